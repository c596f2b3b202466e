"""A store in a folder: ``file:///abs/path``.

create = write a temporary file under ``.tmp/`` of the same root, fsync it, ``link`` it to its name (EEXIST: lost),
fsync the folder. A reader therefore sees an object whole or not at all, and a crash leaves at most a temporary file.
Hints (``live/``) are renamed into place and not fsynced. A folder shared over a network works where the file system has
atomic ``link``; the probe (``checkpoint/probe.py``) finds out.

What is large goes past the page cache (``O_DIRECT``) where the file system lets it: it is synced at once anyway, the
copy costs more processor time than the digests, and it would push out what training reads again. So it comes back too,
where the cache does not begin with it.

Invariants
  F1  a name under the root outside ``.tmp/`` is a whole object or a folder;
  F2  an object's file is never opened for writing after it has its name;
  F3  ``create`` returns True only after file and folder are on disk.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from checkpoint.errors import Damaged, NotFound, StoreError, StoreFull, StoreRefused, StoreUnavailable
from checkpoint.store.base import (
    FREE,
    HASHED_BYTES,
    Data,
    Info,
    check_hint,
    check_key,
    check_prefix,
    check_sha256,
    check_size,
    ignored,
    is_hint,
    is_name,
)
from checkpoint.store.direct import PIECE_BYTES, DirectReads, DirectWrites, Reads, cached
from checkpoint.store.limits import PACED_BYTES, SLICE_BYTES, Rate
from checkpoint.store.memory import window

_TMP = ".tmp"
_DIRECT_BYTES = 1 << 20  # objects from here on are written past the page cache, and reads from here on are read so
FEW = 16  # inodes that are left, for what this store has just removed again; or blocks
_TMP_AGE_S = 24 * 3600.0  # a temporary file this old belongs to nobody alive

_FULL = {errno.ENOSPC, errno.EDQUOT}
_RIGHTS = {errno.EACCES, errno.EPERM}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}
_SHAPE = {
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EXDEV,
}


def translate(error: OSError, what: str, root: Path) -> StoreError:
    """The one place where an OSError becomes one of ours."""
    code, text = error.errno, error.strerror or str(error)
    if isinstance(error, TimeoutError) and code is None:
        return StoreUnavailable(f"{what}: the file store {root}: {text}")
    if code in _FULL:
        if code == errno.ENOSPC and _has_no_inodes(root):
            return StoreFull(
                f"{what}: the file system of {root} has space, but takes no more files ({text}: all its inodes are in "
                "use, df -i); nothing that was there is lost: remove files there and it goes on"
            )
        return StoreFull(
            f"{what}: the file store {root} is full or over its quota ({text}); "
            "nothing that was there is lost: free space and it goes on"
        )
    if code == errno.EFBIG:
        return StoreRefused(f"{what}: the file store {root}: {_largest(text)}")
    if code == errno.EMFILE:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return StoreUnavailable(
            f"{what}: the file store {root}: this process has all of the {most} open files that it may have ({text}): "
            "raise the limit (ulimit -n, a service's LimitNOFILE)"
        )
    if code == errno.ESTALE:
        return StoreUnavailable(
            f"{what}: the file store {root} lies on a network file system whose server has forgotten the folder "
            f"({text}); mount it again and it goes on"
        )
    if code == errno.EROFS:
        return StoreRefused(
            f"{what}: the file store {root} refuses it ({text}): mount it writable, or choose another folder with "
            "--store"
        )
    if code in _RIGHTS:
        return StoreRefused(f"{what}: the file store {root} refuses it ({text}){_whose(error, root)}")
    if code in _SHAPE:
        return StoreRefused(
            f"{what}: {root} cannot hold it ({text}); the store must be a folder on a file system with hard links and "
            "long names: choose another with --store"
        )
    return StoreUnavailable(
        f"{what}: the file store {root} answered {errno.errorcode.get(code or 0, code)} ({text}); "
        "look at that folder (is it mounted?), or choose another with --store"
    )


def _number(folder: Path) -> int | None:
    """Of a folder's inode, which a file system that is mounted again keeps; None where there is no folder."""
    try:
        return os.stat(folder).st_ino
    except OSError:
        return None


def _has_no_inodes(root: Path) -> bool:
    for folder in (root, *root.parents):
        with contextlib.suppress(OSError):
            room = os.statvfs(folder)
            return room.f_files > 0 and room.f_favail < FEW <= room.f_bavail
    return False


