"""Which algorithm computes each product of a run on a GPU (``engine/wire/algorithms.h``): chosen once, kept.

``runs/<run>/algorithms/<number>`` are tables, from 0 on without a gap, each created if absent: what no table before
it has. So of two ranks that time the same product at once the first one's choice is the run's, and both go by it; later
attempts, on any number of nodes and stages, find it before they start. A product's key is opaque here; a table is of
one kind of device and one version of the library, its *family*.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint import keys
from checkpoint.agent.crc32c import crc32c
from checkpoint.errors import CheckpointError, Damaged, NotFound, OtherVersion, StoreError
from checkpoint.store import Store
from trainer import wire
from trainer.wire.files import write_file
from trainer.wire.unreadable import check_version

log = logging.getLogger(__name__)

FILE = "algorithms"
"""In the node's work folder: all tables of the run, one after the other."""
RETRY_S = 0.5
_HEAD, _ENTRY = ctypes.sizeof(wire.Algorithms), ctypes.sizeof(wire.Algorithm)
_KEY = wire.Algorithm.key.size
_CRC_AT = wire.Algorithms.crc.offset + wire.Algorithms.crc.size
_MAX_BYTES = _HEAD + wire.ALGORITHMS_MAX * _ENTRY
_MAX_TABLES = 4096


@dataclass(frozen=True)
class Table:
    """``entries``: an entry's bytes by its key's."""

    device: bytes
    library: bytes
    capability: int
    entries: Mapping[bytes, bytes]

    @property
    def family(self) -> tuple[bytes, bytes, int]:
        return self.device, self.library, self.capability

    def to_bytes(self) -> bytes:
        head = wire.Algorithms(
            version=wire.ALGORITHMS_VERSION,
            device=self.device,
            library=self.library,
            capability=self.capability,
            count=len(self.entries),
        )
        head.magic[:] = wire.ALGORITHMS_MAGIC
        body = b"".join(self.entries.values())
        head.crc = crc32c(bytes(head)[_CRC_AT:], body)
        return bytes(head) + body

    @classmethod
    def parse(cls, data: bytes, what: str) -> Table:
        """Damaged or OtherVersion where the bytes are not exactly one table."""
        if len(data) < _HEAD or data[: len(wire.ALGORITHMS_MAGIC)] != wire.ALGORITHMS_MAGIC:
            raise Damaged(f"{what} is not a table of algorithms: it has {len(data)} bytes, or another beginning")
        head = wire.Algorithms.from_buffer_copy(data)
        check_version(what, head.version, wire.ALGORITHMS_VERSION, OtherVersion)
        if head.count > wire.ALGORITHMS_MAX or len(data) != _HEAD + head.count * _ENTRY:
            raise Damaged(f"{what} has {len(data)} bytes for {head.count} algorithms (at most {wire.ALGORITHMS_MAX})")
        if crc32c(data[_CRC_AT:]) != head.crc:
            raise Damaged(f"{what} does not have its checksum")
        entries = [data[at : at + _ENTRY] for at in range(_HEAD, len(data), _ENTRY)]
        found = {entry[:_KEY]: entry for entry in entries}
        if len(found) != len(entries):
            raise Damaged(f"{what} has two algorithms for one product")
        return cls(head.device, head.library, head.capability, found)


def tables(store: Store, run: str) -> Iterator[Table]:
    """The run's, in order. Raises StoreError, Damaged, OtherVersion."""
    for number in range(_MAX_TABLES):
        key = keys.algorithms_key(run, number)
        try:
            data = store.get(key, max_bytes=_MAX_BYTES)
        except NotFound:
            return
        yield Table.parse(data, key)
    raise Damaged(f"run {run} has more than {_MAX_TABLES} tables of algorithms")


def agree(store: Store, run: str, proposed: Table, cancelled: threading.Event) -> Table | None:
    """The run's choice for the same products, in the same order; None where that was cancelled.

    Blocks until the store has it, for a thread of its own. Raises Damaged, OtherVersion.
    """
    while not cancelled.is_set():
        try:
            have: dict[bytes, bytes] = {}
            count = 0
            for table in tables(store, run):
                count += 1
                if table.family == proposed.family:
                    have = {**table.entries, **have}
            missing = {key: entry for key, entry in proposed.entries.items() if key not in have}
            if not missing:
                return replace(proposed, entries={key: have[key] for key in proposed.entries})
            store.create(keys.algorithms_key(run, count), replace(proposed, entries=missing).to_bytes())
        except StoreError as error:
            log.warning("the choice of algorithms cannot be kept now: %s", error)
            cancelled.wait(RETRY_S)
    return None


def bring(store: Store, run: str, work: Path, cancelled: threading.Event) -> None:
    """All tables of the run into the node's work folder; no file where there are none.

    Blocks as ``agree`` does, and raises the same; OSError where the folder takes no file.
    """
    while not cancelled.is_set():
        try:
            data = b"".join(table.to_bytes() for table in tables(store, run))
        except StoreError as error:
            log.warning("the run's algorithms cannot be read now: %s", error)
            cancelled.wait(RETRY_S)
            continue
        if data:
            write_file(work / FILE, data)
        else:
            (work / FILE).unlink(missing_ok=True)
        return


def digest(work: Path) -> bytes:
    """For the attempt file: SHA-256 of what ``bring`` brought; zeros where that is nothing."""
    with contextlib.suppress(FileNotFoundError):
        return hashlib.sha256((work / FILE).read_bytes()).digest()
    return bytes(32)


def answer(store: Store, run: str, data: bytes, cancelled: threading.Event) -> tuple[int, bytes] | None:
    """What a rank hears that proposed this: 0 and a table, or an exit code and why; None where that was cancelled."""
    try:
        agreed = agree(store, run, Table.parse(data, "what a rank proposes"), cancelled)
    except CheckpointError as error:
        return 78, f"the run's algorithms cannot be kept: {error}".encode()
    return None if agreed is None else (0, agreed.to_bytes())
