"""Files of this machine that are seen whole or not at all: written beside their name, then moved to it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def kept(path: Path, *, mode: int = 0o666, durable: bool = False) -> Iterator[IO[bytes]]:
    """A file that gets its name when the block ends well, over one that had it; nothing is left where it fails."""
    temporary, opened = _new_beside(path, mode)
    try:
        with opened as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def kept_where(path: Path) -> Iterator[IO[bytes]]:
    """As `kept`, under a name that a person gave: of a link its end is replaced, a device or a pipe is written to."""
    if str(path).startswith(("/dev/", "/proc/")) or (path.exists() and not path.is_file()):
        with open(path, "wb") as file:
            yield file
    else:
        with kept(Path(os.path.realpath(path))) as file:
            yield file


class Together:
    """Files of a folder that get their names at once, when all are written: what fails before leaves those as they are
    that have these names. OSError from all of it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, dict[str, Path]()

    def write(self, name: str, pieces: Iterable[bytes | bytearray | memoryview]) -> Path:
        path = self._folder / name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._written[name], opened = _new_beside(path)
        with opened as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return path

    def finish(self) -> None:
        """The names. Who is killed here leaves some of the new files, the first written first, and none of the old."""
        for name in reversed(self._written):
            (self._folder / name).unlink(missing_ok=True)
        for name in list(self._written):
            os.replace(self._written[name], self._folder / name)
            del self._written[name]

    def undo(self) -> None:
        for temporary in self._written.values():
            temporary.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    with kept(path, mode=mode) as file:
        file.write(data)


def create_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Linked to its name: of two that do it at once one is first, and the other's is dropped. Where it is there already
    nothing is written: a disk may be full by then."""
    if path.exists():
        return
    temporary, opened = _new_beside(path, mode)
    try:
        with opened as file:
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


def _new_beside(path: Path, mode: int = 0o666) -> tuple[Path, IO[bytes]]:
    """A new file under a name of nobody's in the same folder."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    return temporary, open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb")
