"""One run's objects in a store of their own, over another store that is only read.

    over:?own=<run>&front=<url>&back=<url>      the three values escaped as in any query

What lies under ``runs/<own>/`` is the front store's, all else is read from the back one. Nothing is ever written or
deleted there, whatever rights the caller has: so a run can be computed again from another's checkpoint and data, on
any machine that may read them, without leaving a trace beside them (``flows/replay``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlencode

from checkpoint.errors import StoreRefused
from checkpoint.keys import run_key
from checkpoint.store.base import Data, Info, Pace, Store, check_key, check_prefix, ignored

SCHEME = "over"


class OverlayStore:
    """``own``: the run whose objects are in ``front``. Its pace is the front store's: that is the one it asks often."""

    def __init__(self, own: str, front: Store, back: Store) -> None:
        self.own, self.front, self.back = own, front, back
        self._mine = run_key(own) + "/"

    @property
    def pace(self) -> Pace:
        return self.front.pace

    @property
    def url(self) -> str:
        return f"{SCHEME}:?" + urlencode({"own": self.own, "front": self.front.url, "back": self.back.url})

    @property
    def retries(self) -> Mapping[str, int]:
        front, back = self.front.retries, self.back.retries
        return {cause: front.get(cause, 0) + back.get(cause, 0) for cause in {*front, *back}}

    def describe(self) -> str:
        return f"{self.front.describe()} over {self.back.describe()}"

    def _of(self, key: str) -> Store:
        return self.front if key.startswith(self._mine) else self.back

    def _to(self, key: str) -> Store:
        check_key(key)
        if not key.startswith(self._mine):
            raise StoreRefused(
                f"object {key!r} may not be written: {self.back.describe()} is only read here, and {self._mine} alone "
                f"is kept in {self.front.describe()}"
            )
        return self.front

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        return self._to(key).create(key, data, sha256=sha256)

    def put(self, key: str, data: Data) -> None:
        self._to(key).put(key, data)

    def get(
        self, key: str, *, max_bytes: int | None = None, first: int | None = None, length: int | None = None
    ) -> bytes:
        return self._of(key).get(key, max_bytes=max_bytes, first=first, length=length)

    def read_into(
        self, key: str, out: Sequence[memoryview], *, first: int = 0, filled: Callable[[int], None] = ignored
    ) -> None:
        self._of(key).read_into(key, out, first=first, filled=filled)

    def holds(self, key: str, data: Data, *, sha256: bytes) -> bool:
        return self._of(key).holds(key, data, sha256=sha256)

    def limit(self, bytes_per_s: float | None) -> None:
        self.front.limit(bytes_per_s)

    def head(self, key: str) -> Info | None:
        return self._of(key).head(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        check_prefix(prefix)
        if prefix.startswith(self._mine):
            return self.front.list(prefix, start_after)
        if self._mine.startswith(prefix):
            raise StoreRefused(f"{prefix!r} is in two stores here: list the objects of one run, or of data")
        return self.back.list(prefix, start_after)

    def delete(self, key: str) -> bool:
        return self._to(key).delete(key)

    def local_path(self, key: str) -> Path | None:
        return self._of(key).local_path(key)


def open_overlay(url: str, open_store: Callable[[str], Store]) -> OverlayStore:
    """The store of such a URL. StoreRefused where it is none."""
    values = parse_qs(url.partition("?")[2], strict_parsing=False)
    if sorted(values) != ["back", "front", "own"] or any(len(found) != 1 for found in values.values()):
        raise StoreRefused(f"store {url[:80]!r}: it names one run (own) and two stores (front, back), each once")
    own, front, back = (values[name][0] for name in ("own", "front", "back"))
    for inner in (front, back):
        if inner.partition(":")[0].lower() == SCHEME:
            raise StoreRefused(f"store {url[:80]!r}: one store lies over another, not more")
    return OverlayStore(own, open_store(front), open_store(back))
