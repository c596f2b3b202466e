"""What a test has left alive: engines and agents that work below a folder, found in /proc. Fault tests count them.

A supervisor that nobody owns holds memory and cores as long as the machine runs; a test that ends with one has found a
fault, or has one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from tests.support.wait import wait_for

_ENGINES = ("hotstage-engine", "node_drive")
_AGENT = "checkpoint.agent"
_WORDS = tuple(word.encode() for word in (*_ENGINES, _AGENT))
LEAVE_S = 60.0  # for what was told to leave: an agent's last uploads, a rank's last words


def newest_process() -> str:
    """What the kernel called the last process or thread: where it is the same as before, nobody has started any."""
    with open("/proc/loadavg") as file:
        return file.read().rsplit(maxsplit=1)[1]


def alive_below(folder: Path) -> dict[int, str]:
    """pid -> command of every engine and agent whose folder or arguments lie below this one; zombies are not alive."""
    found = {}
    for pid in os.listdir("/proc"):
        if not pid.isdigit():
            continue
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb", buffering=0) as file:
                line = file.read()
            if not any(word in line for word in _WORDS):  # after each test this looks at every process: most end here
                continue
            args = line.decode(errors="replace").split("\0")
            name = Path(args[0]).name
            if not (name.startswith(_ENGINES) or _AGENT in args):
                continue
            places = [os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)"), *args]
            if any(f"{folder}/" in f"{place}/" for place in places):
                found[int(pid)] = " ".join(args).strip()
    return found


def ended_for_good(pid: int) -> bool:
    """Whether the node that this process belongs to has left for good (``done``), or its folder is gone."""
    with contextlib.suppress(OSError):
        home = Path(f"/proc/{pid}/cwd")
        return os.readlink(home).endswith(" (deleted)") or (home / "done").exists()
    return False


def expect_none(folder: Path, *, of_ended: bool = False, seconds: float = LEAVE_S) -> None:
    """Waits for all of them to leave (``of_ended``: of those whose node has left for good); fails, and ends them, where
    some stay.
    """

    def left() -> dict[int, str]:
        return {pid: what for pid, what in alive_below(folder).items() if not of_ended or ended_for_good(pid)}

    if not left():
        return
    try:
        wait_for(lambda: not left(), "what works below the test's folder to leave", seconds)
    except AssertionError:
        stayed = left()
        for pid in stayed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if stayed:
            raise AssertionError(f"left alive after {seconds:g} s: {stayed}") from None
