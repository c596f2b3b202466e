"""What a log of 2,000 checkpoints costs, one of 20,000 costs too: requests, calls and bytes are counted, not timed."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pytest

from checkpoint import codec, keys
from checkpoint.errors import Damaged
from checkpoint.log import FOLD_EVERY, RunLog, RunState, condensed_key
from checkpoint.log.records import ended_map
from checkpoint.log.run_log import fold_base
from checkpoint.store import Info, MemoryStore
from tests.checkpoint.samples import attempt_body, point_body
from tests.support.long_log import STEP, calls, long_log

RUN = "demo-0a1b2c"
ATTEMPTS, SHORT, LONG = 20, 100, 1000


class Counted(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.asked = Counter[str]()

    def get(self, key: str, **more: Any) -> bytes:
        self.asked["get"] += 1
        return super().get(key, **more)

    def head(self, key: str) -> Info | None:
        self.asked["head"] += 1
        return super().head(key)


Made = tuple[Counted, RunState]


@pytest.fixture(scope="module")
def logs() -> tuple[Made, Made]:
    """Of 2,000 and of 20,000 checkpoints, by as many attempts."""
    made = []
    for each in (SHORT, LONG):
        store = Counted()
        made.append((store, long_log(store, RUN, ATTEMPTS, each, attempt_body)))
    return made[0], made[1]


def test_it_is_the_log_that_was_written(logs: tuple[Made, Made]) -> None:
    for store, state in logs:
        log = RunLog(store, RUN)
        assert log.fold() == log.fold(quick=True) == state
        assert state.unreadable is None
        assert [r.n for r in log.records(state.n - 300)] == list(range(state.n - 300, state.n + 1))


def test_a_look_that_finds_nothing_is_one_request(logs: tuple[Made, Made]) -> None:
    for store, state in logs:
        store.asked.clear()
        assert RunLog(store, RUN).fold(state) is state
        assert store.asked == {"get": 1}
    (short, a), (long, b) = logs
    assert calls(lambda: RunLog(long, RUN).fold(b)) == calls(lambda: RunLog(short, RUN).fold(a))


def test_a_takeover_asks_and_does_as_much(logs: tuple[Made, Made]) -> None:
    asked, work = [], []
    for store, _ in logs:
        store.asked.clear()
        work.append(calls(lambda store=store: RunLog(store, RUN).fold(quick=True)))  # type: ignore[misc]
        asked.append(sum(store.asked.values()))
    assert asked[1] <= asked[0] + 3 <= 14, asked  # each further object has twice the rows
    assert work[1] <= 1.2 * work[0], work


@pytest.mark.parametrize(
    "what",
    ["find", "checkpoint", "attempt", "at_step", "restore_candidates", "lineage", "append", "damaged", "upto"],
)
def test_what_is_asked_of_a_state_costs_as_much(what: str, logs: tuple[Made, Made]) -> None:
    work = []
    for store, state in logs:
        first = state.checkpoints[0]
        mine = RunState(**{f: getattr(state, f) for f in RunState.__dataclass_fields__})
        asks = {
            "find": lambda s=mine, c=first: s.find(c.step, c.epoch),
            "checkpoint": lambda s=mine, c=first: s.checkpoint(c.n),
            "attempt": lambda s=mine, c=first: s.attempt(c.epoch),
            "at_step": lambda s=mine: s.at_step(),
            "restore_candidates": lambda s=mine: s.restore_candidates()[0],
            "lineage": lambda s=mine: s.lineage()[-1],
            "append": lambda s=mine, st=store: _appended(st, s),
            "damaged": lambda s=mine, st=store, c=first: _appended(st, s, {"checkpoint": c.n, "reason": "x"}),
            "upto": lambda s=mine: s.upto(s.n // 2),
        }  # fmt: skip
        found: Any = None

        def ask(asked: Any = asks[what]) -> None:
            nonlocal found
            found = asked()

        work.append(calls(ask))
        assert found is not None
    assert work[1] <= work[0] + 30, work  # a few steps more of a search by halves


def _appended(store: Counted, state: RunState, damage: dict[str, Any] | None = None) -> RunState:
    """With one record more, in a store of its own."""
    log, body = RunLog(Forked(store), RUN, writer="w"), point_body(state.n * STEP + 1, state.epoch)
    return log.append("damaged" if damage else "checkpoint", damage or body, state, epoch=state.epoch)


class Forked(MemoryStore):
    """Takes writes for itself, and reads the rest elsewhere."""

    def __init__(self, below: MemoryStore) -> None:
        super().__init__()
        self.below = below

    def get(self, key: str, **more: Any) -> bytes:
        return self.below.get(key, **more)


def test_lookups_are_what_a_search_through_all_finds(logs: tuple[Made, Made]) -> None:
    (_, state), _ = logs
    infos = list(state.checkpoints)
    for info in infos[::97]:
        assert state.find(info.step, info.epoch) == state.checkpoint(info.n) == info
        assert state.attempt(info.epoch) == next(a for a in state.attempts if a.n == info.epoch)
        assert state.find(info.step + 1, info.epoch) is state.find(info.step, info.epoch + 1) is None
        assert state.at_step(info.step) == info
    assert [state.checkpoint(n) for n in (0, 1, state.n + 1)] == [None, None, None]
    assert list(state.lineage()) == sorted(infos, key=lambda c: c.step, reverse=True)


def test_what_is_written_grows_with_the_log_and_not_faster(logs: tuple[Made, Made]) -> None:
    for store, state in logs:
        folds = [i.bytes for i in store.list(keys.run_key(RUN, "folds") + "/")]
        assert len(folds) == state.n // FOLD_EVERY
        assert sum(folds) < 3.5 * len(state.to_bytes())  # each row 3.5 times at most, however long the log is
        assert max(folds) < 4 << 20
        assert len(store.get(condensed_key(RUN))) < FOLD_EVERY * 300


def test_every_row_is_in_the_folds_that_a_fold_builds_on() -> None:
    for k in range(1, 300):
        n, links = k * FOLD_EVERY, 0
        while n:
            below = fold_base(n)
            assert below < n
            assert below % FOLD_EVERY == 0
            n, links = below, links + 1
        assert links <= k // 32 + 6


@pytest.mark.parametrize("lost", ["record", "state", "state below"])
def test_a_fold_that_is_damaged_is_not_built_on(lost: str) -> None:
    """Nobody reads the record of an old fold, until the fold that would build on it: that has all rows instead."""
    store = Counted()
    state = long_log(store, RUN, 1, 7 * FOLD_EVERY - 1 - 1 - 6, attempt_body)  # fold 7 comes next, on 6, on 4
    log = RunLog(store, RUN, writer="w")
    names = {record.n: record.body["state"] for record in log.records(1) if record.kind == "fold"}
    number = {"record": 6, "state": 6, "state below": 4}[lost] * FOLD_EVERY
    key = keys.log_key(RUN, number) if lost == "record" else keys.run_key(RUN, names[number])
    store._objects[key] = store._objects[key][:-1] + b"?"
    state = log.append("checkpoint", point_body(10**6, state.epoch), state, epoch=state.epoch)
    assert state.n == 7 * FOLD_EVERY + 1
    store.asked.clear()
    assert RunLog(store, RUN).fold() == state
    assert sum(store.asked.values()) < 14  # from the newest fold, not from the beginning


# --- folds of the version before -------------------------------------------------------------------------------------


def first_version(state: RunState) -> bytes:
    """A folded state as version 1 wrote it: all rows in one object, a map a checkpoint."""
    return codec.seal(
        {
            "v": 1,
            "run": state.run,
            "n": state.n,
            "attempts": [[a.n, a.time, a.body] for a in state.attempts],
            "checkpoints": [[c.n, c.epoch, c.time, c.body()] for c in state.checkpoints],
            "void": [[c.n, c.epoch, c.time, c.body()] for c in state.void],
            "damaged": [[n, state.damaged[n]] for n in sorted(state.damaged)],
            "pins": dict(state.pins),
            "tombstones": sorted(state.tombstones),
            "interventions": [[i.n, i.epoch, i.time, i.body] for i in state.interventions],
            "ended": None if (e := state.ended) is None else [e.n, e.epoch, e.time, ended_map(e)],
        },
        codec.RECORD_DEPTH + 2,
    )


class FirstVersion(RunLog):
    """A writer of the version before."""

    def _store_state(self, state: RunState) -> dict[str, Any]:
        data = first_version(state)
        name = keys.fold_name(state.n + 1, "00")
        self.store.create(keys.run_key(self.run, name), data)
        return {"state": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def _condense(self, state: RunState, record: bytes) -> None:
        head = state.n.to_bytes(8, "little") + hashlib.sha256(record).digest()
        self.store.put(condensed_key(self.run), head + first_version(state))


def test_a_log_of_the_version_before_is_read_and_goes_on() -> None:
    store = Counted()
    old = FirstVersion(store, RUN, writer="old")
    state = old.append("attempt", attempt_body(), old.fold())
    names = {**point_body(5, 1), "manifest": "manifests/another/manifest"}
    state = old.append("checkpoint", names, state, epoch=1)
    state = old.append("checkpoint", names, state, epoch=1)  # void
    state = old.append("pin", {"name": "keep", "checkpoint": 2}, state)
    state = old.append("damaged", {"checkpoint": 2, "reason": "torn"}, state)
    while state.n < 2 * FOLD_EVERY + 9:
        state = old.append("checkpoint", point_body(state.n, 1), state, epoch=1)
    new = RunLog(store, RUN, writer="new")
    assert new.fold() == new.fold(quick=True) == state
    assert new.fold().checkpoints[0].manifest == "manifests/another/manifest"
    while state.n < 5 * FOLD_EVERY + 9:  # folds of this version build on those of the one before
        state = new.append("intervention", {"kind": "note"}, state)
    assert new.fold() == new.fold(quick=True) == state
    store.asked.clear()
    new.fold(quick=True)
    assert sum(store.asked.values()) < 12


def test_a_tombstone_that_the_version_before_folded_is_kept() -> None:
    """Its fold does not say when that came: after the fold below, on which the next one of this version builds."""
    store = Counted()
    old = FirstVersion(store, RUN, writer="old")
    state = old.append("attempt", attempt_body(), old.fold())
    while state.n < 2 * FOLD_EVERY + 3:
        state = old.append("checkpoint", point_body(state.n, 1), state, epoch=1)
    state = old.append("tombstone", {"checkpoint": 2}, state)
    new = RunLog(store, RUN, writer="new")
    state = new.fold(quick=True)
    while state.n < 3 * FOLD_EVERY + 1:
        state = new.append("intervention", {"kind": "note"}, state)
    assert new.fold().tombstones == {2}


def test_rows_that_are_in_other_objects_are_not_left_out() -> None:
    state = RunState(RUN, n=3 * FOLD_EVERY - 1)
    with pytest.raises(Damaged, match="its first 256 records are in other objects"):
        RunState.parse(state.to_bytes(FOLD_EVERY), RUN, state.n)
