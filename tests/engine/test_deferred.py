"""AdamW that waits and is done beside products (kernels/deferred.h) leaves the bits of AdamW that is done at once, and
nobody meets its bytes before they are final."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.engine.kernel_lib import Array, KernelLib, control, encode
from trainer import wire

REALS = (0.9, 0.95, 1e-8, 0.1)
ROWS, WIDTH, OUT, VOCABULARY = 96, 64, 192, 500
"""Of the products, and of the table of embeddings."""

Call = tuple[str, int, list[Array | None], tuple[int, ...], tuple[float, ...]]


class Tensor:
    """A tensor's state, as AdamW takes it."""

    def __init__(self, elements: int, dtype: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.w, self.m, self.g = (rng.normal(size=elements).astype(np.float32) for _ in range(3))
        self.v = np.abs(rng.normal(size=elements)).astype(np.float32)
        self.copy = encode(self.w, dtype) if dtype == wire.BF16 else None
        self.control = np.frombuffer(bytes(control()), np.uint8).copy()

    @property
    def read(self) -> Array:
        """What kernels read of it."""
        return self.w if self.copy is None else self.copy

    @property
    def all(self) -> list[Array]:
        return [self.w, self.m, self.v, self.g, *([] if self.copy is None else [self.copy])]

    def step(self, zero: int = 1) -> Call:
        ptrs = [self.w, self.m, self.v, self.g, self.copy, self.control]
        return "adamw", self.dtype, ptrs, (self.w.size, zero), REALS


class World:
    """Two weights, a table of embeddings, and tensors that nobody comes to; products and lookups of them."""

    def __init__(self, dtype: int, seed: int = 1, most: int = 512) -> None:
        """``most``: rows of the product beside which what waits is done."""
        rng = np.random.default_rng(seed)
        self.dtype, self.most = dtype, most
        self.table = Tensor(VOCABULARY * WIDTH, dtype, seed + 1)
        self.first, self.second = Tensor(OUT * WIDTH, dtype, seed + 2), Tensor(OUT * WIDTH, dtype, seed + 3)
        self.others = [Tensor(n, dtype, seed + 4 + n) for n in (1023, 1024, 70001)]
        self.tokens = rng.integers(0, VOCABULARY, ROWS).astype(np.int32)
        self.x, self.y = encode(rng.normal(size=ROWS * WIDTH), dtype), encode(np.zeros(ROWS * OUT), dtype)
        self.big = [encode(rng.normal(size=n * 512), dtype) for n in (most, 512)]
        self.made = encode(np.zeros(most * 512), dtype)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.table, self.first, self.second, *self.others]

    def lookup(self) -> Call:
        ptrs = [self.x, self.tokens, self.table.read, None, None]
        return "embed_fwd", self.dtype, ptrs, (ROWS, WIDTH, VOCABULARY, ROWS), ()

    def product(self, weight: Tensor) -> Call:
        return "linear_fwd", self.dtype, [self.y, self.x, weight.read, None, None], (
            ROWS, OUT, WIDTH, OUT, WIDTH, 0), ()  # fmt: skip

    def beside(self) -> Call:
        """A product of nothing that waits, long enough for many slices."""
        return "linear_fwd", self.dtype, [self.made, *self.big, None, None], (self.most, 512, 512, 512, 512, 0), ()

    def gradient(self, weight: Tensor) -> Call:
        return "linear_wgrad", self.dtype, [weight.g, None, self.y, self.x], (ROWS, OUT, WIDTH, OUT, WIDTH, 1), ()

    def calls(self, begun: bool) -> list[Call]:
        """``begun``: a product does some of the table's step before the first lookup."""
        steps = [tensor.step() for tensor in self.tensors]
        first = [self.beside(), self.lookup()] if begun else [self.lookup()]
        again = [self.lookup(), self.product(self.first), self.gradient(self.first)]
        return [*steps, *first, self.product(self.first), self.beside(), *again, self.product(self.second)]

    def results(self) -> list[bytes]:
        return [a.tobytes() for a in (self.x, self.y, self.made, *(a for t in self.tensors for a in t.all))]


