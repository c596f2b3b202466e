"""Looking after runs that nobody drives (`flows/drive/reconcile.py`), again and again: in a command, or beside one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from checkpoint.errors import CheckpointError, StoreUnavailable
from checkpoint.store import Store
from flows.drive.reconcile import EVERY_S, Reconciler
from flows.hosting import taken_over
from flows.page.left_open import LeftOpen
from flows.prefect_api import Client, Gone, PrefectSettingsError, Refused, configured

log = logging.getLogger(__name__)


@dataclass
class Care:
    """Of one store. ``out``: the folder for what begins here; ``say`` hears of what is taken over, and why not."""

    store: Store
    out: Path
    say: Callable[[str], None]
    every_s: float = field(default_factory=lambda: EVERY_S)
    stop: threading.Event = field(default_factory=threading.Event)
    _away: bool = False
    _client: Client | None = None

    def __post_init__(self) -> None:
        self.left_open = LeftOpen(self.say)
        self.reconciler = Reconciler(self.store, self.out, self.say, partial(taken_over, say=self.say))

    def start(self) -> Care:
        """In a thread beside other work; it ends with the process."""
        threading.Thread(target=self.run, name="reconcile", daemon=True).start()
        return self

    def run(self, for_s: float | None = None) -> int:
        """Look until ``stop`` is set, or for so long (0: once) and until what it took over has ended; how many that
        were. With an end a store that does not answer is raised.
        """
        began, taken = time.monotonic(), 0
        while not self.stop.is_set():
            try:
                taken += len(self.reconciler.look())
                if self._away:
                    self._away = False
                    self.say("the store answers again")
            except CheckpointError as error:
                if for_s is not None or not isinstance(error, StoreUnavailable):
                    raise
                if not self._away:
                    self._away = True
                    self.say(f"the store does not answer: {error}; gangs train on, and it is asked again")
            self._close_left_open()
            if for_s is not None and time.monotonic() - began + self.every_s > for_s and not self.driven:
                break
            self.stop.wait(self.every_s)
        return taken

    def _close_left_open(self) -> None:
        """Flow runs of processes that are gone, where Prefect's settings name a server."""
        try:
            if self._client is None and configured() is not None:
                self._client = Client.connect(None)
            if self._client is not None:
                self.left_open.look(self._client)
        except (Gone, Refused, PrefectSettingsError) as error:
            log.debug("open flow runs are not looked at now: %s", error)

    @property
    def driven(self) -> int:
        """How many runs this process drives now."""
        return sum(not run.wait(0.0) for run in self.reconciler.driven.values())
