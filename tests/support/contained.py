"""Runs a command, and ends whatever that command leaves behind, however it ended: by itself, by Ctrl-C, killed.

    python -m tests.support.contained [--patience SECONDS] COMMAND...

Every process that the command started, at any depth and in whatever session, becomes a child of this one when its own
parent goes (PR_SET_CHILD_SUBREAPER), and is killed. After a command that succeeded they have some seconds to leave by
themselves (10 where nothing is said); what then is still there is named, with the test that started it (pytest puts it
in the environment). The exit code is the command's; 1 where the command succeeded and left processes behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.contained")
    parser.add_argument("--patience", type=float, default=10.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    told = parser.parse_args()
    if not told.command:
        parser.error("no command is given")
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    child = subprocess.Popen(told.command, preexec_fn=prepare)
    code = _follow(child)
    left = _wait_for_the_rest(told.patience if code == 0 else 0)
    for pid, what in left.items():
        print(f"left behind: {pid} {what}", file=sys.stderr)
    while _kill_all():
        pass
    return 1 if left and code == 0 else code


def _follow(child: subprocess.Popen[bytes]) -> int:
    """The child's exit code; meanwhile signals are passed on and orphans reaped."""
    while True:
        told = signal.sigwaitinfo(_SIGNALS)
        if told.si_signo == signal.SIGCHLD:
            if child.poll() is not None:
                return child.returncode if child.returncode >= 0 else 128 - child.returncode
            _reap(child.pid)
        elif told.si_signo != signal.SIGINT or told.si_pid != 0:  # a Ctrl-C at the terminal has reached it already
            child.send_signal(told.si_signo)


def _wait_for_the_rest(patience_s: float) -> dict[int, str]:
    """What is still there after a while, with its description."""
    end = time.monotonic() + patience_s
    while True:
        _reap()
        left = {pid: _describe(pid) for pid in _descendants()}
        if not left or time.monotonic() >= end:
            return left
        time.sleep(0.02)  # between two looks at the condition


def _reap(but: int = 0) -> None:
    """Collect the orphans that have ended, not the command itself."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == but:
            return
        os.waitpid(found.si_pid, 0)


def _kill_all() -> bool:
    """Kill what is there and collect one that has ended; False where there is nothing left to collect."""
    for pid in _descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        return False
    return True


def _descendants() -> list[int]:
    """Children and their children, those that have ended and are not collected yet left out."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
    found: set[int] = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return "(gone meanwhile)"
    tests = [v.partition(b"=")[2].decode(errors="replace") for v in variables if v.startswith(b"PYTEST_CURRENT_TEST=")]
    return f"{command[:200]}, started by {tests[0]}" if tests else command[:200]


if __name__ == "__main__":
    sys.exit(main())
