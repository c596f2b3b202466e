"""An optimistic step (``trainer/plan/optimistic.py``) has a checked one's bits: losses, norms, gradients, weights.

Whatever the decision is that comes behind the next step's prefix: nothing clipped, everything, or now and then, so that
prefixes run once, twice, or both. What crashes and resumes meanwhile is at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.agent.slots import Slot
from tests.e2e import engine_runs
from tests.e2e.engine_runs import Gang
from tests.e2e.test_equal_bits import CHUNKED, SEQUENCE, VOCAB
from tests.support import slot_gang
from tests.support.chaos import Fault, unleashed
from tests.support.place import SPEC, Place, finish
from tests.support.place import STEPS as SHORT
from tests.support.undisturbed import undisturbed_run
from trainer.plan import Plan, compile_plan
from trainer.plan.places import Pipeline, Position
from trainer.spec import parse_spec, what_digest

STEPS = 6
GPT2, LLAMA = "gpt2 tied, 7 layers", "llama untied, 7 layers"
CLIPS = {
    GPT2: {"always": 1e-3, "never": 0.0, "at times": 1.2},
    LLAMA: {"always": 1e-3, "never": 0.0, "at times": 1.6},
}
"""By how often, the limit of the norm: that of the first steps is 1.1 to 2.1."""


def tree_of(model: str, precision: str, clip: float, parallel: dict[str, Any]) -> dict[str, Any]:
    """A spec's values."""
    sizes = CHUNKED[model] | {"vocab": VOCAB, "context": 32}
    tree = engine_runs.bits_tree("bits", sizes, precision, STEPS, SEQUENCE, {"threads": 1, **parallel})
    tree["train"]["optimizer"]["clip"] = clip
    return tree


def compiled(tree: dict[str, Any], data: Path, pipeline: Pipeline | None = None) -> Plan:
    """Its plan; its samples are written to ``data``."""
    tokens = np.random.default_rng(7).integers(0, VOCAB, (5, SEQUENCE * 3 + 1))
    dataset, spec = engine_runs.write_samples(data, tokens, VOCAB), parse_spec(tree)
    plan = compile_plan(spec.resolve(dataset), dataset, what_digest(spec, dataset), pipeline=pipeline)
    assert {p.step_checks > 0 for p in plan.positions} == {tree["parallel"].get("optimizer") == "optimistic"}
    return plan


