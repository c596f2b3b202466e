"""What a test command leaves behind is ended with it, however it ends, and named."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.wait import wait_for

ROOT = Path(__file__).resolve().parents[2]

# A test that starts a process in a session of its own, whose parent goes at once; then it does as told.
TESTS = """
import os, signal, subprocess, sys, time

def orphan():
    code = "import os, time; open('made', 'w').write(str(os.getpid())); os.rename('made', 'pid'); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}], start_new_session=True)"
    subprocess.Popen([sys.executable, "-c", outer]).wait()
    while not os.path.exists("pid"):
        time.sleep(0.01)

def test_leaves_one():
    orphan()

def test_is_killed():
    orphan()
    os.kill(os.getpid(), signal.SIGKILL)

def test_waits():
    orphan()
    open("waits", "w").close()
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    (tmp_path / "test_some.py").write_text(TESTS)

    def start(name: str, *more: str, **how: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *more, f"test_some.py::{name}"]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.contained", "--patience", "0.5", *command],
            cwd=tmp_path,
            env={k: v for k, v in os.environ.items() if "PYTEST" not in k}
            | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **how,
        )

    return start


def gone(tmp_path: Path) -> bool:
    return not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_what_a_passed_test_leaves_is_an_error(run: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = run("test_leaves_one")
    out, _ = process.communicate(timeout=60)
    assert "1 passed" in out
    pid = (tmp_path / "pid").read_text()
    assert f"left behind: {pid} " in out
    assert "started by test_some.py::test_leaves_one (call)" in out
    assert process.returncode == 1
    assert gone(tmp_path)


def test_a_killed_worker_and_a_killed_command_leave_nothing(
    run: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    for more, code in ((("-n", "1", "--maxprocesses", "1", "--max-worker-restart", "0"), 1), ((), 137)):
        process = run("test_is_killed", *more)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == code, out
        assert gone(tmp_path)
        (tmp_path / "pid").unlink()


@pytest.mark.parametrize("more", [(), ("-n", "1")])
def test_after_an_interrupt_nothing_is_left(
    run: Callable[..., subprocess.Popen[str]], tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Ctrl-C at a terminal, which reaches every process of the command."""
    terminal, inside = os.openpty()

    def at_the_terminal() -> None:
        os.setsid()
        fcntl.ioctl(inside, termios.TIOCSCTTY, 0)

    process = run("test_waits", *more, preexec_fn=at_the_terminal)
    wait_for(lambda: (tmp_path / "waits").exists(), "the test to begin")
    os.write(terminal, b"\x03")
    out, _ = process.communicate(timeout=60)
    os.close(terminal)
    os.close(inside)
    assert process.returncode == 2, out
    assert "KeyboardInterrupt" in out
    assert gone(tmp_path)