def at_once(kernels: KernelLib, world: World, path: str, begun: bool) -> list[bytes]:
    for kernel, dtype, ptrs, dims, reals in world.calls(begun):
        kernels.call(kernel, dtype, ptrs, dims, reals, set_name=path)
    return world.results()


@pytest.mark.parametrize("begun", [False, True], ids=["lookup", "product"])
@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16], ids=["f32", "bf16"])
def test_the_same_bits(kernels: KernelLib, dtype: int, begun: bool) -> None:
    """On every path, and on any number of threads, also more than there are items."""
    for path in kernels.sets[1:]:
        most = 128 if path == "portable" else 512  # it takes ten times as long
        expected = at_once(kernels, World(dtype, most=most), path, begun)
        for threads in (1, 2, 3, 40):
            world = World(dtype, most=most)
            kernels.deferred(world.calls(begun), world.table.w, set_name=path, threads=threads)
            assert world.results() == expected, (path, threads)


def seen_of(kernels: KernelLib, calls: Sequence[Call], watched: Array, threads: int = 2) -> list[Array]:
    return kernels.deferred(calls, watched, set_name=kernels.sets[-1], threads=threads)


def test_it_waits_and_is_done_beside_a_product(kernels: KernelLib) -> None:
    world, tensor = World(wire.BF16), Tensor(1_000_001, wire.BF16, 2)
    before = tensor.w.copy()
    waits, beside, end = seen_of(kernels, [tensor.step(), world.beside()], tensor.w)
    assert np.array_equal(waits, before)
    done = beside == end
    assert 10000 < np.count_nonzero(done) < done.size, "the product did some of it, and not all"
    assert np.array_equal(beside[~done], before[~done])


def test_a_lookup_has_its_rows_done_and_no_others(kernels: KernelLib) -> None:
    world = World(wire.BF16)
    world.tokens[:] = 7
    before = world.table.w.copy()
    _, looked, end = seen_of(kernels, [world.table.step(), world.lookup()], world.table.w)
    rows = slice(7 * WIDTH, 8 * WIDTH)
    assert np.array_equal(looked[rows], end[rows])
    assert np.count_nonzero(looked != before) <= 1024, "an item, of which the row is one"
    assert not np.array_equal(end[-WIDTH:], before[-WIDTH:])


@pytest.mark.parametrize("operand", ["w", "m", "v", "g", "copy"])
def test_whoever_comes_to_its_bytes_finds_them_final(kernels: KernelLib, operand: str) -> None:
    """A call that reads the last byte of an operand; one that reads the byte before and after does not wait for it."""
    memory = Tensor(70001, wire.BF16, 3)
    array = getattr(memory, operand)
    reader = np.zeros(1, np.float32)
    last = array[-1:] if array.itemsize == 4 else array[-2:].view(np.float32)
    cast: Call = ("cast", wire.F32, [reader, last], (1,), ())
    _, read, end = seen_of(kernels, [memory.step(), cast], array)
    assert np.array_equal(read, end)
    outside: Call = ("cast", wire.F32, [np.zeros(1, np.float32), reader], (1,), ())
    world = Tensor(70001, wire.BF16, 3)
    waits, still, end = seen_of(kernels, [world.step(), outside], world.w)
    assert np.array_equal(waits, still)
    assert not np.array_equal(still, end)


def test_more_calls_than_there_is_room_for(kernels: KernelLib) -> None:
    """What finds no room is done at once."""
    tensors = [Tensor(1024, wire.F32, n) for n in range(520)]
    expected = [Tensor(1024, wire.F32, n) for n in range(520)]
    for tensor in expected:
        kernel, dtype, ptrs, dims, reals = tensor.step()
        kernels.call(kernel, dtype, ptrs, dims, reals, set_name=kernels.sets[-1])
    first = tensors[-1].w.copy()
    seen = seen_of(kernels, [tensor.step() for tensor in tensors], tensors[-1].w)
    assert not np.array_equal(seen[-2], first)
    assert all(
        np.array_equal(a, b) for t, e in zip(tensors, expected, strict=True) for a, b in zip(t.all, e.all, strict=True)
    )
