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
from collections.abc import Iterable, Sequence

from trainer import wire

BLOCK_ELEMENTS = wire.PIECE_BLOCK
"""A replica's piece of a tensor is whole blocks."""
BLOCK_BYTES = BLOCK_ELEMENTS * 4
DIGEST_BYTES = 32
KINDS = ("param", "exp_avg", "exp_avg_sq")
_DOMAIN = b"hotstage state v1"


def blocks(elements: int) -> int:
    """How many leaves a tensor of this many elements has."""
    return -(-elements // BLOCK_ELEMENTS)


def leaf_digests(data: bytes | bytearray | memoryview) -> list[bytes]:
    """The leaves of float32 bytes that start at a block's border and end at one, or at the tensor's end."""
    view = memoryview(data).cast("B")
    return [hashlib.sha256(view[at : at + BLOCK_BYTES]).digest() for at in range(0, len(view), BLOCK_BYTES)]


def wrong_block(data: bytes | bytearray | memoryview, leaves: Sequence[bytes]) -> int | None:
    """Where the first block begins, in bytes, that is not its leaf's; None where all are, and as many as leaves."""
    found = leaf_digests(data)
    for number, leaf in enumerate(leaves):
        if number == len(found) or found[number] != leaf:
            return number * BLOCK_BYTES
    return len(leaves) * BLOCK_BYTES if len(found) > len(leaves) else None


def tree_root(leaves: Sequence[bytes]) -> bytes:
    """The root over at least one leaf.

    >>> tree_root([b"a" * 32]) == b"a" * 32
    True
    """
    if not leaves:
        raise ValueError("a tensor has at least one block")
    level = list(leaves)
    while len(level) > 1:
        odd = level[len(level) & ~1 :]
        level = [hashlib.sha256(level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)] + odd
    return level[0]


def state_root(step: int, samples: int, what: bytes, roots: Iterable[bytes]) -> bytes:
    """The state digest from the roots of all tensor-kinds in order."""
    if len(what) != DIGEST_BYTES:
        raise ValueError(f"the What's digest has {len(what)} bytes, not {DIGEST_BYTES}")
    total = hashlib.sha256(_DOMAIN + struct.pack("<QQ", step, samples) + what)
    for root in roots:
        total.update(root)
    return total.digest()
