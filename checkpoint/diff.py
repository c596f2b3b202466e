"""Two checkpoints side by side: the blocks that differ, read from both.

Blocks whose digests are equal are equal, and are not read; of the others at most `READ_BYTES` of each side lie in
memory at once, whatever the tensor's size. Every block is checked against its manifest as it is read. What the numbers
say of each other is for who calls (``flows/show/differ.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from checkpoint.digest import BLOCK_BYTES, BLOCK_ELEMENTS
from checkpoint.manifest import Manifest
from checkpoint.read import StateReader

READ_BYTES = 4 * BLOCK_BYTES


@dataclass(frozen=True)
class Pair:
    """A tensor of either checkpoint. ``only``: "a" or "b" where the other one has none of this name; ``shapes``: of
    both, where they are two.
    """

    name: str
    shape: tuple[int, ...]
    only: str = ""
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def comparable(self) -> bool:
        return not self.only and self.shapes is None


def pairs(a: Manifest, b: Manifest) -> Iterator[Pair]:
    """Every tensor of either side, in the order of the first one's table, then what the second alone has."""
    theirs = {t.name: t.shape for t in b.tensors}
    for tensor in a.tensors:
        shape = theirs.pop(tensor.name, None)
        shapes = None if shape is None or shape == tensor.shape else (tensor.shape, shape)
        yield Pair(tensor.name, tensor.shape, "a" if shape is None else "", shapes)
    yield from (Pair(name, shape, "b") for name, shape in theirs.items())


def differing_blocks(a: Manifest, b: Manifest, name: str, kind: int) -> list[int]:
    """Numbers of the blocks of a tensor and kind whose digests differ; both have it, in one shape. Reads nothing."""
    return [n for n, (x, y) in enumerate(zip(a.leaves(name, kind), b.leaves(name, kind), strict=True)) if x != y]


def differing(a: StateReader, b: StateReader, name: str, kind: int) -> Iterator[tuple[int, bytearray, bytearray]]:
    """(first element, float32 bytes of both) of what covers the blocks that differ, in order; Damaged, StoreError."""
    elements = a.manifest.tensor(name).elements
    for first, count in _ranges(differing_blocks(a.manifest, b.manifest, name, kind), elements):
        yield first, a.read(name, kind, first, count), b.read(name, kind, first, count)


def _ranges(blocks: list[int], elements: int) -> Iterator[tuple[int, int]]:
    """The blocks as few ranges of elements, none above `READ_BYTES`."""
    most = READ_BYTES // BLOCK_BYTES
    for _, run in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        for at in range(0, len(numbers), most):
            begin, last = numbers[at] * BLOCK_ELEMENTS, numbers[min(at + most, len(numbers)) - 1]
            yield begin, min((last + 1) * BLOCK_ELEMENTS, elements) - begin
