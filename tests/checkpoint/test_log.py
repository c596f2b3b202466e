"""The run log: fences, conflicts, folds, the restore rule, unreadable records, and writers that race."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint import codec, keys
from checkpoint.errors import Conflict, Damaged, Halted, OtherVersion, StoreUnavailable
from checkpoint.log import FOLD_EVERY, KINDS, MAX_RECORD_BYTES, Record, RunLog, RunState, ended_body
from checkpoint.store import Info, Store, open_store
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import attempt_body, point_body
from tests.support.hostile_s3 import HostileS3, hostile_s3
from tests.support.mutations import mutate

RUN = "demo-0a1b2c"


def started(store: Store | None = None) -> tuple[RunLog, RunState]:
    log = RunLog(store or MemoryStore(), RUN, writer="driver")
    return log, log.append("attempt", attempt_body(), log.fold())


def raw(store: Store, n: int, kind: str, epoch: int, body: dict[str, Any]) -> None:
    """A record written past the rules."""
    assert store.create(keys.log_key(RUN, n), Record(n, kind, epoch, "zombie:0", 0.0, body).to_bytes())


# --- appending and folding -----------------------------------------------------------------------------------


def test_an_empty_log(store: Store) -> None:
    log = RunLog(store, RUN)
    state = log.fold()
    assert (state.n, state.epoch, state.newest_attempt, state.restore_candidates(), state.ended) == (
        0,
        0,
        None,
        (),
        None,
    )
    assert not log.exists()


def test_what_is_appended_is_what_is_folded(store: Store) -> None:
    log, state = started(store)
    assert state.epoch == 1
    state = log.append("checkpoint", point_body(10), state, epoch=1)
    state = log.append("pin", {"name": "keep", "checkpoint": 2}, state)
    state = log.append("intervention", {"kind": "skip", "from": 3, "to": 4}, state)
    state = log.append("damaged", {"checkpoint": 2, "reason": "chunk x"}, state)
    state = log.append("ended", {"outcome": "gave_up", "reason": "r", "step": 10, "state_digest": None}, state)
    assert log.fold() == state
    assert RunLog(store, RUN).fold() == state
    assert state.checkpoints[0].step == 10
    assert state.checkpoints[0].body() == point_body(10)
    assert dict(state.pins) == {"keep": 2}
    assert dict(state.damaged) == {2: "chunk x"}
    assert state.interventions[0].body["kind"] == "skip"
    assert state.ended is not None
    assert state.ended.outcome == "gave_up"
    state = log.append("attempt", attempt_body(), state)
    assert state.ended is None  # a new attempt opens it again
    assert state.epoch == 7
    assert log.exists()
    assert [r.kind for r in log.records()] == [
        "attempt",
        "checkpoint",
        "pin",
        "intervention",
        "damaged",
        "ended",
        "attempt",
    ]
    assert [r.n for r in log.records(5)] == [5, 6, 7]


def test_orders_and_the_class_of_an_end_survive_a_fold() -> None:
    log, state = started()
    order = {"kind": "order", "how": {"parallel": {"stages": 2}}, "by": "ann@a", "via": "train", "again": True}
    state = log.append("intervention", {"kind": "note"}, state)
    state = log.append("intervention", order, state)
    state = log.append("attempt", attempt_body(order=3), state)
    state = log.append("ended", ended_body(state, "gave_up", "restore: none is left", "restore"), state)
    again = RunState.parse(state.to_bytes(), RUN, state.n)
    assert again == state
    assert [o.n for o in again.orders] == [3]
    assert again.orders[0].body == order
    assert [a.order for a in again.attempts] == [0, 3]
    assert again.ended is not None
    assert again.ended.cls == "restore"
    old = {"outcome": "gave_up", "reason": "config: no", "step": 0, "state_digest": None}  # of an older version
    ended = log.append("ended", old, state).ended
    assert ended is not None
    assert ended.cls == ""


def test_a_record_is_a_msgpack_map_of_the_documented_entries() -> None:
    log, _ = started()
    import msgpack

    record = msgpack.unpackb(log.store.get(keys.log_key(RUN, 1)))
    assert set(record) == {"v", "n", "kind", "epoch", "writer", "time", "body", "digest"}
    assert record["writer"].startswith("driver:")


def test_incremental_fold_reads_only_what_is_new() -> None:
    class Counting(MemoryStore):
        gets = 0

        def get(self, key: str, **more: Any) -> bytes:
            Counting.gets += 1
            return super().get(key, **more)

    log, state = started(Counting())
    for step in range(20):
        state = log.append("checkpoint", point_body(step), state, epoch=1)
    Counting.gets = 0
    assert log.fold(state) == state
    assert Counting.gets == 1
    old = log.fold()
    state = log.append("unpin", {"name": "x"}, state)
    Counting.gets = 0
    assert log.fold(old) == state
    assert Counting.gets == 2


def test_the_loser_gets_the_newer_state_and_decides_again() -> None:
    log, state = started()
    other = RunLog(log.store, RUN, writer="other")
    won = other.append("pin", {"name": "a", "checkpoint": 2}, other.append("checkpoint", point_body(1), state, epoch=1))
    with pytest.raises(Conflict) as caught:
        log.append("intervention", {"kind": "x"}, state)
    assert caught.value.state == won
    assert log.append("intervention", {"kind": "x"}, caught.value.state).n == 4


def test_transact_asks_again_after_a_conflict() -> None:
    log, state = started()
    asked = []

    def decide(now: RunState) -> tuple[str, dict[str, Any]] | None:
        asked.append(now.n)
        if now.n == 1:  # somebody is faster
            RunLog(log.store, RUN, writer="fast").append("intervention", {"kind": "fast"}, now)
        return None if now.n == 3 else ("intervention", {"kind": "slow"})

    state = log.transact(decide, state)
    assert asked == [1, 2]
    assert [i.body["kind"] for i in state.interventions] == ["fast", "slow"]
    assert log.transact(decide) == state


@pytest.mark.parametrize(
    ("kind", "body", "says"),
    [
        ("pin", {"name": "x", "checkpoint": 1}, "which is none"),
        ("pin", {"name": "x", "checkpoint": 99}, "must be 1 to"),
        ("damaged", {"checkpoint": 1}, "which is none"),
        ("ended", {"outcome": "fine", "reason": "", "step": 1, "state_digest": None}, "'fine' is none of"),
        ("attempt", {"launch": "x"}, "no 'restore'"),
        ("attempt", attempt_body(checkpoint=1), "which is no valid checkpoint"),
        ("attempt", attempt_body(plan="AB" * 32), "lower-case hex"),
        ("attempt", attempt_body(nodes=0), "must be 1 to"),
        ("intervention", {}, "no 'kind'"),
        ("intervention", {"kind": "order", "by": "a", "via": "train"}, "no 'how'"),
        ("intervention", {"kind": "order", "how": [], "by": "a", "via": "train"}, "must be dict"),
        ("attempt", attempt_body(order=9), "'order' is 9, must be 1 to"),
        ("checkpoint", point_body(-1), "must be 0 to"),
        ("checkpoint", {**point_body(1), "manifest": "../../x"}, "not a name under manifests/"),
        ("checkpoint", {**point_body(1), "more": 1}, "unknown entry"),
    ],
)
def test_a_wrong_body_is_refused_before_it_is_written(kind: str, body: dict[str, Any], says: str) -> None:
    log, state = started()
    with pytest.raises(Damaged, match=says):
        log.append(kind, body, state, epoch=1)
    assert log.fold() == state


def test_a_record_too_large_or_without_a_form_is_refused() -> None:
    log, state = started()
    with pytest.raises(ValueError, match="limit is 65536"):
        log.append("intervention", {"kind": "x", "bulk": "y" * MAX_RECORD_BYTES}, state)
    with pytest.raises(ValueError, match="canonical"):
        log.append("intervention", {"kind": "x", "loss": float("nan")}, state)
    with pytest.raises(ValueError, match="none of"):
        log.append("fold", {}, state)
    with pytest.raises(ValueError, match="needs the epoch"):
        log.append("checkpoint", point_body(1), state)
    assert log.fold() == state


# --- fences --------------------------------------------------------------------------------------------------


def test_a_writer_of_an_older_epoch_halts() -> None:
    log, state = started()
    agent = RunLog(log.store, RUN, writer="agent-0")
    seen = agent.fold()
    newer = log.append("attempt", attempt_body(), state)
    with pytest.raises(Halted, match="belongs to attempt 1, but attempt 2 holds the run") as caught:
        agent.append("checkpoint", point_body(10), seen, epoch=1)  # found out by losing the number
    assert caught.value.state == newer
    with pytest.raises(Halted):
        agent.append("checkpoint", point_body(10), newer, epoch=1)  # or by looking
    assert log.fold() == newer


def test_a_checkpoint_record_of_an_older_epoch_is_void() -> None:
    log, state = started()
    state = log.append("checkpoint", point_body(10), state, epoch=1)
    state = log.append("attempt", attempt_body(checkpoint=2, step=10), state)
    raw(log.store, 4, "checkpoint", 1, point_body(20))
    state = log.fold(state)
    assert [c.step for c in state.checkpoints] == [10]
    assert [c.step for c in state.void] == [20]
    assert [c.n for c in state.restore_candidates()] == [2]
    assert state.find(20, 1) is None


def test_a_second_record_of_the_same_checkpoint_is_void() -> None:
    log, state = started()
    state = log.append("checkpoint", point_body(10), state, epoch=1)
    state = log.append("checkpoint", point_body(10), state, epoch=1)
    assert [c.n for c in state.checkpoints] == [2]
    assert [c.n for c in state.void] == [3]


@pytest.mark.parametrize(("kind", "epoch"), [("checkpoint", 2), ("pin", 3), ("attempt", 1), ("attempt", 0)])
def test_a_record_with_an_impossible_epoch_is_unreadable(kind: str, epoch: int) -> None:
    log, _ = started()
    log.store.create(keys.log_key(RUN, 2), codec.seal(
        {"v": 1, "n": 2, "kind": kind, "epoch": epoch, "writer": "z:0", "time": 0.0,
         "body": attempt_body() if kind == "attempt" else point_body(1)}))  # fmt: skip
    assert log.fold().unreadable is not None


# --- the restore point ---------------------------------------------------------------------------------------


class Story:
    """A log told step by step."""

    def __init__(self) -> None:
        self.log = RunLog(MemoryStore(), RUN, writer="driver")
        self.state = self.log.fold()

    def attempt(self, checkpoint: int | None = None) -> int:
        named = None if checkpoint is None else self.state.checkpoint(checkpoint)
        self.state = self.log.append(
            "attempt", attempt_body(checkpoint, 0 if named is None else named.step), self.state
        )
        return self.state.n

    def save(self, step: int) -> int:
        self.state = self.log.append(
            "checkpoint", point_body(step, self.state.epoch), self.state, epoch=self.state.epoch
        )
        return self.state.n

    def mark(self, kind: str, checkpoint: int, **more: str) -> None:
        self.state = self.log.append(kind, {"checkpoint": checkpoint, **more}, self.state)

    @property
    def steps(self) -> list[int]:
        return [c.step for c in self.state.restore_candidates()]


def test_restore_the_newest_after_the_newest_attempt() -> None:
    s = Story()
    s.attempt()
    assert s.steps == []
    s.save(10)
    s.save(20)
    s.save(30)
    assert s.steps == [30, 20, 10]


def test_a_late_commit_of_an_earlier_step_does_not_pass_a_later_one() -> None:
    s = Story()
    s.attempt()
    s.save(20)
    s.save(10)
    assert s.steps == [20, 10]


def test_a_second_crash_right_after_a_rollback_goes_back_to_the_rollbacks_point() -> None:
    s = Story()
    s.attempt()
    ten = s.save(10)
    s.save(20)
    s.save(30)
    s.attempt(ten)
    assert s.steps == [10]  # not 30, though its record is newer than 10's
    s.attempt(ten)
    assert s.steps == [10]
    s.save(20)
    assert s.steps == [20, 10]


def test_what_a_rollback_left_behind_is_never_picked_even_after_damage() -> None:
    s = Story()
    s.attempt()
    ten, twenty = s.save(10), s.save(20)
    s.save(30)
    s.attempt(twenty)
    fresh = s.save(25)
    assert s.steps == [25, 20, 10]
    s.mark("damaged", fresh, reason="torn")
    assert s.steps == [20, 10]
    s.mark("damaged", twenty, reason="torn")
    assert s.steps == [10]
    s.mark("damaged", ten, reason="torn")
    assert s.steps == []
    assert [c.step for c in s.state.lineage()] == [25, 20, 10]


def test_a_rollback_to_the_very_beginning_forgets_everything() -> None:
    s = Story()
    s.attempt()
    s.save(10)
    s.attempt(None)
    assert s.steps == []
    s.save(5)
    assert s.steps == [5]


def test_candidates_by_step() -> None:
    s = Story()
    s.attempt()
    s.save(10)
    s.save(20)
    found = s.state.at_step(10)
    assert found is not None
    assert found.step == 10
    newest = s.state.at_step()
    assert newest is not None
    assert newest.step == 20
    assert s.state.at_step(15) is None


def test_tombstones_are_void_for_what_is_pinned_or_named() -> None:
    s = Story()
    s.attempt()
    ten, twenty, thirty = s.save(10), s.save(20), s.save(30)
    s.mark("pin", ten, name="release")
    s.attempt(thirty)
    for checkpoint in (ten, twenty, thirty):
        s.mark("tombstone", checkpoint)
    assert s.state.tombstones == {twenty}
    assert s.steps == [30, 10]
    s.mark("pin", twenty, name="late")  # the collector may be at work: too late
    assert dict(s.state.pins) == {"release": ten}
    s.state = s.log.append("unpin", {"name": "release"}, s.state)
    s.mark("tombstone", ten)
    assert s.state.tombstones == {ten, twenty}
    assert s.steps == [30]


# --- records that cannot be read -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "other number", "unknown kind", "newer schema"])
def test_an_unreadable_record_halts_writers_and_readers_keep_what_came_before(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path.as_uri())
    log, state = started(store)
    before = log.append("checkpoint", point_body(10), state, epoch=1)
    last = log.append("checkpoint", point_body(20), before, epoch=1)
    path = store.local_path(keys.log_key(RUN, 3))
    assert path is not None
    data = bytearray(path.read_bytes())
    head = {"v": 1, "n": 3, "kind": "pin", "epoch": 1, "writer": "z:0", "time": 0.0, "body": {}}
    match how:
        case "flip":
            data[len(data) // 2] ^= 4
        case "cut":
            del data[-1:]
        case "empty":
            data.clear()
        case "other number":
            data = bytearray(codec.seal({**head, "n": 4}))
        case "unknown kind":
            data = bytearray(codec.seal({**head, "kind": "dance"}))
        case "newer schema":
            data = bytearray(codec.seal({**head, "v": 2}))
    path.write_bytes(data)
    torn = log.fold()
    assert torn.unreadable is not None
    assert "log record 3" in torn.unreadable
    assert torn.n == 2
    assert [c.step for c in torn.restore_candidates()] == [10]
    assert "nobody may write" in caplog.text
    for state in (torn, before):  # also a writer who has not seen it
        with pytest.raises(Halted, match="log record 3"):
            log.append("intervention", {"kind": "x"}, state)
    assert store.head(keys.log_key(RUN, 4)) is None
    assert log.fold(last) == last  # who has read it before goes on


def test_a_deleted_record_is_noticed(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    log, state = started(store)
    for step in range(5):
        state = log.append("checkpoint", point_body(step), state, epoch=1)
    store.delete(keys.log_key(RUN, 3))
    torn = log.fold()
    assert torn.n == 2
    assert torn.unreadable is not None
    assert "record 3 is missing" in torn.unreadable
    with pytest.raises(Halted):
        log.append("intervention", {"kind": "x"}, torn)


# --- folds ---------------------------------------------------------------------------------------------------


def long_log(store: Store, records: int) -> tuple[RunLog, RunState]:
    log, state = started(store)
    rng = random.Random(3)
    while state.n < records:
        kind = rng.choice(["checkpoint"] * 6 + ["attempt", "pin", "damaged", "intervention", "ended", "tombstone"])
        some = rng.choice(state.checkpoints).n if state.checkpoints else None
        body: dict[str, Any] | None = None
        match kind:
            case "checkpoint":
                body = point_body(state.n * 10, state.epoch)
            case "attempt":
                body = attempt_body(some, 5, how={"a": {"b": {"c": [1, {"d": 2.5}]}}}, cause={"code": 75})
            case "pin" if some:
                body = {"name": f"p{rng.randrange(5)}", "checkpoint": some}
            case "damaged" if some:
                body = {"checkpoint": some, "reason": "x"}
            case "tombstone" if some:
                body = {"checkpoint": some}
            case "intervention":
                body = {"kind": "skip", "n": 3}
            case "ended":
                body = {"outcome": "cancelled", "reason": "r", "step": 3, "state_digest": "0" * 64}
        if body is not None:
            state = log.append(kind, body, state, epoch=state.epoch if kind == "checkpoint" else None)
    return log, state


@pytest.fixture(scope="module")
def long() -> tuple[RunLog, RunState]:
    return long_log(MemoryStore(), 3 * FOLD_EVERY + 100)


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


# --- racing --------------------------------------------------------------------------------------------------


def test_writers_that_race_all_get_in_once(store: Store) -> None:
    _, state = started(store)
    writers, each = 6, 6

    def work(number: int) -> None:
        log = RunLog(store, RUN, writer=f"w{number}")
        at = state
        for count in range(each):
            done = False

            def decide(_: RunState) -> tuple[str, dict[str, Any]] | None:
                return None if done else ("intervention", {"kind": f"{number}-{count}"})  # noqa: B023 (called at once)

            at = log.transact(decide, at)
            done = True

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(work, range(writers)))
    final = RunLog(store, RUN).fold()
    assert final.n == 1 + writers * each
    assert Counter(i.body["kind"] for i in final.interventions) == Counter(
        f"{n}-{c}" for n in range(writers) for c in range(each)
    )


def test_two_drivers_race_for_an_attempt_and_one_holds_the_run(store: Store) -> None:
    logs = [RunLog(store, RUN, writer=f"driver-{n}") for n in range(8)]
    state = logs[0].fold()

    def start(log: RunLog) -> RunState | None:
        try:
            return log.append("attempt", attempt_body(launch=log._writer), state)
        except Conflict:
            return None

    with ThreadPoolExecutor(len(logs)) as pool:
        won = [s for s in pool.map(start, logs) if s is not None]
    assert len(won) == 1
    assert won[0] == logs[0].fold()


class Racing:
    """Writers with stale states, in any order: what a crash, a partition or a slow pod makes of them."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.states = {w: RunState(RUN) for w in ("driver-a", "driver-b", "agent-0", "agent-1")}
        self.epochs = dict.fromkeys(self.states, 0)
        self.accepted: dict[int, str] = {}
        self.problems: list[str] = []

    def move(self, who: str, what: str) -> None:
        log = RunLog(self.store, RUN, writer=who)
        state = self.states[who]
        if what == "fold":
            self.states[who] = log.fold(state)
            return
        if what == "join":
            self.epochs[who] = state.epoch
            return
        agent = who.startswith("agent")
        try:
            if agent:
                if not self.epochs[who]:
                    return
                body = point_body(state.n, self.epochs[who])
                self.states[who] = log.append("checkpoint", body, state, epoch=self.epochs[who])
            else:
                options = state.restore_candidates()
                named = options[0].n if options and what == "attempt" else None
                kind = "attempt" if what in ("attempt", "scratch") else "intervention"
                body = attempt_body(named) if kind == "attempt" else {"kind": "note"}
                self.states[who] = log.append(kind, body, state)
        except Conflict as conflict:
            self.problems += [] if conflict.state.n > state.n else [f"{who}: a conflict with nothing newer"]
            self.states[who] = conflict.state
        except Halted as halted:
            right = agent and halted.state is not None and halted.state.epoch > self.epochs[who]
            self.problems += [] if right else [f"{who}: halted without a newer epoch"]
            self.epochs[who] = 0
        else:
            assert self.states[who].n not in self.accepted
            self.accepted[self.states[who].n] = who

    def check(self) -> None:
        truth = RunLog(self.store, RUN).fold()
        records = list(RunLog(self.store, RUN).records())
        assert truth.unreadable is None
        assert self.problems == []
        assert [r.n for r in records] == list(range(1, truth.n + 1))
        assert {r.n: r.writer.split(":")[0] for r in records if r.kind != "fold"} == self.accepted
        newest = 0
        for record in records:  # no checkpoint of a fenced epoch was ever accepted
            newest = record.n if record.kind == "attempt" else newest
            assert record.kind != "checkpoint" or record.epoch == newest
        for state in self.states.values():
            assert RunLog(self.store, RUN).fold(state) == truth
        line = truth.restore_candidates()
        assert len({c.n for c in line}) == len(line)
        assert all(a.n > b.n for a, b in itertools.pairwise(line))


