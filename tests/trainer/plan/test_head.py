"""The head shared by positions: schedules with its parts, what they cost, what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from tests.engine.plans import GPT2, small_plan
from trainer import wire
from trainer.dataset import DatasetRef
from trainer.errors import PlanError, SpecError
from trainer.plan.compile import compile_plan
from trainer.plan.compiled import Plan
from trainer.plan.edges import check_messages
from trainer.plan.head import share
from trainer.plan.head_rows import HELD, HeadParts, check_parts, with_parts
from trainer.plan.layout import split_layers, split_with
from trainer.plan.places import Pipeline, Position, Stage
from trainer.plan.records import ActionList
from trainer.plan.rows import SPREAD, Action, Row
from trainer.plan.schedule_file import to_csv
from trainer.plan.schedules import pipeline_for, rows_for
from trainer.plan.simulate import CostModel, from_plan, simulate
from trainer.spec import parse_spec

SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("zb-h1", 1), ("interleaved-1f1b", 2), ("zb-v", 2)]
UNIT = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


def rows_of(
    schedule: str, chunks: int, positions: int, microbatches: int, count: int, part: tuple[float, float]
) -> tuple[list[Row], HeadParts]:
    """Equal stages; ``part``: what F and B of a part last, where a stage's F lasts 1."""
    pipeline = pipeline_for(schedule, positions * chunks, positions)
    parts = HeadParts.of(count, pipeline)
    times = {(Stage(s), op): UNIT[op] / chunks for s in range(pipeline.stages) for op in UNIT}
    for n in range(count):
        times |= {(parts.stage(n), "F"): part[0], (parts.stage(n), "B"): part[1]}
    rows = rows_for(schedule, pipeline, microbatches)
    return list(with_parts(rows, pipeline, parts, times)), parts


def last_end(rows: list[Row], parts: HeadParts, pipeline: Pipeline, part: tuple[float, float]) -> float:
    """When the last of these rows' computations ends, where messages take no time: played here, action by action."""
    done: dict[tuple[int, str, int], float] = {}
    clock, place = [0.0] * len(rows), [0] * len(rows)
    last, count = parts.last, len(parts.positions)

    def needs(a: Action) -> list[tuple[int, str, int]]:
        m = a.microbatch
        if a.stage > last:
            return [(last, "F", m)] if a.op == "F" else [(parts.stage(n), "F", m) for n in range(count)]
        if a.op == "F":
            return [(a.stage - 1, "F", m)] if a.stage else []
        if a.op == "W":
            return []
        return [(parts.stage(n), "B", m) for n in range(count)] if a.stage == last else [(a.stage + 1, "B", m)]

    listed = [[a for a in row if a.is_compute] for row in rows]
    while any(place[p] < len(row) for p, row in enumerate(listed)):
        moved = False
        for p, row in enumerate(listed):
            while place[p] < len(row) and all(n in done for n in needs(row[place[p]])):
                a = row[place[p]]
                start = max([clock[p], *(done[n] for n in needs(a))])
                took = (part[0] if a.op == "F" else part[1]) if a.stage > last else UNIT[a.op]
                clock[p] = start + took / (1 if a.stage > last else len(pipeline.chunks[p]))
                done[a.stage, "B" if a.op == "I" else a.op, a.microbatch] = clock[p]
                place[p] += 1
                moved = True
        assert moved, "they wait for one another"
    return max(clock)


