"""What tests of several pytest processes (pytest-xdist) share: made once a session, by the first that asks.

``once`` is for results: a run that has ended, and what it said. ``kept`` is for a server: a process of its own keeps it
for as long as any process of the session uses it.

    python -m tests.support.shared MODULE:FUNCTION FOLDER    # that process; FUNCTION(folder) is a context manager
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.support.wait import wait_for

T = TypeVar("T")


def folder_of(factory: pytest.TempPathFactory, name: str) -> Path:
    """The same one in every process of the session."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, value: Any) -> None:
    made = path.with_suffix(".made")
    made.write_text(json.dumps(value))
    made.replace(path)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """What ``make`` gave to the first that asked, as JSON keeps it; it gets a folder that the session has alone."""
    folder = folder_of(factory, name)
    told = folder / "told.json"
    with _alone(folder / "lock"):
        if not told.exists():
            work = folder / "work"
            work.mkdir(exist_ok=True)
            _write(told, make(work))
    found: T = json.loads(told.read_text())
    return found


@contextlib.contextmanager
def kept(factory: pytest.TempPathFactory, name: str, function: str) -> Iterator[dict[str, Any]]:
    """What ``function`` (``module:name``, a context manager over a folder) yields; a process holds it open until its
    last user has left or died."""
    folder = folder_of(factory, name)
    told = folder / "told.json"
    with (folder / "users").open("w") as users:
        with _alone(folder / "lock"):
            fcntl.flock(users, fcntl.LOCK_SH)  # waits where a keeper is just closing
            if not told.exists():
                keeper = _start_keeper(folder, function)
                log = folder / "keeper.log"
                wait_for(lambda: told.exists() or keeper.poll() is not None, f"{name} to start; see {log}", 200)
                assert told.exists(), log.read_text()[-4000:]
        yield json.loads(told.read_text())


def _start_keeper(folder: Path, function: str) -> subprocess.Popen[bytes]:
    with (folder / "keeper.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.shared", function, str(folder)],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _keep(function: str, folder: Path) -> None:
    module, _, name = function.partition(":")
    work = folder / "work"
    work.mkdir(exist_ok=True)
    with (folder / "users").open("w") as users, getattr(importlib.import_module(module), name)(work) as value:
        _write(folder / "told.json", value)
        fcntl.flock(users, fcntl.LOCK_EX)  # until nobody uses it
        (folder / "told.json").unlink()


if __name__ == "__main__":
    _keep(sys.argv[1], Path(sys.argv[2]))
