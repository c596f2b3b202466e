"""Versions of records: what an older reader must not ignore it refuses, however it comes to it; the rest it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from checkpoint import codec, keys
from checkpoint.errors import Damaged, Halted, OtherVersion
from checkpoint.log import FOLD_EVERY, Record, RunLog, RunState, condensed_key, records
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import attempt_body, point_body
from trainer import wire

RUN = "demo-0a1b2c"
Needs = Callable[[Any], bool]


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A hotstage in which interventions of kind "turn" need version 2 is asked for by ``with``: before, and after it
    is undone, it is this one.
    """
    with monkeypatch.context() as patch:
        needs: dict[str, tuple[Needs, ...]] = {
            **records.NEEDS,
            "intervention": (*records.NEEDS.get("intervention", ()), lambda body: body.get("kind") == "turn"),
        }
        patch.setattr(records, "NEEDS", needs)
        yield patch


def sealed(value: dict[str, Any]) -> bytes:
    return codec.seal(value, codec.RECORD_DEPTH)


def raw_map(data: bytes) -> dict[str, Any]:
    return codec.unseal(data, "record", max_bytes=1 << 20, max_depth=codec.RECORD_DEPTH)


def test_a_record_carries_the_lowest_version_that_reads_it_rightly(newer: pytest.MonkeyPatch) -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("attempt", attempt_body(), log.fold())
    for kind, version in (("note", 1), ("turn", records.known_version("intervention"))):
        state = log.append("intervention", {"kind": kind}, state)
        assert raw_map(log.store.get(keys.log_key(RUN, state.n)))["v"] == version
    assert state.needs == {"intervention": records.known_version("intervention")}
    assert log.fold() == state


def test_an_older_reader_refuses_what_it_must_not_ignore_in_a_record_a_fold_and_a_condensed_state(
    newer: pytest.MonkeyPatch,
) -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("attempt", attempt_body(), log.fold())
    state = log.append("intervention", {"kind": "turn"}, state)
    while state.n <= 2 * FOLD_EVERY:
        state = log.append("intervention", {"kind": "note"}, state)
    assert log.fold() == state == log.fold(quick=True)
    newest, needed = log.store.get(condensed_key(RUN)), records.known_version("intervention")
    newer.undo()  # an older hotstage looks at the same store
    for quick in (False, True):
        seen = log.fold(quick=quick)
        assert (seen.n, seen.newer) == (1, True), "a fold of after the record does not hide it"
        with pytest.raises(OtherVersion, match=f"log record 2 has version {needed}, this hotstage reads"):
            seen.of_this_version()
        with pytest.raises(Halted):
            log.append("pin", {"name": "x", "checkpoint": 1}, seen)
    with pytest.raises(OtherVersion, match=f"kind 'intervention' and version {needed}"):
        RunState.parse(newest[40:], RUN, int.from_bytes(newest[:8], "little"), lambda *_: RunState(RUN))


def test_states_without_such_records_stay_as_older_versions_read_them() -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("attempt", attempt_body(numerics=wire.NUMERICS_F32), log.fold())
    state = log.append("checkpoint", point_body(3), state, epoch=1)
    assert [raw_map(log.store.get(keys.log_key(RUN, n)))["v"] for n in (1, 2)] == [1, 1]
    found = raw_map(state.to_bytes())
    assert (found["v"], "needs" in found) == (2, False)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"v": 2, "kind": "later"}, OtherVersion, "has version 2, this hotstage reads version 1"),
        ({"v": 1, "kind": "later"}, Damaged, "unknown kind 'later'"),
        ({"v": 9}, OtherVersion, "has version 9, this hotstage reads versions 1 to 3"),
        ({"v": 0}, Damaged, "'v' is 0"),
        ({"v": 2, "kind": None}, OtherVersion, "version 2"),
        ({"body": {"numerics": 2}}, Damaged, "version 1, with what only version 2 has"),
    ],
)
def test_versions_and_kinds_that_do_not_go_together(change: dict[str, Any], error: type[Exception], says: str) -> None:
    whole = {**raw_map(Record(1, "attempt", 1, "w:0", 0.0, attempt_body()).to_bytes()), **change}
    with pytest.raises(error, match=says):
        Record.parse(sealed(whole), 1)


def test_bits_of_other_numerics_are_said_by_the_attempt_and_refused_by_who_does_not_know_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("attempt", attempt_body(), log.fold())  # of a version that did not say it
    state = log.append("checkpoint", point_body(3), state, epoch=1)
    ours = wire.NUMERICS_VERSION
    with monkeypatch.context() as later:
        later.setattr(wire, "NUMERICS_VERSION", ours + 1)
        state = log.append("attempt", attempt_body(2, 3, numerics=ours + 1), state)
        state = log.append("checkpoint", point_body(6, 3), state, epoch=3)
        assert [state.numerics(c) for c in state.checkpoints] == [1, ours + 1]
        assert log.fold() == state
    seen = log.fold()
    assert (seen.n, seen.newer) == (2, True)
    with pytest.raises(OtherVersion, match=f"numerics has version {ours + 1}, .* reads versions 1 to {ours}"):
        seen.of_this_version()


@pytest.mark.parametrize("needs", [{"attempt": 1}, {"attempt": "2"}, {"attempt": True}, [2]])
def test_a_state_with_hostile_needs_is_damaged(needs: Any) -> None:
    log = RunLog(MemoryStore(), RUN, writer="d")
    state = log.append("attempt", attempt_body(), log.fold())
    data = codec.seal({**raw_map(state.to_bytes()), "v": 3, "needs": needs}, codec.RECORD_DEPTH + 2)
    with pytest.raises(Damaged):
        RunState.parse(data, RUN, 1)
