"""What an optimistic step's prefix holds, when its report leaves, what it saves where many steps follow one another."""

from __future__ import annotations

import doctest
import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.plans import GPT2, SEQUENCE, VOCAB, small_plan
from trainer import wire
from trainer.dataset import DatasetRef
from trainer.errors import PlanError
from trainer.plan import Plan, optimistic
from trainer.plan.edges import check_messages
from trainer.plan.messages import free_slots_early, insert_messages
from trainer.plan.optimistic import cuts
from trainer.plan.places import Pipeline, Position
from trainer.plan.rows import Row
from trainer.plan.schedules import pipeline_for, rows_for
from trainer.plan.simulate import CostModel
from trainer.plan.steady import quicker, redo_seconds, steady
from trainer.plan.turns import Turns

ZERO = Position(0)
SCHEDULES = ("1f1b", "gpipe", "zb-h1", "zb-v", "v-half")
FREE = CostModel(1e15, 1e15, 1e18, 0.0, 0.0)


def rows_of(schedule: str, positions: int, microbatches: int) -> tuple[list[Row], Pipeline]:
    stages = positions * (2 if schedule in ("zb-v", "v-half") else 1)
    pipeline = pipeline_for(schedule, stages, positions)
    return free_slots_early(insert_messages(rows_for(schedule, pipeline, microbatches), stages)), pipeline


def open_ends(rows: list[Row], pipeline: Pipeline, ends: tuple[int, ...]) -> Counter[tuple[int, int]]:
    """By link, forwards that are sent before ``ends`` and not received, or the other way round."""
    found: Counter[tuple[int, int]] = Counter()
    for position, (row, end) in enumerate(zip(rows, ends, strict=True)):
        for action in row[:end]:
            if action.op == "SEND_F":
                found[position, pipeline.of_stage[action.stage + 1]] += 1
            elif action.op == "RECV_F":
                found[pipeline.of_stage[action.stage - 1], position] -= 1
    return Counter({link: n for link, n in found.items() if n})


def test_examples_in_the_docstring_run() -> None:
    assert doctest.testmod(optimistic).failed == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("positions", "microbatches"), [(2, 2), (2, 3), (3, 2)])
def test_a_prefix_is_the_largest_closed_cut_of_forwards(schedule: str, positions: int, microbatches: int) -> None:
    """Against every cut there is."""
    rows, pipeline = rows_of(schedule, positions, microbatches)
    forwards = [next(n for n, a in enumerate(row) if a.op in ("I", "W", "B", "RECV_B", "SEND_B")) for row in rows]
    every = itertools.product(*(range(n + 1) for n in forwards))
    closed = [ends for ends in every if not open_ends(rows, pipeline, ends)]
    largest = tuple(max(ends[p] for ends in closed) for p in range(positions))
    assert largest in closed
    assert tuple(cut.prefix for cut in cuts(rows, pipeline, ZERO)) == largest


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_report_leaves_as_soon_as_it_cannot_block(schedule: str) -> None:
    """Where one leaves an action of position 0's need sooner, the lists wait for one another under rendezvous."""
    chunks = 2 if schedule in ("zb-v", "v-half") else 1
    parallel = {"stages": 3 * chunks, "chunks": chunks, "schedule": schedule, "optimizer": "optimistic"}
    plan = small_plan(parallel=parallel, model=GPT2 | {"layers": 6}, batch=12)
    moved = 0
    for number, position in enumerate(plan.positions[1:], 1):
        step = list(position.step)
        tells = [c.kind == wire.CH_REPORT for c in plan.channels]
        (report,) = (n for n, a in enumerate(step) if a.channel is not None and tells[a.channel])
        sooner = next((n for n in reversed(range(report)) if step[n].channel is not None), None)
        if sooner is None:
            continue
        step.insert(sooner, step.pop(report))
        positions = [*plan.positions]
        positions[number] = replace(position, step=tuple(step))
        with pytest.raises(PlanError, match="deadlock under rendezvous"):
            check_messages(positions, plan.channels)
        moved += 1
    assert moved