moves = st.lists(
    st.tuples(
        st.sampled_from(["driver-a", "driver-b", "agent-0", "agent-1"]),
        st.sampled_from(["fold", "join", "write", "write", "attempt", "scratch"]),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves)
def test_any_interleaving_of_stale_writers_keeps_the_rules(story: list[tuple[str, str]]) -> None:
    racing = Racing()
    for who, what in story:
        racing.move(who, what)
    racing.check()


# --- unclear answers -----------------------------------------------------------------------------------------


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileS3]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    with hostile_s3() as running:
        yield running


def test_a_create_whose_answer_was_lost_is_settled_by_its_token(peer: HostileS3) -> None:
    log, state = started(open_store(peer.url()))
    for fault in ("done-reset", "done-500", "done-409", "done-412", "500", "reset"):
        peer.faults.append(fault)  # type: ignore[arg-type]
        state = log.append("intervention", {"kind": fault}, state)
    assert state.n == 7
    assert log.fold() == state


def test_a_create_that_another_won_behind_an_unclear_answer_is_a_conflict(peer: HostileS3) -> None:
    store = open_store(peer.url())
    log, state = started(store)
    other = Record(2, "intervention", 1, "other:1", 0.0, {"kind": "theirs"}).to_bytes()
    name = f"p/{keys.log_key(RUN, 2)}"

    class Late(dict[str, bytes]):
        def setdefault(self, key: str, default: Any = None) -> Any:
            return super().setdefault(key, other if key == name else default)

    peer.objects = Late(peer.objects)
    peer.faults.append("other-500")
    with pytest.raises(Conflict) as caught:
        log.append("intervention", {"kind": "mine"}, state)
    assert [i.body["kind"] for i in caught.value.state.interventions] == ["theirs"]


def test_a_store_that_hides_what_it_has_is_unavailable() -> None:
    class Blind(MemoryStore):
        def create(self, key: str, data: Any, *, sha256: bytes | None = None) -> bool:
            return False

        def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
            return iter(())

    log = RunLog(Blind(), RUN)
    with pytest.raises(StoreUnavailable, match="does not show it"):
        log.append("attempt", attempt_body(), log.fold())


# --- hostile bytes with right digests ------------------------------------------------------------------------


def survives(parse: Callable[[bytes], object], value: dict[str, Any], rng: random.Random) -> bool:
    """Parse the sealed value with one or two mutations: True where it passed; only these two errors may come out."""
    changed = value
    for _ in range(rng.randrange(1, 3)):
        changed = mutate(rng, changed)
    if not isinstance(changed, dict) or len(changed) > 14:
        return False
    try:
        data = codec.seal(changed, 500)
    except ValueError:  # a number or text that nobody can write
        return False
    try:
        parse(data)
    except (Damaged, OtherVersion):
        return False
    return True


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


def test_the_log_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="checkpoint")
    started()
    assert "log record 1, attempt, epoch 1" in caplog.text


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
