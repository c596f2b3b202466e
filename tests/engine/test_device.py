"""The CUDA backend in an ordinary engine, on an emulated CUDA (``trainer/engine/kernels/cuda/emulate_runtime.h``) whose
memory is not the host's and whose work is queued: the same bits as the CPU, in every order that the events allow; and
each event and each wait that is left out shows. Where a test is about order, the CPU's kernels stand in for CUDA's.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import engine_runs
from tests.engine import cuda_lib
from tests.engine.agent_end import agent_at
from tests.engine.engine_build import engine
from tests.engine.plans import GPT2, LLAMA, SEQUENCE, VOCAB, small_plan
from tests.engine.test_agent_link import slots
from trainer import wire
from trainer.plan.compiled import Plan

__all__ = ["engine"]

COMPUTE, IN, OUT, SAVE, *WINDOWS = range(6)  # streams, and the events that say where they are (run/hazards.h)
STREAMS, EVENTS = 4, 64
ORDERS = (0, 3, 7, 9, 13, 15)  # of 24, of four streams: all six of the first three; numbers from 24 on are seeds
STEADY: dict[str, Any] = {"schedule": {"kind": "constant"}, "steps": 1}  # the last step too changes every weight


@pytest.fixture(scope="session")
def library() -> Path:
    return cuda_lib.build()


@pytest.fixture(autouse=True)
def emulated(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTSTAGE_CUDA", str(library))
    monkeypatch.setenv("HS_EMULATED_KERNELS", "cpu")
    monkeypatch.setenv("HS_EMULATED_COUNTS", "1")
    monkeypatch.setenv("HOTSTAGE_ENGINE_CHANNELS", "tcp")  # through the host; test_links.py has the others


class Runs:
    """Runs of one plan in a folder."""

    def __init__(self, engine: Path, folder: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.folder, self.plan, self.patch, self.count = engine, folder, plan, monkeypatch, 0

    def state(self, device: str, path: str = "auto", **emulated: str) -> dict[str, Any]:
        """Losses, norms, gradients and weights of every step, as they were told and dumped."""
        self.count += 1
        folder = self.folder / f"run-{len(self.plan.ranks)}-{self.count}"
        with self.patch.context() as patch:
            for name, value in emulated.items():
                patch.setenv(f"HS_EMULATED_{name}", value)
            gang = engine_runs.train(
                self.plan, self.folder / "data", folder, engine=self.engine, device=device, kernel_path=path
            )
        state = engine_runs.dumped(gang, folder)
        assert len(state) == 2 + 2 * len(gang.steps) * len(self.plan.ranks)
        return state

    def counts(self, what: str) -> list[int]:
        """Of the last run: the most that a rank had, by stream and event, or by event."""
        folder = self.folder / f"run-{len(self.plan.ranks)}-{self.count}"
        ranks = [(folder / f"stderr-{r}").read_text().splitlines()[-1] for r in range(len(self.plan.ranks))]
        return [int(n) for n in np.max([np.atleast_1d(json.loads(line)["emulated"][what]) for line in ranks], axis=0)]

    def count_of(self, what: str) -> int:
        """Of the last run, of all ranks: of something that is counted as one number."""
        folder = self.folder / f"run-{len(self.plan.ranks)}-{self.count}"
        last = [(folder / f"stderr-{r}").read_text().splitlines()[-1] for r in range(len(self.plan.ranks))]
        return sum(int(json.loads(line)["emulated"][what]) for line in last)

    def shows(self, sound: dict[str, Any], **emulated: str) -> bool:
        """Whether a fault does."""
        return engine_runs.shows(lambda: self.state("cuda", **emulated), sound)


MakeRuns = Callable[..., Runs]


@pytest.fixture
def runs(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRuns:
    def make(**plan: Any) -> Runs:
        return Runs(engine, tmp_path, small_plan(tmp_path, **plan), monkeypatch)

    return make


CHUNKS = {"stages": 4, "chunks": 2, "schedule": "interleaved-1f1b"}
SPLIT = CHUNKS | {"schedule": f"file:{Path(__file__).parents[1] / 'golden' / 'schedules' / 'zbv-2x2x4.csv'}"}
"""As PyTorch's pipelining wrote it."""


AHEAD = {"stages": 2, "schedule": "gpipe", "optimizer": "optimistic"}


@pytest.mark.parametrize(
    "parallel", [{"stages": 1}, {"stages": 2}, CHUNKS, SPLIT, AHEAD], ids=["1", "2", "2x2", "split", "optimistic"]
)
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_same_bits_in_any_order(runs: MakeRuns, model: dict[str, Any], parallel: dict[str, Any]) -> None:
    some = runs(model=model | {"layers": 4}, parallel=parallel, batch=8, steps=3)
    sound = some.state("cpu")
    for order in [*ORDERS, 31, 32, 33]:
        assert some.state("cuda", ORDER=str(order)) == sound, order


