"""The log's watcher: a thread that folds what is new and posts it to the agent's loop.

A store that does not answer is said, never acted on; only one that refuses the very first look ends the agent.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial

from checkpoint.errors import Damaged, StoreError, StoreRefused
from checkpoint.log import RunLog, RunState

log = logging.getLogger(__name__)


class Watcher:
    """The thread. All callbacks are posted: ``on_state`` with each newer state, ``on_error`` with why the log cannot be
    read now (None: it can again), ``on_refused`` where a person must mend it first.
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
    ) -> None:
        self._log, self._poll_s, self._post = run_log, poll_s, post
        self._on_state, self._on_error, self._on_refused = on_state, on_error, on_refused
        self._closing = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._main, name="log", daemon=True).start()

    def close(self) -> None:
        """It looks no more; a look in progress is not waited for."""
        self._closing.set()

    def _main(self) -> None:
        state: RunState | None = None
        told: str | None = None
        while not self._closing.is_set():
            pause = self._poll_s
            try:
                newer = self._log.fold(state)
            except StoreRefused as error:
                if state is None:  # not one look at the log was allowed: only a person mends that
                    log.error("the store refuses this agent: %s", error)
                    self._post(self._on_refused)
                    return
                log.warning("the log cannot be read now: %s", error)
                self._post(partial(self._on_error, str(error)))
                told, pause = str(error), max(pause, 2.0)
            except (StoreError, Damaged) as error:
                if told != str(error):
                    told = str(error)
                    log.warning("the log cannot be read now: %s", error)
                    self._post(partial(self._on_error, told))
                pause = max(pause, 0.5)
            else:
                if told is not None:
                    told = None
                    self._post(partial(self._on_error, None))
                if state is None or newer.n != state.n or newer.unreadable != state.unreadable:
                    state = newer
                    self._post(partial(self._on_state, newer))
                if newer.unreadable is not None:
                    pause = max(pause, 2.0)
            self._closing.wait(pause)
