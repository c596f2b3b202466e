"""Looking after runs that nobody drives (`flows/drive/reconcile.py`), again and again: in a command, or beside one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from checkpoint.errors import CheckpointError, StoreUnavailable
from checkpoint.store import Store
from flows.drive.reconcile import EVERY_S, Reconciler
from flows.hosting import taken_over

STEPS_S = 0.2


@dataclass
class Care:
    """Of one store. ``out``: the folder for what begins here; ``say`` hears of what is taken over, and why not."""

    store: Store
    out: Path
    say: Callable[[str], None]
    every_s: float = EVERY_S
    stop: threading.Event = field(default_factory=threading.Event)
    _away: bool = False

    def __post_init__(self) -> None:
        self.reconciler = Reconciler(self.store, self.out, self.say, partial(taken_over, say=self.say))

    def start(self) -> Care:
        """In a thread beside other work; it ends with the process."""
        threading.Thread(target=self.run, name="reconcile", daemon=True).start()
        return self

    def run(self, *, once: bool = False) -> None:
        """Look until ``stop`` is set. ``once``: one look, then until what it took over has ended; a store that does not
        answer is raised then.
        """
        while not self.stop.is_set():
            try:
                self.reconciler.look()
                if self._away:
                    self._away = False
                    self.say("the store answers again")
            except CheckpointError as error:
                if once or not isinstance(error, StoreUnavailable):
                    raise
                if not self._away:
                    self._away = True
                    self.say(f"the store does not answer: {error}; gangs train on, and it is asked again")
            if once:
                while self.driven and not self.stop.wait(STEPS_S):
                    pass
                return
            self.stop.wait(self.every_s)

    @property
    def driven(self) -> int:
        """How many runs this process drives now."""
        return sum(not run.wait(0.0) for run in self.reconciler.driven.values())