@pytest.mark.parametrize("positions", [2, 4, 8, pytest.param(16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_a_head_of_all_ranks_leaves_the_bubble_of_equal_stages(schedule: str, positions: int) -> None:
    """A step lasts what every rank computes, M (F + B + S + T), and the bubble of stages without a head, (P - 1) (F +
    B), but for what fills it, or for two rounds of messages: never more than two parts' work. It does not grow with M.
    """
    count, part, pipeline, bubbles = positions, (0.5, 1.0), Pipeline.in_turn(positions), []
    for microbatches in (3 * positions, 6 * positions):
        rows, parts = rows_of(schedule, 1, positions, microbatches, count, part)
        check_parts(rows, parts)
        bubbles.append(last_end(rows, parts, pipeline, part) - microbatches * (3.0 + sum(part)))
    assert bubbles[0] == pytest.approx(bubbles[1])
    assert bubbles[0] <= 3.0 * (positions - 1) + 2 * sum(part) + 1e-9
    alone = last_end_of_one(positions, 6 * positions, positions * sum(part))
    assert bubbles[0] + 6 * positions * (3.0 + sum(part)) < alone


def last_end_of_one(positions: int, microbatches: int, head: float) -> float:
    """1F1B with the whole head on the last stage: it alone sets the pace."""
    return 3.0 * (positions - 1) + microbatches * (3.0 + head)


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_schedules_with_parts_run_and_hold_few_microbatches(schedule: str, chunks: int) -> None:
    source = random.Random(f"head {schedule}")
    for _ in range(12):
        positions = source.choice([2, 3, 4, 5, 8])
        microbatches = source.choice([1, 2, 5, 8, 12])
        if schedule == "interleaved-1f1b":
            microbatches = positions * source.choice([1, 2])
        count = source.choice([n for n in (2, 4, 8) if n <= positions])
        part = (source.uniform(0.1, 2), source.uniform(0.1, 2))
        rows, parts = rows_of(schedule, chunks, positions, microbatches, count, part)
        check_parts(rows, parts)
        pipeline = pipeline_for(schedule, positions * chunks, positions)
        assert last_end(rows, parts, pipeline, part) > 0
        for n, position in enumerate(parts.positions):
            held, most = 0, 0
            for a in rows[position]:
                held += (a.stage, a.op) == (parts.stage(n), "F")
                held -= (a.stage, a.op) == ((parts.stage(n), "JOIN") if n else (parts.last, "JOIN"))
                most = max(most, held)
            assert most <= HELD


def test_what_a_part_needs_must_stand_before_it() -> None:
    rows, parts = rows_of("1f1b", 1, 2, 4, 2, (0.5, 1.0))
    for position in range(2):
        for place, action in enumerate(rows[position]):
            if action.op not in ("SPREAD", "SHARE", "JOIN"):
                continue
            wrong = list(rows)
            wrong[position] = Row.of([a for at, a in enumerate(rows[position]) if at != place])
            ends = action.op == "JOIN" and position != parts.positions[0]  # nothing at this position waits for it
            if ends:
                continue
            with pytest.raises(PlanError, match=f"needs .*{action.op}{action.microbatch} before it"):
                check_parts(wrong, parts)


def plan_of(stages: int, more: dict[str, Any], **train: Any) -> Plan:
    values = {
        "name": "head",
        "model": {"family": "gpt2", "layers": 8, "width": 64, "heads": 2, "context": 32, "vocab": 9_000},
        "train": {"steps": 1, "batch": 8, "microbatch": 1, "sequence": 32, "vocab_blocks": 8} | train,
        "parallel": {"stages": stages} | more,
    }
    spec = parse_spec(values)
    data = DatasetRef("0" * 64, 9_000, 2, (1000,), "0" * 64)
    return compile_plan(spec.resolve(data), data, bytes(32))


def test_the_compiler_shares_the_head_where_that_pays() -> None:
    cost = CostModel(5e10, 1e10)
    alone, chosen = plan_of(4, {"vocab_stages": 1}), plan_of(4, {})
    assert (alone.heads, chosen.heads) == (1, 4)
    seconds = [simulate(from_plan(plan, cost), cost).step_seconds for plan in (alone, chosen)]
    assert seconds[1] < 0.75 * seconds[0]
    assert plan_of(4, {}, vocab_blocks=1).to_bytes() == plan_of(4, {"vocab_stages": 1}, vocab_blocks=1).to_bytes()
    assert plan_of(1, {}).heads == 1
    assert plan_of(8, {"schedule": "v-half", "chunks": 2}).heads == 1
    assert plan_of(4, {"optimizer": "optimistic"}).heads == 1


def test_memory_of_all_parts_is_that_of_one_head() -> None:
    """Each row of the head's gradient lies at one position, and what others give at the owner."""
    plan = plan_of(4, {"vocab_stages": 4})
    rows = {
        (call.dim[7], call.dim[2])
        for position in plan.positions
        for program in position.programs.values()
        for call in program.calls
        if call.kernel == "vocab_part"
    }
    assert sorted(rows) == [(share(9_000, 8, 4, part).first, share(9_000, 8, 4, part).rows) for part in range(4)]
    kinds = {wire.CH_TIED_GRAD: 0, wire.CH_TIED_WEIGHT: 0}
    for channel in plan.channels:
        if channel.kind in kinds:
            kinds[channel.kind] += channel.bytes
    first = next(share(9_000, 8, 4, n).rows for n, p in enumerate((3, 2, 1, 0)) if p == 0)
    assert kinds == dict.fromkeys(kinds, 4 * 64 * (9_000 - first))


def test_messages_that_do_not_meet_are_found() -> None:
    plan = small_plan(stages=2, parallel={"vocab_stages": 2}, vocab_blocks=2, model=GPT2)
    check_messages(plan.positions, plan.channels)
    step = ActionList.of(plan.positions[0].step)
    sums = next(n for n, a in enumerate(step) if a.sender is not None)
    short = ActionList.of([a for n, a in enumerate(step) if n != sums])
    wrong = (replace(plan.positions[0], step=short), plan.positions[1])
    with pytest.raises(PlanError, match="channel"):
        check_messages(wrong, plan.channels)


def test_layers_make_room_for_parts() -> None:
    source = random.Random(5)
    for _ in range(40):
        costs = [source.randint(1, 9) for _ in range(source.randint(3, 9))]
        stages = source.randint(1, 3)
        extras = [source.randint(0, 12) for _ in range(stages)]
        found = split_with(costs, extras)
        assert [n for layers in found for n in layers] == list(range(len(costs)))

        def heaviest(ranges: tuple[range, ...], costs: list[int] = costs, extras: list[int] = extras) -> int:
            return max(sum(costs[n] for n in layers) + extra for layers, extra in zip(ranges, extras, strict=True))

        cuts = [(a, b) for a in range(1, len(costs)) for b in range(a + 1, len(costs))] if stages == 3 else []
        cuts = [(a,) for a in range(1, len(costs))] if stages == 2 else cuts  # type: ignore[misc]
        ways = [tuple(map(range, (0, *cut), (*cut, len(costs)))) for cut in cuts or [()]]
        assert heaviest(found) == min(map(heaviest, ways))
    assert split_with([1, 1, 1, 1], [0, 2]) == split_layers([1, 1, 1, 1], 2, 2)


@pytest.mark.parametrize(
    ("parallel", "told"),
    [
        ({"vocab_stages": 3}, r"vocab_stages 3 is no power of two; take vocab_stages = 2"),
        ({"vocab_stages": 8}, r"vocab_stages 8 is more than the 4 ranks of a replica; take vocab_stages = 4"),
        ({"vocab_stages": 2, "schedule": "v-half", "chunks": 2}, r"has no place for parts of the head yet"),
        ({"vocab_stages": 2, "schedule": "file:x.csv"}, r"has no place for parts of the head yet"),
        ({"vocab_stages": 2, "optimizer": "optimistic"}, r'take optimizer = "checked" or "auto", or vocab_stages = 1'),
    ],
)
def test_what_cannot_share_the_head_is_refused(parallel: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        plan_of(4, parallel)


def test_a_head_of_more_ranks_than_blocks_is_refused() -> None:
    with pytest.raises(SpecError, match=r"vocab_stages 4 is more than train\.vocab_blocks 2, .* take vocab_stages = 2"):
        plan_of(4, {"vocab_stages": 4}, vocab_blocks=2)


def test_a_schedule_with_parts_is_no_csv() -> None:
    with pytest.raises(PlanError, match=r"cannot say: .* set parallel\.vocab_stages = 1"):
        to_csv(plan_of(4, {"vocab_stages": 2}).schedule)
    assert any((row.op >= SPREAD).any() for row in plan_of(4, {"vocab_stages": 2}).schedule)
    assert HeadParts.of(2, Pipeline.there_and_back(8, 4)).positions == (Position(0), Position(1))
