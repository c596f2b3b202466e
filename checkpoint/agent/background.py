"""Threads that hash and copy beside the ranks: behind them in their share of a core, and on cores that no rank uses,
where there are such.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence

from checkpoint.agent.gang import Gang

_NICE = 10


def cores_in_use(gang: Gang) -> int:
    """By the ranks of an attempt on this machine; 0: nobody has said, so all (``parallel.threads``)."""
    ranks = gang.attempt.ranks if gang.how("launch", "target") == "local" else gang.count  # local nodes share a machine
    return ranks * int(gang.how("parallel", "threads"))


def spare(cores: Iterable[int], used: int) -> Sequence[int]:
    """Of these cores those to keep to: the last ones, where so many in use leave some; else all.

    >>> spare({0, 1, 2, 3}, 3), spare({0, 1, 2, 3}, 4), spare({4, 5}, 0)
    ([3], [0, 1, 2, 3], [4, 5])
    """
    there = sorted(cores)
    return there[used:] if 0 < used < len(there) else there


class Background:
    """The threads of one pool; ``enter`` is its initializer."""

    def __init__(self) -> None:
        self._all = os.sched_getaffinity(0)
        self._cores: Sequence[int] = sorted(self._all)
        self._threads: list[int] = []
        self._lock = threading.Lock()

    def enter(self) -> None:
        """The calling thread is one of them from here on."""
        behind()
        with self._lock:
            self._threads.append(threading.get_native_id())
            self._place(self._threads[-1])

    def beside(self, gang: Gang) -> None:
        """The ranks of this attempt run, or will."""
        with self._lock:
            self._cores = spare(self._all, cores_in_use(gang))
            for thread in self._threads:
                self._place(thread)

    def _place(self, thread: int) -> None:
        with contextlib.suppress(OSError):  # a wish: the cores may have been taken away, or it is not allowed
            os.sched_setaffinity(thread, self._cores)


def behind() -> None:
    """The calling thread takes the processor time that the ranks leave."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
