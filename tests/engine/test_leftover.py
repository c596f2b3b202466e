"""The count of what a test leaves alive finds it: a test of the tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.engine.engine_build import engine
from tests.support.leftover import alive_below, expect_none
from tests.support.wait import wait_for

__all__ = ["engine"]


@pytest.mark.parametrize("folder", ["running", "done", "deleted"])
def test_a_supervisor_that_is_left_alive_is_found_and_ended(engine: Path, tmp_path: Path, folder: str) -> None:
    home = tmp_path / "node0"
    home.mkdir()
    process = subprocess.Popen([engine, "node", "--agent", "agent.sock"], cwd=home, stderr=subprocess.DEVNULL)
    try:
        if folder == "done":
            (home / "done").write_text("ended")
        if folder == "deleted":
            home.rmdir()
        wait_for(lambda: list(alive_below(tmp_path)) == [process.pid], "the supervisor to be seen")
        assert alive_below(tmp_path / "node") == {}, "a folder whose name only begins so is another"
        if folder == "running":
            expect_none(tmp_path, of_ended=True)  # its node has not been told to leave
        with pytest.raises(
            AssertionError, match=rf"left alive after 0.05 s: .{process.pid}: .*node --agent agent.sock"
        ):
            expect_none(tmp_path, of_ended=folder != "running", seconds=0.05)
        assert process.wait(60) == -9
        expect_none(tmp_path)
    finally:
        process.kill()
        process.wait()
