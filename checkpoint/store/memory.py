"""A store in this process's memory: the contract at its shortest, for tests and for reading."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from checkpoint.errors import Damaged, NotFound
from checkpoint.store.base import (
    FREE,
    HASHED_BYTES,
    Data,
    Info,
    Pace,
    check_hint,
    check_key,
    check_prefix,
    check_sha256,
    check_size,
    fill,
    ignored,
)


class MemoryStore:
    """Objects in a dict; lives as long as this value does. ``pace``: as if its requests cost another store's;
    ``clock``: its own, which says when an object was written."""

    def __init__(self, pace: Pace = FREE, clock: Callable[[], float] = time.time) -> None:
        self.pace = pace
        self._clock = clock
        self._objects: dict[str, bytes] = {}
        self._written: dict[str, float] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return "memory:"

    @property
    def retries(self) -> Mapping[str, int]:
        return {}

    def describe(self) -> str:
        return "this process's memory"

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        check_key(key)
        check_size(key, data)
        check_sha256(key, data, sha256, HASHED_BYTES)
        with self._lock:
            self._written.setdefault(key, self._clock())
            return self._objects.setdefault(key, copy := bytes(data)) == copy

    def put(self, key: str, data: Data) -> None:
        check_hint(key)
        check_size(key, data)
        with self._lock:
            self._objects[key], self._written[key] = bytes(data), self._clock()

    def get(
        self, key: str, *, max_bytes: int | None = None, first: int | None = None, length: int | None = None
    ) -> bytes:
        check_key(key)
        with self._lock:
            data = self._objects.get(key)
        if data is None:
            raise NotFound(key, self.describe())
        begin, size = window(key, len(data), max_bytes, first, length)
        return data[begin : begin + size]

    def read_into(
        self, key: str, out: Sequence[memoryview], *, first: int = 0, filled: Callable[[int], None] = ignored
    ) -> None:
        fill(out, self.get(key, first=first, length=sum(view.nbytes for view in out)), filled)

    def holds(self, key: str, data: Data, *, sha256: bytes) -> bool:
        check_key(key)
        with self._lock:
            return self._objects.get(key) == data

    def limit(self, bytes_per_s: float | None) -> None:
        """Nothing leaves this process."""

    def head(self, key: str) -> Info | None:
        check_key(key)
        with self._lock:
            data = self._objects.get(key)
            return None if data is None else Info(key, len(data), self._written[key])

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        check_prefix(prefix)
        with self._lock:
            names = sorted(k for k in self._objects if k.startswith(prefix) and k > start_after)
            found = [Info(k, len(self._objects[k]), self._written[k]) for k in names]
        yield from found

    def delete(self, key: str) -> bool:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)
            self._written.pop(key, None)
        return False

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None


def window(key: str, size: int, max_bytes: int | None, first: int | None, length: int | None) -> tuple[int, int]:
    """First byte and number of bytes that a ``get`` answers for an object of this size; Damaged where it cannot."""
    begin = 0 if first is None else first
    count = size - begin if length is None else length
    if begin < 0 or count < 0 or begin + count > size:
        raise Damaged(
            f"object {key!r} has {size} bytes, but bytes {begin} to {begin + max(count, 0)} were asked for: "
            "it was cut short"
        )
    if max_bytes is not None and count > max_bytes:
        raise Damaged(f"object {key!r} has {count} bytes to read, the reader takes at most {max_bytes}")
    return begin, count
