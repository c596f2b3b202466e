"""Where an export goes: a folder, or under a prefix of a bucket. Files are seen whole or not at all, in either.

Memory: what is being written of one file (a piece, or a few parts of ``store/s3_parts.py``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from checkpoint.errors import StoreError, StoreRefused, StoreUnavailable
from checkpoint.store.address import address, folder_of
from trainer.wire.files import Together

if TYPE_CHECKING:
    from checkpoint.store.s3 import S3Store

_NO_FOLDER = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOENT),
}
RUN_MARK = "hotstage_run"
"""Of the run, in the header of exported weights; it stands at the beginning."""
_HEAD_BYTES = 512
ADAPTER = re.compile(r"adapter_(config\.json|model\..*)")
"""Files by which a folder holds an adapter of a model."""
TEMPLATE = "chat_template.jinja"
"""How a talk is written for a model."""
Buffer = bytes | bytearray | memoryview
"""Contiguous little-endian bytes (a C-ordered NumPy array's ``.data.cast("B")``)."""


class Destination(Protocol):
    """Takes files, one after the other."""

    def begin(self, names: Sequence[str], weights: str) -> None:
        """Before anything is written: StoreRefused where other files that begin with ``weights`` would be taken for a
        part of these."""

    def write(self, name: str, pieces: Iterable[Buffer], size: int, state: str) -> str:
        """The file, of ``size`` bytes, from a checkpoint of this state digest; its address."""

    def finish(self) -> None:
        """After the last file."""

    def undo(self) -> None:
        """It cannot be written whole: what is left would be taken for an export goes, as far as that is sure."""


class Folder:
    """A folder of this machine. An older export of a run is replaced; files that somebody else put there are not.

    Files get their names once all are written: whatever fails before, an older export stays as it was, and no file of
    one lies beside those of the other.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._files = path, Together(path)

    def begin(self, names: Sequence[str], weights: str) -> None:
        try:
            there = os.listdir(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return  # it is made, or writing says why not
        except OSError as error:
            raise _refusal(self.path, error) from error
        refuse_others(str(self.path), there, names, weights)
        replaced = sorted(set(there) & set(names))
        if replaced and not any(_exported(self.path / name) for name in replaced if name.endswith(".safetensors")):
            raise StoreRefused(
                f"{self.path} holds {replaced[0]}{' and more' if len(replaced) > 1 else ''} that no export of a run "
                "wrote, and this one would replace: choose an empty folder with -o, or remove it first"
            )

    def write(self, name: str, pieces: Iterable[Buffer], size: int, state: str) -> str:
        try:
            return str(self._files.write(name, pieces))
        except OSError as error:
            raise _refusal(self.path / name, error) from error

    def finish(self) -> None:
        try:
            self._files.finish()
        except OSError as error:
            raise _refusal(self.path, error) from error

    def undo(self) -> None:
        with contextlib.suppress(OSError):  # the first error is told
            self._files.undo()


def _exported(path: Path) -> bool:
    """Whether weights were written by an export of a run: their header says which."""
    try:
        with path.open("rb") as file:
            return f'"{RUN_MARK}":'.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False


class Bucket:
    """Under a prefix of a bucket. Nothing is replaced: what is there of the same checkpoint stays, so that an export
    that was interrupted goes on; something else is refused."""

    def __init__(self, store: S3Store) -> None:
        self.store = store

    def finish(self) -> None:
        """Each file is there since it was written."""

    def undo(self) -> None:
        """The next one goes on from there."""

    def begin(self, names: Sequence[str], weights: str) -> None:
        there = [info.key for info in self.store.list(weights) if "/" not in info.key]
        refuse_others(self.store.describe(), there, names, weights)

    def write(self, name: str, pieces: Iterable[Buffer], size: int, state: str) -> str:
        from checkpoint.store.s3_parts import create_in_parts

        if not create_in_parts(self.store, name, pieces, size, state):
            raise StoreRefused(
                f"{self.store.describe()} has another {name}, and an export replaces nothing there: choose an empty "
                "prefix with -o, or remove it first"
            )
        before, mark, after = self.store.url.partition("?")
        return f"{before}/{name}{mark}{after}"


def target(text: str) -> Destination:
    """Where ``-o`` says: a folder, file:///…, or s3://bucket/prefix with the options of a store's address."""
    if not text.strip():
        raise StoreRefused("-o is empty: give a folder, or s3://bucket/prefix")
    url = address(text)
    if url.lower().startswith("s3:"):
        from checkpoint.store.s3_address import open_s3

        return Bucket(open_s3(url))
    if not url.lower().startswith("file:"):
        raise StoreRefused(f"-o {text}: an export goes into a folder or to s3://bucket/prefix")
    return Folder(folder_of(url))


def refuse_others(where: str, there: Iterable[str], names: Sequence[str], weights: str) -> None:
    """StoreRefused where other files are there that would be taken for weights of these, or for what changes them."""
    there = list(there)
    if adapter := next((name for name in sorted(there) if ADAPTER.fullmatch(name)), None):
        raise StoreRefused(
            f"{where} holds an adapter ({adapter}), with which others would open these weights: remove it, or choose "
            "another folder with -o"
        )
    if TEMPLATE in there and TEMPLATE not in names:
        raise StoreRefused(
            f"{where} holds a {TEMPLATE}, with which others would talk to this model, and it has none: remove it, or "
            "choose another folder with -o"
        )
    others = sorted(n for n in there if n.startswith(weights) and ".safetensors" in n and n not in names)
    if others:
        raise StoreRefused(
            f"{where} holds {others[0]}{' and more' if len(others) > 1 else ''} of another export, which would be "
            "opened in place of this one: remove it, or choose another folder with -o"
        )


def _refusal(path: Path, error: OSError) -> StoreError:
    why = "a file lies where a folder must be" if isinstance(error, FileExistsError) else error.strerror or error
    text = f"writing {path}: {why}; nothing was left half written"
    if error.errno in _NO_FOLDER:
        return StoreRefused(f"{text}: choose a folder that can be written with -o")
    return StoreUnavailable(f"{text}: free space, or choose another folder with -o")
