"""How often hints are written: the heartbeat's own thread, and what the others may ask of a store that costs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from checkpoint.errors import StoreError
from checkpoint.store import Store

log = logging.getLogger(__name__)

FLUSH_S = 0.25
AT_ONCE = 10
"""Requests that may be made at once after a while without."""
HELD_UP_S = 60.0


class Beat:
    """The thread that writes the node's status, the newest one, as soon as there is one."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._wake = threading.Condition()
        self._packed: bytes | None = None
        self._closing = False
        self.error: str | None = None
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)
        self._thread.start()

    def status(self, packed: bytes) -> None:
        with self._wake:
            self._packed = packed
            self._wake.notify()

    def close(self, timeout_s: float) -> None:
        """Write what waits, once, and end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._packed is not None)
                packed, self._packed, closing = self._packed, None, self._closing
            if packed is not None and not self._put(packed) and not closing:
                with self._wake:
                    self._packed = self._packed or packed  # again, unless there is a newer one
                    self._wake.wait(FLUSH_S)  # a store that refuses is not asked in a tight loop
            if closing:
                return

    def _put(self, packed: bytes) -> bool:
        try:
            self._store.put(self._key, packed)
        except StoreError as error:
            if self.error is None:
                log.warning("the store does not take the status: %s", error)
            self.error = str(error)
            return False
        self.error = None
        return True


class Allowance:
    """Requests that may be made: `AT_ONCE`, and in the long run one each ``each_s``; none is held up for more than
    `HELD_UP_S`, so ranks that print more than that carries cost what they cost.
    """

    def __init__(self, each_s: float, clock: Callable[[], float]) -> None:
        self._each_s, self._clock = each_s, clock
        self._paid_until = 0.0

    def spend(self, requests: int = 1) -> None:
        """They are made, whether there is room or not."""
        now = self._clock()
        paid = max(self._paid_until, now) + requests * self._each_s
        self._paid_until = min(paid, now + HELD_UP_S + (AT_ONCE - 1) * self._each_s)

    @property
    def room(self) -> bool:
        """Whether one may be made now."""
        return self._paid_until - self._clock() <= (AT_ONCE - 1) * self._each_s
