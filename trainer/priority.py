"""The share of the processors that a session has where the kernel divides them by session: ``nice`` counts inside one
alone there (sched_autogroup_enabled), and each new session begins with an ordinary share. Where it does not, nothing is
done.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

_TRIES, _PAUSE_S = 5, 0.03  # the kernel takes one change each 0.1 s of whoever is not root


def session_nice() -> int:
    """Of this process's session, as ``nice`` counts; 0: ordinary."""
    try:
        return int(Path("/proc/self/autogroup").read_text().split()[-1])
    except (OSError, ValueError, IndexError):
        return 0


def set_session_nice(pid: int, nice: int) -> None:
    """Of the session that a process is in. A wish: it may be gone, or somebody else's."""
    with contextlib.suppress(OSError):
        for _ in range(_TRIES):
            try:
                Path(f"/proc/{pid}/autogroup").write_text(str(nice))
                return
            except BlockingIOError:
                time.sleep(_PAUSE_S)
