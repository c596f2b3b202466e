"""The chaos harness looks at processes that come and go: what is gone meanwhile is no error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.chaos import _kill, spoil_arenas
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
