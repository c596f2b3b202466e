"""The chaos harness looks at processes that come and go: what is gone meanwhile is no error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chaos import _kill, _strangers, pids_below, spoil_arenas
from tests.support.wait import wait_for

# a supervisor as seen from outside: it keeps an arena, and opens and closes descriptors all the time
BUSY = """
import os
arena = os.memfd_create("hotstage-arena")
os.write(arena, bytes(64))
open("ready", "w").close()
while True:
    for each in [os.open(os.devnull, os.O_RDONLY) for _ in range(50)]:
        os.close(each)
"""


def test_arenas_of_a_busy_supervisor_are_spoiled(tmp_path: Path) -> None:
    (tmp_path / "node").write_text(BUSY)
    process = subprocess.Popen(["hotstage-engine", "node"], executable=sys.executable, cwd=tmp_path)
    try:
        wait_for(lambda: (tmp_path / "ready").exists(), "the process to begin")
        assert [spoil_arenas(tmp_path) for _ in range(50)] == [64] * 50
        assert _kill(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not _kill(process.pid)


def test_a_rank_that_begins_while_all_are_looked_at_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was one for ever: who waited for its step saw no rank, and the run was over."""
    ranks: list[subprocess.Popen[bytes]] = []

    def looked(*args: Any) -> Iterator[tuple[int, list[str]]]:
        yield from pids_below(*args)
        ranks.append(subprocess.Popen(["sleep", "600"], cwd=tmp_path))

    monkeypatch.setattr("tests.support.chaos.pids_below", looked)
    try:
        strangers = _strangers(tmp_path)
        assert ranks[0].pid not in strangers
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
