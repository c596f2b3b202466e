"""Folded states: every 256 records, in a handful of requests, damaged or hostile."""

from __future__ import annotations

import random
from typing import Any

import pytest

from checkpoint import codec, keys
from checkpoint.errors import Conflict
from checkpoint.log import FOLD_EVERY, KINDS, MAX_RECORD_BYTES, Record, RunLog, RunState
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import RUN, attempt_body, point_body, started
from tests.support.mutations import survives


def test_a_fold_comes_every_256_and_says_what_folding_says(long: tuple[RunLog, RunState]) -> None:
    log, state = long
    kinds = {r.n: r.kind for r in log.records()}
    assert [n for n, kind in kinds.items() if kind == "fold"] == [256, 512, 768]
    assert log.fold() == state == log.fold(RunState(RUN))


def test_a_reader_starts_at_the_newest_fold(long: tuple[RunLog, RunState]) -> None:
    log, state = long
    asked: list[str] = []

    class Watching:
        def __getattr__(self, name: str) -> Any:
            found = getattr(log.store, name)
            if name not in ("get", "head", "list"):
                return found

            def call(key: str, *args: Any, **more: Any) -> Any:
                asked.append(f"{name} {key}")
                return found(key, *args, **more)

            return call

    watching: Any = Watching()
    assert RunLog(watching, RUN).fold() == state
    read = [a for a in asked if a.startswith("get") and "/log/" in a]
    assert len(read) == state.n - 768 + 2  # the fold, what follows, and the absent one
    assert sum(a.startswith("head") for a in asked) <= 5
    assert sum(a.startswith("list") for a in asked) == 1


@pytest.mark.parametrize("how", ["flip", "gone"])
def test_a_damaged_fold_is_said_and_an_earlier_one_used(
    how: str, long: tuple[RunLog, RunState], caplog: pytest.LogCaptureFixture
) -> None:
    source, state = long
    store = MemoryStore()
    for info in source.store.list(""):
        store.create(info.key, source.store.get(info.key))
    names = [i.key for i in store.list(keys.run_key(RUN, "folds") + "/")]
    assert len(names) == 3
    for broken in reversed(names):
        data = bytearray(store.get(broken))
        data[len(data) // 3] ^= 1
        store.delete(broken)
        if how == "flip":
            store.create(broken, data)
        caplog.clear()
        assert RunLog(store, RUN).fold() == state
        assert "is of no use" in caplog.text


def test_a_writer_that_loses_at_a_fold_gets_a_conflict() -> None:
    log, state = started()
    while state.n < FOLD_EVERY - 1:
        state = log.append("intervention", {"kind": "x"}, state)
    other = RunLog(log.store, RUN, writer="other").append("intervention", {"kind": "y"}, state)
    assert other.n == FOLD_EVERY + 1
    with pytest.raises(Conflict) as caught:
        log.append("intervention", {"kind": "z"}, state)
    assert caught.value.state == other


# --- hostile bytes with right digests ------------------------------------------------------------------------


def test_mutated_records_end_in_damaged(long: tuple[RunLog, RunState]) -> None:
    log, _ = long
    rng = random.Random(5)
    state = RunState(RUN)
    seen: set[str] = set()
    for record in log.records():
        data = log.store.get(keys.log_key(RUN, record.n))
        value = codec.unseal(data, "x", max_bytes=MAX_RECORD_BYTES)
        for _ in range(300 if record.kind not in seen else 2):
            survives(lambda d, s=state, n=record.n: s.apply(Record.parse(d, n)), value, rng)  # type: ignore[misc]
        seen.add(record.kind)
        state = state.apply(record)
    assert seen == set(KINDS) - {"unpin"}


def test_mutated_folded_states_end_in_damaged(long: tuple[RunLog, RunState]) -> None:
    _, state = long
    small = log_state = RunState(RUN)
    for record in list(long[0].records())[:40]:
        small = log_state = log_state.apply(record)
    assert RunState.parse(state.to_bytes(), RUN, state.n) == state
    value = codec.unseal(small.to_bytes(), "x", max_bytes=1 << 26, max_depth=codec.MAX_DEPTH + 2)
    rng = random.Random(6)
    for _ in range(3000):
        survives(lambda d: RunState.parse(d, RUN, small.n), value, rng)


# --- a state that a writer left lately ---------------------------------------------------------------------


def test_nothing_new_is_the_state_itself() -> None:
    log, state = started()
    assert log.fold(state) is state


class Asked(MemoryStore):
    """Counts what is asked of it."""

    asked = 0

    def get(self, key: str, **more: Any) -> bytes:
        self.asked += 1
        return super().get(key, **more)

    def head(self, key: str) -> Any:
        self.asked += 1
        return super().head(key)


def test_a_quick_fold_is_the_fold_in_a_handful_of_requests() -> None:
    log, state = started(Asked())
    for step in range(30):
        state = log.append("checkpoint", point_body(step), state, epoch=1)
        store = log.store
        assert isinstance(store, Asked)
        store.asked = 0
        assert log.fold(quick=True) == state == log.fold(state, quick=True)
        if state.n >= 4:
            assert store.asked <= 2 + 3 + 1 + 1 + 1
    assert log.fold() == state


@pytest.mark.parametrize("how", ["other log", "rubbish", "cut", "too far", "empty"])
def test_a_condensed_state_that_is_not_of_this_log_is_not_taken(how: str) -> None:
    log, state = started()
    for step in range(10):
        state = log.append("checkpoint", point_body(step), state, epoch=1)
    key = keys.run_key(RUN, "live", "fold")
    kept = log.store.get(key)
    other, theirs = started()
    for step in range(10):
        theirs = other.append("checkpoint", point_body(step + 100), theirs, epoch=1)
    log.store.put(
        key,
        {
            "other log": other.store.get(key),
            "rubbish": bytes(range(256)) * 4,
            "cut": kept[:-5],
            "too far": (99).to_bytes(8, "little") + kept[8:],
            "empty": b"",
        }[how],
    )
    assert log.fold(quick=True) == state


def test_an_attempt_holds_the_largest_and_deepest_how_that_a_spec_may_have() -> None:
    """With the longest last words beside it; also in a folded state."""
    log, state = started()
    deep: Any = "x"
    for level in range(20):
        deep = {"a": deep} if level % 2 else [deep]
    how = {"launch": {"pod_patch": {"deep": deep, "long": "y" * (24 << 10)}}}
    cause = {"class": "bug", "text": "w" * (16 << 10), "mend": "", "step": 3, "words": {"why": "w" * (16 << 10)}}
    state = log.append("attempt", attempt_body() | {"how": how, "cause": cause}, state)
    assert log.fold() == state
    assert log.fold().attempts[-1].body["how"] == how
    assert RunState.parse(state.to_bytes(), RUN, state.n) == state
