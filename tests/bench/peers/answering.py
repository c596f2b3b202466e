"""How a peer's process is asked, for its script beside this file; imports nothing of this project.

A line of JSON when the first step is done; then, for each line ``N`` of stdin, one with what N steps took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def answer(step: Callable[[], float], version: str) -> int:
    """Until nobody asks any more. ``step``: one step, and its loss."""

    def say(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)

    say(losses=[step()], version=version)
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(int(line)):
            began = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - began)
        say(losses=losses, seconds=seconds)
    return 0
