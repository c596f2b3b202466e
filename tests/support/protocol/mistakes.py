"""Mistakes that the shipped code does not make, each made on purpose inside a block, for those who look for such.

Each says what is left out, where. They are put into the code from outside (docs/adr/0004).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import checkpoint.agent.commit as commit_module
import checkpoint.collect.collector as collector_module
import flows.drive.decide as decide_module
import flows.drive.fork as fork_module
import flows.drive.loop as loop_module
from checkpoint.agent import effects as do
from checkpoint.agent.machine import Machine
from checkpoint.agent.slots import Slot
from checkpoint.amendments import NONE, Amendments
from checkpoint.errors import Conflict, StoreUnavailable
from checkpoint.log import RunLog, RunState
from checkpoint.log.records import Record, parse_checkpoint
from checkpoint.log.state import Fold
from checkpoint.store.base import Data
from flows.drive.views import Decision, LogView, Look, Policy, Restore
from tests.support.protocol.hub import swapped


@contextmanager
def no_fence_of_writers() -> Iterator[None]:
    """A writer does not halt where a newer attempt holds the run."""
    checked = RunLog._may_write

    def may_write(self: RunLog, state: RunState, epoch: int | None) -> None:
        checked(self, state, None)

    with swapped(RunLog, "_may_write", may_write):
        yield


@contextmanager
def no_fence_of_readers() -> Iterator[None]:
    """A checkpoint record of an older attempt counts."""
    add = Fold.add

    def any_epoch(self: Fold, r: Record) -> Fold:
        if r.kind == "checkpoint" and self.attempts and r.epoch != self.attempts[-1].n:
            self.checkpoints.add(parse_checkpoint(r.n, r.epoch, r.time, r.body))
            self.n = r.n
            return self
        return add(self, r)

    with swapped(Fold, "add", any_epoch):
        yield


@contextmanager
def no_fence() -> Iterator[None]:
    """Neither who writes nor who reads looks at the epoch."""
    with no_fence_of_writers(), no_fence_of_readers():
        yield


@contextmanager
def unclear_is_done(store: type) -> Iterator[None]:
    """An answer that did not come is taken for done: no read-back."""
    create = store.create

    def hopeful(self: Any, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        try:
            return bool(create(self, key, data, sha256=sha256))
        except StoreUnavailable:
            return True

    with swapped(store, "create", hopeful):
        yield


@contextmanager
def acts_without_winning() -> Iterator[None]:
    """A driver that loses a record's number goes on as if it had won it."""
    create = RunLog._create

    def winner(self: RunLog, kind: str, body: Mapping[str, Any], state: RunState, record_epoch: int,
               epoch: int | None) -> RunState:  # fmt: skip
        try:
            return create(self, kind, body, state, record_epoch, epoch)
        except Conflict:
            if kind != "attempt":
                raise
            n = state.n + 1
            return state.apply(Record(n, kind, n, "mistaken:1", 0.0, dict(body)))

    with swapped(RunLog, "_create", winner):
        yield


@contextmanager
def forgets_what_was_saved_since() -> Iterator[None]:
    """A driver begins again where the attempt before began."""
    choose = decide_module.choose_restore

    def forgetful(log: LogView, nodes: Any, policy: Any, *, use_slots: bool) -> Restore:
        if not log.attempts:
            return choose(log, nodes, policy, use_slots=use_slots)
        newest = log.attempts[-1]
        return Restore(newest.restore_checkpoint, newest.restore_step)

    with swapped(decide_module, "choose_restore", forgetful):
        yield


@contextmanager
def record_before_manifest() -> Iterator[None]:
    """The log names a manifest that is written afterwards."""

    class Late:
        read, TooLarge = commit_module.pages.read, commit_module.pages.TooLarge

        @staticmethod
        def write(store: Any, run: str, name: str, data: Iterable[bytes], label: str) -> tuple[bytes, bool]:
            return b"".join(data), True

    with swapped(commit_module, "pages", Late):
        yield


@contextmanager
def claims_are_not_exclusive(where: Any) -> Iterator[None]:
    """Whoever starts a node believes that it is its own."""

    def mine(store: Any, options: Any, gang: Any, cancelled: Any) -> Any:
        return options.place

    with swapped(where, "claim", mine):
        yield


