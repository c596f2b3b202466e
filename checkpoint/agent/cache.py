"""A node's bounded cache of token shards: sparse files of their full size, leaf by leaf filled and emptied.

A leaf is what has a digest of its own (``checkpoint/dataset.py``). The engine opens the files as it opens whole ones;
which leaves are there when is ``ahead.py``'s. Files outlive the agent: the next one finds leaves by where the files
have data, and believes none whose digest it has not checked.

    <folder>/<dataset>/00000.bin       a shard, with holes
    <folder>/<dataset>/00000.leaves    its leaves' digests, once they were needed
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from checkpoint import keys
from checkpoint.agent.fetch import DataRefused, room_bytes
from checkpoint.agent.gang import CannotStart
from checkpoint.dataset import LEAF_ALIGN, ShardLeaves, ShardRow, load_leaves
from checkpoint.errors import CheckpointError, Damaged, NotFound
from checkpoint.store import Store
from checkpoint.store.limits import until
from trainer import wire
from trainer.wire.files import write_file

log = logging.getLogger(__name__)

RANGE_BYTES = 4 << 20
"""Most of one request."""
_WORKERS = 4
_TABLES = 1024  # digests of so many shards' leaves are kept in memory
_KEPT = 4096  # of a file's beginning: its header stays, for ranks that start
_SHIFT = 32
_TABLE = ".leaves"
_REQUEST_S = 30.0

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
_PUNCH = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@dataclass(frozen=True)
class CachedShard:
    """A shard of a dataset, as its manifest has it, and its file here."""

    dataset: str
    number: int
    row: ShardRow
    vocab: int
    token_bytes: int
    path: Path

    @property
    def key(self) -> str:
        return keys.dataset_key(self.dataset, keys.shard_name(self.number))


def leaf_id(shard: int, leaf: int) -> int:
    """Of a leaf, among those of all shards; ascending with the place."""
    return shard << _SHIFT | leaf


class Cache:
    """The files. ``bring`` is called by one thread at a time."""

    def __init__(self, store: Store, shards: Sequence[CachedShard], leaf_bytes: Sequence[int]) -> None:
        self._store, self.shards, self._leaf_bytes = store, shards, leaf_bytes
        self._tables: OrderedDict[int, ShardLeaves] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="data")
        self.fetched_bytes = self.requests = 0
        """From the store, digests of leaves included."""

    # --- leaves ------------------------------------------------------------------------------------------

    def span(self, leaf: int) -> tuple[int, int]:
        """Where a leaf begins in its shard, and its bytes."""
        shard, size = leaf >> _SHIFT, self._leaf_bytes[leaf >> _SHIFT]
        first = (leaf & (1 << _SHIFT) - 1) * size
        return first, min(size, self.shards[shard].row.bytes - first)

    @property
    def largest(self) -> int:
        """Bytes of a leaf, at most."""
        return max(self._leaf_bytes)

    @property
    def count(self) -> int:
        """Of all leaves."""
        return sum(-(-shard.row.bytes // size) for shard, size in zip(self.shards, self._leaf_bytes, strict=True))

    def shard_of(self, leaf: int) -> CachedShard:
        return self.shards[leaf >> _SHIFT]

    def size(self, leaf: int) -> int:
        """Bytes that it takes of the disk: of its blocks."""
        return -(-self.span(leaf)[1] // LEAF_ALIGN) * LEAF_ALIGN

    def leaves(self, shard: int, first: int, end: int) -> range:
        """Those that hold these bytes of a shard."""
        size = self._leaf_bytes[shard]
        return range(leaf_id(shard, first // size), leaf_id(shard, (end - 1) // size) + 1)

    # --- the files ----------------------------------------------------------------------------------------

    def open(self) -> Iterator[int]:
        """Make the files that are not there; leaves that were left in those that are."""
        for number, shard in enumerate(self.shards):
            version = wire.SHARD_VERSION if shard.row.counted is None else wire.SHARD_MASKED
            header = wire.ShardHeader(
                version=version, token_bytes=shard.token_bytes, tokens=shard.row.tokens, vocab=shard.vocab
            )
            header.magic[:] = wire.SHARD_MAGIC
            fd = os.open(shard.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if os.fstat(fd).st_size != shard.row.bytes:
                    os.ftruncate(fd, 0)
                    os.ftruncate(fd, shard.row.bytes)
                found = list(self._found(fd, number))
                if os.pread(fd, len(bytes(header)), 0) != bytes(header):
                    os.pwrite(fd, bytes(header), 0)
            finally:
                os.close(fd)
            yield from found

    def _found(self, fd: int, shard: int) -> Iterator[int]:
        size, end = self._leaf_bytes[shard], self.shards[shard].row.bytes
        at = 0
        while at < end:
            try:
                first = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # holes up to the end
                    return
                raise
            at = os.lseek(fd, first, os.SEEK_HOLE)
            whole_to = at // size if at < end else -(-end // size)
            for leaf in range(-(-first // size), whole_to):
                if (leaf + 1) * size > _KEPT:  # of what stays there is no telling
                    yield leaf_id(shard, leaf)

    def drop(self, leaves: Iterable[int]) -> None:
        """Empty these."""
        for leaf in leaves:
            first, length = self.span(leaf)
            end = -(-(first + length) // LEAF_ALIGN) * LEAF_ALIGN  # a block at a file's end goes whole, or not at all
            first = max(first, _KEPT)
            if first >= end:
                continue
            fd = os.open(self.shards[leaf >> _SHIFT].path, os.O_RDWR | os.O_CLOEXEC)
            try:
                punch(fd, first, end - first)
            finally:
                os.close(fd)

    # --- from the store -----------------------------------------------------------------------------------

    def bring(self, leaves: Sequence[int], go_on: Callable[[], None]) -> None:
        """Have these leaves in the files, verified. Raises DataRefused, StoreError, OSError, and what ``go_on`` raises,
        which is asked before each request.
        """
        futures = [self._pool.submit(self._bring_run, run, go_on) for run in _runs(sorted(leaves), self.size)]
        wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _bring_run(self, run: Sequence[int], go_on: Callable[[], None]) -> None:
        """Leaves of one shard that lie beside one another."""
        go_on()
        number = run[0] >> _SHIFT
        shard = self.shards[number]
        try:
            table = self._table(number, go_on)
            fd = os.open(shard.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                missing = [leaf for leaf in run if not self._is_there(fd, table, leaf)]
                if missing:
                    self._fetch(fd, shard, table, range(missing[0], missing[-1] + 1))
            finally:
                os.close(fd)
        except (NotFound, Damaged) as error:
            raise DataRefused(
                f"shard {shard.key} is missing or cut short in {self._store.describe()}; prepare the data again"
            ) from error

    def _fetch(self, fd: int, shard: CachedShard, table: ShardLeaves, leaves: range) -> None:
        first = self.span(leaves[0])[0]
        end = sum(self.span(leaves[-1]))
        for last_try in (False, True):
            data = memoryview(self._get(shard.key, first, end - first))
            bad = [leaf for leaf in leaves if not self._holds(table, leaf, data, first)]
            if not bad:
                break
            if last_try:
                raise DataRefused(
                    f"{shard.key} in {self._store.describe()} does not have its digest at byte "
                    f"{self.span(bad[0])[0]}: it, or the digest, is damaged; `hotstage data prepare SPEC --again` "
                    "writes both anew"
                )
        while data:
            written = os.pwrite(fd, data, first)
            data, first = data[written:], first + written

    def _is_there(self, fd: int, table: ShardLeaves, leaf: int) -> bool:
        first, length = self.span(leaf)
        try:
            if os.lseek(fd, first, os.SEEK_DATA) != first:
                return False
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise
        return table.holds(leaf & (1 << _SHIFT) - 1, os.pread(fd, length, first))

    def _holds(self, table: ShardLeaves, leaf: int, data: memoryview, first: int) -> bool:
        at, size = self.span(leaf)
        return table.holds(leaf & (1 << _SHIFT) - 1, data[at - first : at - first + size])

    def _get(self, key: str, first: int, length: int) -> bytes:
        with until(time.monotonic() + _REQUEST_S):
            data = self._store.get(key, first=first, length=length)
        with self._lock:
            self.fetched_bytes += len(data)
            self.requests += 1
        return data

    # --- digests ------------------------------------------------------------------------------------------

    def _table(self, number: int, go_on: Callable[[], None]) -> ShardLeaves:
        """The digests of a shard's leaves: of this folder, else of the store, else of the shard itself, read whole."""
        with self._lock:
            if number in self._tables:
                self._tables.move_to_end(number)
                return self._tables[number]
        shard, size = self.shards[number], self._leaf_bytes[number]
        table = kept_leaves(shard.path)
        if table is None or (table.leaf_bytes, table.shard_bytes) != (size, shard.row.bytes):
            table = self._stored(shard, size) or self._made(shard, size, go_on)
            write_file(shard.path.with_suffix(_TABLE), table.pack())
        with self._lock:
            self._tables[number] = table
            if len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        return table

    def _stored(self, shard: CachedShard, size: int) -> ShardLeaves | None:
        """None where the store has none for leaves of that size."""
        try:
            table = load_leaves(self._store, shard.dataset, shard.number)
        except (NotFound, Damaged) as error:
            log.warning("%s: the shard is read whole, once, to make them; `hotstage data prepare SPEC --again`", error)
            return None
        with self._lock:
            self.fetched_bytes += len(table.digests)
            self.requests += 1
        return table if (table.leaf_bytes, table.shard_bytes) == (size, shard.row.bytes) else None

    def _made(self, shard: CachedShard, size: int, go_on: Callable[[], None]) -> ShardLeaves:
        whole = hashlib.sha256()

        def pieces() -> Iterator[bytes]:
            for first in range(0, shard.row.bytes, RANGE_BYTES):
                go_on()
                data = self._get(shard.key, first, min(RANGE_BYTES, shard.row.bytes - first))
                whole.update(data)
                yield data

        table = ShardLeaves.of(pieces(), size)
        if whole.hexdigest() != shard.row.sha256:
            raise DataRefused(f"shard {shard.key} in {self._store.describe()} is damaged; prepare the data again")
        return table


