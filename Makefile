# hotstage: `make demo` is the whole job in front of your eyes, `make test` proves it.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# a module that became a package is found only after another installation
PACKAGES := $(shell find flows trainer checkpoint k8s -name __init__.py)
ENGINE_SOURCES := $(shell find trainer/engine -name '*.[ch]' -o -name CMakeLists.txt) CMakeLists.txt

# tests run in so many processes side by side: one more than there are cores, because many wait for what they started;
# PYTEST="--durations=40 …": more of pytest's options ("-p tests.tools.processor_time": what each takes of the processors)
JOBS ?= $(shell cores=$$(nproc); echo $$((cores < 8 ? cores + 1 : 8)))
# the engine that was installed is the one under test; nothing that the tests start outlives them
RUN_TESTS = HOTSTAGE_ENGINE=$$($(BIN)/python -m trainer.engine_path) \
	$(BIN)/python -m tests.support.contained $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(PYTEST)
RUN_CLUSTER = HOTSTAGE_ENGINE=$$($(BIN)/python -m trainer.engine_path) \
	$(BIN)/python -m tests.support.contained $(BIN)/python -m pytest -q

# on a bare machine with a GPU there is no environment, and none can be made: the Python that has PyTorch
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos-checkpoint simulate-faults chaos-flows test-postgres test-browser newcomer images cuda test-gpu bench-gpu gpu-session test-cluster nightly-cluster cluster-up cluster-down check bench bench-peers nightly clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: $(STAMP) ## make the environment .venv and build the C engine into it

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml $(PACKAGES) $(ENGINE_SOURCES) | $(VENV)/bin/python
	@echo "installing hotstage and building its engine into $(VENV) (about a minute the first time)"
	@touch $@.begun # what changes meanwhile is newer
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@mv $@.begun $@

demo: setup ## the main job end to end: prepare, train on two stages, lose a rank, recover, prove, export, report
	$(BIN)/hotstage demo

test: setup ## the tests, at most 10 minutes on 2 cores (the first time some more: it builds what they need)
	$(BIN)/python -m tests.support.parts
	$(RUN_TESTS) -m "not slow and not cluster and not browser"

chaos-checkpoint: setup ## kills at N named points of the checkpoint protocol, in one process, from SEED (1000, 1)
	$(BIN)/python -m tests.support.protocol.chaos --points $(or $(N),1000) --seed $(or $(SEED),1)

simulate-faults: setup ## the driver through HOURS of simulated faults of every class, from SEED (1000, 1)
	$(BIN)/python -m tests.support.simulated.campaign --hours $(or $(HOURS),1000) --seed $(or $(SEED),1)

chaos-flows: setup ## N times SIGKILL or SIGTERM to driver, schedule or Prefect server of real runs, from SEED (100, 1)
	HOTSTAGE_ENGINE=$$($(BIN)/python -m trainer.engine_path) $(BIN)/python -m tests.support.contained \
		$(BIN)/python -m tests.support.chaos_flows --kills $(or $(N),100) --seed $(or $(SEED),1)

test-postgres: setup ## what Prefect shows and starts, with its server on a real PostgreSQL (Debian's package, unpacked into the cache)
	postgres=$$($(BIN)/python -m tests.support.postgres) && HOTSTAGE_TEST_POSTGRES=$$postgres $(RUN_TESTS) \
		tests/flows/recurring tests/flows/cli/test_schedule.py tests/flows/page tests/flows/test_serve.py tests/flows/test_prefect.py

test-browser: setup ## what people read on Prefect's pages and in report.html, in Debian's chromium (KEEP=1: into docs/images)
	$(BIN)/python -m tests.browser
	HOTSTAGE_ENGINE=$$($(BIN)/python -m trainer.engine_path) HOTSTAGE_KEEP_IMAGES=$(KEEP) \
		$(BIN)/python -m pytest -q -m browser $(PYTEST) tests/browser

newcomer: ## `make test` in a bare Debian with only the README's packages (root; SUITE=trixie, COMMAND="make demo")
	$(PYTHON) -m tests.tools.newcomer --suite $(or $(SUITE),bookworm) $(or $(COMMAND),make test)

images: setup ## images of engine, agent, flows into out/images (BASE=IMAGE: what they stand on; BASE=local: the S3 server too)
	$(BIN)/python -m k8s.images.build $(IMAGES) $(if $(BASE),--base $(BASE))

cuda: setup ## the kernels for GPUs into out/cuda, with what each takes (nvcc from pinned wheels; no GPU is needed)
	$(BIN)/python -m k8s.images.cuda

test-gpu: ## tests on this machine's first GPU (docs/gpu-session.md); without one it says so and why
	$(GPU_PYTHON) -m tests.gpu test

bench-gpu: ## figures of this machine's first GPU beside PyTorch and JAX, into out/gpu/bench.json
	$(GPU_PYTHON) -m tests.gpu bench

gpu-session: ## both, at most 9 minutes a call; call again while it says that there is more to do
	$(GPU_PYTHON) -m tests.gpu session

test-cluster: setup ## tests on a real Kubernetes, at most 10 minutes: two nodes on this machine (root; built once), or HOTSTAGE_KUBECONFIG
	$(BIN)/python -m tests.cluster build
	$(BIN)/python -m tests.support.s3_server
	$(RUN_CLUSTER) -n $(JOBS) -m "cluster and not slow" $(PYTEST) tests/cluster

nightly-cluster: setup ## every test on a real Kubernetes, also the slow ones
	$(BIN)/python -m tests.support.s3_server
	$(RUN_CLUSTER) -m cluster $(PYTEST) tests/cluster

cluster-up: setup ## bring that Kubernetes up and leave it there, to look around; prints its kubeconfig's path
	@$(BIN)/python -m tests.cluster up

cluster-down: setup ## take it down again
	@$(BIN)/python -m tests.cluster down

check: setup ## format, lint, types, layering, the kernels' instruction counts, warnings as errors, sanitizers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find trainer/engine tests -name '*.[ch]' -o -name '*.cc' -o -name '*.cu')
	$(BIN)/python -m tests.tools.counts
	$(BIN)/python -m tests.tools.sanitize

bench: setup ## figures into out/bench.json
	$(BIN)/python -m tests.bench

bench-peers: setup ## whole training steps beside PyTorch and JAX on these CPUs, into out/bench.json (CASES="train gemm/bf16", ROUNDS=5)
	$(BIN)/python -m tests.bench.bench_peers $(CASES) --rounds $(or $(ROUNDS),5)

nightly: setup ## the long campaigns: every test, also the slow ones (but nightly-cluster's)
	$(BIN)/python -m tests.support.parts
	$(RUN_TESTS) -m "not cluster and not browser"
	$(MAKE) test-postgres

clean: ## remove what was built and run here (not the caches of the user's folder)
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
