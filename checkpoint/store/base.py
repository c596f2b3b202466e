"""The seam between checkpoints and storage: a handful of verbs over flat keys, and what each of them promises.

A key is a relative path of plain names, ``runs/r-0a1b2c/log/00000000000000000001``. The only primitive that orders
anything is ``create``; objects are never changed once created, except hints (``runs/<run>/live/...``), which ``put``
replaces. Stores are safe to use from several threads.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from checkpoint.errors import StoreRefused

Data = bytes | bytearray | memoryview

MAX_OBJECT_BYTES = 5 << 30  # of one single PUT on S3
HASHED_BYTES = 1 << 20
"""Whoever hands over more than this with its SHA-256 has hashed it a moment ago, and nothing lies between."""
MAX_KEY_BYTES = 900  # S3 takes 1024, prefix included
_NAME = re.compile(r"[A-Za-z0-9_+=@-][A-Za-z0-9._+=@-]{0,199}\Z")


@dataclass(frozen=True, slots=True)
class Info:
    """An object as a listing shows it."""

    key: str
    bytes: int
    modified: float | None = field(default=None, compare=False)
    """When it was written, in seconds since 1970 by the store's own clock; None where the store does not say."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How often a store is asked while nothing happens, by what a request of it costs. Seconds.

    An idle agent asks 1 / idle_s + 1 / beat_s + 2 / hint_s times a second: on S3 less than once.
    """

    look_s: float
    """Between looks for what may come any moment."""
    idle_s: float
    """Between looks for what may come some time."""
    beat_s: float
    """After which a status is written again although nothing in it is new; 0: whenever its writer looks at it."""
    hint_s: float
    """A request that writes lines of metrics, on the average, and one that writes what ranks print."""

    def pause_s(self, waited_s: float, look_s: float | None = None) -> float:
        """Until the next look for what has not come for so long: a quarter of that, between ``look_s`` and idle."""
        least = self.look_s if look_s is None else look_s
        return min(max(self.idle_s, least), max(least, waited_s / 4))


FREE = Pace(look_s=0.05, idle_s=0.05, beat_s=0.0, hint_s=0.0)
"""Of a store on this machine."""
PAID = Pace(look_s=0.5, idle_s=3.0, beat_s=5.0, hint_s=5.0)
"""Of a service, which counts requests and has many agents to answer."""


def ignored(_: int) -> None:
    """Of whom nothing is to be told."""


def fill(out: Sequence[memoryview], data: Data, filled: Callable[[int], None]) -> None:
    """These, one after the other, with bytes that are there."""
    at = 0
    for number, view in enumerate(out):
        view[:] = data[at : at + view.nbytes]
        at += view.nbytes
        filled(number)


class Store(Protocol):
    """Storage of one root. Every call raises only ``checkpoint.errors``."""

    @property
    def pace(self) -> Pace:
        """How often it may be asked while nothing happens."""

    @property
    def url(self) -> str:
        """The address that opens it again, without credentials."""

    @property
    def retries(self) -> Mapping[str, int]:
        """How often a request was sent again since this was opened, by cause."""

    def describe(self) -> str:
        """One phrase for people."""

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        """Create the object if there is none; atomic, durable, never visible in part.

        True: the object holds exactly these bytes, because this call (or an identical one) made it. False: another
        one was there first. An unclear answer (time-out, 409, 412, 5xx, reset) is settled inside by reading
        back and comparing, so writers who must know who won put an owner token into their bytes. With ``sha256``
        a store that gets the bytes over a wire checks what arrived and refuses what differs; in this process only
        small objects are hashed again (``HASHED_BYTES``).
        """

    def put(self, key: str, data: Data) -> None:
        """Create or replace a hint atomically; only for keys under ``runs/<run>/live/``. Safe to lose."""

    def get(
        self, key: str, *, max_bytes: int | None = None, first: int | None = None, length: int | None = None
    ) -> bytes:
        """The whole object, or the ``length`` bytes from ``first`` on (all that follow, without ``length``).

        NotFound where there is none; Damaged where it is larger than ``max_bytes`` or the range is not inside it.
        """

    def read_into(
        self, key: str, out: Sequence[memoryview], *, first: int = 0, filled: Callable[[int], None] = ignored
    ) -> None:
        """Fill these, one after the other, with the bytes from ``first`` on, without another copy of them. As ``get``;
        after an error they hold nothing that counts. ``filled`` is called with the number of each once it is full and
        before the next one is read; again where it was read again after a fault. What it raises ends the read.
        """

    def holds(self, key: str, data: Data, *, sha256: bytes) -> bool:
        """Whether the object is there with exactly these bytes: by the checksum that the store keeps of what it took,
        where it tells one, else by reading them. Nothing is sent.
        """

    def limit(self, bytes_per_s: float | None) -> None:
        """From here on the bodies of large objects leave this process at most so fast, all together; None: freely."""

    def head(self, key: str) -> Info | None:
        """Name and size, or None where there is none."""

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        """Objects whose key starts with the prefix and sorts after ``start_after``, in byte order of their keys."""

    def delete(self, key: str) -> bool:
        """Remove the object; no error where there is none. Only the collector's identity may. Whether its bytes stay
        all the same, as an old version.
        """

    def local_path(self, key: str) -> Path | None:
        """Where the object's bytes lie as a file on this machine, if they do; read only."""


