"""Pins: they hold against the collector, they go with their reader, and readers without rights read all the same."""

from __future__ import annotations

import itertools
import logging

import pytest

from checkpoint.collect.pins import pin, pinned, unpin
from checkpoint.errors import PinRefused, StoreUnavailable
from checkpoint.log import CheckpointInfo, RunLog, RunState
from checkpoint.store import Data, Store
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import attempt_body, point_body
from tests.support.s3_server import S3Server

RUN = "demo-0a1b2c"


def saved(store: Store, *steps: int) -> tuple[RunLog, RunState]:
    log = RunLog(store, RUN, writer="driver")
    state = log.append("attempt", attempt_body(), log.fold())
    for step in steps:
        state = log.append("checkpoint", point_body(step), state, epoch=1)
    return log, state


def at(state: RunState, step: int) -> CheckpointInfo:
    found = state.at_step(step)
    assert found is not None
    return found


def test_a_pin_lasts_as_long_as_its_reader(store: Store) -> None:
    log, state = saved(store, 10, 20)
    with pinned(store, RUN, at(state, 10), "export") as name:
        assert name is not None
        assert name.startswith("export-")
        assert dict(log.fold().pins) == {name: 2}
        state = log.append("tombstone", {"checkpoint": 2}, log.fold())
        assert not state.buried  # void: it is pinned
    assert not log.fold().pins
    with pytest.raises(ZeroDivisionError), pinned(store, RUN, at(state, 20), "verify"):
        raise ZeroDivisionError
    assert not log.fold().pins
    with pinned(store, RUN, at(state, 10), "replay") as first, pinned(store, RUN, at(state, 10), "replay") as second:
        assert first != second


def test_what_was_given_up_is_refused_before_it_is_read(store: Store) -> None:
    log, state = saved(store, 10, 20)
    info = at(state, 10)
    log.append("tombstone", {"checkpoint": 2}, state)
    with (
        pytest.raises(PinRefused, match=r"step 10 of run demo-0a1b2c was given up \(log record 4\)"),
        pinned(store, RUN, info, "export"),
    ):
        pytest.fail("it is read")
    assert log.fold().n == 4


def test_names_are_one_checkpoints_alone() -> None:
    log, state = saved(MemoryStore(), 10, 20)
    state = pin(log, at(state, 10), "best", state)
    assert pin(log, at(state, 10), "best").n == state.n  # again: nothing to write
    with pytest.raises(PinRefused, match="'best' of run demo-0a1b2c holds the checkpoint of step 10: remove it first"):
        pin(log, at(state, 20), "best")
    for name in ("", "a b", "-x", "ä", "x" * 151):
        with pytest.raises(PinRefused, match="must be letters"):
            pin(log, at(state, 20), name)
    state = unpin(log, "best")
    assert not state.pins
    assert unpin(log, "best").n == state.n


class Racing(MemoryStore):
    """Before the ``at``-th create the collector writes its tombstone."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count, self.race = at, 0, lambda: None

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        self.count += 1
        if self.count == self.at:
            self.race()
        return super().create(key, data, sha256=sha256)


def test_pin_and_tombstone_race_and_one_of_them_holds() -> None:
    store = Racing(4)
    log, state = saved(store, 10, 20)
    other = RunLog(store, RUN, writer="collector")
    store.race = lambda: other.append("tombstone", {"checkpoint": 2}, other.fold())  # type: ignore[assignment, return-value]
    with pytest.raises(PinRefused, match="given up"):
        pin(log, at(state, 10), "mine", state)
    assert set(log.fold().buried) == {2}


class Full(MemoryStore):
    """Takes ``room`` more objects."""

    room = 10**6

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        self.room -= 1
        if self.room < 0:
            raise StoreUnavailable("full")
        return super().create(key, data, sha256=sha256)


@pytest.mark.parametrize("room", [0, 1])
def test_readers_that_cannot_write_read_and_say_so(room: int, caplog: pytest.LogCaptureFixture) -> None:
    store = Full()
    log, state = saved(store, 10)
    store.room = room
    with caplog.at_level(logging.WARNING), pinned(store, RUN, at(state, 10), "verify") as name:
        assert (name is None) == (room == 0)
    assert ("is read without a pin" if room == 0 else "hotstage ckpt unpin demo-0a1b2c verify-") in caplog.text
    assert len(log.fold().pins) == room


def test_a_log_that_nobody_may_write_is_read_without_a_pin(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    _, state = saved(store, 10)
    store.create(f"runs/{RUN}/log/{3:020d}", b"torn")
    with pinned(store, RUN, at(state, 10), "export") as name:
        assert name is None
    assert "without a pin" in caplog.text


_numbers = itertools.count()


def test_a_read_only_identity_reads_without_a_pin(server: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    from checkpoint.store import open_store

    with server.identity("trainer"):
        store = open_store(server.url(f"pins-{next(_numbers)}"))
    _, state = saved(store, 10)
    with server.identity("reader"):
        reader = open_store(store.url)
    with pinned(reader, RUN, at(state, 10), "verify") as name:
        assert name is None
    assert "403 AccessDenied" in caplog.text