def _whose(error: OSError, root: Path) -> str:
    """What kept this user out, as far as that can be seen, and the mend: a store may have several users."""
    asked = Path(os.fsdecode(error.filename2)).parent if error.filename2 else Path(os.fsdecode(error.filename or root))
    for path in (asked, *asked.parents):
        with contextlib.suppress(OSError):
            found = os.stat(path)
            return (
                f": {path} is user {found.st_uid}'s and group {found.st_gid}'s, with mode {found.st_mode & 0o7777:o}, "
                f"and this is user {os.geteuid()} of group {os.getegid()}; give it the rights there (users who share a "
                "store have a group and umask 002: docs/stores.md), or choose another folder with --store"
            )
    return f"; give the user {os.geteuid()} rights there, or choose another folder with --store"


def _largest(text: str) -> str:
    """What limits a file, and the mend: the process's limit, else the file system."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if most == resource.RLIM_INFINITY:
        return f"its file system takes no file as large as this ({text}); choose another with --store"
    return (
        f"this process may write files of {most} bytes at most ({text}), and chunks of checkpoints and shards of data "
        "are larger: raise the limit (ulimit -f unlimited, a service's LimitFSIZE=infinity) and start again; nothing "
        "that was there is lost"
    )


def _no_links(error: OSError, what: str, root: Path) -> StoreRefused:
    """Files can be made there, links to them cannot: FAT, exFAT, BeeGFS, some FUSE and some shared folders."""
    return StoreRefused(
        f"{what}: the file system of {root} has no hard links ({error.strerror}), and creating an object only where "
        "there is none rests on them; use a folder on a file system that has them (ext4, xfs, btrfs, NFS) or an S3 "
        "store, with --store"
    )


class FileStore:
    """Objects as files below ``root``; made at the first write where it is missing, but for who knows that there is a
    run (``begun``).
    """

    pace = FREE

    def __init__(self, root: Path, *, begun: bool = False) -> None:
        if "\0" in str(root):
            raise StoreRefused(f"file store {str(root)!r}: a path holds no NUL byte; take it out")
        if not root.is_absolute():
            raise StoreRefused(f"file store {root}: the path must be absolute, as in file:///home/me/runs")
        self.root, self._begun = root, begun
        self._numbers = itertools.count()
        self._token = secrets.token_hex(4)
        self._rate: Rate | None = None
        self._folder: int | None = None
        """The inode of the folder when the first object was written or found; None: there was none yet."""
        self._met: Path | None = None
        """An object of it that stays, or its folder for what is half written: some file systems number a folder anew
        when they look again."""

    @property
    def url(self) -> str:
        return self.root.as_uri()

    @property
    def retries(self) -> Mapping[str, int]:
        return {}

    def describe(self) -> str:
        return f"folder {self.root}" + ("" if os.path.exists(self.root) else " (which is not there)")

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        path = self._path(key)
        check_size(key, data)
        check_sha256(key, data, sha256, HASHED_BYTES)
        durable = not is_hint(key)
        try:
            if os.path.lexists(path):  # the common way to lose: no need to write first
                self._know(key)
                return self._holds(path, data)
            temporary = self._write(data, durable)
            try:
                self._into_place(os.link, temporary, path, durable)
            except FileExistsError:
                return self._holds(path, data)
            except OSError as error:
                if error.errno in _NO_LINKS and temporary.exists():  # it may be written to, but not linked
                    raise _no_links(error, f"creating {key!r}", self.root) from error
                raise
            finally:
                os.unlink(temporary)
            self._know(key)
        except OSError as error:
            raise translate(error, f"creating {key!r}", self.root) from error
        return True

    def put(self, key: str, data: Data) -> None:
        path = self._path(check_hint(key))
        check_size(key, data)
        try:
            temporary = self._write(data, durable=False)
            try:
                self._into_place(os.replace, temporary, path, durable=False)
            except (OSError, StoreError):
                os.unlink(temporary)
                raise
        except OSError as error:
            raise translate(error, f"writing {key!r}", self.root) from error

    def get(
        self, key: str, *, max_bytes: int | None = None, first: int | None = None, length: int | None = None
    ) -> bytes:
        path = self._path(key)
        try:
            with open(path, "rb", buffering=0) as file:
                begin, count = window(key, os.fstat(file.fileno()).st_size, max_bytes, first, length)
                file.seek(begin)
                data = _read(file.fileno(), count)
            self._know(key)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_root(error)
            raise NotFound(key, self.describe()) from error
        except OSError as error:
            raise translate(error, f"reading {key!r}", self.root) from error
        if len(data) != count:
            raise _shorter(key, path)
        return data

    def read_into(
        self, key: str, out: Sequence[memoryview], *, first: int = 0, filled: Callable[[int], None] = ignored
    ) -> None:
        path, at = self._path(key), first
        try:
            with open(path, "rb", buffering=0) as file:
                size = sum(view.nbytes for view in out)
                window(key, os.fstat(file.fileno()).st_size, None, first, size)
                direct = size >= _DIRECT_BYTES and not cached(file.fileno(), first)
                read = DirectReads(file.fileno()).read if direct else Reads(file.fileno(), first, size).read
                for number, view in enumerate(out):
                    rest = view.cast("B")
                    while rest.nbytes:
                        came = read(rest, at)
                        if came == 0:
                            raise _shorter(key, path)
                        rest, at = rest[came:], at + came
                    filled(number)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_root(error)
            raise NotFound(key, self.describe()) from error
        except OSError as error:
            raise translate(error, f"reading {key!r}", self.root) from error

    def holds(self, key: str, data: Data, *, sha256: bytes) -> bool:
        path = self._path(key)
        try:
            return self._holds(path, data)
        except (NotADirectoryError, IsADirectoryError):
            return False
        except OSError as error:
            raise translate(error, f"looking at {key!r}", self.root) from error

    def limit(self, bytes_per_s: float | None) -> None:
        self._rate = Rate(bytes_per_s) if bytes_per_s else None

    def head(self, key: str) -> Info | None:
        path = self._path(key)
        try:
            status = os.stat(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_root(error)
            return None
        except OSError as error:
            raise translate(error, f"looking at {key!r}", self.root) from error
        self._know(key)
        return None if os.path.isdir(path) else Info(key, status.st_size, status.st_mtime)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        check_prefix(prefix)
        folder = prefix.rpartition("/")[0]
        try:
            yield from self._walk(folder + "/" if folder else "", prefix, start_after)
        except OSError as error:
            raise translate(error, f"listing {prefix!r}", self.root) from error

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[Info]:
        try:
            with os.scandir(self.root / folder) as entries:
                names = sorted(entry.name + "/" if entry.is_dir() else entry.name for entry in entries)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._check_root(error)
            return
        for name in names:  # a folder sorts by its name with the slash: byte order of the keys
            if not is_name(name.removesuffix("/")):  # no object's: a tool's copy, a name of our own that is hidden
                continue
            key = folder + name
            if not (key.startswith(prefix) or prefix.startswith(key)):
                continue
            if name.endswith("/"):
                if key > start_after or start_after.startswith(key):
                    yield from self._walk(key, prefix, start_after)
            elif key > start_after and key.startswith(prefix):
                info = self.head(key)
                if info is not None:  # gone meanwhile
                    yield info

    def delete(self, key: str) -> bool:
        path = self._path(key)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise translate(error, f"deleting {key!r}", self.root) from error
        for parent in path.parents:  # folders are not objects: empty ones go; a creator makes them anew
            if parent == self.root:
                break
            try:
                os.rmdir(parent)
            except OSError:
                break
        return False

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    # --- inside -------------------------------------------------------------------------------------------

    def _know(self, key: str = "") -> None:
        """Something of the store is there: from here on it is known by its folder, and by that object."""
        self._folder = self._folder or _number(self.root)
        if self._met is None or (self._met.name == _TMP and key and not is_hint(key)):
            self._met = self.root / (_TMP if not key or is_hint(key) else key)

    def _check_root(self, error: OSError) -> None:
        """Where something is missing. StoreUnavailable where the folder is not the one that this store has met, or has
        no run where there must be one: it is neither read nor begun anew, as what was there would be missed by nobody.
        StoreRefused where none can be.
        """
        known = self._folder  # before the look: another thread may be making the folder
        if known is not None and known != _number(self.root) and not (self._met and os.path.exists(self._met)):
            raise StoreUnavailable(
                f"the file store {self.root} is gone, and this process has used it: put the folder back where it was, "
                "or mount its disk again, and it goes on; nothing is written there meanwhile"
            ) from error
        if self._begun and not os.path.isdir(self.root / "runs"):
            raise StoreUnavailable(
                f"the file store {self.root} is not there, or has no runs, and this process serves one of them: put "
                "the folder back where it was, or mount its disk again, and it goes on"
            ) from error
        if os.path.isdir(self.root):
            return
        for path in (self.root, *self.root.parents):
            if os.path.islink(path) and not os.path.exists(path):
                raise StoreRefused(
                    f"the file store {self.root}: {path} is a symbolic link to {os.readlink(path)!r}, and nothing is "
                    "there; make that folder (or mount its disk), or correct --store"
                ) from error
            if os.path.exists(path) and not os.path.isdir(path):
                raise StoreRefused(
                    f"the file store {self.root}: {path} is a file, and a store is a folder; correct --store"
                ) from error

    def _sweep(self) -> None:
        """Remove what crashed writers left half written, as far as that is ours to remove."""
        limit = time.time() - _TMP_AGE_S
        with contextlib.suppress(OSError), os.scandir(self.root / _TMP) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                    if entry.stat(follow_symlinks=False).st_mtime < limit:
                        os.unlink(entry.path)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _write(self, data: Data, durable: bool) -> Path:
        """A new temporary file with the data; removed again where it cannot be written whole."""
        number = next(self._numbers)
        if number == 0:
            self._sweep()
        path = self.root / _TMP / f"{os.getpid()}-{self._token}-{number}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError as error:
            self._make_folders(path.parent, durable, error)
            descriptor = os.open(path, flags, 0o666)
        self._know()
        try:
            try:
                rest, rate = memoryview(data).cast("B"), self._rate
                paced = rate is not None and rest.nbytes >= PACED_BYTES
                write = DirectWrites(descriptor).write if durable and rest.nbytes >= _DIRECT_BYTES else None
                while rest:
                    piece = rest[: SLICE_BYTES if paced else PIECE_BYTES]
                    if paced and rate is not None:
                        rate.take(piece.nbytes)
                    rest = rest[write(piece) if write is not None else os.write(descriptor, piece) :]
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            os.unlink(path)
            raise
        return path

    def _into_place(self, move: object, temporary: Path, path: Path, durable: bool) -> None:
        assert callable(move)
        for attempt in itertools.count():
            try:
                move(temporary, path)
                break
            except FileNotFoundError as error:  # the folder is missing, or a collector has just removed it as empty
                if attempt == 10:
                    raise
                self._make_folders(path.parent, durable, error)
        if durable:
            _fsync_folder(path.parent)

    def _make_folders(self, folder: Path, durable: bool, error: OSError) -> None:
        """``error``: that they are missing."""
        self._check_root(error)
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            try:
                os.mkdir(folder)
            except FileExistsError:
                pass  # another creator's
            except FileNotFoundError as error:
                if not (self.root.is_relative_to(folder) and folder.parent.is_dir()):
                    raise  # a collector's
                raise StoreRefused(
                    f"the file store {self.root}: {folder.parent} takes no folders of people (it is the system's own); "
                    "choose another with --store"
                ) from error
            if durable:
                _fsync_folder(folder.parent)

    def _holds(self, path: Path, data: Data) -> bool:
        """Whether the object that was there first has exactly these bytes."""
        try:
            with open(path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != memoryview(data).nbytes:
                    return False
                rest = memoryview(data).cast("B")
                while rest:
                    block = os.read(file.fileno(), 1 << 20)
                    if not block or block != rest[: len(block)]:
                        return False
                    rest = rest[len(block) :]
        except FileNotFoundError:
            return False
        return True


def _shorter(key: str, path: Path) -> Damaged:
    return Damaged(
        f"object {key!r}: its file {path} became shorter while it was read; objects never change: who else writes "
        "there?"
    )


def _read(descriptor: int, count: int) -> bytes:
    """Up to ``count`` bytes from here on, in as few calls as the kernel allows."""
    block = os.read(descriptor, count)
    if len(block) == count or not block:
        return block
    parts, have = [block], len(block)
    while have < count and (block := os.read(descriptor, count - have)):
        parts.append(block)
        have += len(block)
    return b"".join(parts)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
