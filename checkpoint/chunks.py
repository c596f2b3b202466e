"""What lies in a chunk object: ranges of tensors that start on a border of the digest's blocks, and their digests.

Plain data in, plain data out. Who calls what, in order: ``manifest.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from checkpoint.digest import BLOCK_BYTES, BLOCK_ELEMENTS, KINDS, Leaves, blocks
from checkpoint.hashes import sha256_leaves, sha256_two_chunks
from checkpoint.store.base import Data

MAX_CHUNK_BYTES = 64 << 20
Digest = bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A row of the table: a tensor as the model knows it, whatever rank holds it."""

    name: str
    shape: tuple[int, ...]
    kinds: int = len(KINDS)
    """How many of KINDS there are of it: all, or the first two."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def shape_text(shape: Iterable[int]) -> str:
    """
    >>> shape_text((50304, 768)), shape_text(())
    ('50304 x 768', 'a scalar')
    """
    return " x ".join(map(str, shape)) or "a scalar"


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of a tensor's elements in somebody's memory: ``source`` is a byte offset there (of a slot's data)."""

    tensor: int
    kind: int
    first: int
    elements: int
    source: int

    @property
    def bytes(self) -> int:
        return self.elements * 4


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What goes into one chunk object: segments, one after the other without gaps."""

    index: int
    segments: tuple[Segment, ...]

    @property
    def bytes(self) -> int:
        return sum(s.bytes for s in self.segments)


def plan_chunks(segments: Iterable[Segment], limit: int = MAX_CHUNK_BYTES) -> tuple[ChunkPlan, ...]:
    """Segments packed into chunks of at most ``limit`` bytes, cut on block borders only; order and elements are kept.

    A segment must start on a block border of its tensor, as every layout's cuts do.

    >>> [c.bytes for c in plan_chunks([Segment(0, 0, 0, 600000, 0), Segment(1, 0, 0, 10, 2400000)], limit=2 << 20)]
    [2097152, 302888]
    """
    block = BLOCK_ELEMENTS * 4
    if limit < block:
        raise ValueError(f"a chunk of {limit} bytes is smaller than one block of {block}")
    chunks: list[ChunkPlan] = []
    held: list[Segment] = []
    room = limit

    def close() -> None:
        nonlocal held, room
        if held:
            chunks.append(ChunkPlan(len(chunks), tuple(held)))
        held, room = [], limit

    for segment in segments:
        if segment.first % BLOCK_ELEMENTS or segment.elements <= 0:
            raise ValueError(f"{segment} does not start on a block border, or is empty")
        first, source, left = segment.first, segment.source, segment.elements
        while left:
            take = left if left * 4 <= room else room // block * BLOCK_ELEMENTS
            if take == 0:
                close()
                continue
            held.append(Segment(segment.tensor, segment.kind, first, take, source))
            first, source, left, room = first + take, source + take * 4, left - take, room - take * 4
            if room == 0:
                close()
    close()
    return tuple(chunks)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk object: name relative to the run, size, SHA-256."""

    name: str
    bytes: int
    sha256: Digest

    @classmethod
    def of(cls, name: str, data: Data) -> Chunk:
        """The chunk that these bytes make."""
        return cls(name, memoryview(data).nbytes, hashlib.sha256(data).digest())


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [first, first + elements) of a tensor and kind, at a byte offset of a chunk; their blocks' digests."""

    tensor: int
    kind: int
    first: int
    elements: int
    chunk: int
    offset: int
    leaves: Sequence[bytes]

    @property
    def bytes(self) -> int:
        return self.elements * 4

    def cut(self, first: int, end: int) -> Piece:
        """What of it lies in [first, end) of the tensor. Both are block borders, or the tensor's end."""
        low, high = max(first, self.first), min(end, self.first + self.elements)
        if (low, high) == (self.first, self.first + self.elements):
            return self
        leaf = (low - self.first) // BLOCK_ELEMENTS
        leaves = self.leaves[leaf : leaf + blocks(high - low)]
        return Piece(self.tensor, self.kind, low, high - low, self.chunk, self.offset + 4 * (low - self.first), leaves)


Digests = tuple[tuple[Piece, ...], Digest]
"""Of a chunk: its pieces with their leaves, and its own SHA-256."""


def chunk_digests(plan: ChunkPlan, data: Data) -> Digests:
    """Of a chunk's bytes (exactly the plan's), in one pass over them."""
    leaves, whole = sha256_leaves(_checked(plan, data), _lengths(plan), BLOCK_BYTES, whole=True)
    return _pieces(plan, leaves), whole


def digests_of_two(chunks: Sequence[tuple[ChunkPlan, Data]]) -> tuple[Digests, ...]:
    """``chunk_digests`` of two chunks at once, in less time."""
    (first, of_first), (second, of_second) = chunks
    found = sha256_two_chunks(
        ((_checked(first, of_first), _lengths(first)), (_checked(second, of_second), _lengths(second))), BLOCK_BYTES
    )
    return tuple((_pieces(plan, leaves), whole) for plan, (leaves, whole) in zip((first, second), found, strict=True))


def _checked(plan: ChunkPlan, data: Data) -> memoryview:
    view = memoryview(data).cast("B")
    if len(view) != plan.bytes:
        raise ValueError(f"chunk {plan.index} has {len(view)} bytes, its plan says {plan.bytes}")
    return view


def _lengths(plan: ChunkPlan) -> list[int]:
    return [s.bytes for s in plan.segments]


def _pieces(plan: ChunkPlan, leaves: bytes) -> tuple[Piece, ...]:
    found, at, first = [], 0, 0
    for s in plan.segments:
        own = Leaves(leaves[32 * first : 32 * (first + blocks(s.elements))])
        found.append(Piece(s.tensor, s.kind, s.first, s.elements, plan.index, at, own))
        at, first = at + s.bytes, first + len(own)
    return tuple(found)


def chunk_pieces(plan: ChunkPlan, data: Data) -> tuple[Piece, ...]:
    """The first half of ``chunk_digests``."""
    return chunk_digests(plan, data)[0]
