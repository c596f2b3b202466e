"""Attention of the fast CPU kernels: what a row's bits depend on, and the order of its sums in bf16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.engine.chains import chain_of, flushed, least_numbers
from tests.engine.kernel_lib import CPU_PATHS, Array, KernelLib, decode, encode
from trainer import wire

DTYPES = pytest.mark.parametrize("dtype", [wire.F32, wire.BF16], ids=["f32", "bf16"])


def fwd_of(
    kernels: KernelLib, dtype: int, qkv: Sequence[Array], h: int, set_name: str = "", window: int = 0,
    first: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """y, lse of one sequence: q has h heads, k and v have as many as their width says."""
    q, k, v = qkv
    t, d = len(q), q.shape[1] // h
    y, lse = np.empty_like(q), np.empty((h, t), np.float32)
    dims = (1, t, h, k.shape[1] // d, d, *(x.shape[1] for x in (y, q, k, v)), window)
    kernels.call(
        "attention_fwd", dtype, [y, lse, q, k, v, first], dims, (d**-0.5,), set_name=set_name or kernels.sets[-1]
    )
    return y, lse


def igrad_of(
    kernels: KernelLib, dtype: int, dy: Array, y: Array, qkv: Sequence[Array], lse: Array, set_name: str = "",
    window: int = 0, first: Array | None = None,
) -> list[Array]:  # fmt: skip
    """dq, dk, dv of one sequence."""
    q, k, _ = qkv
    h, t = lse.shape
    d = q.shape[1] // h
    grads = [np.empty_like(x) for x in qkv]
    dims = (1, t, h, k.shape[1] // d, d, *(x.shape[1] for x in (*grads, dy, y, *qkv)), window)
    arrays = [*grads, dy, y, *qkv, lse, np.empty_like(lse), first]
    kernels.call("attention_igrad", dtype, arrays, dims, (d**-0.5,), set_name=set_name or kernels.sets[-1])
    return grads


def drawn(seed: int, dtype: int, *shapes: tuple[int, int]) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [encode(rng.normal(size=shape), dtype) for shape in shapes]


@DTYPES
def test_attention_of_a_prefix(kernels: KernelLib, dtype: int) -> None:
    """A row's output depends on the keys up to it: a longer sequence begins with the same bits."""
    # keys and values of 1250 rows of 512 do not fit a worker's scratch, of 700 they do; in bf16, of 2,500 rows
    long = (1250, 1, 512, (700,)) if dtype == wire.F32 else (2500, 1, 512, (700,))
    for most, h, d, shorter in ((300, 2, 24, (1, 63, 64, 65, 192, 250)), long):
        qkv = drawn(2, dtype, *[(most, h * d)] * 3)
        whole, _ = fwd_of(kernels, dtype, qkv, h)
        for t in shorter:
            y, _ = fwd_of(kernels, dtype, [x[:t].copy() for x in qkv], h)
            assert y.tobytes() == whole[:t].tobytes(), (most, t)


@DTYPES
@pytest.mark.parametrize("window", [0, 100])
def test_attention_does_not_know_other_documents(kernels: KernelLib, window: int, dtype: int) -> None:
    """A row's bits depend on what it reads, and on its place: with other documents around its own they are the same,
    forward and back."""
    t, h, g, d = 700, 2, 1, 24
    dy, *qkv = drawn(6, dtype, (t, h * d), (t, h * d), (t, g * d), (t, g * d))
    many = [0, 30, 64, 65, 190, 211, 420, 699]

    def of(starts: Sequence[int]) -> list[Array]:
        first = np.zeros(t, np.int32)
        for start in starts:
            first[start:] = start
        y, lse = fwd_of(kernels, dtype, qkv, h, window=window, first=first)
        return [y, lse.T.copy(), *igrad_of(kernels, dtype, dy, y, qkv, lse, window=window, first=first)]

    whole = of(many)
    for begin, end in zip(many, [*many[1:], t], strict=True):
        alone = of([0, begin, end] if end < t else [0, begin])
        for x, y in zip(alone, whole, strict=True):
            assert x[begin:end].tobytes() == y[begin:end].tobytes(), (begin, end)
    if not window:  # the one document that there is when nothing is said
        y, lse = fwd_of(kernels, dtype, qkv, h)
        assert [x.tobytes() for x in of([0])[:2]] == [y.tobytes(), lse.T.tobytes()]


