"""Bits do not depend on layout: stages, schedule, threads, instruction set and microbatch order, fp32 and bf16.

Real processes over TCP; every loss, norm and final weight is compared for equality, never for closeness. Fresh starts
from the plan's own initial weights, shuffled data over several passes. What crashes and resumes is compared elsewhere.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import engine_runs
from tests.e2e.engine_runs import Gang
from tests.engine.engine_build import build_engine
from tests.engine.kernel_lib import cpu_has
from tests.support.compilers import OTHER
from tests.support.drawn import as_csv, drawn
from trainer import wire
from trainer.plan.compile import compile_plan
from trainer.plan.places import Pipeline, Position
from trainer.spec import parse_spec, what_digest

VOCAB, SEQUENCE, STEPS = 203, 19, 4

MODELS: dict[str, dict[str, Any]] = {
    "gpt2 tied": {"family": "gpt2", "layers": 4, "width": 36, "heads": 3, "tied": True},
    "llama untied": {
        "family": "llama",
        "layers": 4,
        "width": 48,
        "heads": 6,
        "kv_heads": 2,
        "hidden": 72,
        "tied": False,
    },
    "qwen3 tied": {
        "family": "qwen3",
        "layers": 4,
        "width": 40,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 16,
        "tied": True,
    },
}
CHUNKED = {f"{name}, 7 layers": MODELS[name] | {"layers": 7} for name in ("gpt2 tied", "llama untied")}
"""Enough layers for several stages a position, of different sizes."""


def run(
    folder: Path,
    model: str,
    precision: str,
    *,
    kernel_path: str = "auto",
    pipeline: Pipeline | None = None,
    microbatch: int = 1,
    **parallel: Any,
) -> Gang:
    """Trains a few steps in ``folder``; ``parallel`` is the spec's section."""
    tokens = np.random.default_rng(7).integers(0, VOCAB, (5, SEQUENCE * 3 + 1))  # 15 samples: 24 are 1.6 passes
    sizes = (MODELS | CHUNKED)[model] | {"vocab": VOCAB, "context": 32}
    tree = engine_runs.bits_tree("bits", sizes, precision, STEPS, SEQUENCE, parallel)
    tree["train"]["microbatch"] = microbatch
    spec = parse_spec(tree)
    dataset = engine_runs.write_samples(folder / "data", tokens, VOCAB)
    plan = compile_plan(spec.resolve(dataset), dataset, what_digest(spec, dataset), pipeline=pipeline)
    return engine_runs.train(plan, folder / "data", folder / "run", kernel_path=kernel_path)


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plain run that all others must equal: one stage, one thread."""

    @cache
    def of(model: str, precision: str) -> Gang:
        return run(tmp_path_factory.mktemp("one"), model, precision, stages=1, threads=1)

    return of


def assert_same(ours: Gang, theirs: Gang) -> None:
    assert len(ours.steps) == STEPS
    for key in ("loss", "grad_norm", "lr"):
        assert [event[key] for event in ours.steps] == [event[key] for event in theirs.steps]
    for step in range(1, STEPS + 1):
        for what in ("grads", "weights"):
            mine, other = getattr(ours, what)(step), getattr(theirs, what)(step)
            for name, value in other.items():
                np.testing.assert_array_equal(mine[name], value, f"step {step}, {what}: {name}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("stages", "schedule", "threads"),
    [(2, "gpipe", 2), (2, "1f1b", 4), (3, "1f1b", 1), (4, "gpipe", 1), (4, "1f1b", 2)],
)
def test_stages_schedules_threads(
    one_stage: Any, tmp_path: Path, model: str, precision: str, stages: int, schedule: str, threads: int
) -> None:
    ours = run(tmp_path, model, precision, stages=stages, schedule=schedule, threads=threads)
    assert len(ours.plan.positions) == stages
    assert_same(ours, one_stage(model, precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_threads_on_one_stage(one_stage: Any, tmp_path: Path, model: str, precision: str) -> None:
    for threads in (2, 4):
        assert_same(run(tmp_path / str(threads), model, precision, threads=threads), one_stage(model, precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_one_microbatch(tmp_path: Path, precision: str) -> None:
    """On one stage a tied embedding then has one gradient, on two two, in memory of their own."""
    one, two = (run(tmp_path / str(n), "gpt2 tied", precision, microbatch=6, stages=n) for n in (1, 2))
    kernels = [{c.kernel for p in g.plan.positions for x in p.programs.values() for c in x.calls} for g in (one, two)]
    assert ["embed_wgrad_tied" in names for names in kernels] == [True, False]
    assert_same(one, two)


@pytest.mark.parametrize(("model", "precision"), [("gpt2 tied", "bf16"), ("llama untied", "fp32")])
def test_stages_at_other_positions(one_stage: Any, tmp_path: Path, model: str, precision: str) -> None:
    """A stage's number is not its position's: rank 0 runs stage 1, the embedding is on rank 2, the head on rank 1."""
    pipeline = Pipeline(tuple(map(Position, (2, 0, 3, 1))), 4)
    ours = run(tmp_path, model, precision, pipeline=pipeline, stages=4)
    assert [p.chunks for p in ours.plan.positions] == [(1,), (3,), (0,), (2,)]
    assert_same(ours, one_stage(model, precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", CHUNKED)
@pytest.mark.parametrize(
    ("pipeline", "schedule"),
    [
        (Pipeline.in_turn(4, 2), "interleaved-1f1b"),
        (Pipeline.in_turn(6, 2), "interleaved-1f1b"),
        (Pipeline.in_turn(6, 3), "interleaved-1f1b"),
        (Pipeline.in_turn(5, 2), "gpipe"),
        (Pipeline.there_and_back(4, 2), "gpipe"),
        (Pipeline.there_and_back(6, 2), "gpipe"),
        (Pipeline.in_turn(3, 1), "interleaved-1f1b"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.stages} at {value.positions}",
)
def test_several_stages_a_position(
    one_stage: Any, tmp_path: Path, model: str, precision: str, pipeline: Pipeline, schedule: str
) -> None:
    """In turn and there and back, as many a position and not; with stages that follow one another at one position."""
    chunks = max(map(len, pipeline.chunks))
    how = {"stages": pipeline.stages, "chunks": chunks, "schedule": schedule}
    ours = run(tmp_path, model, precision, pipeline=pipeline, **how)
    assert [p.chunks for p in ours.plan.positions] == list(pipeline.chunks)
    assert_same(ours, one_stage(model, precision))


@pytest.mark.parametrize(("model", "precision"), [("gpt2 tied, 7 layers", "bf16"), ("llama untied, 7 layers", "fp32")])
@pytest.mark.parametrize(
    ("schedule", "stages", "chunks"), [("zb-h1", 3, 1), ("zb-v", 6, 2), ("zb-v", 2, 2), ("v-half", 4, 2)]
)
def test_backwards_in_two_parts(
    one_stage: Any, tmp_path: Path, model: str, precision: str, schedule: str, stages: int, chunks: int
) -> None:
    ours = run(tmp_path, model, precision, schedule=schedule, stages=stages, chunks=chunks)
    assert len(ours.plan.positions) == stages // chunks
    assert_same(ours, one_stage(model, precision))


@pytest.mark.parametrize(
    ("of_stage", "seed", "split"),
    [
        ((0, 1, 1, 0, 0), 1, 0.0),
        ((1, 0, 1, 0, 1, 0), 2, 0.0),
        ((0, 0, 1, 2, 2, 1, 0), 3, 0.0),
        ((0, 1, 2, 1, 2), 7, 0.0),
        ((0, 1, 2, 3), 4, 1.0),
        ((0, 1, 1, 0), 5, 1.0),
        ((0, 0, 1, 2, 2, 1, 0), 6, 0.5),
        ((0,), 8, 0.5),
    ],
)
@pytest.mark.parametrize(("model", "precision"), [("gpt2 tied, 7 layers", "bf16"), ("llama untied, 7 layers", "fp32")])
def test_schedules_of_a_file(
    one_stage: Any, tmp_path: Path, model: str, precision: str, of_stage: tuple[int, ...], seed: int, split: float
) -> None:
    """Any order that a file may say, stages anywhere, backwards whole or in two parts."""
    path = tmp_path / "schedule.csv"
    path.write_text(as_csv(drawn(of_stage, seed, split)))
    stages, chunks = len(of_stage), max(of_stage.count(position) for position in of_stage)
    ours = run(tmp_path, model, precision, stages=stages, chunks=chunks, schedule=f"file:{path}")
    assert [p.chunks for p in ours.plan.positions] == list(Pipeline(of_stage, 1 + max(of_stage)).chunks)
    assert_same(ours, one_stage(model, precision))


@pytest.mark.parametrize("name", ["zbv-2x2x6", "interleavedzerobubble-2x2x6.comms"])
def test_schedules_that_pytorch_wrote(one_stage: Any, tmp_path: Path, name: str) -> None:
    path = Path(__file__).parents[1] / "golden" / "schedules" / f"{name}.csv"
    ours = run(tmp_path, "llama untied, 7 layers", "fp32", stages=4, chunks=2, schedule=f"file:{path}")
    assert_same(ours, one_stage("llama untied, 7 layers", "fp32"))


@pytest.mark.parametrize(
    ("of_stage", "split", "recompute"),
    [
        ((0,), 0.0, "layer"),
        ((0, 1, 2), 0.0, {"kind": "layer", "layers": [2, 1, 0]}),
        ((0, 1, 1, 0), 0.0, "attention"),
        ((0, 1, 1, 0), 1.0, {"kind": "layer", "layers": [1, 1, 1, 0]}),
        ((0, 1), 0.5, {"kind": "elementwise", "layers": 2}),
    ],
)
@pytest.mark.parametrize(("model", "precision"), [("gpt2 tied, 7 layers", "bf16"), ("llama untied, 7 layers", "fp32")])
def test_layers_computed_again(
    one_stage: Any, tmp_path: Path, model: str, precision: str, of_stage: tuple[int, ...], split: float, recompute: Any
) -> None:
    path = tmp_path / "schedule.csv"
    path.write_text(as_csv(drawn(of_stage, 9, split)))
    stages, chunks = len(of_stage), max(of_stage.count(position) for position in of_stage)
    ours = run(tmp_path, model, precision, stages=stages, chunks=chunks, schedule=f"file:{path}", recompute=recompute)
    again = [call for p in ours.plan.positions for g in p.programs.values() for call in g.calls if call.part == "R"]
    assert again
    assert_same(ours, one_stage(model, precision))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "v-half"])
def test_layers_computed_again_under_each_schedule(one_stage: Any, tmp_path: Path, schedule: str) -> None:
    layout = {"stages": 4, "chunks": 1 if schedule in ("1f1b", "zb-h1") else 2, "schedule": schedule}
    recompute = {"kind": "layer", "layers": [1, 1, 1, 0]}
    ours = run(tmp_path, "gpt2 tied, 7 layers", "bf16", **layout, recompute=recompute)
    assert_same(ours, one_stage("gpt2 tied, 7 layers", "bf16"))


@pytest.mark.parametrize("optimizer", ["checked", "optimistic"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_layers_computed_again_by_replicas(one_stage: Any, tmp_path: Path, schedule: str, optimizer: str) -> None:
    """The last backward of a step is cut by layer for its exchanges, and what a layer computes again goes with it."""
    layout = {"stages": 3, "replicas": 2, "schedule": schedule, "optimizer": optimizer}
    ours = run(tmp_path, "gpt2 tied, 7 layers", "bf16", **layout, recompute={"kind": "layer", "layers": [2, 1, 1]})
    assert_same(ours, one_stage("gpt2 tied, 7 layers", "bf16"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel_path", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(one_stage: Any, tmp_path: Path, precision: str, kernel_path: str) -> None:
    """One order of sums on all four: portable, AVX2, AVX-512 and AVX-512 with BF16 give the same bits."""
    if not cpu_has(kernel_path):
        pytest.skip(f"this CPU lacks {kernel_path}")
    for model in MODELS:
        ours = run(tmp_path / model.split()[0], model, precision, kernel_path=kernel_path, stages=2)
        assert_same(ours, one_stage(model, precision))


def test_compilers(one_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine as clang builds it, against the engine under test, which the installation built (by gcc, mostly)."""
    plain = {(model, precision): one_stage(model, precision) for model in MODELS for precision in ("fp32", "bf16")}
    monkeypatch.setenv("HOTSTAGE_ENGINE", str(build_engine(OTHER)))
    for (model, precision), theirs in plain.items():
        assert_same(run(tmp_path / f"{model}-{precision}", model, precision, stages=2), theirs)


def test_the_rate_follows_the_schedule_and_the_loss_falls(one_stage: Any) -> None:
    gang = one_stage("llama untied", "fp32")
    assert gang.steps[0]["lr"] == pytest.approx(1.5e-3)
    assert gang.steps[1]["lr"] == pytest.approx(3e-3)
    assert gang.losses[-1] < gang.losses[0]
    assert gang.losses[0] == pytest.approx(np.log(VOCAB), rel=0.02)
    assert gang.plan.config.dtype == wire.F32


@pytest.mark.parametrize("model", MODELS)
def test_bf16_stays_near_fp32(one_stage: Any, model: str) -> None:
    """Not equal, of course; but the same training, and not the same bits by accident."""
    low, full = one_stage(model, "bf16"), one_stage(model, "fp32")
    assert low.losses != full.losses
    np.testing.assert_allclose(low.losses, full.losses, rtol=5e-3)
    np.testing.assert_allclose(low.norms, full.norms, rtol=5e-2)
