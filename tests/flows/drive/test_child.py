"""What works beside a run takes the processor time that the run leaves, and ends whole when its time is over."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from flows.drive.child import ChildProcess
from tests.support.wait import wait_for


def test_it_is_below_everybody_in_its_session_and_as_a_session() -> None:
    child = ChildProcess.begin(["cat"])
    try:
        wait_for(lambda: Path(f"/proc/{child.process.pid}/comm").read_text() == "cat\n", "nice to become it")
        assert os.getpriority(os.PRIO_PROCESS, child.process.pid) == 19
        assert os.getsid(child.process.pid) == child.process.pid
        group = Path(f"/proc/{child.process.pid}/autogroup")
        if not group.exists():
            pytest.skip("this kernel does not share processors by session")
        assert group.read_text().split()[-1] == "19"
    finally:
        child.kill()
        child.process.wait()
        child.said()


STARTS_ANOTHER = """
import os, signal, subprocess, sys
other = subprocess.Popen(["sleep", "600"], start_new_session=True)
def leave(*_):
    other.kill()
    other.wait()
    sys.exit(7)
signal.signal(signal.SIGTERM, leave)
print(other.pid, flush=True)
signal.pause()
"""


def test_one_whose_time_is_over_ends_what_it_started_in_another_session() -> None:
    """As an evaluation does with a command of the user's, which nobody else would end."""
    child = ChildProcess.begin([sys.executable, "-c", STARTS_ANOTHER], low=False)
    try:
        wait_for(lambda: os.pread(child.output.fileno(), 20, 0).endswith(b"\n"), "the other one")
        other = int(os.pread(child.output.fileno(), 20, 0))
        child.until = time.monotonic()
        wait_for(lambda: child.ended() is not None, "its end")
        gone = not Path(f"/proc/{other}").exists()
        if not gone:
            os.kill(other, signal.SIGKILL)
        assert (child.ended(), gone) == (7, True)
    finally:
        child.kill()
        child.said()


def test_one_that_does_not_leave_when_it_is_asked_to_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.drive.child.GRACE_S", 0.0)
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    child = ChildProcess.begin([sys.executable, "-c", deaf], low=False)
    wait_for(lambda: os.pread(child.output.fileno(), 20, 0), "it to be up")
    child.until = time.monotonic()
    wait_for(lambda: child.ended() is not None, "its end")
    assert child.ended() == -signal.SIGKILL
    child.said()