@DTYPES
def test_attention_of_more_than_the_scratch_has_the_same_gradient(kernels: KernelLib, dtype: int) -> None:
    """In float32, of 400 rows of 512 keys and values are kept, of 700 the running dk and dv fit; of 1,100 and
    2,000 dk and dv are made in two and three spans of keys (bf16 has room for a few more rows). Rows without a gradient
    of their own add nothing: the bits of the first 400 are the same."""
    most, h, d = 400, 2, 512
    q, y, dy, k, v = drawn(3, dtype, *[(2000, h * d)] * 3, *[(2000, d)] * 2)
    dy[most:] = 0

    def first(t: int) -> list[bytes]:
        lse = np.full((h, t), np.log(t), np.float32)
        lse[:, :most] = np.log(most)
        grads = igrad_of(kernels, dtype, dy[:t].copy(), y[:t].copy(), [x[:t].copy() for x in (q, k, v)], lse)
        return [x[:most].tobytes() for x in grads]

    kept = first(most)
    for t in (700, 1100, 2000):
        assert first(t) == kept, t


@pytest.mark.parametrize("set_name", list(CPU_PATHS))
@pytest.mark.parametrize("t", [33, 131])
def test_bf16_adds_in_pairs(kernels: KernelLib, set_name: str, t: int) -> None:
    """Where every p is 1 (no score, or none and lse 0), each sum is a chain of pairs as products have it (chains.py),
    of numbers about the least normal one too. ds, rounded to bf16 as it enters one, is dy . v then: y is 0.
    """
    if set_name not in kernels.sets:
        pytest.skip(f"this CPU has no {set_name}")
    rng = np.random.default_rng(t)
    d, seen = 21, np.tril(np.ones((t, t), np.float32))
    q, y = np.zeros((t, d), np.uint16), np.zeros((t, d), np.uint16)
    k, v, dy = (least_numbers(rng, (t, d), low, low + 12) for low in (-6, -70, -66))
    kf, vf, dyf = (decode(x, wire.BF16).astype(np.float32) for x in (k, v, dy))
    empty = np.zeros((t, d), np.float32)

    def whole(sums: Array) -> Array:
        return sums + np.float32(0)

    low, _ = fwd_of(kernels, wire.BF16, [q, k, least := least_numbers(rng, (t, d), -128, -118)], 1, set_name)
    sums = whole(chain_of(seen, decode(least, wire.BF16).T, empty, wire.BF16))
    rows = np.arange(1, t + 1, dtype=np.float32)[:, None]
    assert low.tobytes() == encode(sums / rows, wire.BF16).tobytes()

    dq, dk, dv = igrad_of(kernels, wire.BF16, dy, y, [q, k, v], np.zeros((1, t), np.float32), set_name)
    scale = np.float32(d**-0.5)
    dp = flushed(chain_of(dyf, vf, np.zeros((t, t), np.float32), wire.BF16) * seen)
    ds = decode(encode(dp, wire.BF16), wire.BF16).astype(np.float32)
    assert (np.abs(ds) > 0).mean() > 0.2
    assert (np.abs(dp) < 2.0**-120).any()
    assert dv.tobytes() == encode(whole(chain_of(seen.T, dyf.T, empty, wire.BF16)), wire.BF16).tobytes()
    assert dq.tobytes() == encode(whole(chain_of(ds, kf.T, empty, wire.BF16)) * scale, wire.BF16).tobytes()
    assert not dk.any(), "no query, no gradient of a key, and no zero is -0"
    assert (np.float32(2.0**-130) * np.float32(2.0)) > 0, "the process's own mode is as it was"
