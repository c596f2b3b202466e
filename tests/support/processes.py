"""What the kernel says of processes that a test started, or that those did."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.support.wait import wait_for


def alive(pid: int) -> bool:
    """Not gone and not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def stop(pid: int) -> None:
    """SIGSTOP, and until none of its threads runs any more: each goes on to its next look at signals."""
    os.kill(pid, signal.SIGSTOP)

    def stands() -> bool:
        stats = [task.joinpath("stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    wait_for(stands, f"process {pid} to stand still")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
