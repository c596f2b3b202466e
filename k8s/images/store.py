"""The S3 server of the quick overlay as one static binary: what its image holds where none can be pulled.

Built from its Go module, once, into the user's cache folder. The tests use the same one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from k8s.images.builder import ImageError
from k8s.images.static import cache, say

VERSION = "v1.8.0"
MODULE = "github.com/versity/versitygw/cmd/versitygw"


def store_server(go: Callable[[], str] | None = None) -> Path:
    """The server's binary, built where it is not in the cache yet (minutes, once) by the ``go`` command."""
    folder = cache() / "bin"
    found = folder / f"versitygw-{VERSION}-static"
    if found.exists():
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".versitygw-{VERSION}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            program = (go or _go)()
            say(f"building the S3 server versitygw {VERSION} (about 3 minutes on 2 cores, once)")
            target = folder / f".build-{os.getpid()}"
            try:
                subprocess.run(
                    [program, "install", "-trimpath", "-ldflags=-s -w", f"{MODULE}@{VERSION}"],
                    env={**os.environ, "GOBIN": str(target), "GOFLAGS": "-mod=mod", "CGO_ENABLED": "0"},
                    cwd=folder,
                    check=True,
                )
                os.replace(target / "versitygw", found)
            finally:
                shutil.rmtree(target, ignore_errors=True)
    return found


def _go() -> str:
    found = shutil.which("go")
    if found is None:
        raise ImageError(
            f"the image `store` is built from {MODULE} by Go, and there is no `go` here; install it, or have the "
            f"cluster pull docker.io/versity/versitygw:{VERSION}, which the quick overlay names"
        )
    return found