def kept_leaves(shard: Path) -> ShardLeaves | None:
    """The digests of leaves that lie beside a shard's file."""
    path = shard.with_suffix(_TABLE)
    try:
        return ShardLeaves.parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except CheckpointError as error:
        log.warning("%s", error)
        return None


def _runs(leaves: Sequence[int], size: Callable[[int], int]) -> Iterator[Sequence[int]]:
    """Of ascending leaves those that lie beside one another, in runs that one request brings."""
    run: list[int] = []
    room = 0
    for leaf in leaves:
        if run and (leaf != run[-1] + 1 or room < size(leaf)):
            yield run
            run = []
        if not run:
            room = RANGE_BYTES
        run.append(leaf)
        room -= size(leaf)
    if run:
        yield run


def punch(fd: int, first: int, length: int) -> None:
    """Give these bytes of a file back to its file system; they read as zero. OSError where it cannot do that."""
    if _LIBC.fallocate(fd, _PUNCH, first, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def check_folder(folder: Path, needed: int) -> None:
    """CannotStart where files of this folder cannot be emptied in part, or so many more bytes have no room."""
    path = folder / "punched"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, bytes(2 * LEAF_ALIGN), 0)
        punch(fd, 0, LEAF_ALIGN)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        raise CannotStart(
            78,
            f"the file system of {folder} cannot give back parts of a file ({error.strerror}), as data.cache_gib needs "
            "it: put the node's folder on ext4, xfs, btrfs or tmpfs, or set data.cache_gib = 0 (all shards are kept)",
        ) from error
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)
    free = room_bytes(folder)
    if free < needed:
        raise CannotStart(
            78,
            f"data.cache_gib asks for {needed / (1 << 30):.3g} GiB more below {folder}, which has "
            f"{free / (1 << 30):.3g} GiB free: lower data.cache_gib, or make room there",
        )
