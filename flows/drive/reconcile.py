"""Take over what nobody drives: every open run on a cluster gets a driver in this process.

A driver keeps nothing, and two beside each other are harmless (who loses a log record decides again), so nobody has to
know whether another one lives. Local runs are left alone: only their machine can drive them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.errors import CheckpointError, StoreUnavailable
from checkpoint.keys import log_key
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from flows.drive.run import load_run, opened_again, ruling_how, run_names
from flows.drive.train import OUT, Run, make_driver
from trainer.errors import TrainerError

log = logging.getLogger(__name__)

ENDED_A_LOOK = 16


def wants_driver(state: RunState) -> bool:
    """Whether a run has begun, is for a cluster (by its newest order, too), and has not ended for good."""
    if state.newest_attempt is None or (state.ended and not opened_again(state)) or state.unreadable:
        return False
    how = ruling_how(state) or {}
    return bool((how.get("launch") or {}).get("target") == "kubernetes")


@dataclass
class Reconciler:
    """``look()`` starts drivers for open runs that this process does not drive yet; ``say`` hears what it does.

    A run that wants no driver is read once. Later looks ask whether its log has grown: at every look for one that may
    begin here, and for `ENDED_A_LOOK` of those that have ended, in turn, so that a look's cost does not grow with them.
    """

    store: Store
    out: Path = OUT
    say: Callable[[str], None] = log.info
    driven: dict[str, Run] = field(default_factory=dict)
    _seen: dict[str, tuple[int, bool]] = field(default_factory=dict)  # run -> records that were read; whether it ended
    _turn: int = 0

    def look(self) -> list[str]:
        """The runs that were taken over now."""
        taken = []
        for name in self._to_read(list(run_names(self.store))):
            known = self.driven.get(name)
            if known is not None and not known.wait(0.0):
                continue
            if known is not None:
                del self.driven[name]
                self._tell_end(known)
            try:
                state = RunLog(self.store, name).fold(quick=True).of_this_version()
                if not wants_driver(state):
                    self._seen[name] = state.n, state.ended is not None
                    continue
                self._seen.pop(name, None)
                prepared = load_run(self.store, name)
                run = Run(prepared, self.store, make_driver(prepared, self.store, out=self.out))
            except StoreUnavailable:
                raise  # no run of it can be asked now
            except (CheckpointError, TrainerError) as error:
                self.say(f"run {name} cannot be taken over: {error}")
                continue
            except Exception as error:  # of this run; the others are looked after all the same
                log.exception("run %s cannot be taken over", name)
                self.say(f"run {name} cannot be taken over: {error!r}; a bug, see the log")
                continue
            self.driven[name] = run.start()
            self.say(f"run {name} is driven from here")
            taken.append(name)
        return taken

    def _to_read(self, names: list[str]) -> list[str]:
        """Those whose log must be read: unknown, driven here, or grown since."""
        ended = sorted(name for name in names if self._seen.get(name, (0, False))[1])
        asked = {ended[(self._turn + i) % len(ended)] for i in range(min(ENDED_A_LOOK, len(ended)))}
        self._turn += ENDED_A_LOOK
        return [
            name
            for name in names
            if name not in self._seen
            or name in self.driven
            or ((name in asked or not self._seen[name][1]) and self._has_grown(name))
        ]

    def _has_grown(self, name: str) -> bool:
        return self.store.head(log_key(name, self._seen[name][0] + 1)) is not None

    def _tell_end(self, run: Run) -> None:
        if run.error is None:
            return
        self.say(f"the driver of run {run.name} ended: {run.error}; the gang trains on")
        expected = isinstance(run.error, CheckpointError | TrainerError)
        log.error("the driver of run %s ended: %s", run.name, run.error, exc_info=None if expected else run.error)
