"""What works beside a run takes the processor time that the run leaves."""

from __future__ import annotations

import os
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