@pytest.mark.parametrize("parallel", [{"stages": 1}, AHEAD], ids=["checked", "optimistic"])
def test_muon_has_the_same_bits_in_any_order(runs: MakeRuns, parallel: dict[str, Any]) -> None:
    """Its products share the scratch of the programs; clipped in each step, and masked."""
    some = runs(model=LLAMA | {"layers": 2}, parallel=parallel, optimizer={"name": "muon", "clip": 0.1}, masked=True)
    sound = some.state("cpu")
    for order in (0, 15, 31):
        assert some.state("cuda", ORDER=str(order)) == sound, order


@pytest.mark.parametrize(
    ("replicas", "stages", "vocab", "orders"),
    [(2, 2, VOCAB, [0, 7, 15, 31]), (2, 2, 16_400, [3, 31]), (4, 1, 16_400, [7])],
    ids=["whole", "tied pieces", "pieces"],
)
def test_replicas_have_the_same_bits_in_any_order(
    runs: MakeRuns, replicas: int, stages: int, vocab: int, orders: list[int]
) -> None:
    """Their messages pass through the host, in both windows at once. 16,400 x 16 are two blocks: in pieces. Some have
    more tokens that count than others.
    """
    train: dict[str, Any] = {"batch": 8, "microbatch": 1, "reduction_groups": 4, "steps": 2, "vocab": vocab}
    train["masked"] = True
    some = runs(stages=stages, parallel={"replicas": replicas}, **train)
    sound = some.state("cpu")
    alone = runs(**train).state("cpu")
    assert (sound["losses"], sound["norms"]) == (alone["losses"], alone["norms"])
    for order in orders:
        assert some.state("cuda", ORDER=str(order)) == sound, order


def test_ranks_that_share_the_head_have_the_same_bits_in_any_order(runs: MakeRuns) -> None:
    """Parts at both positions; and the head of one. Of masked data."""
    shared = {"stages": 2, "vocab_stages": 2}
    some = runs(model=GPT2 | {"layers": 2}, parallel=shared, batch=8, steps=2, vocab_blocks=2, masked=True)
    sound = some.state("cpu")
    alone = runs(model=GPT2 | {"layers": 2}, batch=8, steps=2, vocab_blocks=2, masked=True).state("cpu")
    assert (sound["losses"], sound["norms"]) == (alone["losses"], alone["norms"])
    for order in (0, 7, 15, 31):
        assert some.state("cuda", ORDER=str(order)) == sound, order


def test_a_device_does_not_sleep(runs: MakeRuns) -> None:
    """Kernel delay is for CPUs: there it changes no bits."""
    slow, plain = runs(stages=2, delays={"F": 1e-4, "B": 2e-4}, steps=2), runs(stages=2, steps=2)
    assert slow.state("cpu") == plain.state("cpu")
    with pytest.raises(
        AssertionError, match=r"(?s)exit 78\n.*kernel delay sleeps, which a device cannot; run the plan on"
    ):
        slow.state("cuda")


