"""Waiting for a state: the one way in which tests wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], what: str, seconds: float = 60.0, every_s: float = 0.005) -> T:
    """What ``look`` gives once it gives something; AssertionError, saying what was waited for, after the deadline.
    ``every_s``: a server that is asked by each look has other work too.
    """
    end = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(every_s)  # between two looks at the condition
