"""Calls that may not come back for long, made aside, so that whoever waits for one can turn away from it.

A store that is down keeps a call for up to a minute (its retries), a socket for half of that, and neither hears of a
Ctrl-C. ``Aside.call`` waits for the result and for the wish to stop; what it turned away from goes on by itself in its
thread and must look at ``Aside.left`` before it acts on anything.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

T = TypeVar("T")

LOOK_S = 0.1


class TurnedAway(Exception):
    """The call has not come back in time, or the caller has left it."""


@dataclass
class Aside:
    """One call at a time, in one daemon thread with the context of whoever made this object."""

    clock: Callable[[], float] = time.monotonic
    left: threading.Event = field(default_factory=threading.Event)
    _work: queue.SimpleQueue[Callable[[], Any] | None] = field(default_factory=queue.SimpleQueue)
    _done: queue.SimpleQueue[tuple[Any, BaseException | None]] = field(default_factory=queue.SimpleQueue)
    _thread: threading.Thread | None = None

    def call(self, work: Callable[[], T], stop: threading.Event, patience_s: float) -> T:
        """The result of ``work``, or what it raised; TurnedAway where it has not come ``patience_s`` after ``stop``."""
        if self._thread is None:
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=lambda: context.run(self._serve), name="look", daemon=True)
            self._thread.start()
        self._work.put(work)
        since: float | None = None
        while True:
            try:
                result, error = self._done.get(timeout=LOOK_S)
            except queue.Empty:
                since = self.clock() if since is None and stop.is_set() else since
                if since is not None and self.clock() - since >= patience_s:
                    self.left.set()
                    raise TurnedAway("it has not come back in time") from None
                continue
            if error is not None:
                raise error
            return cast(T, result)

    def close(self) -> None:
        """Let the thread end, once the call that it is in has come back."""
        self._work.put(None)
        self._thread = None

    def go_on(self) -> None:
        """For the call itself, before it acts: TurnedAway where nobody waits for it any more."""
        if self.left.is_set():
            raise TurnedAway("nobody waits for this any more")

    def _serve(self) -> None:
        while (work := self._work.get()) is not None and not self.left.is_set():
            try:
                self._done.put((work(), None))
            except BaseException as error:
                self._done.put((None, error))
