"""Take over what nobody drives: every open run on a cluster gets a driver in this process.

A driver keeps nothing, and two beside each other are harmless (who loses a log record decides again), so nobody has to
know whether another one lives. Local runs are left alone: only their machine can drive them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from flows.api import OUT, Run, make_driver
from flows.run import load_run, run_names
from trainer.errors import TrainerError

log = logging.getLogger(__name__)


def wants_driver(state: RunState) -> bool:
    """Whether a run has begun on a cluster and has not ended."""
    newest = state.newest_attempt
    if newest is None or state.ended or state.unreadable:
        return False
    how = newest.body.get("how") or {}
    return bool((how.get("launch") or {}).get("target") == "kubernetes")


@dataclass
class Reconciler:
    """``look()`` starts drivers for open runs that this process does not drive yet; ``say`` hears what it does."""

    store: Store
    out: Path = OUT
    say: Callable[[str], None] = log.info
    driven: dict[str, Run] = field(default_factory=dict)

    def look(self) -> list[str]:
        """The runs that were taken over now."""
        taken = []
        for name in list(run_names(self.store)):
            known = self.driven.get(name)
            if known is not None and not known.wait(0.0):
                continue
            try:
                if not wants_driver(RunLog(self.store, name).fold()):
                    self.driven.pop(name, None)
                    continue
                prepared = load_run(self.store, name)
                run = Run(prepared, self.store, make_driver(prepared, self.store, out=self.out))
            except (CheckpointError, TrainerError) as error:
                self.say(f"run {name} cannot be taken over: {error}")
                continue
            self.driven[name] = run.start()
            self.say(f"run {name} is driven from here")
            taken.append(name)
        return taken