def test_parts_of_a_step_hold_it_once() -> None:
    plan = small_plan(stages=3, model=GPT2 | {"layers": 3}, batch=12, parallel={"optimizer": "optimistic"})
    for position in plan.positions:
        turns = Turns.of(position, plan.channels)
        assert [*turns.ahead, *turns.check, *turns.rest] == [*position.step]
        assert len(turns.first) + len(turns.end) == position.step_prefix
        kinds = [a.kind for a in turns.again]
        assert wire.A_DATA not in kinds
        assert kinds == [a.kind for a in turns.first if a.kind != wire.A_DATA]
        first, second, last = turns.steps(3)
        assert [*first] == [*turns.first, *turns.rest, *turns.ahead, *turns.check]
        assert [*second] == [*turns.rest, *turns.ahead, *turns.check]
        assert [*last] == [*turns.rest, *turns.end, *turns.check]


def both(schedule: str, **delays: float) -> tuple[Plan, Plan]:
    """Four positions, eight microbatches, checked and optimistic; programs last as said, and nothing else does."""
    chunks = 2 if schedule in ("zb-v", "v-half") else 1
    parallel = {"stages": 4 * chunks, "chunks": chunks, "schedule": schedule}
    made = [
        small_plan(
            parallel=parallel | {"optimizer": optimizer}, model=GPT2 | {"layers": 8}, batch=16, delays=delays,
            optimizer={"clip": 0.0},
        )
        for optimizer in ("checked", "optimistic")
    ]  # fmt: skip
    return made[0], made[1]


def test_many_steps_of_zb_v_have_no_bubble() -> None:
    """A step by itself, and so a checked one, has that of its start: (p - 1) F / 2 of 8 (F + I + W)."""
    checked, ahead = both("zb-v", F=0.5, I=0.5, W=0.5)
    alone, many = steady(checked, FREE), steady(ahead, FREE)
    assert alone.step_seconds == pytest.approx(24 + 1.5, rel=1e-3)
    assert max(alone.bubble) == pytest.approx(1.5 / 25.5, rel=0.05)
    assert many.step_seconds == pytest.approx(24, rel=1e-3)
    assert max(many.bubble) < 0.005
    assert quicker(checked, ahead, FREE)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_position_that_starts_first_and_ends_last_leaves_nothing_to_gain(schedule: str) -> None:
    checked, ahead = both(schedule, F=1.0, I=1.0, W=1.0)
    assert steady(checked, FREE).step_seconds == pytest.approx(33, rel=1e-3)
    assert steady(ahead, FREE).step_seconds == pytest.approx(33, rel=1e-3)
    assert not quicker(checked, ahead, FREE)


def test_what_a_clipped_step_costs_is_its_prefix() -> None:
    _, ahead = both("gpipe", F=1.0, I=1.0, W=1.0)
    assert redo_seconds(ahead, FREE) == pytest.approx(8 + 3, rel=1e-3)


def test_auto_takes_the_quicker() -> None:
    """And no optimistic one for masked data: what is foreseen there never holds."""
    masked = DatasetRef("0" * 64, VOCAB, 2, (100 * SEQUENCE,), "0" * 64, counted=7)

    def optimizer(schedule: str, stages: int, chunks: int, **train: Any) -> bool:
        parallel = {"stages": stages, "chunks": chunks, "schedule": schedule}
        delays = {"F": 0.01, "I": 0.01, "W": 0.01}
        plan = small_plan(parallel=parallel, model=GPT2 | {"layers": 8}, batch=16, delays=delays, **train)
        return plan.positions[0].step_checks > 0

    assert optimizer("zb-v", 8, 2)
    assert not optimizer("zb-v", 8, 2, dataset=masked)
    assert not optimizer("v-half", 8, 2)
    assert not optimizer("1f1b", 4, 1)


def test_memory_of_what_is_foreseen() -> None:
    """A copy of each weight in fp32; of vectors alone in bf16; with FP8, of a matrix at a time in scratch."""
    for precision in ("fp32", "bf16", "fp8"):
        plain, ahead = (
            small_plan(stages=2, precision=precision, parallel={"optimizer": optimizer})
            for optimizer in ("checked", "optimistic")
        )
        for one, other in zip(plain.positions, ahead.positions, strict=True):
            more = other.bytes_by_kind["weights"] - one.bytes_by_kind["weights"]
            tensors = [plain.tensors[state.tensor] for state in one.states]
            vectors = sum(-(-4 * t.elements // 64) * 64 for t in tensors if not t.decay)
            whole = sum(-(-4 * t.elements // 64) * 64 for t in tensors)
            assert more == (whole if precision == "fp32" else vectors)
            assert one.bytes_by_kind["moments"] == other.bytes_by_kind["moments"]