def run(
    folder: Path, model: str, precision: str, clip: float, pipeline: Pipeline | None = None, **parallel: Any
) -> Gang:
    """Trains in ``folder``; ``parallel`` is the spec's section."""
    plan = compiled(tree_of(model, precision, clip, parallel), folder / "data", pipeline)
    return engine_runs.train(plan, folder / "data", folder / "run")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of one stage, whose steps are checked."""

    @cache
    def of(*case: Any) -> Gang:
        return run(tmp_path_factory.mktemp("checked"), *case)

    return of


def assert_same(ours: Gang, theirs: Gang) -> None:
    assert [s["step"] for s in ours.steps] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "lr"):
        assert [step[key] for step in ours.steps] == [step[key] for step in theirs.steps], key
    for step in range(1, STEPS + 1):
        for what in ("grads", "weights"):
            mine, other = getattr(ours, what)(step), getattr(theirs, what)(step)
            for name, value in other.items():
                np.testing.assert_array_equal(mine[name], value, f"step {step}, {what}: {name}")


@pytest.mark.parametrize("clip", CLIPS[GPT2])
@pytest.mark.parametrize(("model", "precision"), [(GPT2, "bf16"), (LLAMA, "fp32")])
@pytest.mark.parametrize(
    ("pipeline", "schedule"),
    [
        (Pipeline.in_turn(3, 3), "1f1b"),
        (Pipeline.there_and_back(4, 2), "zb-v"),
        (Pipeline.in_turn(4, 2), "interleaved-1f1b"),
    ],
    ids=["1f1b", "zb-v", "interleaved"],
)
def test_equal_bits(
    checked: Any, tmp_path: Path, model: str, precision: str, clip: str, pipeline: Pipeline, schedule: str
) -> None:
    """Clipped in every step, in none, in some."""
    limit = CLIPS[model][clip]
    theirs = checked(model, precision, limit)
    clipped = [0 < limit < norm for norm in theirs.norms]
    assert (any(clipped), all(clipped)) == {"always": (True, True), "never": (False, False)}.get(clip, (True, False))
    chunks = pipeline.stages // pipeline.positions
    parallel = {"stages": pipeline.stages, "chunks": chunks, "schedule": schedule, "optimizer": "optimistic"}
    assert_same(run(tmp_path, model, precision, limit, pipeline, **parallel), theirs)


ODD: dict[str, tuple[Pipeline | None, dict[str, Any]]] = {
    "one position": (None, {"stages": 1}),
    "stages elsewhere": (Pipeline(tuple(map(Position, (2, 0, 3, 1))), 4), {"stages": 4, "schedule": "gpipe"}),
    "computed again": (None, {"stages": 3, "recompute": {"kind": "layer"}}),
}
"""Nobody to report to; position 0 has neither end of the model; forwards in the backward, on the same weights."""


@pytest.mark.parametrize("odd", ODD)
def test_equal_bits_of_odd_layouts(checked: Any, tmp_path: Path, odd: str) -> None:
    pipeline, parallel = ODD[odd]
    limit = CLIPS[GPT2]["at times"]
    ours = run(tmp_path, GPT2, "bf16", limit, pipeline, optimizer="optimistic", **parallel)
    assert_same(ours, checked(GPT2, "bf16", limit))


def holding(held: Sequence[bytes], step: int) -> slot_gang.Fill:
    """Fills every rank's slot with what it held."""

    def fill(slots: Mapping[int, Slot]) -> None:
        with ThreadPoolExecutor(1) as pool:
            for rank, slot in slots.items():
                with slot.begin_fill() as view:
                    view[:] = held[rank]
                slot.finish_fill(step, slot_gang.EPOCH, pool)

    return fill


@pytest.mark.parametrize("clip", CLIPS[GPT2])
def test_snapshots_are_a_checked_step_s(tmp_path: Path, clip: str) -> None:
    """What every rank's slots hold after the steps that are saved, and after a start from the middle; the next step's
    prefix has run on other weights meanwhile."""
    data, plans = tmp_path / "data", {}
    for optimizer in ("checked", "optimistic"):
        tree = tree_of(GPT2, "bf16", CLIPS[GPT2][clip], {"stages": 2, "optimizer": optimizer})
        plans[optimizer] = compiled(tree | {"checkpoint": {"every": 2, "slots": 4}}, data)
    kept = {name: slot_gang.train(plan, data, tmp_path / name) for name, plan in plans.items()}
    assert sorted(kept["checked"]) == [2, 4, 6]
    assert kept["optimistic"] == kept["checked"]
    fill = holding(kept["checked"][2], 2)
    again = slot_gang.train(plans["optimistic"], data, tmp_path / "again", step=2, fill=fill)
    assert again == {step: held for step, held in kept["checked"].items() if step > 2}


CLIPPED = SPEC.replace(f"steps = {SHORT}", "steps = 120").replace(
    "seed = 3\n", "seed = 3\n[train.optimizer]\nclip = 0.05\n"
)
"""Every step is clipped: every prefix runs twice."""


def test_kills_in_a_prefix_and_in_one_that_runs_again(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A whole run by the real command, on two ranks; its state is that of one stage and checked steps."""
    _, run, digest = undisturbed_run(tmp_path_factory, CLIPPED)
    place = Place(tmp_path / "p", CLIPPED)
    out = place.folder / "out"
    try:
        process = place.start_train("parallel.schedule='gpipe'", "parallel.optimizer='optimistic'")
        for fault in (Fault("again", 0, 6), Fault("forward", 1, 10)):  # one at a time: a watcher takes a core
            with unleashed(fault, place.run_folder(run), out) as watcher:
                assert watcher.wait(60) == 0, fault
        result = finish(process).json()
        assert (result["run"], result["outcome"], result["attempts"]) == (run, "succeeded", 3)
        assert result["state_digest"] == digest
    finally:
        place.stop_all()
