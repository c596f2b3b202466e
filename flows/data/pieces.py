"""A corpus cut into pieces by bytes; pure. A piece is a run of whole entries, or a range of one that is large.

Nothing of a dataset depends on where the cuts are: documents keep their order, and what crosses pieces (duplicates, the
tokenizer, shards) is decided from all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flows.data.sources import Entry

MIB = 1 << 20
"""What ``data.piece_mib`` counts in."""


@dataclass(frozen=True)
class CorpusPiece:
    """Entries ``begin`` up to ``end``; of a single one the range from ``first`` to ``last`` (-1: to its end)."""

    number: int
    begin: int
    end: int
    first: int = 0
    last: int = -1


def cut(entries: Sequence[Entry], divides: Callable[[Entry], bool], size: int) -> tuple[CorpusPiece, ...]:
    """Pieces of about ``size`` bytes, in the order of the entries; one entry that cannot be divided may be larger.

    >>> [(p.begin, p.end, p.first, p.last) for p in cut([Entry("a", 3, ""), Entry("b", 9, "")], lambda _: True, 5)]
    [(0, 1, 0, -1), (1, 2, 0, 5), (1, 2, 5, -1)]
    """
    pieces: list[CorpusPiece] = []
    begin, held = 0, 0
    for number, entry in enumerate(entries):
        large = entry.size > size
        if begin < number and (large or held + entry.size > size):
            pieces.append(CorpusPiece(len(pieces), begin, number))
            begin, held = number, 0
        held += entry.size
        if large:
            count = -(-entry.size // size) if divides(entry) else 1
            for part in range(count):
                last = -1 if part == count - 1 else (part + 1) * size
                pieces.append(CorpusPiece(len(pieces), number, number + 1, part * size, last))
            begin, held = number + 1, 0
    if begin < len(entries):
        pieces.append(CorpusPiece(len(pieces), begin, len(entries)))
    return tuple(pieces)
