"""The run log: what is appended and folded, fences, conflicts, unreadable records, unclear answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint import codec, keys
from checkpoint.errors import Conflict, Damaged, Halted, StoreUnavailable
from checkpoint.log import MAX_RECORD_BYTES, Record, RunLog, RunState, ended_body
from checkpoint.store import Info, Store, open_store
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import RUN, attempt_body, point_body, started
from tests.support.hostile_s3 import HostileS3


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


# --- unclear answers -----------------------------------------------------------------------------------------


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


def test_the_log_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="checkpoint")
    started()
    assert "log record 1, attempt, epoch 1" in caplog.text
