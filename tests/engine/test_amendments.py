"""Amendments in the engine: batches that are passed over, a lower rate, another end; the same bits in every layout."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.amendments import NONE, Amendments
from tests.e2e import engine_runs
from tests.e2e.engine_runs import Gang
from tests.engine.engine_build import engine
from tests.engine.native import build_program
from tests.engine.plans import SEQUENCE, VOCAB, small_plan
from tests.engine.test_rank import Gang as Processes
from tests.engine.test_rank import gang

__all__ = ["engine", "gang"]  # fixtures

STEPS, BATCH = 6, 4
TOKENS = np.random.default_rng(5).integers(0, VOCAB, ((STEPS + 3) * BATCH, SEQUENCE + 1))
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"kind": "constant", "warmup": 2},
    "cosine": {"kind": "cosine"},
    "wsd": {"kind": "wsd", "warmup": 1, "decay": 3},
}
AMENDED = Amendments(steps=7, skip=((2, 2), (5, 6)), rate=((3, 0.5), (6, 0.125)))


def trained(
    folder: Path, amended: Amendments = NONE, tokens: Any = TOKENS, schedule: str = "constant", **parallel: Any
) -> Gang:
    dataset = engine_runs.write_samples(folder / "data", tokens, VOCAB)
    plan = small_plan(
        dataset=dataset,
        data={"shuffled": False},
        steps=STEPS,
        batch=BATCH,
        reduction_groups=2,
        optimizer={"lr": 1e-2, "min_lr": 1e-4, "clip": 1.0},
        schedule=SCHEDULES[schedule],
        parallel={"stages": 1, **parallel},
    )
    return engine_runs.train(plan, folder / "data", folder / "run", amended=amended)


def assert_same(ours: Gang, theirs: Gang, steps: range) -> None:
    """Bit for bit, of these steps."""
    mine, others = ({s["step"]: (s["loss"], s["grad_norm"], s["lr"]) for s in gang.steps} for gang in (ours, theirs))
    assert {s: mine[s] for s in steps} == {s: others[s] for s in steps}
    for step in steps:
        weights = theirs.weights(step)
        for name, value in ours.weights(step).items():
            np.testing.assert_array_equal(value, weights[name], f"step {step}: {name}")


def test_what_is_skipped_might_as_well_not_be_there(tmp_path: Path) -> None:
    """A run that skips batches has the bits of one whose data do not hold them."""
    batches = TOKENS.reshape(-1, BATCH, SEQUENCE + 1)
    kept = np.delete(batches, [1, 4, 5], 0).reshape(-1, SEQUENCE + 1)
    ours = trained(tmp_path / "ours", Amendments(skip=((2, 2), (5, 6))))
    assert_same(ours, trained(tmp_path / "theirs", tokens=kept), range(1, STEPS + 1))
    assert [s.get("batch", s["step"]) for s in ours.steps] == [1, 3, 4, 7, 8, 9]


@pytest.mark.parametrize("parallel", [
    {"stages": 2}, {"stages": 2, "optimizer": "optimistic"}, {"replicas": 2}, {"stages": 2, "replicas": 2},
])  # fmt: skip
def test_amended_steps_have_the_same_bits_in_every_layout(tmp_path: Path, parallel: dict[str, Any]) -> None:
    one = trained(tmp_path / "one", AMENDED, schedule="wsd")
    assert [s["step"] for s in one.steps] == list(range(1, 8))
    assert_same(trained(tmp_path / "more", AMENDED, schedule="wsd", **parallel), one, range(1, 8))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_is_the_schedules_times_a_factor_from_a_step_on(tmp_path: Path, schedule: str) -> None:
    plain = trained(tmp_path / "plain", schedule=schedule)
    lower = trained(tmp_path / "lower", Amendments(rate=((3, 0.5), (5, 0.3))), schedule=schedule)
    assert_same(lower, plain, range(1, 3))
    rates = [s["lr"] for s in plain.steps]
    assert [s["lr"] for s in lower.steps] == [*rates[:2], *(r * 0.5 for r in rates[2:4]), *(r * 0.3 for r in rates[4:])]
    assert lower.losses[3] != plain.losses[3]


def test_more_steps_leave_the_curve_where_it_was(tmp_path: Path) -> None:
    """A cosine stays at its floor; the decay of wsd moves to the new end, and nothing before it changes."""
    for schedule in SCHEDULES:
        folder = tmp_path / schedule
        plain = trained(folder / "plain", schedule=schedule)
        longer = trained(folder / "longer", Amendments(steps=8), schedule=schedule)
        rates, more = [s["lr"] for s in plain.steps], [s["lr"] for s in longer.steps]
        assert [s["step"] for s in longer.steps] == list(range(1, 9))
        kept = 3 if schedule == "wsd" else STEPS
        assert_same(longer, plain, range(1, kept + 1))
        wanted = {"constant": [1e-2, 1e-2], "cosine": [1e-4, 1e-4], "wsd": [1e-2, 1e-2, *rates[3:]]}[schedule]
        assert more == rates[:kept] + wanted
    assert len(trained(tmp_path / "shorter", Amendments(steps=4)).steps) == 4


def test_the_engine_and_the_log_number_batches_alike() -> None:
    skips = ((2, 2), (4, 9), (11, 11), (40, 41))
    amended = Amendments(skip=skips)
    words = [f"{first}-{last}" for first, last in skips]
    command = [build_program("order_drive"), "1", "1", "1", "30", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = [int(line) + 1 for line in done.stdout.split()]
    assert found == [amended.batch(step) for step in range(1, 31)]
    skipped = {b for first, last in skips for b in range(first, last + 1)}
    assert found == [b for b in range(1, 100) if b not in skipped][:30]
    assert [amended.step(batch) for batch in found] == list(range(1, 31))
    assert [amended.skipped(batch) for batch in found] == [b - s for s, b in enumerate(found, 1)]


@pytest.mark.parametrize(("amended", "words"), [
    (Amendments(steps=1 << 41), "total_steps 2199023255552 is out of range"),
    (Amendments(steps=-1), "total_steps -1 is out of range"),
    (Amendments(skip=((0, 1),)), "the skipped batches 0 to 1 do not ascend"),
    (Amendments(skip=((3, 2),)), "the skipped batches 3 to 2 do not ascend"),
    (Amendments(skip=((3, 5), (5, 6))), "the skipped batches 5 to 6 do not ascend"),
    (Amendments(skip=((3, 1 << 41),)), "out of range"),
    (Amendments(rate=((0, 0.5),)), "the rate's factor 0.5 from step 0"),
    (Amendments(rate=((4, 0.5), (4, 0.25))), "the rate's factor 0.25 from step 4"),
    (Amendments(rate=((4, 0.0),)), "the rate's factor 0 from step 4 is not above 0"),
    (Amendments(rate=((4, 1.5),)), "the rate's factor 1.5 from step 4"),
    (Amendments(rate=((4, float("nan")),)), "the rate's factor -nan from step 4"),
    (Amendments(skip=tuple((2 * i, 2 * i) for i in range(1, 259))), "258 skips and 0 rates do not go with"),
])  # fmt: skip
def test_bad_amendments_are_refused(gang: Processes, tmp_path: Path, amended: Amendments, words: str) -> None:
    gang.prepare(small_plan(tmp_path), amended=amended)
    code, _, err = gang.run()
    assert code == 78, err
    assert words.replace("-nan", "nan") in err.replace("-nan", "nan")
