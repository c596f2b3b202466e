"""Amendments in records: what they say, what is no amendment, and where an order has the run's line go on."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoint import codec, keys
from checkpoint.amendments import MOST, NONE, Amendments
from checkpoint.errors import Damaged, OtherVersion
from checkpoint.log import FOLD_EVERY, RunLog, RunState, StartPoint, records
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import attempt_body, point_body

RUN = "demo-0a1b2c"
AMENDED = Amendments(steps=40, skip=((3, 4), (9, 9)), rate=((7, 0.5), (20, 0.25)))


def order(amended: Amendments = NONE, **more: Any) -> dict[str, Any]:
    body = {"kind": "order", "how": {"parallel": {}}, "by": "ann@b", "via": "runs order", **more}
    return {**body, "amendments": amended.to_map()} if amended else body


def test_skips_move_what_follows_and_take_no_step_away() -> None:
    assert [AMENDED.batch(step) for step in range(9)] == [0, 1, 2, 5, 6, 7, 8, 10, 11]
    assert [AMENDED.step(batch) for batch in (1, 2, 3, 4, 5, 8, 9, 10)] == [1, 2, 3, 3, 3, 6, 7, 7]
    assert [AMENDED.skipped(batch) for batch in (2, 3, 4, 8, 9, 20)] == [0, 1, 2, 2, 3, 3]
    assert Amendments(skip=((1, 2),)).batch(0) == 0  # nothing is read before the first step


def test_ranges_that_touch_are_one() -> None:
    made = NONE
    for first, last in ((9, 9), (3, 4), (5, 6), (8, 8), (2, 12), (20, 20)):
        made = made.skipping(first, last)
    assert made.skip == ((2, 12), (20, 20))


def test_the_newest_word_on_the_rate_rules_from_its_step_on() -> None:
    made = NONE.rated(10, 0.5).rated(20, 0.25)
    assert [made.factor(step) for step in (9, 10, 19, 20)] == [1.0, 0.5, 0.5, 0.25]
    assert made.rated(15, 0.1).rate == ((10, 0.5), (15, 0.1))
    assert made.rated(10, 1.0) == NONE
    assert NONE.rated(10, 0.5).rated(20, 1.0).rate == ((10, 0.5), (20, 1.0))
    assert NONE.rated(10, 0.5).rated(20, 0.5).rate == ((10, 0.5),)


@pytest.mark.parametrize("value", [
    {"steps": 0}, {"steps": MOST + 1}, {"steps": "4"}, {"steps": True},
    {"skip": [[0, 1]]}, {"skip": [[3, 2]]}, {"skip": [[1, MOST + 1]]}, {"skip": [[1]]}, {"skip": [7]},
    {"skip": [[1, 2.0]]}, {"skip": [[1, 3], [3, 4]]}, {"skip": [[5, 6], [1, 2]]}, {"skip": [[True, 2]]},
    {"skip": [[i, i] for i in range(1, 600, 2)]},
    {"rate": [[0, 0.5]]}, {"rate": [[1, 0.0]]}, {"rate": [[1, 1.5]]}, {"rate": [[1, float("nan")]]}, {"rate": [[1, 1]]},
    {"rate": [[2, 0.5], [2, 0.25]]}, {"rate": [[i, 0.5] for i in range(1, 66)]}, {"other": 1}, [1], "x",
])  # fmt: skip
def test_what_is_no_amendment_is_damaged(value: Any) -> None:
    with pytest.raises(Damaged):
        Amendments.parse(value, "record 3")


def test_they_come_back_as_they_went() -> None:
    for made in (NONE, AMENDED, Amendments(steps=MOST), Amendments(rate=((1, 1.0),))):
        assert Amendments.parse(codec.unpack(codec.pack(made.to_map()), "x", max_bytes=1000), "x") == made


def points(log: RunLog, *steps: int) -> RunState:
    """The log of a run whose only attempt has saved these steps, in records 2 and on."""
    state = log.append("attempt", attempt_body(), log.fold())
    for step in steps:
        state = log.append("checkpoint", point_body(step), state, epoch=1)
    return state


def test_an_order_cuts_the_line_at_the_checkpoint_that_it_names() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = points(log, 5, 10, 15)
    state = log.append("intervention", order(AMENDED, checkpoint=3, step=10), state)
    assert (state.amendments, state.start) == (AMENDED, StartPoint(3, 10))
    assert [c.step for c in state.restore_candidates()] == [10, 5]
    # the gang trains on until the next attempt: what it saves is not on the line
    state = log.append("checkpoint", point_body(20), state, epoch=1)
    assert [c.step for c in state.restore_candidates()] == [10, 5]
    assert (state.at_step(), state.at_step(20)) == (state.checkpoint(3), None)
    # nor does an order on the layout alone change where the run goes on; it says the amendments again
    state = log.append("intervention", order(AMENDED), state)
    assert (state.amendments, state.start) == (AMENDED, StartPoint(3, 10))
    state = log.append("attempt", attempt_body(3, 10, order=7, amendments=AMENDED.to_map()), state)
    assert (state.attempts[-1].amendments, state.start) == (AMENDED, None)
    state = log.append("checkpoint", point_body(15, 8), state, epoch=8)
    assert [(c.step, c.epoch) for c in state.restore_candidates()] == [(15, 8), (10, 1), (5, 1)]
    assert log.fold() == state == log.fold(quick=True)


def test_an_order_to_the_start_leaves_nothing_to_go_back_to() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("intervention", order(step=0), points(log, 5))
    assert (state.start, list(state.restore_candidates()), state.at_step()) == (StartPoint(None, 0), [], None)


def test_a_damaged_one_is_left_for_the_one_before_it() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("intervention", order(checkpoint=3, step=10), points(log, 5, 10, 15))
    state = log.append("damaged", {"checkpoint": 3, "reason": "bits"}, state)
    assert [c.step for c in state.restore_candidates()] == [5]


def test_the_collector_does_not_get_what_an_order_names() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("intervention", order(checkpoint=3, step=10), points(log, 5, 10, 15))
    for record in (2, 3):
        state = log.append("tombstone", {"checkpoint": record}, state)
    assert set(state.tombstones) == {2}
    state = log.append("attempt", attempt_body(4, 15, order=5), state)  # followed, or given up
    assert set(log.append("tombstone", {"checkpoint": 3}, state).tombstones) == {2, 3}


@pytest.mark.parametrize("body", [
    order(checkpoint=1, step=10), order(checkpoint=9, step=10), order(checkpoint=3, step=-1), order(step="x"),
    {**order(), "amendments": {"skip": [[2, 1]]}},
])  # fmt: skip
def test_an_order_that_names_no_checkpoint_or_amends_nothing_that_can_be_is_not_written(body: dict[str, Any]) -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = points(log, 5, 10, 15)
    with pytest.raises(Damaged):
        log.append("intervention", body, state)
    assert log.fold() == state


@pytest.mark.parametrize(("kind", "body"), [
    ("intervention", order(AMENDED, checkpoint=2, step=5)),
    ("intervention", order(checkpoint=2, step=5)),
    ("intervention", order(AMENDED)),
    ("intervention", {"kind": "parent", "run": "p-000000", "checkpoint": 2, "step": 5, "amendments": AMENDED.to_map()}),
    ("attempt", attempt_body(2, 5, amendments=AMENDED.to_map())),
])  # fmt: skip
def test_a_version_that_knows_no_amendments_refuses(
    kind: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind a fold, and where the log's state is read whole."""
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append(kind, body, points(log, 5))
    while state.n <= FOLD_EVERY:
        state = log.append("intervention", {"kind": "note"}, state)
    assert log.fold().of_this_version() == state
    monkeypatch.setattr(records, "NEEDS", {"attempt": records.NEEDS["attempt"][:1]})
    for quick in (False, True):
        with pytest.raises(OtherVersion, match="log record 3 has version"):
            log.fold(quick=quick).of_this_version()


def test_other_orders_keep_the_bytes_that_older_versions_read() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("intervention", order(), points(log, 5))
    state = log.append("intervention", {"kind": "parent", "run": "p-000000", "checkpoint": 2, "step": 5}, state)
    for n in range(1, state.n + 1):
        found = codec.unseal(log.store.get(keys.log_key(RUN, n)), "r", max_bytes=1 << 16, max_depth=codec.RECORD_DEPTH)
        assert found["v"] == 1