@contextmanager
def safe_before_the_record() -> Iterator[None]:
    """Ranks hear COMMITTED once their part is there."""

    def hasty(self: Machine) -> None:
        attempt = self.attempt
        for rank, step in attempt.finals.items() if attempt is not None else ():
            peer = attempt.peers.get(rank) if attempt is not None else None
            if attempt is not None and peer is not None:
                self._do(do.Send(peer, "COMMITTED", rank=rank, epoch=attempt.epoch, a=step))

    with swapped(Machine, "_tell_committed", hasty):
        yield


@contextmanager
def slots_are_not_held() -> Iterator[None]:
    """What is uploaded may be refilled meanwhile, and nobody looks, at its checksums neither."""
    with (
        swapped(Slot, "hold", lambda self, expected: None),
        swapped(Slot, "check", lambda self, expected: None),
        swapped(Slot, "verify", lambda self, ranges: None),
    ):
        yield


@contextmanager
def collects_at_once() -> Iterator[None]:
    """A collector without grace."""
    with swapped(collector_module._Pass, "_wait_s", lambda self, n: 0.0):
        yield


@contextmanager
def collects_what_is_pinned() -> Iterator[None]:
    """Pins are not looked at, in the log and in the collector."""
    add = Fold.add

    def no_pins(self: Fold, r: Record) -> Fold:
        found = add(self, r)
        if r.kind == "pin":
            self.pins.clear()
        return found

    with swapped(Fold, "add", no_pins):
        yield


@contextmanager
def collects_what_is_being_saved() -> Iterator[None]:
    """What no record names is an orphan, also of the attempt that runs."""
    doom = collector_module._Pass._doom

    def hasty(self: Any, point: tuple[int, int]) -> tuple[int, str] | None:
        found: tuple[int, str] | None = doom(self, point)
        if found is None and self.state.find(*point) is None:
            return self.state.epoch, "an orphan"
        return found

    with swapped(collector_module._Pass, "_doom", hasty):
        yield


@contextmanager
def a_line_by_records() -> Iterator[None]:
    """What lies before a checkpoint is what was recorded before it, whatever its step."""

    def line(self: RunState) -> Iterator[Sequence[int]]:
        points, attempt, before = self.checkpoints, self.newest_attempt, self.n + 1
        if (start := self.start) is not None:
            if (row := points.row_of(start.checkpoint or 0)) is None:
                return
            yield (row,)
            attempt, before = self.attempt(points.epoch[row]), points.n[row]
        while attempt is not None:
            own = [row for row in points.rows_of(attempt.n) if points.n[row] < before]
            yield sorted(own, key=points.step.__getitem__, reverse=True)
            if (named := points.row_of(attempt.checkpoint or 0)) is None:
                return
            yield (named,)
            attempt, before = self.attempt(points.epoch[named]), points.n[named]

    with swapped(RunState, "_line", line):
        yield


@contextmanager
def forks_without_a_pin() -> Iterator[None]:
    """The collector of the parent does not hear of its child."""
    with swapped(fork_module, "pin", lambda *_: None):
        yield


@contextmanager
def forks_without_amendments() -> Iterator[None]:
    """A child does not keep what its parent was ordered."""
    with swapped(fork_module, "_kept", lambda *_, **__: NONE):
        yield


@contextmanager
def trains_by_older_orders() -> Iterator[None]:
    """An attempt has the amendments of the one before."""
    body = loop_module.attempt_body

    def older(*what: Any, amendments: Amendments = NONE, **more: Any) -> dict[str, Any]:
        return body(*what, **more)

    with swapped(loop_module, "attempt_body", older):
        yield


@contextmanager
def keeps_its_own_layout() -> Iterator[None]:
    """A driver goes on in the How that it was started with, whatever was ordered."""
    with swapped(loop_module, "followed", lambda store, state, prepared, say: prepared):
        yield


@contextmanager
def heals_an_older_attempt() -> Iterator[None]:
    """What an attempt's steps said is taken for the newest one's."""
    healed = decide_module.healed

    def stale(log: LogView, seen: Look, policy: Policy, decision: Decision) -> Decision | None:
        if seen.exploded is not None and log.attempts:
            seen = replace(seen, exploded=replace(seen.exploded, epoch=log.attempts[-1].epoch))
        return healed(log, seen, policy, decision)

    with swapped(decide_module, "healed", stale):
        yield
