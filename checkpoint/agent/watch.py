"""The log's watcher: a thread that folds what is new and posts it to the agent's loop.

It looks often after something of the node's own happened (``expect``: its ranks have ended, say, and the next attempt
is likely), and the more seldom the longer nothing follows, as the store's pace says. A store that does not answer is
said, never acted on; only one that refuses the very first look ends the agent.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from checkpoint.errors import Damaged, StoreError, StoreRefused
from checkpoint.log import RunLog, RunState

log = logging.getLogger(__name__)


class Watcher:
    """The thread. All callbacks are posted: ``on_state`` with each newer state, ``on_error`` with why the log cannot be
    read now (None: it can again), ``on_refused`` where a person must mend it first. ``poll_s``: between looks while
    something is expected.
    """

    def __init__(
        self,
        run_log: RunLog,
        poll_s: float,
        *,
        post: Callable[[Callable[[], None]], None],
        on_state: Callable[[RunState], None],
        on_error: Callable[[str | None], None],
        on_refused: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._poll_s, self._post, self._clock = run_log, poll_s, post, clock
        self._on_state, self._on_error, self._on_refused = on_state, on_error, on_refused
        self._wake = threading.Condition()
        self._closing = False
        self._expected = clock()
        self._looked = clock()
        self._state: RunState | None = None
        self._told: str | None = None

    def start(self) -> None:
        threading.Thread(target=self._main, name="log", daemon=True).start()

    def close(self) -> None:
        """It looks no more; a look in progress is not waited for."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def expect(self) -> None:
        """Something of our own has happened on which a record may follow."""
        with self._wake:
            self._expected = self._clock()
            self._wake.notify()

    def pause_s(self) -> float:
        """From the last look to the next one, as things are."""
        return self._log.store.pace.pause_s(max(0.0, self._looked - self._expected), self._poll_s)

    def _main(self) -> None:
        while (least := self.look()) is not None:
            with self._wake:
                while not self._closing and (rest := self._looked + max(least, self.pause_s()) - self._clock()) > 0:
                    self._wake.wait(rest)
                if self._closing:
                    return

    def look(self) -> float | None:
        """Look once. The pause that must follow whatever is expected; None where there is nothing to look for."""
        least = 0.0
        try:
            newer = self._log.fold(self._state)
        except StoreRefused as error:
            if self._state is None:  # not one look at the log was allowed: only a person mends that
                log.error("the store refuses this agent: %s", error)
                self._post(self._on_refused)
                return None
            log.warning("the log cannot be read now: %s", error)
            self._post(partial(self._on_error, str(error)))
            self._told, least = str(error), 2.0
        except (StoreError, Damaged) as error:
            if self._told != str(error):
                self._told = str(error)
                log.warning("the log cannot be read now: %s", error)
                self._post(partial(self._on_error, self._told))
            least = 0.5
        else:
            if self._told is not None:
                self._told = None
                self._post(partial(self._on_error, None))
            state = self._state
            if state is None or newer.n != state.n or newer.unreadable != state.unreadable:
                self._state = newer
                self._post(partial(self._on_state, newer))
            if newer.unreadable is not None:
                least = 2.0
        self._looked = self._clock()
        return least
