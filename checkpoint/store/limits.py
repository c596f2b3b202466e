"""Limits of what a store's requests may take: until when, how slowly, and how much of the network.

A deadline is of the thread that calls (``until``): whatever a store does for it, retries and pauses included, ends by
then. A request that moves its bytes too slowly ends as one that is lost (``Progress``), so that a peer that drips is no
worse than one that hangs.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_DEADLINE: ContextVar[float] = ContextVar("deadline", default=math.inf)

SLICE_BYTES = 1 << 20
"""Of a large body: what moves between two looks at the clock."""
PACED_BYTES = 1 << 20
"""Objects smaller than this are not slowed down by a bandwidth cap: records, hints, statuses."""
LEAST_RATE = 64 << 10
"""Bytes a second of one request, below which its peer counts as lost."""


@contextlib.contextmanager
def until(at: float) -> Iterator[None]:
    """Calls of a store inside end by ``at`` (of ``time.monotonic``), as unavailable; never later than around it."""
    before = _DEADLINE.get()
    _DEADLINE.set(min(before, at))
    try:
        yield
    finally:
        _DEADLINE.set(before)


def deadline() -> float:
    """Of this thread's calls now; infinity where there is none."""
    return _DEADLINE.get()


class Rate:
    """At most so many bytes a second, of all threads together. ``clock`` and ``sleep``: where a test has its own."""

    def __init__(
        self,
        bytes_per_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._free = -math.inf  # when what was taken so far will have gone out

    def take(self, count: int) -> float:
        """Wait until ``count`` bytes may go; how long that took. A deadline that passes meanwhile is a TimeoutError."""
        with self._lock:
            now = self._clock()
            begin = max(now, self._free)
            self._free = begin + count / self.bytes_per_s
        wait = begin - now
        if wait <= 0:
            return 0.0
        if now + wait >= deadline():
            raise TimeoutError(f"the bandwidth cap of {self.bytes_per_s / 1e6:g} MB/s leaves it no time")
        self._sleep(wait)
        return wait


class Progress:
    """How one request gets on: at least ``LEAST_RATE`` after a grace, and not beyond the thread's deadline."""

    def __init__(self, grace_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._grace_s = clock, grace_s
        self._began, self._end, self._moved = clock(), deadline(), 0

    def moved(self, count: int, waited_s: float = 0.0) -> None:
        """So many more bytes went or came; ``waited_s`` of that time was our own. TimeoutError where it is too slow."""
        self._moved += count
        self._began += waited_s
        now = self._clock()
        spent = now - self._began
        if spent > self._grace_s + self._moved / LEAST_RATE:
            raise TimeoutError(
                f"{self._moved} bytes in {spent:.1f} s: fewer than {LEAST_RATE} a second, the connection counts as lost"
            )
        if now >= self._end:
            raise TimeoutError("the deadline passed while its bytes were moving")