@pytest.mark.parametrize(
    ("precision", "path", "model"),
    [
        ("fp32", "cuda-exact", GPT2),
        ("bf16", "cuda-exact", LLAMA),
        ("fp32", "cuda", LLAMA),
        ("bf16", "cuda", GPT2),
        ("fp8", "cuda", GPT2),
    ],
    ids=["fp32-exact-gpt2", "bf16-exact-llama", "fp32-llama", "bf16-gpt2", "fp8-gpt2"],
)
def test_cuda_kernels_train(runs: MakeRuns, precision: str, path: str, model: dict[str, Any]) -> None:
    """The same bits over stages and orders."""
    one, two = (runs(model=model, stages=stages, precision=precision, steps=2) for stages in (1, 2))
    sound = one.state("cuda", path, KERNELS="cuda")
    assert one.state("cuda", path, KERNELS="cuda", ORDER="31") == sound
    split = two.state("cuda", path, KERNELS="cuda", ORDER="32")
    assert (split["losses"], split["norms"]) == (sound["losses"], sound["norms"])
    assert sound["losses"] == pytest.approx(one.state("cpu")["losses"], rel=1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize("apart", [False, True], ids=["across", "documents and a window"])
def test_attention_on_tensor_cores_trains(runs: MakeRuns, apart: bool) -> None:
    """Path cuda in bf16, heads of 32, a key head shared by two: the same bits over stages and orders."""
    model = LLAMA | {"width": 64, "hidden": 64} | ({"family": "mistral", "window": 3} if apart else {})
    packing: dict[str, Any] = {"data": {"packing": "within"}, "eot": 2} if apart else {}
    one, two = (runs(model=model, stages=stages, steps=2, precision="bf16", **packing) for stages in (1, 2))
    sound = one.state("cuda", "cuda", KERNELS="cuda")
    split = two.state("cuda", "cuda", KERNELS="cuda", ORDER="33")
    assert (split["losses"], split["norms"]) == (sound["losses"], sound["norms"])
    exact = one.state("cuda", "cuda-exact", KERNELS="cuda")
    assert sound["losses"] != exact["losses"]
    assert sound["losses"] == pytest.approx(exact["losses"], rel=1e-3)


@pytest.mark.parametrize("stages", [1, 2])
def test_each_wait_that_is_left_out_shows(runs: MakeRuns, stages: int) -> None:
    """But those for a window that is free already: of four messages in a row, the second two go through the windows of
    the first two.
    """
    some = runs(parallel={"stages": stages, "schedule": "gpipe"}, batch=8, **STEADY)
    sound = some.state("cuda")
    waits = some.counts("waits")
    assert [e for e in range(EVENTS) if waits[e]] == ([OUT] if stages == 1 else [OUT, *WINDOWS])
    for event in np.flatnonzero(waits).tolist():
        shown = (some.shows(sound, HASTE=f"{event} {n}") for n in range(1, waits[event] + 1))
        assert all(shown) if event == OUT else any(shown), event


def continued(
    engine: Path, device: str, folder: Path, plan: Plan, fds: tuple[int, ...], start: int, stop: int
) -> dict[str, bytes]:
    """An attempt with an agent: from the slot 0 (after step ``start``; -1: fresh) to step ``stop``. What it dumped, and
    the data of the slots.
    """
    folder.mkdir()
    (folder / "plan").write_bytes(plan.to_bytes())
    data = engine_runs.attempt_bytes(plan, [0], folder.parent / "data", folder, device=device)
    head, rest = wire.Attempt.from_buffer_copy(data), data[ctypes.sizeof(wire.Attempt) :]
    head.start_step, head.stop_after = start, stop
    head.crc = engine_runs._crc32c(bytes(head)[wire.Attempt.run.offset :] + rest)
    (folder / "attempt").write_bytes(bytes(head) + rest)
    socket = folder / "agent"
    command = [str(engine), "rank", "--plan", f"{folder}/plan", "--attempt", f"{folder}/attempt", "--rank", "0"]
    command += ["--agent", str(socket), "--dump", str(folder)]
    with agent_at(socket) as agent, subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as rank:
        try:
            agent.hears("HELLO", 0)
            agent.tell("SLOTS", 0, a=len(fds), b=0 if start >= 0 else -1, fds=fds, epoch=1)
            agent.hears("READY", 0)
            agent.tell("COMMITTED", 0, a=stop)
            assert rank.communicate(timeout=60)[1] is not None
            assert rank.returncode == 0
        finally:
            rank.kill()
    slot = agent.of("READY")[-1].a
    header = wire.SlotHeader.from_buffer_copy(os.pread(fds[slot], ctypes.sizeof(wire.SlotHeader), 0))
    assert (header.state, header.step) == (wire.SLOT_READY, stop)
    dumped = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".grads", ".weights")}
    return dumped | {"slot": os.pread(fds[slot], header.data_bytes, header.data_offset)}


def test_a_slot_is_filled_and_restored_across(engine: Path, tmp_path: Path) -> None:
    """Each goes on from what the other saved, to the same bits."""
    plan = small_plan(tmp_path, steps=4, schedule={"kind": "constant"})
    found = []
    for number, (first, then) in enumerate([("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cpu")]):
        with slots(2) as fds:
            before = continued(engine, first, tmp_path / f"{number}a", plan, fds, -1, 2)
            found.append((before, continued(engine, then, tmp_path / f"{number}b", plan, fds, 2, 4)))
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert found[0][0]["slot"] != found[0][1]["slot"]


def test_a_host_that_reads_device_memory_dies(library: Path) -> None:
    """So an engine that trained without dying touched none of it."""
    code = (
        "import ctypes, sys; c = ctypes.CDLL(sys.argv[1]); c.hs_test_memory.restype = ctypes.c_void_p; "
        "print(ctypes.string_at(c.hs_test_memory(0), 1)); ctypes.string_at(c.hs_test_memory(1), 1)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, check=False)
    assert died.returncode == -11, died.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (214, 88, "(cudaErrorECCUncorrectable)"),
        (700, 70, "an illegal memory access was encountered (cudaErrorIllegalAddress)"),
    ],
)
def test_a_failed_device_says_so_at_a_wait(runs: MakeRuns, error: int, code: int, words: str) -> None:
    """A device's own failure takes its machine out of later launches (88); a kernel's fault does not (70)."""
    with pytest.raises(AssertionError) as ended:
        runs().state("cuda", FAIL=f"40 {error}")
    assert f"rank 0: exit {code}" in str(ended.value)
    assert words in str(ended.value)


@pytest.mark.parametrize("mode", ["infer", "losses"])
def test_inference(engine: Path, tmp_path: Path, mode: str) -> None:
    plan = small_plan(mode=mode)
    rng = np.random.default_rng(3)
    values = {t.name: rng.normal(0, 0.3, t.shape).astype(np.float32) for t in plan.tensors}
    weights = engine_runs.weights_file(plan, values, tmp_path / "weights")
    tokens = rng.integers(0, VOCAB, (3, 4, SEQUENCE))
    targets = rng.integers(-1, VOCAB, tokens.shape) if mode == "losses" else None
    here, there = (engine_runs.infer(plan, weights, tokens, tmp_path, engine, one, targets) for one in ("cpu", "cuda"))
    assert here.tobytes() == there.tobytes()
