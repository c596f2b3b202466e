"""What whoever works on a piece must know, and where what comes of it is kept. A job goes to other processes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from checkpoint.store import Store, open_store
from flows.data import pieces
from flows.data.pieces import CorpusPiece
from flows.data.sources import Borne, Document, Entry, open_source
from flows.data.sources.talk import ChatForm
from flows.data.work import KeptWork
from trainer.errors import DatasetError
from trainer.spec import DataSpec

_stores: dict[str, Store] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class DataJob:
    """One preparation."""

    spec: DataSpec
    url: str
    """Of the store that keeps the work."""
    sight: str
    room: bool = False
    """A stored token has room for its mask."""
    form: ChatForm | None = None
    """How conversations are written, where the spec names some."""

    @property
    def masked(self) -> bool:
        """Each stored token says whether its prediction counts."""
        return self.spec.masks

    @cached_property
    def work(self) -> KeptWork:
        return KeptWork(store_of(self.url), self.sight)

    @property
    def piece_letters(self) -> int:
        """Of text, after which the result of a piece that is larger is kept in parts."""
        return self.spec.piece_mib * pieces.MIB

    def __getstate__(self) -> dict[str, Any]:
        kept = ("spec", "url", "sight", "room", "form")
        return {key: getattr(self, key) for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


@dataclass(frozen=True)
class Task:
    """A piece of a job, with its entries."""

    job: DataJob
    piece: CorpusPiece
    entries: Sequence[Entry]

    def documents(self, borne: Borne) -> Iterator[tuple[Entry, Document]]:
        """The documents of the piece, in order, each with the entry that it is of."""
        source = open_source(self.job.spec, self.job.form)
        for entry in self.entries:
            for document in source.read(entry, self.piece.first, self.piece.last, borne):
                yield entry, document


def store_of(url: str) -> Store:
    """The store of that address in this process."""
    with _lock:
        if url not in _stores:
            _stores[url] = open_store(url)
        return _stores[url]


def hold_store(store: Store, url: str) -> None:
    """In this process jobs of that address use this store."""
    with _lock:
        _stores[url] = store


def release_store(url: str) -> None:
    with _lock:
        _stores.pop(url, None)


def too_large(document: Document, limit: int, what: str) -> DatasetError:
    return DatasetError(
        f"{document.name} is one text of more than {limit >> 20} MiB, and {what} looks at a text as a whole: raise "
        "data.piece_mib above that, cut the file into several, or leave it out of data.source"
    )
