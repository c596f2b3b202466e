"""The compiler's passes on columns against the same passes one action at a time (``one_by_one.py``)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.plan import one_by_one
from tests.trainer.plan.message_ends import MessageEnd, check_channels
from trainer import wire
from trainer.errors import PlanError
from trainer.plan import check, layout, memory, messages, schedules, simulate, slots
from trainer.plan.memory import Interval
from trainer.plan.places import Stage
from trainer.plan.records import ActionList, BoundAction
from trainer.plan.rows import COMPUTE, MESSAGES, Action, Row, columns
from trainer.plan.schedules import GENERATORS
from trainer.plan.simulate import CostModel, from_rows

SIZES = [(p, m) for p in range(1, 11) for m in (*range(1, 9), 11, 16, 24) if p * m <= 120]

Lists = list[list[Action]]


def lists(rows: object) -> Lists:
    return [list(row) for row in rows]  # type: ignore[attr-defined]


def random_schedule(source: random.Random) -> tuple[Lists, int]:
    """A schedule that can run: stages anywhere on the ranks, backward whole or in two parts, forwards in any order."""
    stages, microbatches = source.randint(1, 6), source.randint(1, 6)
    ranks = source.randint(1, stages)
    rank_of = [*range(ranks), *(source.randrange(ranks) for _ in range(stages - ranks))]
    source.shuffle(rank_of)
    split = [source.random() < 0.5 for _ in range(stages)]
    todo: dict[tuple[int, str], list[int]] = {}
    for stage in range(stages):
        for op in ("F", "I", "W") if split[stage] else ("F", "B"):
            todo[stage, op] = list(range(microbatches))
        if source.random() < 0.3:
            source.shuffle(todo[stage, "F"])
    seen: set[tuple[int, str, int]] = set()
    rows: Lists = [[] for _ in range(ranks)]
    while any(todo.values()):
        ready = []
        for (stage, op), left in todo.items():
            if left:
                back = [(stage, "F", left[0]), *([(stage + 1, "I", left[0])] if stage < stages - 1 else [])]
                needs = {
                    "F": [(stage - 1, "F", left[0])] if stage else [],
                    "W": [(stage, "I", left[0])],
                    "I": back,
                    "B": back,
                }[op]
                ready += [(stage, op)] * (seen.issuperset(needs))
        if not ready:  # backwards ascend, and forwards came in another order: run all forwards first
            return random_schedule(source)
        stage, op = source.choice(ready)
        microbatch = todo[stage, op].pop(0)
        seen.add((stage, "I" if op == "B" else op, microbatch))
        rows[rank_of[stage]].append(Action(stage, op, microbatch))
    return rows, stages


def spoil(rows: Lists, source: random.Random) -> Lists:
    """The rows with one action moved, lost, doubled, renamed or given to another rank."""
    out = [list(row) for row in rows]
    row = source.choice([row for row in out if row])
    at, to = source.randrange(len(row)), source.randrange(len(row))
    action = row[at]
    kind = source.randrange(7)
    if kind <= 1:
        row[at], row[to] = row[to], row[at]
    elif kind == 2:
        row.insert(to, row.pop(at))
    elif kind == 3:
        del row[at]
    elif kind == 4:
        row.insert(to, action)
    elif kind == 5:
        changes = [
            {"microbatch": source.choice([0, action.microbatch + 1, 50])},
            {"stage": source.choice([0, action.stage + 1])},
            {"op": source.choice(COMPUTE + MESSAGES)},
        ]
        row[at] = replace(action, **source.choice(changes))  # type: ignore[arg-type]
    else:
        source.choice(out).insert(0, row.pop(at))
    return out


def refusal(check: Callable[[], object]) -> str | None:
    try:
        check()
    except PlanError as error:
        return str(error).partition("; they wait for one another")[0]  # one by one, no circle is told
    return None


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_messages_of_the_generators(name: str) -> None:
    for stages, microbatches in SIZES:
        rows = GENERATORS[name](stages, microbatches)
        lowered = messages.insert_messages(rows, stages)
        slow = one_by_one.insert_messages(lists(rows), stages)
        assert lowered == slow
        early = messages.free_slots_early(lowered)
        slow = one_by_one.free_slots_early(slow)
        assert early == slow
        check.check_lowered(early)
        for row, plain in zip(early, slow, strict=True):
            count, of_microbatch = slots.assign_slots(row)
            assert (count, dict(enumerate(of_microbatch))) == one_by_one.assign_slots(plain)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 30))
def test_any_schedule(seed: int) -> None:
    rows, stages = random_schedule(random.Random(seed))
    lowered, slow = messages.insert_messages(rows, stages), one_by_one.insert_messages(rows, stages)
    assert lowered == slow
    assert messages.free_slots_early(lowered) == one_by_one.free_slots_early(slow)
    check.check_lowered(lowered)
    assert schedules.in_flight(lowered) == one_by_one.in_flight(slow)
    if len(rows) == stages:
        for row, plain in zip(lowered, slow, strict=True):
            count, of_microbatch = slots.assign_slots(row)
            assert (count, dict(enumerate(of_microbatch))) == one_by_one.assign_slots(plain)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 30))
def test_what_is_refused_and_why(seed: int) -> None:
    source = random.Random(seed)
    rows, _ = random_schedule(source)
    for _ in range(source.randint(1, 2)):
        rows = spoil(rows, source)
    if any(rows):
        bound = [source.randint(1, 4)] * 60
        for limits in (None, bound):
            wanted = refusal(lambda limits=limits: one_by_one.check_schedule(rows, bound=limits))
            assert refusal(lambda limits=limits: check.check_schedule(rows, bound=limits)) == wanted


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 30))
def test_which_messages_are_refused(seed: int) -> None:
    source = random.Random(seed)
    rows, stages = random_schedule(source)
    lowered = lists(messages.insert_messages(rows, stages))
    if any(lowered):
        lowered = spoil(lowered, source)
        wanted, found = (refusal(lambda by=by: by.check_lowered(lowered)) for by in (one_by_one, check))
        if wanted is None or " message " not in wanted:
            assert found == wanted
        else:  # of several messages that do not meet, each names one
            assert found is not None
            assert found.startswith("deadlock") == wanted.startswith("deadlock")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 1)), max_size=5), max_size=4))
def test_which_channels_are_refused(raw: list[list[tuple[int, bool, int]]]) -> None:
    rows = [
        [MessageEnd(channel, send, label, f"{channel}{send}{label}") for channel, send, label in row] for row in raw
    ]
    wanted, found = (refusal(lambda by=by: by(rows)) for by in (one_by_one.check_channels, check_channels))
    assert (found is None) == (wanted is None)
    if wanted is not None and "belongs to" in wanted:
        assert found == wanted


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("F", "B", "SEND_F", "RECV_F", "SEND_B", "RECV_B")), st.integers(0, 3))))
def test_hazards(raw: list[tuple[str, int]]) -> None:
    row = [Action(1, op, microbatch) for op, microbatch in dict.fromkeys(raw)]
    wanted = refusal(lambda: one_by_one.check_hazards(row, 1))
    assert refusal(lambda: slots.check_hazards(Row.of(row), Stage(1))) == wanted
    assert slots.sent_at_once(Row.of(row), Stage(1)) == one_by_one.sent_at_once(row)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=40))
def test_slots_of_any_order(raw: list[tuple[int, int]]) -> None:
    """Microbatches taken and freed in any order: the lowest free slot."""
    row: list[Action] = []
    live: list[int] = []
    for turn, (which, _) in enumerate(raw):
        if which and live:
            row.append(Action(0, "B", live.pop(which % len(live))))
        else:
            live.append(sum(action.op == "F" for action in row))
            row.append(Action(0, "F", live[-1]))
        assert len(row) == turn + 1
    count, of_microbatch = slots.assign_slots(Row.of(row))
    assert (count, dict(enumerate(of_microbatch))) == one_by_one.assign_slots(row)


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("seconds", [{"F": 1.0, "B": 2.0}, {"F": 0.3, "I": 0.1, "W": 0.7}])
def test_simulated_times(name: str, seconds: dict[str, float]) -> None:
    for stages, microbatches in SIZES[::3]:
        cost = CostModel(1.0, 1.0, 1000.0, 0.013)
        rows = from_rows(messages.insert_messages(GENERATORS[name](stages, microbatches), stages), seconds, 100)
        result = simulate.simulate(rows, cost)
        events, link_bytes = one_by_one.simulate(lists(rows), cost)
        assert list(result.timeline.events) == events
        assert result.link_bytes == link_bytes
        again = simulate.simulate(lists(rows), cost)
        assert list(again.timeline.events) == events
        assert result.bubble == pytest.approx(again.bubble)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30))
def test_simulated_times_of_any_schedule(seed: int) -> None:
    rows, stages = random_schedule(random.Random(seed))
    cost = CostModel(1.0, 1.0, 1000.0, 0.013)
    timed = from_rows(messages.insert_messages(rows, stages), {"F": 1.0, "I": 0.7, "W": 0.4}, 100)
    events, _ = one_by_one.simulate(lists(timed), cost)
    assert list(simulate.simulate(timed, cost).timeline.events) == events


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=10),
    st.integers(0, 30),
    st.data(),
    st.sampled_from((1, 7, 10**12)),
    st.booleans(),
)
def test_the_split(costs: list[int], head: int, data: st.DataObject, unit: int, same: bool) -> None:
    costs = [unit * (costs[0] if same else cost) for cost in costs]
    stages = data.draw(st.integers(1, len(costs)))
    wanted = one_by_one.split_layers(costs, head, stages)
    assert layout.split_layers(costs, head, stages) == wanted
    limit = layout.lightest(costs, head, stages)
    assert layout.balanced(costs, head, stages, limit) == tuple(r.stop for r in wanted)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_placement(raw: list[tuple[int, int, int]]) -> None:
    items = [Interval(str(n), size, min(a, b), max(a, b)) for n, (size, a, b) in enumerate(raw)]
    assert memory.place(items) == one_by_one.place(items)


def test_rows_read_as_lists() -> None:
    (row,) = columns([[Action(0, "F", 0), Action(1, "SEND_F", 3), Action(0, "B", 0)]])
    assert row[1] == Action(1, "SEND_F", 3)
    assert row[-1] == Action(0, "B", 0)
    assert row[1:] == [Action(1, "SEND_F", 3), Action(0, "B", 0)]
    assert next(reversed(row)) == row[2]
    assert row != row[:2]
    assert Row.of(row) is row
    assert len(Row.of([])) == 0
    with pytest.raises(IndexError):
        row[3]
    with pytest.raises(PlanError, match=f"count from 0 to {(1 << 31) - 1}"):
        Action(0, "F", 1 << 31)


def test_action_lists_read_as_lists() -> None:
    plain = [
        BoundAction(wire.A_DATA),
        *(BoundAction(wire.A_RUN, op, op, None, m, m % 2) for op in "FB" for m in (0, 1)),
    ]
    listed = ActionList.of(plain)
    assert len(listed.patterns) == 3
    assert listed == plain
    assert listed[1:3] == plain[1:3]
    assert [listed[n] for n in range(-5, 5)] == [plain[n] for n in range(-5, 5)]
    assert listed != plain[:4]
    for one, two in itertools.pairwise(plain):
        assert one != two


def test_a_deadlock_is_told_as_its_cycle() -> None:
    """Ranks that wait behind it are not named."""

    def end(channel: str, is_send: bool) -> MessageEnd:
        return MessageEnd(channel, is_send, 0, f"{'send' if is_send else 'receive'} {channel}")

    rows = [[end("c", True)], [end("a", True), end("b", False)], [end("b", True), end("a", False), end("c", False)]]
    with pytest.raises(PlanError) as caught:
        check_channels(rows)
    assert str(caught.value) == (
        "deadlock under rendezvous-only channels: position 2 at message 0, send b, waits for position 1; "
        "position 1 at message 0, send a, waits for position 2"
    )
