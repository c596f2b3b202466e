"""Schedules in closed form, against the same played out from the engine's own generators."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import trainer.planner
from trainer.plan.schedules import held_at_once, pipeline_for, rows_for
from trainer.planner.estimate import of_stage
from trainer.planner.pipelines import closed, held, play_out, played
from trainer.planner.times import Parts
from trainer.spec_how import SCHEDULES, THERE_AND_BACK

CHUNKS = {"interleaved-1f1b": 4, "zb-v": 2, "v-half": 2}
# positions, microbatches: in rounds of one size, which interleaved-1f1b wants
SIZES = [(2, 4), (4, 4), (4, 16), (8, 8), (8, 32), (16, 32), (8, 4), (13, 15)]


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(trainer.planner.__path__)])
def test_examples_in_the_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(f"trainer.planner.{name}"))
    assert failed == 0


def at_each(stages: list[Parts], positions: int, back: bool) -> list[Parts]:
    found = [Parts()] * positions
    for stage, position in enumerate(of_stage(len(stages), positions, back)):
        found[position] += stages[stage]
    return found


def compared(schedule: str, positions: int, microbatches: int, hop: float, heavy: bool) -> tuple[float, float]:
    stages = [Parts(1.0, 1.1, 0.9)] * (positions * CHUNKS.get(schedule, 1))
    if heavy:
        stages[-2] = stages[-2] * 2
    found = closed(schedule, microbatches, stages, at_each(stages, positions, schedule in THERE_AND_BACK), hop)
    return found.seconds, play_out(schedule, positions, microbatches, stages, hop).step_seconds


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("positions", "microbatches"), SIZES)
def test_the_formula_is_what_is_played(schedule: str, positions: int, microbatches: int) -> None:
    """Exact for GPipe, 1F1B, interleaved and ZB-H1 with like stages; V shapes, whose generators are greedy, nearly."""
    formula, simulated = compared(schedule, positions, microbatches, 0.0, heavy=False)
    near = {"zb-v": 0.03, "v-half": 0.09}.get(schedule, 1e-9)
    if schedule in THERE_AND_BACK and microbatches < positions:
        near = 0.3
    assert formula == pytest.approx(simulated, rel=near)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1"])
@pytest.mark.parametrize(("positions", "microbatches"), [(4, 16), (8, 32), (16, 32)])
def test_messages_and_a_heavy_stage_are_in_the_formula(schedule: str, positions: int, microbatches: int) -> None:
    formula, simulated = compared(schedule, positions, microbatches, 0.1, heavy=False)
    assert formula == pytest.approx(simulated, rel=0.045)
    formula, simulated = compared(schedule, positions, microbatches, 0.0, heavy=True)
    assert formula == pytest.approx(simulated, rel=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("positions", "microbatches"), SIZES)
def test_in_flight_is_what_the_rows_hold(schedule: str, positions: int, microbatches: int) -> None:
    chunks = CHUNKS.get(schedule, 1)
    rows = rows_for(schedule, pipeline_for(schedule, positions * chunks, positions), microbatches)
    real = [count / chunks for count in held_at_once(rows)]
    foretold = [held(schedule, chunks, microbatches, positions, position) for position in range(positions)]
    if schedule in THERE_AND_BACK:  # some positions hold less than the most
        assert max(real) == max(foretold)
        assert all(r <= f for r, f in zip(real, foretold, strict=True))
    else:
        assert real == foretold


def test_a_long_step_is_carried_on() -> None:
    """What is played with fewer microbatches is what would have been played with all, to a thousandth."""
    stages = [Parts(1.0, 1.0, 1.0)] * 4
    assert played("1f1b", 4, 1000, stages, 0.0, most_played=2000).seconds == pytest.approx(3.0 * 1003, rel=1e-3)
