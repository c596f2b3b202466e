"""Attention on tensor cores (kernel path cuda), emulated: right within a bound, the same bits always; and what the
emulator makes of mma, ldmatrix and asynchronous copies. Faults planted in it: test_kernels_cuda.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from tests.engine.attention_bound import outputs_of, whole_of
from tests.engine.cuda_lib import CudaLib, build
from tests.engine.kernel_calls import Call, Case, attention_cases
from tests.engine.kernel_lib import Array, KernelLib, decode, encode
from trainer import wire

# Lengths around the tiles of 64, all head sizes, grouped queries, rows that lie apart; by 3 and 1: addresses that
# allow no 16-byte accesses, and none of 4 bytes.
FLASH_CASES = [
    *attention_cases(1, 1, 1, 1, 64),
    *attention_cases(2, 7, 2, 1, 32, 8),
    *attention_cases(1, 63, 2, 2, 64, 2),
    *attention_cases(2, 64, 4, 2, 32),
    *attention_cases(1, 65, 3, 3, 96, 8),
    *attention_cases(1, 129, 4, 1, 64, 1),
    *attention_cases(1, 200, 2, 1, 128, 16),
    *attention_cases(2, 200, 2, 2, 32, 3),
    *attention_cases(1, 193, 1, 1, 64),
    *attention_cases(2, 200, 2, 1, 32, 8, documents=True),
    *attention_cases(2, 65, 2, 2, 64, documents=True),
    *attention_cases(1, 193, 2, 1, 64, 1, window=50),
    *attention_cases(1, 129, 1, 1, 96, 3, window=1),
    *attention_cases(1, 260, 1, 1, 128, window=100, documents=True),
]


@pytest.fixture(scope="module")
def cuda() -> CudaLib:
    return CudaLib(build())


def written(call: Call, arrays: list[Array | None]) -> list[bytes]:
    return [x.tobytes() for x in outputs_of(call, arrays)]


@pytest.mark.parametrize("case", FLASH_CASES, ids=lambda case: case.name)
def test_right_and_equal(kernels: KernelLib, cuda: CudaLib, case: Case) -> None:
    """Within the bound; near ref; nothing written beside the rows; the same bits in any order of threads and blocks,
    and where operands begin at odd addresses; no bank conflicts."""
    call = Call.make(kernels, case, wire.BF16)
    cuda.seed(1)
    got = call.run(cuda, "flash")
    assert cuda.c.hs_emulated_conflicts() == 0
    assert any(op in (5, 6) for _, _, op in cuda.sites()), "the plain kernels ran"
    whole = whole_of(call)
    ref = outputs_of(call, call.run(kernels, "ref"))
    for x, want, bound, oracle in zip(outputs_of(call, got), whole.want, whole.bound, ref, strict=True):
        assert np.max(np.abs(oracle - want) - bound) <= 0, "the oracle and this file disagree"
        assert np.max(np.abs(x - want) - bound) <= 0, np.max(np.abs(x - want) / bound)
    before = [None if x is None else x.copy() for x in call.inputs]
    for i, _ in call.outputs():
        x, y = before[i], got[i]
        assert x is not None
        assert y is not None
        if wire.KERNELS[case.kernel].operands[i].kind == "dt":
            n = case.dims[2 if i == 0 else 3] * case.dims[4]
            ld = case.dims[5 + i]
            for array in (x, y):
                for row in range(-(-array.size // ld)):
                    array[row * ld : row * ld + n] = 0
            assert x.tobytes() == y.tobytes(), "bytes between rows changed"
    good = written(call, call.run(cuda, "flash"))
    cuda.seed(2)
    assert written(call, call.run(cuda, "flash")) == good
    shifted: list[Array | None] = []
    for x in call.inputs:
        if x is None:
            shifted.append(None)
            continue
        buffer = np.zeros(x.size + 16, x.dtype)
        buffer = buffer[(-buffer.ctypes.data % 16) // x.itemsize + 1 :][: x.size]
        buffer[:] = x.reshape(-1)
        shifted.append(buffer)
    cuda.call(case.kernel, wire.BF16, shifted, case.dims, case.reals, set_name="flash")
    assert written(call, shifted) == good


@dataclass(frozen=True)
class Heads:
    """Attention of b sequences on tensor cores; documents begin at ``first`` (of each row), or rows have a window."""

    cuda: CudaLib
    b: int
    h: int
    g: int
    first: Array | None = None
    window: int = 0

    def fwd(self, q: Array, k: Array, v: Array) -> list[Array]:
        b, h, g = self.b, self.h, self.g
        t, d = len(q) // b, q.shape[1] // h
        o, lse = np.empty_like(q), np.empty((b * h, t), np.float32)
        dims = (b, t, h, g, d, h * d, h * d, g * d, g * d, self.window)
        arrays = [o, lse, q, k, v, self.first]
        self.cuda.call("attention_fwd", wire.BF16, arrays, dims, (d**-0.5,), set_name="flash")
        return [o, lse]

    def both(self, dy: Array, q: Array, k: Array, v: Array) -> list[Array]:
        """What the forward gives, and the backward."""
        b, h, g = self.b, self.h, self.g
        t, d = len(q) // b, q.shape[1] // h
        y, lse = self.fwd(q, k, v)
        dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
        dims = (b, t, h, g, d, h * d, g * d, g * d, h * d, h * d, h * d, g * d, g * d, self.window)
        arrays = [dq, dk, dv, dy, y, q, k, v, lse, np.empty_like(lse), self.first]
        self.cuda.call("attention_igrad", wire.BF16, arrays, dims, (d**-0.5,), set_name="flash")
        return [y, lse, dq, dk, dv]

    def products(self, dy: Array, q: Array, k: Array, v: Array) -> tuple[int, int]:
        """How many mma the forward makes, and the backward."""
        self.cuda.seed(1)
        self.fwd(q, k, v)
        one = int(self.cuda.c.hs_emulated_products())
        self.both(dy, q, k, v)
        return one, int(self.cuda.c.hs_emulated_products()) - 2 * one


def drawn(seed: int, t: int, *widths: int) -> list[Array]:
    """bf16 [t, width] of each."""
    rng = np.random.default_rng(seed)
    return [encode(rng.normal(size=(t, width)), wire.BF16) for width in widths]


def begun(t: int, starts: Sequence[int]) -> Array:
    """By row of a sequence, where its document begins."""
    first = np.zeros(t, np.int32)
    for start in starts:
        first[start:] = start
    return first


def test_a_sequence_does_not_know_its_batch(cuda: CudaLib) -> None:
    """Alone or among others, and what a longer sequence adds behind it: the same bits."""
    b, t, h, g, d = 3, 130, 2, 1, 64
    dy, q, k, v = drawn(4, b * t, h * d, h * d, g * d, g * d)
    many, one = Heads(cuda, b, h, g), Heads(cuda, 1, h, g)
    whole, _, *grads = many.both(dy, q, k, v)
    second = slice(t, 2 * t)
    y, _, *own = one.both(*(x[second].copy() for x in (dy, q, k, v)))
    for x, of_many in zip([y, *own], [whole, *grads], strict=True):
        assert x.tobytes() == of_many[second].tobytes()
    for n in (1, 64, 65):
        prefix = one.fwd(*(x[:n].copy() for x in (q, k, v)))[0]
        assert prefix.tobytes() == whole[:n].tobytes(), n


@pytest.mark.parametrize("window", [0, 70])
def test_a_document_does_not_know_the_others(cuda: CudaLib, window: int) -> None:
    """With other documents around its own a row has the same bits, forward and back; a single document has those of a
    call that says nothing; and what is said beyond a row, or below 0, is as the nearest that may be."""
    t, h, g, d = 200, 2, 1, 32
    dy, q, k, v = drawn(6, t, h * d, h * d, g * d, g * d)
    starts = [0, 30, 64, 65, 190, 199]

    def of(first: Array | None) -> list[Array]:
        o, lse, *grads = Heads(cuda, 1, h, g, first, window).both(dy, q, k, v)
        return [o, lse.T.copy(), *grads]

    whole, documents = of(begun(t, starts)), set(pairwise([*starts, t]))
    # every other document cut in two; every one between them; all before one together
    found = set()
    for others in ([0, 30, 47, 64, 65, 100, 190, 199], [0, 15, 30, 64, 65, 190, 194, 199], [0, 65, 190]):
        around = of(begun(t, others))
        for begin, end in documents.intersection(pairwise([*others, t])):
            found.add((begin, end))
            for x, y in zip(around, whole, strict=True):
                assert x[begin:end].tobytes() == y[begin:end].tobytes(), (begin, end)
    assert found == documents
    assert [x.tobytes() for x in of(begun(t, [0]))] == [x.tobytes() for x in of(None)]
    wild = np.where(np.arange(t) < 40, -7, 2**31 - 1).astype(np.int32)
    mended = np.clip(wild, 0, np.arange(t)).astype(np.int32)
    assert [x.tobytes() for x in of(wild)] == [x.tobytes() for x in of(mended)]


def test_what_nobody_reads_is_not_computed(cuda: CudaLib) -> None:
    """Documents of 64 in a sequence of 512, and windows: products by tiles that a warp of 32 rows meets; and blocks do
    not touch what lies outside their bands."""
    t, d = 512, 32
    dy, q, k, v = drawn(8, t, d, d, d, d)
    all_before = Heads(cuda, 1, 1, 1).products(dy, q, k, v)
    documents = Heads(cuda, 1, 1, 1, begun(t, range(0, t, 64))).products(dy, q, k, v)
    # columns come in steps of 64 (forward) and 32 (backward); warp w of 16 has rows 32 w to 32 w + 31
    assert Fraction(documents[0], all_before[0]) == Fraction(16, 72)
    assert Fraction(documents[1], all_before[1]) == Fraction(24, 136)
    near = Heads(cuda, 1, 1, 1, None, 33).products(dy, q, k, v)  # a warp's own rows, and the 32 keys before them
    assert Fraction(near[0], all_before[0]) == Fraction(16 + 7, 72)
    assert Fraction(near[1], all_before[1]) == Fraction(16 + 15, 136)
    heads = Heads(cuda, 1, 1, 1, begun(t, [0, 128, 256]))
    want = heads.both(dy, q, k, v)
    for x in (dy, q, k, v):
        x[128:256] = 0x7FC0
    got = heads.both(dy, q, k, v)
    got[1], want[1] = got[1].T, want[1].T
    for x, y in zip(got, want, strict=True):
        assert x[:128].tobytes() == y[:128].tobytes()
        assert x[256:].tobytes() == y[256:].tobytes()


@pytest.mark.parametrize("window", [0, 1, 20])
def test_a_nan_is_not_lost(cuda: CudaLib, window: int) -> None:
    """One element of q, k, v or dy that is NaN: every row that depends on it has an element that is not finite. (What
    two_to and maxima do to a NaN is the kernels' own.) An infinity in q or dy leaves its own row so."""
    rng = np.random.default_rng(7)
    t, d, at = 70, 32, 40
    clean = [rng.normal(size=(t, d)) for _ in range(4)]
    spot = np.arange(t * d).reshape(t, d) == at * d + 3
    heads = Heads(cuda, 1, 1, 1, None, window)
    read_by, reads = range(at, min(t, at + (window or t))), range(max(0, at + 1 - (window or t)), at + 1)
    for bad in (np.nan, np.inf, -np.inf):
        for which, name in enumerate(("dy", "q", "k", "v")):
            dy, q, k, v = (encode(np.where(spot & (i == which), bad, x), wire.BF16) for i, x in enumerate(clean))
            o, lse, dq, dk, dv = heads.both(dy, q, k, v)
            sound = [np.isfinite(decode(x, wire.BF16)).all(-1) for x in (o, dq, dk, dv)]
            if np.isinf(bad):
                assert name not in ("q", "dy") or not sound[1][at], name
                continue
            assert name not in ("q", "k") or not np.isfinite(lse[0, at])
            rows_of: dict[str, tuple[Sequence[int], ...]] = {
                "dy": ([], [at], reads, reads),
                "q": ([at], [at], reads, reads),
                "k": (read_by, read_by, [at], [at]),
                "v": (read_by, read_by, [at], []),
            }
            for x, touched in zip(sound, rows_of[name], strict=True):
                assert not x[list(touched)].any(), name


def test_others_fall_back_to_the_plain_kernels(kernels: KernelLib, cuda: CudaLib) -> None:
    for case, dtype in [(c, wire.BF16) for c in attention_cases(1, 33, 2, 1, 40)] + [
        (c, wire.F32) for c in attention_cases(1, 33, 2, 1, 32)
    ]:
        call = Call.make(kernels, case, dtype)
        assert written(call, call.run(cuda, "flash")) == written(call, call.run(cuda, "cuda"))


# --- the emulator's tensor cores, and what they compute with ---------------------------------------------------------


def _aligned(x: Array) -> Array:
    buffer = np.zeros(x.size + 16, x.dtype)
    buffer = buffer[(-buffer.ctypes.data % 16) // x.itemsize :][: x.size]
    buffer[:] = x.reshape(-1)
    return buffer


def _mma(cuda: CudaLib, how: int, shared: int = 768, seed: int = 1) -> tuple[int, Array, Array]:
    rng = np.random.default_rng(1)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))  # sums of their products are exact
    stored = [_aligned(encode(x.astype(np.float32), wire.BF16)) for x in (a, b if how & 1 else b.T)]
    out = np.zeros((16, 8), np.float32)
    cuda.seed(seed)
    rc = cuda.c.hs_test_mma(*(ctypes.c_void_p(x.ctypes.data) for x in (out, *stored)), how, shared)
    begun = np.array([[1, 2], [3, 4]])[np.arange(16)[:, None] // 8, np.arange(8) % 2]
    return int(rc), out, a @ b + begun


def test_fragments_lie_as_the_manual_says(cuda: CudaLib) -> None:
    for how in (0, 1):
        rc, out, want = _mma(cuda, how)
        assert rc == 0, cuda.text()
        assert np.array_equal(out, want)
    assert cuda.c.hs_emulated_conflicts() > 0  # its rows of 32 bytes lie four to a bank's width


def test_data_arrive_at_their_wait_and_not_before(cuda: CudaLib) -> None:
    rc, out, _ = _mma(cuda, 2)
    assert rc == 0
    assert np.isnan(out).all()
    rc, _, _ = _mma(cuda, 2 | 4)
    assert rc == -3
    assert "returns with 1 copies in flight" in cuda.text()


def test_shared_memory_is_what_an_architecture_gives(cuda: CudaLib) -> None:
    for capability, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)):
        cuda.c.hs_emulated_architecture(capability)
        try:
            assert _mma(cuda, 0, kib << 10)[0] == 0
            assert _mma(cuda, 0, (kib << 10) + 1)[0] == -3
            assert f"capability {capability // 10}.{capability % 10} gives {kib << 10}" in cuda.text()
        finally:
            cuda.c.hs_emulated_architecture(86)


def test_power_of_two(cuda: CudaLib) -> None:
    x = np.concatenate([np.linspace(-125, 0, 100_001), np.linspace(-1, 0, 100_001)]).astype(np.float32)
    for c in (1.0, 0.18):
        y = x.copy()
        cuda.c.hs_test_two_to(ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(x.size), ctypes.c_float(c))
        want = 2.0 ** (x.astype(np.float64) * np.float32(c))
        assert np.max(np.abs(y / want - 1)) < 3e-6
        assert y[-1] == 1
