"""The state digest: one number for all that training has made, equal wherever the bits are equal.

A Merkle tree over fixed global blocks, so that the owners of tensors hash in parallel while they save, and a part of a
tensor can be checked without the rest:

    block   262144 float32 (1 MiB, little-endian) of one tensor and one kind; the last one may be shorter
    leaf    SHA-256(block)
    node    SHA-256(left | right), pairwise; an odd one is carried up as it is; the top is the tensor-kind's root
    root    SHA-256("hotstage state v1" | step u64le | samples u64le | What's digest | every tensor-kind's root),
            tensors in the table's order, and of each: param, exp_avg, exp_avg_sq

Nothing of the layout (stages, ranks, chunks, epoch) enters.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from checkpoint.hashes import sha256_leaves
from trainer import wire

BLOCK_ELEMENTS = wire.PIECE_BLOCK
"""A replica's piece of a tensor is whole blocks."""
BLOCK_BYTES = BLOCK_ELEMENTS * 4
DIGEST_BYTES = 32
KINDS = ("param", "exp_avg", "exp_avg_sq")
_DOMAIN = b"hotstage state v1"


class Leaves(Sequence[bytes]):
    """Digests of consecutive blocks, side by side in one buffer: equal to any sequence of the same ones, and as many of
    them as a trillion parameters have cost 32 bytes each.
    """

    __slots__ = ("_data", "_end", "_first")

    def __init__(self, data: bytes, first: int = 0, count: int | None = None) -> None:
        """``count`` digests of ``data`` from number ``first`` on; all that follow without it."""
        self._data, self._first = data, first
        self._end = len(data) // DIGEST_BYTES if count is None else first + count
        if not 0 <= first <= self._end or self._end * DIGEST_BYTES > len(data):
            raise ValueError(f"digests {first} to {self._end} of {len(data)} bytes")

    @property
    def raw(self) -> memoryview:
        return memoryview(self._data)[self._first * DIGEST_BYTES : self._end * DIGEST_BYTES]

    def __len__(self) -> int:
        return self._end - self._first

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        places = range(self._first, self._end)[index]
        if isinstance(places, int):
            return self._data[places * DIGEST_BYTES : (places + 1) * DIGEST_BYTES]
        if places.step == 1:
            return Leaves(self._data, places.start, len(places))
        return tuple(self[at - self._first] for at in places)

    def __iter__(self) -> Iterator[bytes]:
        data = self._data
        for at in range(self._first * DIGEST_BYTES, self._end * DIGEST_BYTES, DIGEST_BYTES):
            yield data[at : at + DIGEST_BYTES]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Leaves):
            return self.raw == other.raw
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Leaves({bytes(self.raw)!r})"


def raw_leaves(leaves: Sequence[bytes]) -> bytes | memoryview:
    """Digests side by side."""
    return leaves.raw if isinstance(leaves, Leaves) else b"".join(leaves)


def blocks(elements: int) -> int:
    """How many leaves a tensor of this many elements has."""
    return -(-elements // BLOCK_ELEMENTS)


def leaf_digests(data: bytes | bytearray | memoryview) -> Leaves:
    """The leaves of float32 bytes that start at a block's border and end at one, or at the tensor's end."""
    view = memoryview(data).cast("B")
    return Leaves(sha256_leaves(view, (view.nbytes,), BLOCK_BYTES, whole=False)[0])


def wrong_block(data: bytes | bytearray | memoryview, leaves: Sequence[bytes]) -> int | None:
    """Where the first block begins, in bytes, that is not its leaf's; None where all are, and as many as leaves."""
    wrong = wrong_block_of(data, [(memoryview(data).nbytes, leaves)])
    return None if wrong is None else wrong[1]


def wrong_block_of(
    data: bytes | bytearray | memoryview, pieces: Sequence[tuple[int, Sequence[bytes]]]
) -> tuple[int, int] | None:
    """As ``wrong_block``, of pieces in a row, of each its bytes and its leaves: the first wrong one, and where in it.

    Together they are checked in less time than one by one: as many blocks side by side as the CPU can, whose ever.
    """
    found = Leaves(sha256_leaves(data, [size for size, _ in pieces], BLOCK_BYTES, whole=False)[0])
    first = 0
    for number, (size, leaves) in enumerate(pieces):
        own = found[first : first + -(-size // BLOCK_BYTES)]
        first += len(own)
        if own != leaves:
            same = (a == b for a, b in zip(own, leaves, strict=False))
            return number, BLOCK_BYTES * next(
                (n for n, equal in enumerate(same) if not equal), min(len(own), len(leaves))
            )
    return None


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The root over at least one leaf.

    >>> tree_root([b"a" * 32]) == b"a" * 32
    True
    """
    return raw_root(raw_leaves(leaves))


def raw_root(leaves: bytes | bytearray | memoryview) -> bytes:
    """As ``tree_root``, of digests side by side."""
    level = bytes(leaves)
    if not level or len(level) % DIGEST_BYTES:
        raise ValueError("a tensor has at least one block")
    sha256, pair = hashlib.sha256, 2 * DIGEST_BYTES
    while len(level) > DIGEST_BYTES:
        even = len(level) // pair * pair
        nodes = [sha256(level[at : at + pair]).digest() for at in range(0, even, pair)]
        level = b"".join([*nodes, level[even:]])
    return level


def state_root(step: int, samples: int, what: bytes, roots: Iterable[bytes]) -> bytes:
    """The state digest from the roots of all tensor-kinds in order."""
    if len(what) != DIGEST_BYTES:
        raise ValueError(f"the What's digest has {len(what)} bytes, not {DIGEST_BYTES}")
    total = hashlib.sha256(_DOMAIN + struct.pack("<QQ", step, samples) + what)
    for root in roots:
        total.update(root)
    return total.digest()
