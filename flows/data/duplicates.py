"""Which documents of a whole corpus were there before: by what the pieces kept of each, in bounded memory.

Documents are numbered in the order of the corpus. Of equal ones the first stays. Near ones are joined where their
signatures say so (``near.py``), also through a third; of those that are joined the first stays. What is sorted at a
time is a range of hashes that fits the memory, so neither pieces nor workers show in the result.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flows.data import near as nearness
from flows.data.work import KeptWork, piece_name

_SORTED = 1 << 19  # documents whose hashes are sorted at a time
_HELD = 8  # parts whose signatures are in memory
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CorpusPart:
    """What a piece's part kept: its documents begin at ``base`` in the corpus."""

    name: str
    base: int
    documents: int


def parts_of(work: KeptWork, reads: Sequence[dict[str, object]]) -> list[CorpusPart]:
    """All parts of the pieces, in order, by what the first pass said of each piece."""
    found, base = [], 0
    for piece, row in enumerate(reads):
        for number in range(int(str(row["parts"]))):
            name = piece_name(piece, number)
            documents = len(bytes(work.get_map("read", name)["codes"]))
            found.append(CorpusPart(name, base, documents))
            base += documents
    return found


def exact(work: KeptWork, parts: Sequence[CorpusPart], alive: Flags) -> None:
    """Clear in ``alive`` all but the first of each text."""
    ranges = -(-len(alive) // _SORTED) or 1
    for low, high in _ranges(ranges):
        numbers, rows = [], []
        for part in parts:
            sums = np.frombuffer(work.get_map("read", part.name)["sums"], ">u8").reshape(-1, 4)
            here = alive[part.base : part.base + part.documents] & (sums[:, 0] >= low)
            if high is not None:
                here &= sums[:, 0] < high
            numbers.append(np.flatnonzero(here) + part.base)
            rows.append(sums[here].astype(np.uint64))
        table, order_of = np.concatenate(rows), np.concatenate(numbers)
        order = np.lexsort((order_of, table[:, 3], table[:, 2], table[:, 1], table[:, 0]))
        same = (table[order][1:] == table[order][:-1]).all(axis=1)
        alive[order_of[order[1:][same]]] = False


def near(work: KeptWork, parts: Sequence[CorpusPart], alive: Flags, nearness_wanted: float) -> None:
    """Clear in ``alive`` all but the first of those that are joined."""
    edges: set[tuple[int, int]] = set()
    for band in range(nearness.bands(nearness_wanted)[0]):
        edges.update(_candidates(work, parts, alive, band))
    first: dict[int, int] = {}

    def root(number: int) -> int:
        while (above := first.get(number, number)) != number:
            first[number] = first.get(above, above)
            number = above
        return number

    for earlier, later, alike in _compared(work, parts, sorted(edges), nearness_wanted):
        if alike:
            one, other = sorted((root(earlier), root(later)))
            first[other] = one
    for number in first:
        if root(number) != number:
            alive[number] = False


def _ranges(count: int) -> Iterator[tuple[np.uint64, np.uint64 | None]]:
    """So many equal ranges of all u64; None: to the end."""
    for number in range(count):
        high = None if number == count - 1 else np.uint64((1 << 64) * (number + 1) // count)
        yield np.uint64((1 << 64) * number // count), high


def _candidates(work: KeptWork, parts: Sequence[CorpusPart], alive: Flags, band: int) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) that share this band: each with the first of those that do, and with the one before."""
    for low, high in _ranges(-(-len(alive) // _SORTED) or 1):
        numbers, found = [], []
        for part in parts:
            first, length = nearness.key_span(band, part.documents)
            keys = np.frombuffer(work.get("near", part.name, first=first, length=length), "<u8").astype(np.uint64)
            here = alive[part.base : part.base + part.documents] & (keys > 0) & (keys >= low)
            if high is not None:
                here &= keys < high
            numbers.append(np.flatnonzero(here) + part.base)
            found.append(keys[here])
        keys, number = np.concatenate(found), np.concatenate(numbers)
        order = np.lexsort((number, keys))
        keys, number = keys[order], number[order]
        begins = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))) if keys.size else np.empty(0, np.int64)
        group = np.repeat(begins, np.diff(np.append(begins, keys.size)))
        later = np.flatnonzero(group != np.arange(keys.size))
        yield from zip(number[group[later]].tolist(), number[later].tolist(), strict=True)
        yield from zip(number[later - 1].tolist(), number[later].tolist(), strict=True)


def _compared(
    work: KeptWork, parts: Sequence[CorpusPart], pairs: Sequence[tuple[int, int]], wanted: float
) -> Iterator[tuple[int, int, bool]]:
    """Each pair with whether its signatures are so much alike."""
    bases = np.asarray([part.base for part in parts], np.int64)
    held: OrderedDict[int, nearness.Signature] = OrderedDict()

    def of(number: int) -> nearness.Signature:
        at = int(np.searchsorted(bases, number, "right")) - 1
        if at not in held:
            if len(held) == _HELD:
                held.popitem(last=False)
            first, length = nearness.signature_span(wanted, parts[at].documents)
            data = work.get("near", parts[at].name, first=first, length=length)
            held[at] = np.frombuffer(data, "<u4").reshape(-1, nearness.VALUES)
        held.move_to_end(at)
        row: nearness.Signature = held[at][number - parts[at].base]
        return row

    for earlier, later in pairs:
        yield earlier, later, bool(nearness.likeness(of(earlier), of(later)) >= wanted)
