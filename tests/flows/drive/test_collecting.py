"""A driver's own collector: in a folder alone, never in the driver's way, and never the run's end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.collect.collector import Collected
from checkpoint.errors import StoreUnavailable
from checkpoint.log import RunLog, RunState
from checkpoint.store.file import FileStore
from checkpoint.store.memory import MemoryStore
from flows.drive.collecting import EVERY_S, SOON_S, Collecting
from tests.support.small_checkpoints import RUN, Clock, begin, save
from tests.support.wait import wait_for

KEEP: dict[str, Any] = {"checkpoint": {"keep": {"last": 2, "grace_s": 0.0}}}


class Held(FileStore):
    """A folder whose listings wait until they may."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.go, self.asked = threading.Event(), threading.Event()
        self.raises: Exception | None = None

    def list(self, prefix: str, start_after: str = "") -> Any:
        if threading.current_thread().name == "collect":
            self.asked.set()
            assert self.go.wait(60)
            if self.raises is not None:
                raise self.raises
        return super().list(prefix, start_after)


def run_of(store: FileStore | MemoryStore, how: dict[str, Any], *steps: int) -> tuple[RunLog, RunState]:
    log = RunLog(store, RUN, writer="driver")
    state = begin(log, log.fold(), how)
    for step in steps:
        state = save(store, log, state, step)
    return log, state


def test_a_look_returns_while_a_pass_is_at_work_and_a_pass_follows_news(tmp_path: Path) -> None:
    store, clock, done = Held(tmp_path), Clock(), list[Collected]()
    log, state = run_of(store, KEEP, 10, 20)
    collecting = Collecting(store, RUN, clock=clock, collected=done.append)
    collecting.look(state)
    assert not store.asked.is_set()  # two checkpoints: nothing to do
    state = save(store, log, state, 30)
    collecting.look(state)
    assert store.asked.wait(60)
    for _ in range(100):
        collecting.look(state)  # it comes back, whatever the pass waits for
    store.go.set()
    wait_for(lambda: len(done) == 1, "the pass")
    assert [info.step for info in done[0].given_up] == [10]
    state = save(store, log, log.fold(), 40)
    collecting.look(state)  # news, but too soon
    clock.now += SOON_S
    wait_for(lambda: not collecting.busy, "the thread to be idle")
    collecting.look(state)
    wait_for(lambda: len(done) == 2, "the pass")
    assert [info.step for info in done[1].given_up] == [20]
    wait_for(lambda: not collecting.busy, "the thread to be idle")
    clock.now += EVERY_S - 1
    collecting.look(state)
    assert not collecting.busy  # nothing new
    clock.now += 1
    collecting.look(state)
    wait_for(lambda: len(done) == 3, "the pass for what waits")
    collecting.close()


@pytest.mark.parametrize("error", [StoreUnavailable("away"), RuntimeError("a bug")])
def test_what_goes_wrong_is_said_and_the_next_pass_goes_on(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    store, clock, done = Held(tmp_path), Clock(), list[Collected]()
    _, state = run_of(store, KEEP, 10, 20, 30)
    store.raises = error
    store.go.set()
    collecting = Collecting(store, RUN, clock=clock, collected=done.append)
    with caplog.at_level(logging.WARNING):
        collecting.look(state)
        wait_for(lambda: store.asked.is_set() and not collecting.busy, "the pass to fail")
    assert "old checkpoints are not collected" in caplog.text
    store.raises = None
    clock.now += EVERY_S
    collecting.look(state)
    wait_for(lambda: len(done) == 1, "the pass")
    collecting.close()


def test_a_pass_that_is_cut_short_by_the_end_keeps_nobody(tmp_path: Path) -> None:
    store = Held(tmp_path)
    _, state = run_of(store, KEEP, 10, 20, 30)
    collecting = Collecting(store, RUN)
    collecting.look(state)
    assert store.asked.wait(60)
    collecting.close()  # comes back; the thread is a daemon
    store.go.set()
    wait_for(lambda: "collect" not in {t.name for t in threading.enumerate()}, "the thread to leave")


@pytest.mark.parametrize(
    ("how", "make"), [({"parallel": {}}, FileStore), (KEEP, lambda _: MemoryStore())], ids=["no rules", "no folder"]
)
def test_without_rules_and_on_a_service_it_never_begins(
    tmp_path: Path, how: dict[str, Any], make: Callable[[Path], Any]
) -> None:
    store = make(tmp_path)
    _, state = run_of(store, how, 10, 20, 30)
    collecting = Collecting(store, RUN)
    collecting.look(state)
    assert not collecting.busy
