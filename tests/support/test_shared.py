"""What several processes of one session ask for is made once; a kept server ends with its last user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import contextlib, os, pathlib, time
import pytest
from tests.support.shared import kept, once

HERE = pathlib.Path(__file__).parent

@contextlib.contextmanager
def keep(folder):
    (HERE / f"kept-{os.getpid()}").touch()
    yield {"pid": os.getpid(), "folder": str(folder)}
    (HERE / "ended").touch()

@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with kept(tmp_path_factory, "some", "test_some:keep") as told:
        yield told

def make(work):
    (HERE / f"made-{os.getpid()}").touch()
    return {"where": str(work)}

@pytest.mark.parametrize("n", [0, 1])
def test_both_at_once(tmp_path_factory, server, n):
    (HERE / f"here{n}").touch()
    while not (HERE / f"here{1 - n}").exists():
        time.sleep(0.01)
    assert once(tmp_path_factory, "value", make)["where"].endswith("shared/value/work")
    assert pathlib.Path(f"/proc/{server['pid']}").exists() and server["folder"].endswith("shared/some/work")
"""


def test_once_and_kept_over_two_processes(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "test_some.py"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.contained", *pytest],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if "PYTEST" not in k}
        | {
            "PYTHONPATH": f"{ROOT}:{tmp_path}",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_PLUGINS": "xdist",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr  # nothing is left behind either
    assert "2 passed" in done.stdout
    assert len(list(tmp_path.glob("kept-*"))) == len(list(tmp_path.glob("made-*"))) == 1
    assert (tmp_path / "ended").exists()
