"""A corpus in a bucket: ``s3://bucket/prefix/*.jsonl.gz[?endpoint=…&region=…&path_style=1]``.

The pattern is one of names, as for files; credentials come from where the store's do, never from the address. An object
is read by ranges, each asked for with the ETag that the look saw.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
import re
import threading
from collections.abc import Sequence
from typing import Any

from checkpoint.errors import NotFound, StoreError
from checkpoint.store import endpoint_of
from flows.data.sources.base import Entry, changed, vanished
from flows.proxies import reach_directly
from trainer.errors import DatasetError

_SCHEME = "s3://"
_local = threading.local()


def is_object(name: str) -> bool:
    return name.startswith(_SCHEME)


def look_at_objects(source: str) -> list[Entry]:
    """The objects of ``kind:s3://bucket/PATTERN``, in byte order of their names."""
    kind, _, address = source.partition(":")
    path, query = _cut(address)
    bucket, _, pattern = path.removeprefix(_SCHEME).partition("/")
    fixed = pattern[: m.start()] if (m := re.search(r"[*?[]", pattern)) else pattern
    parts = pattern.split("/")
    found, seen = [], 0
    for row in _reading(_address(bucket, query), lambda store: list(store.listed(fixed)), source):
        seen += 1
        if row["Key"].endswith("/") or not _fits(row["Key"].split("/"), parts):
            continue
        found.append(Entry(_name(bucket, row["Key"], query), int(row["Size"]), str(row["ETag"])))
    if not found:
        shown = f"{_SCHEME}{bucket}/{glob.escape(pattern)}"
        more = f"; {kind}:{shown}/**/* takes the objects below a folder" if not glob.has_magic(pattern) else ""
        raise DatasetError(
            f"data.source {source!r} matches no object: {seen:,} begin with {fixed!r} and none of them fits; check the "
            f"pattern{more}"
        )
    return found


def _fits(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether an object's name fits a pattern, both cut at their slashes. As of files: ``*`` and ``?`` stay inside a
    name, ``**`` crosses folders, and a name that begins with a dot only fits a part that does."""
    if not parts:
        return not names
    if parts[0] == "**" and _fits(names, parts[1:]):
        return True
    if not names or (names[0].startswith(".") and not parts[0].startswith(".")):
        return False
    if parts[0] == "**":
        return _fits(names[1:], parts)
    return fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _cut(address: str) -> tuple[str, str]:
    """A pattern or a name, and the options behind its last question mark; each other one is of the pattern."""
    path, question, query = address.rpartition("?")
    return (path, query) if question and "=" in query else (address, "")


def _name(bucket: str, key: str, query: str) -> str:
    return f"{_SCHEME}{bucket}/{key}" + (f"?{query}" if query else "")


def _address(bucket: str, query: str) -> str:
    return f"{_SCHEME}{bucket}" + (f"?{query}" if query else "")


def _reading(address: str, ask: Any, what: str) -> Any:
    """What a bucket answers. Rights and addresses are the user's to mend (exit 78), an outage passes (75)."""
    try:
        return ask(_store(address))
    except NotFound:
        raise
    except StoreError as error:  # of the same class: it says what to do
        raise type(error)(f"data.source {what!r}: {error}") from error


def _foreign() -> Any:
    from checkpoint.store import s3_foreign

    return s3_foreign


def _store(address: str) -> Any:
    """The bucket, opened once a thread: a session of boto3 is not to be shared while it is made."""
    made = getattr(_local, "stores", None)
    if made is None:
        made = _local.stores = {}
    if address not in made:
        from checkpoint.store.s3_address import open_s3  # boto3 takes 0.3 s to import: only where it is used

        reach_directly(functools.partial(endpoint_of, address), os.environ)
        made[address] = open_s3(address)
    return made[address]


def open_object(entry: Entry) -> _Object:
    path, query = _cut(entry.name.removeprefix(_SCHEME))
    bucket, _, key = path.partition("/")
    return _Object(entry, _address(bucket, query), key)


class _Object:
    """An object that is being read; the last range stays in memory, since readers ask for little at a time."""

    _AHEAD = 8 << 20

    def __init__(self, entry: Entry, address: str, key: str) -> None:
        self._entry, self._address, self._key = entry, address, key
        self._first, self._held = 0, b""

    def read(self, first: int, length: int) -> bytes:
        length = min(length, self._entry.size - first)
        if length <= 0:
            return b""
        if not self._first <= first or first + length > self._first + len(self._held):
            ahead = max(length, min(self._AHEAD, self._entry.size - first))
            self._first, self._held = first, self._get(first, ahead)
        at = first - self._first
        return self._held[at : at + length]

    def _get(self, first: int, length: int) -> bytes:
        ask = functools.partial(self._ask, first=first, length=length)
        try:
            data: bytes = _reading(self._address, ask, self._entry.name)
        except NotFound:
            raise vanished(self._entry.name) from None
        if len(data) != length:
            raise changed(self._entry.name)
        return data

    def _ask(self, store: Any, first: int, length: int) -> bytes:
        data: bytes | None = _foreign().part(store, self._key, first, length, self._entry.mark)
        if data is None:
            raise changed(self._entry.name)
        return data

    def check(self) -> None:
        """Nothing: each range was asked for by its ETag."""
