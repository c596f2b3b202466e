"""Files of this machine that are seen whole or not at all: written beside their name, then moved to it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def kept(path: Path, *, mode: int = 0o666, durable: bool = False) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block ends well, over one that had it; nothing is left where it fails."""
    temporary = _beside(path)
    try:
        with _new(temporary, mode) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    with kept(path, mode=mode) as file:
        file.write(data)


def create_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Linked to its name: of two that do it at once one is first, and the other's is dropped. Where it is there already
    nothing is written: a disk may be full by then."""
    if path.exists():
        return
    temporary = _beside(path)
    try:
        with _new(temporary, mode) as file:
            file.write(data)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links: the rename may replace, so only where there is none
            if not path.exists():
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _new(path: Path, mode: int) -> IO[bytes]:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb")


def _beside(path: Path) -> Path:
    """A name of nobody's in the same folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")