def is_name(text: str) -> bool:
    """Whether it can be a part of a key."""
    return _NAME.match(text) is not None


def check_key(key: str) -> str:
    """The key itself, or StoreRefused: relative, of plain names, without '.', '..' or hidden parts."""
    if not isinstance(key, str) or not key or len(key.encode("utf-8", "surrogatepass")) > MAX_KEY_BYTES:
        raise StoreRefused(f"object key {str(key)[:80]!r}: must have 1 to {MAX_KEY_BYTES} bytes")
    for name in key.split("/"):
        if not is_name(name):
            raise StoreRefused(
                f"object key {key[:200]!r}: {name[:80]!r} is not a plain name of letters, digits and ._+=@- "
                "(200 at most, not starting with a dot); keys are relative paths of such names"
            )
    return key


def check_prefix(prefix: str) -> str:
    """A listing's prefix: a key, or one cut anywhere, or nothing."""
    whole, _, last = prefix.rpartition("/")
    if whole:
        check_key(whole)
    if last:
        check_key(last)
    elif prefix == "/":
        raise StoreRefused("listing prefix '/': keys are relative, leave the slash out")
    return prefix


def is_hint(key: str) -> bool:
    """True for what may be overwritten and lost: ``runs/<run>/live/...``."""
    parts = key.split("/", 3)
    return len(parts) == 4 and parts[0] == "runs" and parts[2] == "live"


def check_hint(key: str) -> str:
    """The key, or StoreRefused where it is not a hint's."""
    check_key(key)
    if not is_hint(key):
        raise StoreRefused(f"object {key!r} may not be overwritten: only hints under runs/<run>/live/ may; create it")
    return key


def check_size(key: str, data: Data) -> int:
    """Bytes of the data, or StoreRefused where one PUT cannot carry them."""
    size = data.nbytes if isinstance(data, memoryview) else len(data)
    if size > MAX_OBJECT_BYTES:
        raise StoreRefused(f"object {key!r} has {size} bytes, the limit is {MAX_OBJECT_BYTES}: cut it into chunks")
    return size


def check_sha256(key: str, data: Data, sha256: bytes | None, most: int = MAX_OBJECT_BYTES) -> None:
    """StoreRefused where the data, of at most ``most`` bytes, is not what the digest says."""
    if sha256 is not None and memoryview(data).nbytes <= most and hashlib.sha256(data).digest() != sha256:
        raise StoreRefused(
            f"object {key!r}: its bytes do not have the SHA-256 {sha256.hex()} that came with them; "
            "they changed between hashing and writing, so nothing was written: hash and write again"
        )
