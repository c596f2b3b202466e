"""Who runs the collector, and when: a command or a flow over the runs of a store, and a run's own driver where the
store is a folder of this machine, whose user may delete whatever he wrote.

On a service the driver has no right to delete: there the collector is a process of its own, with an identity of its
own (docs/policies/collector.json, k8s/base/collector.yaml).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from checkpoint.collect.collector import Collected, PassLimits, collect
from checkpoint.collect.probes import sweep_probes
from checkpoint.collect.retention import LEAST, Rules
from checkpoint.errors import CheckpointError, StoreUnavailable
from checkpoint.log import RunState
from checkpoint.store import Store
from checkpoint.store.file import FileStore

log = logging.getLogger(__name__)

EVERY_S = 60.0
"""Between passes of a driver, for graces that are over; and"""
SOON_S = 1.0
"""between those that a new checkpoint asks for."""


@dataclass(frozen=True)
class NotCollected:
    """A run whose pass ended early."""

    run: str
    error: CheckpointError


def collect_runs(
    store: Store,
    runs: Iterable[str],
    *,
    rules: Rules | None = None,
    dry_run: bool = False,
    grace_s: float | None = None,
    probes: bool = False,
) -> Iterator[Collected | NotCollected]:
    """A pass over each of these runs; one that cannot be collected does not keep the others. ``probes``: then over what
    probing the store left. StoreUnavailable where the store does not answer.
    """
    now: float | None = None
    for run in runs:
        try:
            done = collect(store, run, rules=rules, dry_run=dry_run, grace_s=grace_s)
        except StoreUnavailable:
            raise
        except CheckpointError as error:
            yield NotCollected(run, error)
            continue
        now = done.now if done.now is not None else now
        yield done
    if probes and now is not None:
        count = sweep_probes(store, now, PassLimits().objects, dry_run=dry_run)
        log.info("%d objects of old probes%s", count, " would go" if dry_run else " are gone")


def collects_itself(store: Store) -> bool:
    """Whether a driver collects its run: nobody else would, and it may."""
    return isinstance(store, FileStore)


@dataclass
class Collecting:
    """Passes over one run beside its driver, in a thread of their own that nobody waits for."""

    store: Store
    run: str
    clock: Callable[[], float] = time.monotonic
    collected: Callable[[Collected], None] = lambda _: None
    """Hears of each pass, in the thread."""
    _wake: threading.Condition = field(default_factory=threading.Condition)
    _state: RunState | None = None  # of the pass that is at work, or begins
    _began: float = -math.inf
    _saved: int = LEAST  # checkpoints in the log when the last pass began: with so few there is nothing to do
    _thread: threading.Thread | None = None
    _closing: bool = False

    @property
    def busy(self) -> bool:
        """Whether a pass is at work."""
        return self._state is not None

    def look(self, state: RunState) -> None:
        """The log as it is now: where it is time, a pass begins. Returns at once."""
        since, saved = self.clock() - self._began, len(state.checkpoints)
        if since < (SOON_S if saved > self._saved else EVERY_S) or saved <= LEAST or not self._wanted(state):
            return
        with self._wake:
            if self.busy:
                return
            self._state, self._began, self._saved = state, self.clock(), saved
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="collect", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def _wanted(self, state: RunState) -> bool:
        section = (state.asked_how or {}).get("checkpoint") or {}
        return collects_itself(self.store) and state.unreadable is None and section.get("keep") is not None

    def close(self) -> None:
        """No further pass; one that is at work may be cut short at any instant, as the process ends."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._state is not None)
                if self._closing:
                    return
                state = self._state
            try:
                self.collected(collect(self.store, self.run, state=state))
            except CheckpointError as error:
                log.warning("run %s: its old checkpoints are not collected now: %s", self.run, error)
            except Exception:  # a bug here costs room on the disk, never the run
                log.exception("run %s: its old checkpoints are not collected: a bug", self.run)
            with self._wake:
                self._state = None
