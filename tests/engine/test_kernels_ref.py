"""The oracle against what it stands for: NumPy formulas in float64, and every gradient by finite differences.

A forward kernel is run in f64 on both sides of a point, so the differences know nothing of the gradient kernels;
input and weight gradients are checked apart, with and without adding to what was there. bf16 and f32 are then only
roundings of the same loops, checked against the f64 run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.engine.kernel_lib import Array, KernelLib, control, decode, encode, to_bf16
from trainer import wire

F32, BF16, F64 = wire.F32, wire.BF16, wire.F64


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def differences(f: Callable[[], float], x: Array, grad: Array, rng: np.random.Generator, h: float = 1e-5) -> None:
    """Asserts that ``grad`` is the derivative of f by the elements of ``x`` (which f reads; restored after).

    Every element where there are few, else random directions; central differences, error about 1e-9.
    """
    assert x.shape == grad.shape
    assert np.isfinite(grad).all()
    original = x.copy()
    directions: list[Array] = []
    if x.size <= 60:
        for i in range(x.size):
            one = np.zeros(x.size)
            one[i] = 1
            directions.append(one.reshape(x.shape))
    directions += [rng.normal(size=x.shape) for _ in range(6)]
    for d in directions:
        x[...] = original + h * d
        up = f()
        x[...] = original - h * d
        down = f()
        x[...] = original
        numeric, analytic = (up - down) / (2 * h), float((grad * d).sum())
        tolerance = 2e-7 * (1 + abs(analytic))
        assert abs(numeric - analytic) < tolerance, (numeric, analytic)


def strided(rng: np.random.Generator, rows: int, ld: int, columns: int) -> tuple[Array, Array]:
    """A buffer of rows*ld and the view of its first columns (the last row's gap exists here, and is not touched)."""
    buffer = rng.normal(size=(rows, ld))
    return buffer, buffer[:, :columns]


# --- embed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(("b", "t", "c", "v"), [(1, 1, 1, 1), (2, 3, 5, 7), (3, 4, 8, 311)])
def test_embed(kernels: KernelLib, rng: np.random.Generator, b: int, t: int, c: int, v: int, positions: bool) -> None:
    r = b * t
    tok = rng.integers(0, v, r).astype(np.int32)
    wte, y, dy = rng.normal(size=(v, c)), np.empty((r, c)), rng.normal(size=(r, c))
    wpe = rng.normal(size=(t, c)) if positions else None

    def loss() -> float:
        kernels.call("embed_fwd", F64, [y, tok, wte, wpe], [r, c, v, t])
        return float((y * dy).sum())

    loss()
    want = wte[tok] + (wpe[np.arange(r) % t] if wpe is not None else 0)
    assert np.array_equal(y, want)
    old, old_p = rng.normal(size=wte.shape), rng.normal(size=(t, c))
    dwte, dwpe = old.copy(), old_p.copy() if positions else None
    kernels.call("embed_wgrad", F64, [dwte, dwpe, dy, tok], [r, c, v, t])
    differences(loss, wte, dwte - old, rng)
    if wpe is not None and dwpe is not None:
        differences(loss, wpe, dwpe - old_p, rng)
    unused = np.setdiff1d(np.arange(v), tok)
    assert np.array_equal(dwte[unused], old[unused])


# --- norms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "c"), [(1, 1), (1, 2), (3, 5), (2, 16), (5, 67)])
def test_layernorm(kernels: KernelLib, rng: np.random.Generator, r: int, c: int) -> None:
    eps = 1e-5
    x, w, b, dy = rng.normal(size=(r, c)) * 2 + 1, rng.normal(size=c), rng.normal(size=c), rng.normal(size=(r, c))
    y, mean, rstd = np.empty((r, c)), np.empty(r), np.empty(r)

    def loss() -> float:
        kernels.call("layernorm_fwd", F64, [y, mean, rstd, x, w, b], [r, c], [eps])
        return float((y * dy).sum())

    loss()
    true_rstd = 1 / np.sqrt(x.var(axis=1) + eps)
    h = (x - x.mean(axis=1, keepdims=True)) * true_rstd[:, None]
    np.testing.assert_allclose(y, h * w + b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mean, x.mean(axis=1), rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(rstd, true_rstd, rtol=1e-13)
    for accum, apart in ((0, False), (1, False), (1, True)):
        old = rng.normal(size=x.shape)
        dx = np.full_like(old, np.nan) if apart else old.copy()
        given = [dx, dy, x, w, mean, rstd, old.copy() if apart else None]
        kernels.call("layernorm_igrad", F64, given, [r, c, accum])
        if c > 1:  # with one column y is b, and differences of rounding errors are nothing to compare
            differences(loss, x, dx - accum * old, rng)
            loss()  # mean and rstd of x itself again
    old_w, old_b = rng.normal(size=c), rng.normal(size=c)
    dw, db = old_w.copy(), old_b.copy()
    kernels.call("layernorm_wgrad", F64, [dw, db, dy, x, mean, rstd], [r, c])
    differences(loss, w, dw - old_w, rng)
    differences(loss, b, db - old_b, rng)


@pytest.mark.parametrize(("r", "n", "c"), [(1, 1, 1), (3, 1, 5), (2, 3, 7), (4, 2, 16), (2, 1, 67)])
def test_rmsnorm(kernels: KernelLib, rng: np.random.Generator, r: int, n: int, c: int) -> None:
    eps = 1e-6
    ldx, ldy, lddx, lddy = n * c + 3, n * c + 1, n * c + 2, n * c
    (x, x_in), (y, y_in), (dy, dy_in) = (strided(rng, r, ld, n * c) for ld in (ldx, ldy, lddy))
    w, rstd = rng.normal(size=c), np.empty((r, n))

    def loss() -> float:
        kernels.call("rmsnorm_fwd", F64, [y, rstd, x, w], [r, n, c, ldx, ldy], [eps])
        return float((y_in * dy_in).sum())

    loss()
    groups = x_in.reshape(r, n, c)
    true_rstd = 1 / np.sqrt((groups**2).mean(axis=2) + eps)
    np.testing.assert_allclose(y_in.reshape(r, n, c), groups * true_rstd[:, :, None] * w, rtol=1e-12)
    np.testing.assert_allclose(rstd, true_rstd, rtol=1e-13)
    for accum, apart in ((0, False), (1, False), (1, True)):
        old, old_in = strided(rng, r, lddx, n * c)
        dx = np.full_like(old, np.nan) if apart else old.copy()
        given = [dx, dy, x, w, rstd, old.copy() if apart else None]
        kernels.call("rmsnorm_igrad", F64, given, [r, n, c, lddx, lddy, ldx, accum])
        differences(loss, x_in, dx[:, : n * c] - accum * old_in, rng)
        loss()
    old_w = rng.normal(size=c)
    dw = old_w.copy()
    kernels.call("rmsnorm_wgrad", F64, [dw, dy, x, rstd], [r, n, c, lddy, ldx])
    differences(loss, w, dw - old_w, rng)


# --- linear -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("r", "n", "k"), [(1, 1, 1), (1, 7, 3), (5, 3, 4), (6, 17, 13), (4, 1, 67)])
def test_linear(
    kernels: KernelLib, rng: np.random.Generator, r: int, n: int, k: int, residual: bool, bias: bool
) -> None:
    ldy, ldx, ldres, lddx, lddy = n + 1, k + 2, n + 3, k + 1, n + 2
    (x, x_in), (y, y_in), (dy, dy_in), (res, res_in) = (
        strided(rng, r, ld, columns) for ld, columns in ((ldx, k), (ldy, n), (lddy, n), (ldres, n))
    )
    w, b = rng.normal(size=(n, k)), rng.normal(size=n)
    operands = [y, x, w, b if bias else None, res if residual else None]

    def loss() -> float:
        kernels.call("linear_fwd", F64, operands, [r, n, k, ldy, ldx, ldres])
        return float((y_in * dy_in).sum())

    loss()
    want = x_in @ w.T + (b if bias else 0) + (res_in if residual else 0)
    np.testing.assert_allclose(y_in, want, rtol=1e-12, atol=1e-12)
    for accum in (0, 1):
        old, old_in = strided(rng, r, lddx, k)
        dx = old.copy()
        kernels.call("linear_igrad", F64, [dx, dy, w], [r, n, k, lddx, lddy, accum])
        np.testing.assert_allclose(dx[:, :k], dy_in @ w + accum * old_in, rtol=1e-12, atol=1e-12)
        differences(loss, x_in, dx[:, :k] - accum * old_in, rng)
    old_w, old_b = rng.normal(size=w.shape), rng.normal(size=n)
    dw, db = old_w.copy(), old_b.copy() if bias else None
    kernels.call("linear_wgrad", F64, [dw, db, dy, x], [r, n, k, lddy, ldx, 1])
    differences(loss, w, dw - old_w, rng)
    if db is not None:
        differences(loss, b, db - old_b, rng)


# --- attention --------------------------------------------------------------------------------------------


def attention(q: Array, k: Array, v: Array, scale: float) -> tuple[Array, Array]:
    """q [B,T,H,D], k and v [B,T,G,D] -> o [B,T,H,D], lse [B,H,T]."""
    group = q.shape[2] // k.shape[2]
    kk, vv = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    s = scale * np.einsum("bthd,buhd->bhtu", q, kk)
    s = np.where(np.tri(q.shape[1], dtype=bool), s, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    e = np.exp(s - top)
    o = np.einsum("bhtu,buhd->bthd", e / e.sum(axis=-1, keepdims=True), vv)
    return o, (top + np.log(e.sum(axis=-1, keepdims=True)))[..., 0]


@pytest.mark.parametrize(
    ("b", "t", "h", "g", "d"),
    [
        (1, 1, 1, 1, 1),
        (1, 1, 4, 2, 16),
        (2, 5, 2, 2, 3),
        (1, 7, 4, 1, 5),  # one key head for all
        (2, 4, 6, 3, 7),
        (1, 6, 2, 1, 12),
        (1, 9, 2, 2, 16),
        (1, 5, 4, 2, 32),
        (1, 4, 2, 1, 64),
        (1, 3, 3, 3, 80),
        (1, 3, 2, 1, 128),
        (1, 2, 1, 1, 512),
    ],
)
def test_attention(kernels: KernelLib, rng: np.random.Generator, b: int, t: int, h: int, g: int, d: int) -> None:
    r, scale = b * t, d**-0.5
    # q, k and v are parts of one buffer, as a fused projection writes them
    ld = (h + 2 * g) * d + 1
    qkv = rng.normal(size=(r, ld))
    flat = qkv.reshape(-1)
    q, k, v = qkv[:, : h * d], qkv[:, h * d : (h + g) * d], qkv[:, (h + g) * d : (h + 2 * g) * d]
    ldo, lddo = h * d + 2, h * d + 3
    (o, o_in), (do, do_in) = strided(rng, r, ldo, h * d), strided(rng, r, lddo, h * d)
    lse = np.empty((b, h, t))
    parts = [flat, flat[h * d :], flat[(h + g) * d :]]

    def loss() -> float:
        kernels.call("attention_fwd", F64, [o, lse, *parts], [b, t, h, g, d, ldo, ld, ld, ld], [scale])
        return float((o_in * do_in).sum())

    loss()
    want_o, want_lse = attention(q.reshape(b, t, h, d), k.reshape(b, t, g, d), v.reshape(b, t, g, d), scale)
    np.testing.assert_allclose(o_in.reshape(b, t, h, d), want_o, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-12)

    (dq, dq_in), (dk, dk_in), (dv, dv_in) = (strided(rng, r, columns + 1, columns) for columns in (h * d, g * d, g * d))
    delta = np.full((b, h, t), np.nan)
    lds = [h * d + 1, g * d + 1, g * d + 1, lddo, ldo, ld, ld, ld]
    kernels.call("attention_igrad", F64, [dq, dk, dv, do, o, *parts, lse, delta], [b, t, h, g, d, *lds], [scale])
    differences(loss, q, dq_in, rng)
    differences(loss, k, dk_in, rng)
    differences(loss, v, dv_in, rng)


@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_of_documents_and_windows(kernels: KernelLib, rng: np.random.Generator, window: int) -> None:
    """Each document as if it were alone; within a window, the keys of it; gradients by differences."""
    b, t, h, g, d = 2, 9, 2, 1, 3
    starts, lds = [[0, 4, 5], [0, 7]], (h * d, g * d, g * d, h * d, h * d, h * d, g * d, g * d)
    first = np.array([[max(s for s in of if s <= u) for u in range(t)] for of in starts], np.int32)
    q, k, v, dy = (rng.normal(size=(b, t, n, d)) for n in (h, g, g, h))
    o, lse, delta = np.empty((b, t, h, d)), np.empty((b, h, t)), np.empty((b, h, t))

    def loss() -> float:
        dims = [b, t, h, g, d, h * d, h * d, g * d, g * d, window]
        kernels.call("attention_fwd", F64, [o, lse, q, k, v, first], dims, [0.5])
        return float((o * dy).sum())

    loss()
    for row, of in enumerate(starts):
        for begin, end in zip(of, [*of[1:], t], strict=True):
            for u in range(begin, end):
                seen = slice(max(begin, u - window + 1) if window else begin, u + 1)
                alone = (x[row : row + 1, seen] for x in (q, k, v))
                np.testing.assert_allclose(o[row, u], attention(*alone, 0.5)[0][0, -1], rtol=1e-11, atol=1e-12)
    grads = [np.empty_like(x) for x in (q, k, v)]
    kernels.call(
        "attention_igrad", F64, [*grads, dy, o, q, k, v, lse, delta, first], [b, t, h, g, d, *lds, window], [0.5]
    )
    for x, grad in zip((q, k, v), grads, strict=True):
        differences(loss, x, grad, rng)


def test_borders(kernels: KernelLib) -> None:
    """An end token belongs to its document, also where several follow one another, first or last."""
    tokens = np.array([[9, 1, 2, 9, 9, 3, 4, 5], [1, 2, 3, 4, 5, 6, 9, 9]], np.int32)
    first = np.empty_like(tokens)
    kernels.call("borders", F32, [first, tokens], [2, 8, 10, 9])
    assert first.tolist() == [[0, 1, 1, 1, 4, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 7]]


def test_positions_count_from_a_documents_beginning(kernels: KernelLib, rng: np.random.Generator) -> None:
    t, c, v = 7, 4, 5
    first = np.array([0, 0, 2, 2, 2, 2, 6], np.int32)
    place = np.arange(t) - first
    tok, wte, wpe, y, dy = rng.integers(0, v, t).astype(np.int32), *(rng.normal(size=(n, c)) for n in (v, t, t, t))
    kernels.call("embed_fwd", F64, [y, tok, wte, wpe, first], [t, c, v, t])
    assert np.array_equal(y, wte[tok] + wpe[place])
    dwte, dwpe, want = np.zeros((v, c)), np.zeros((t, c)), np.zeros((t, c))
    kernels.call("embed_wgrad", F64, [dwte, dwpe, dy, tok, first], [t, c, v, t])
    np.add.at(want, place, dy)
    np.testing.assert_allclose(dwpe, want, rtol=1e-14)
    table = np.empty((t, c // 2, 2))
    kernels.call("rope_table", F64, [table], [t, c], [10000.0])
    turned, told = dy.copy(), dy.copy()
    kernels.call("rope_fwd", F64, [turned, table, first], [t, t, 1, c, c])
    kernels.call("rope_fwd", F64, [told, table[place].copy()], [t, t, 1, c, c])
    assert np.array_equal(turned, told)
    kernels.call("rope_igrad", F64, [turned, table, first], [t, t, 1, c, c])
    np.testing.assert_allclose(turned, dy, rtol=1e-12, atol=1e-12)


def test_attention_survives_large_scores(kernels: KernelLib, rng: np.random.Generator) -> None:
    q, k, v = (rng.normal(size=(8, 4)) * s for s in (1e4, 1e4, 1))
    o, lse = np.empty((8, 4)), np.empty((1, 1, 8))
    kernels.call("attention_fwd", F64, [o, lse, q, k, v], [1, 8, 1, 1, 4, 4, 4, 4, 4], [1.0])
    split = (1, 8, 1, 4)
    want, want_lse = attention(q.reshape(split), k.reshape(split), v.reshape(split), 1.0)
    np.testing.assert_allclose(o, want.reshape(8, 4), rtol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-12)


# --- rope -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "d", "base"), [(1, 2, 1e4), (7, 6, 1e4), (33, 16, 5e5), (2048, 128, 1e6)])
def test_rope_table(kernels: KernelLib, t: int, d: int, base: float) -> None:
    table = np.empty((t, d // 2, 2))
    kernels.call("rope_table", F64, [table], [t, d], [base])
    angle = np.arange(t)[:, None] / base ** (np.arange(0, d, 2) / d)
    np.testing.assert_allclose(table, np.stack([np.cos(angle), np.sin(angle)], axis=-1), rtol=0, atol=2e-13 * max(t, 1))


@pytest.mark.parametrize(("b", "t", "n", "d"), [(1, 1, 1, 2), (2, 3, 2, 6), (1, 5, 3, 16), (2, 2, 1, 66)])
def test_rope(kernels: KernelLib, rng: np.random.Generator, b: int, t: int, n: int, d: int) -> None:
    r, ld = b * t, n * d + 3
    table = np.empty((t, d // 2, 2))
    kernels.call("rope_table", F64, [table], [t, d], [10000.0])
    x, x_in = strided(rng, r, ld, n * d)
    dy = rng.normal(size=(r, ld))

    def loss() -> float:
        y = x.copy()
        kernels.call("rope_fwd", F64, [y, table], [r, t, n, d, ld])
        return float((y * dy)[:, : n * d].sum())

    y = x.copy()
    kernels.call("rope_fwd", F64, [y, table], [r, t, n, d, ld])
    heads = x_in.reshape(b, t, n, 2, d // 2)
    pairs = heads[:, :, :, 0] + 1j * heads[:, :, :, 1]
    turned = pairs * (table[..., 0] + 1j * table[..., 1])[None, :, None, :]
    want = np.stack([turned.real, turned.imag], axis=3).reshape(r, n * d)
    np.testing.assert_allclose(y[:, : n * d], want, rtol=1e-12, atol=1e-12)
    dx = dy.copy()
    kernels.call("rope_igrad", F64, [dx, table], [r, t, n, d, ld])
    differences(loss, x_in, dx[:, : n * d], rng)
    kernels.call("rope_igrad", F64, [y, table], [r, t, n, d, ld])
    np.testing.assert_allclose(y, x, rtol=1e-12, atol=1e-12)


# --- activations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 37])
@pytest.mark.parametrize("in_place", [False, True])
def test_gelu(kernels: KernelLib, rng: np.random.Generator, n: int, in_place: bool) -> None:
    x, dy, y = rng.normal(size=n) * 2, rng.normal(size=n), np.empty(n)

    def loss() -> float:
        kernels.call("gelu_fwd", F64, [y, x], [n])
        return float((y * dy).sum())

    loss()
    want = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-15)
    dx = dy.copy() if in_place else np.empty(n)
    kernels.call("gelu_igrad", F64, [dx, dx if in_place else dy, x], [n])
    differences(loss, x, dx, rng)
    far = np.array([-1e3, 1e3, -40.0, 40.0])
    y4, one = np.empty(4), np.ones(4)
    kernels.call("gelu_fwd", F64, [y4, far], [4])
    assert np.array_equal(y4, [0, 1e3, 0, 40])
    kernels.call("gelu_igrad", F64, [y4, one, far], [4])
    assert np.array_equal(y4, [0, 1, 0, 1])


@pytest.mark.parametrize(("r", "f"), [(1, 1), (3, 5), (2, 35)])
@pytest.mark.parametrize("in_place", [False, True])
def test_swiglu(kernels: KernelLib, rng: np.random.Generator, r: int, f: int, in_place: bool) -> None:
    gu, dy, y = rng.normal(size=(r, 2 * f)) * 2, rng.normal(size=(r, f)), np.empty((r, f))

    def loss() -> float:
        kernels.call("swiglu_fwd", F64, [y, gu], [r, f])
        return float((y * dy).sum())

    loss()
    gate, up = gu[:, :f], gu[:, f:]
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=1e-12)
    dgu = gu.copy() if in_place else np.empty_like(gu)
    kernels.call("swiglu_igrad", F64, [dgu, dy, dgu if in_place else gu], [r, f])
    differences(loss, gu, dgu, rng)


def test_swiglu_far_out(kernels: KernelLib) -> None:
    gu, y, one, dgu = np.array([[-1e3, 1e3, 2.0, 3.0]]), np.empty((1, 2)), np.ones((1, 2)), np.empty((1, 4))
    kernels.call("swiglu_fwd", F64, [y, gu], [1, 2])
    assert np.array_equal(y, [[0, 3e3]])
    kernels.call("swiglu_igrad", F64, [dgu, one, gu], [1, 2])
    assert np.array_equal(dgu, [[0, 3, 0, 1e3]])


# --- classifier -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "c", "v", "chunk"), [(1, 1, 1, 1), (1, 3, 7, 4), (5, 3, 7, 2), (6, 4, 5, 3), (4, 9, 311, 64)]
)
def test_classifier(kernels: KernelLib, rng: np.random.Generator, r: int, c: int, v: int, chunk: int) -> None:
    scale = 0.37
    x, w = rng.normal(size=(r, c)), rng.normal(size=(v, c))
    target = rng.integers(0, v, r).astype(np.int32)
    if r > 2:
        target[1] = -1  # left out
    kept = target >= 0
    loss_r, logits = np.empty(r), np.full((chunk, v), np.nan)

    def loss() -> float:
        kernels.call("classifier_fwd", F64, [loss_r, x, w, target, logits], [r, c, v, chunk])
        return scale * float(loss_r.sum())

    loss()
    all_logits = x @ w.T
    lse = np.log(np.exp(all_logits).sum(axis=1))
    want = np.where(kept, lse - all_logits[np.arange(r), np.maximum(target, 0)], 0)
    np.testing.assert_allclose(loss_r, want, rtol=1e-10, atol=1e-12)

    old = rng.normal(size=w.shape)
    again, dx, dw = np.empty(r), np.full((r, c), np.nan), old.copy()
    dlogits = np.full((chunk, v), np.nan)
    operands = [again, dx, dw, x, w, target, logits, dlogits]
    kernels.call("classifier_grad", F64, operands, [r, c, v, chunk, 1], [scale])
    assert np.array_equal(again, loss_r)
    assert not dx[~kept].any()
    differences(loss, x, dx, rng)
    differences(loss, w, dw - old, rng)

    out = np.empty((r, v))
    kernels.call("logits", F64, [out, x, w], [r, c, v])
    np.testing.assert_allclose(out, all_logits, rtol=1e-12, atol=1e-13)


def test_classifier_survives_large_logits(kernels: KernelLib) -> None:
    x, w, target = np.array([[1.0]]), np.array([[1e4], [1e4 - 1], [-1e4]]), np.array([1], np.int32)
    loss, logits = np.empty(1), np.empty((1, 3))
    kernels.call("classifier_fwd", F64, [loss, x, w, target, logits], [1, 1, 3, 1])
    assert loss[0] == pytest.approx(1 + math.log1p(math.exp(-1)), rel=1e-12)


# --- optimizer, init --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("zero_g", [0, 1])
@pytest.mark.parametrize("copy", [True, False])
def test_adamw(kernels: KernelLib, rng: np.random.Generator, dtype: int, zero_g: int, copy: bool) -> None:
    """Ten steps against the textbook form, with clipping, decay, and bias correction by the control block."""
    n, beta1, beta2, eps, decay, lr = 65, 0.9, 0.95, 1e-8, 0.1, 3e-3
    real: type[np.floating[Any]] = np.float64 if dtype == F64 else np.float32
    w: Array = rng.normal(size=n).astype(real)
    m: Array = np.zeros(n, real)
    v, wc = m.copy(), encode(np.zeros(n), dtype)
    tw, tm, tv = w.astype(np.float64), np.zeros(n), np.zeros(n)
    for step in range(1, 11):
        g = rng.normal(size=n).astype(real)
        clip = float(np.float32(min(1, 4 / float(np.linalg.norm(g.astype(np.float64))))))
        tg = g.astype(np.float64) * clip
        tm, tv = beta1 * tm + (1 - beta1) * tg, beta2 * tv + (1 - beta2) * tg**2
        tw -= lr * decay * tw
        tw -= lr * (tm / (1 - beta1**step)) / (np.sqrt(tv / (1 - beta2**step)) + eps)
        ctl = np.frombuffer(
            bytes(control(clip, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), lr)), np.uint8
        ).copy()
        given = g.copy()
        operands = [w, m, v, g, wc if copy else None, ctl]
        foreseen, before = np.empty_like(wc), [x.copy() for x in (w, m, v, g)]
        kernels.call("adamw_copy", dtype, [foreseen, w, m, v, g, ctl], [n], [beta1, beta2, eps, decay])
        assert all(np.array_equal(x, y) for x, y in zip((w, m, v, g), before, strict=True))
        kernels.call("adamw", dtype, operands, [n, zero_g], [beta1, beta2, eps, decay])
        assert foreseen.tobytes() == encode(w, dtype).tobytes()
        assert np.array_equal(g, np.zeros(n) if zero_g else given)
        tolerance = 1e-6  # the control block is f32
        np.testing.assert_allclose(m, tm, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(v, tv, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(w, tw, rtol=tolerance, atol=2e-6)
        if copy:
            assert np.array_equal(wc, encode(w, dtype))
    assert np.abs(tw - w).max() < 1e-5 < np.abs(tw).max()


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("copy", [True, False])
def test_muon(kernels: KernelLib, rng: np.random.Generator, dtype: int, copy: bool) -> None:
    """Ten steps of the elementwise parts, the direction being what goes in, against the textbook form."""
    n, momentum, scale, decay, lr = 65, 0.95, 5.5, 0.1, 3e-3
    real: type[np.floating[Any]] = np.float64 if dtype == F64 else np.float32
    w: Array = rng.normal(size=n).astype(real)
    m, u, wc = np.zeros(n, real), np.zeros(n, real), encode(np.zeros(n), dtype)
    tw, tm = w.astype(np.float64), np.zeros(n)
    for _ in range(10):
        g = rng.normal(size=n).astype(real)
        clip = float(np.float32(min(1, 4 / float(np.linalg.norm(g.astype(np.float64))))))
        tg = g.astype(np.float64) * clip
        tm = momentum * tm + tg
        tu = tg + momentum * tm
        ctl = np.frombuffer(bytes(control(clip, 0.5, 0.5, lr)), np.uint8).copy()
        before = [x.copy() for x in (w, m, g)]
        kernels.call("muon_momentum", F64 if dtype == F64 else F32, [u, m, g, ctl], [n], [momentum])
        np.testing.assert_allclose(u, tu, rtol=1e-6, atol=1e-6)
        norm = np.array([float((u.astype(np.float64) ** 2).sum())])
        kernels.call("muon_scale", F64 if dtype == F64 else F32, [u, norm], [n], [1e-7])
        tu /= np.sqrt((tu**2).sum()) + 1e-7
        np.testing.assert_allclose(u, tu, rtol=1e-6, atol=1e-6)
        tw -= lr * decay * tw
        tw -= lr * scale * tu
        foreseen = np.empty_like(wc)
        kernels.call("muon_copy", dtype, [foreseen, w, u, ctl], [n], [scale, decay])
        assert all(np.array_equal(x, y) for x, y in zip((w, m, g), before, strict=True))
        kernels.call("muon", dtype, [w, m, g, u, wc if copy else None, ctl], [n], [momentum, scale, decay])
        assert foreseen.tobytes() == encode(w, dtype).tobytes()
        assert not g.any()
        np.testing.assert_allclose(m, tm, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(w, tw, rtol=1e-6, atol=2e-6)
        if copy:
            assert np.array_equal(wc, encode(w, dtype))


@pytest.mark.parametrize("s", [1, 5])
def test_muon_poly(kernels: KernelLib, rng: np.random.Generator, s: int) -> None:
    p, q = rng.normal(size=(s, s)), rng.normal(size=(s, s))
    want = 3.0 * np.eye(s) - 4.0 * p + 2.0 * q
    kernels.call("muon_poly", F64, [q, p], [s], [3.0, -4.0, 2.0])
    np.testing.assert_allclose(q, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("n", [1, 7, 65536, 65537, 200_001])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_sumsq(kernels: KernelLib, rng: np.random.Generator, n: int, dtype: int) -> None:
    x = encode(rng.normal(size=n), dtype)
    out, part = np.full(1, np.nan), np.full(-(-n // 65536), np.nan)
    kernels.call("sumsq", dtype, [out, x, part], [n])
    assert out[0] == pytest.approx(math.fsum(x.astype(np.float64) ** 2), rel=1e-12)
    parts, joined = np.full(part.size, np.nan), np.full(1, np.nan)
    kernels.call("sumsq_parts", dtype, [parts, x], [n])
    kernels.call("sum", dtype, [joined, parts, np.full(parts.size, np.nan)], [parts.size])
    assert joined[0] == out[0]


def test_cast_rounds_to_nearest_even(kernels: KernelLib, rng: np.random.Generator) -> None:
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint64).astype(np.uint32)
    bits[:5000] = (bits[:5000] & 0xFFFF0000) | 0x8000  # ties
    bits[5000:6000] = (bits[5000:6000] & 0xFFFF0000) | 0x7FFF
    bits[6000:6006] = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000000, 0x7FC00001]
    src = bits.view(np.float32)
    dst = np.empty(src.size, np.uint16)
    kernels.call("cast", BF16, [dst, src], [src.size])
    finite = ~np.isnan(src)
    assert np.array_equal(dst[finite], to_bf16(src)[finite])
    assert np.isnan(decode(dst[~finite], BF16)).all()
    same = np.empty_like(src)
    kernels.call("cast", F32, [same, src], [src.size])
    assert np.array_equal(same[finite], src[finite])


def test_stores_to_bf16_round_once(kernels: KernelLib) -> None:
    """A sum just above a tie of bf16 that float32 would round onto the tie must go up."""
    tie = 1 + 2**-8  # half way between 1 and its bf16 neighbour
    x = encode(np.array([[1.0, 2**-8, 2**-40]]), BF16)
    w = encode(np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, -1.0]]), BF16)
    y = np.empty((1, 3), np.uint16)
    kernels.call("linear_fwd", BF16, [y, x, w, None, None], [1, 3, 3, 3, 3, 3])
    assert tie == 1.00390625
    assert list(decode(y, BF16)[0]) == [1.0078125, 1.0, 1.0]


def test_small_ops(kernels: KernelLib, rng: np.random.Generator) -> None:
    dst, src = rng.normal(size=37), rng.normal(size=37)
    want = dst + src
    kernels.call("add_acc", F64, [dst, src], [37])
    assert np.array_equal(dst, want)
    before, last = src.copy(), dst[36]
    kernels.call("fold", F64, [dst, src], [36])
    assert np.array_equal(dst, np.append(want[:36] + before[:36], last))
    assert np.array_equal(src, np.append(np.zeros(36), before[36]))
    raw = np.full(40, 7, np.uint8)
    kernels.call("zero", F32, [raw], [37])
    assert list(raw) == [0] * 37 + [7] * 3
    w = np.empty(37, np.float32)
    kernels.call("init_const", BF16, [w], [37], [0.1])
    assert np.array_equal(w, np.full(37, 0.1, np.float32))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345])
def test_init_normal(kernels: KernelLib, seed: int) -> None:
    n, tensor, mean, std = 1003, 9, 0.25, 0.02
    w, short = np.empty(n, np.float32), np.empty(10, np.float32)
    kernels.call("init_normal", BF16, [w], [n, tensor, seed], [mean, std])
    z = kernels.normals(seed % 2**64, tensor, 1, 0, n)
    assert np.array_equal(w, (mean + std * z).astype(np.float32))
    kernels.call("init_normal", F32, [short], [10, tensor, seed], [mean, std])
    assert np.array_equal(short, w[:10])


# --- the same loops in f32 and bf16 -----------------------------------------------------------------------


def run_both(
    kernels: KernelLib,
    kernel: str,
    dtype: int,
    build: Callable[[int], tuple[Sequence[Array | None], list[int]]],
    dims: Sequence[int],
    reals: Sequence[float] = (),
) -> None:
    """Runs a kernel in ``dtype`` and in f64 on the same values; the outputs agree to the rounding of dtype.

    ``build(dtype)`` gives the operands, and the places of its outputs.
    """
    low, outputs = build(dtype)
    high, _ = build(F64)
    kernels.call(kernel, dtype, low, dims, reals)
    kernels.call(kernel, F64, high, dims, reals)
    for i in outputs:
        a, b = low[i], high[i]
        assert a is not None
        assert b is not None
        got = decode(a, BF16 if a.dtype == np.uint16 else F32)
        eps = 2**-8 if a.dtype == np.uint16 else 2**-23
        loose = (
            2**-7 if dtype == BF16 and kernel in ("classifier_grad", "vocab_head", "attention_igrad") else 8 * 2**-23
        )
        np.testing.assert_allclose(got, b, rtol=eps, atol=loose * max(1, np.abs(b).max()))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_lower_precisions_are_roundings_of_f64(kernels: KernelLib, dtype: int) -> None:
    def maker(*shapes: tuple[str, tuple[int, ...]]) -> Callable[[int], tuple[Sequence[Array | None], list[int]]]:
        """Codes: w written, u updated, r read, then D dt or A acc; I targets. Values representable in dtype."""

        def build(kind: int) -> tuple[Sequence[Array | None], list[int]]:
            rng = np.random.default_rng(5)
            operands: list[Array | None] = []
            for code, shape in shapes:
                acc = F64 if kind == F64 else F32
                values = decode(encode(rng.normal(size=shape), dtype), dtype)
                if code[1] == "I":
                    operands.append(rng.integers(0, 7, shape).astype(np.int32))
                else:
                    operands.append(encode(values, acc if code[1] == "A" else kind))
            return operands, [i for i, (code, _) in enumerate(shapes) if code[0] in "wu"]

        return build

    def check(kernel: str, dims: Sequence[int], reals: Sequence[float], *shapes: tuple[str, tuple[int, ...]]) -> None:
        run_both(kernels, kernel, dtype, maker(*shapes), dims, reals)

    rc, c, r = (5, 9), (9,), (5,)
    check("embed_fwd", [5, 9, 7, 5], [], ("wD", rc), ("rI", r), ("rD", (7, 9)), ("rD", (5, 9)))
    check("embed_wgrad", [5, 9, 7, 5], [], ("uA", (7, 9)), ("uA", rc), ("rD", rc), ("rI", r))
    check("layernorm_fwd", [5, 9], [1e-5], ("wD", rc), ("wA", r), ("wA", r), ("rD", rc), ("rA", c), ("rA", c))
    norm = (("uD", rc), ("rD", rc), ("rD", rc))
    check("layernorm_igrad", [5, 9, 1], [], *norm, ("rA", c), ("rA", r), ("rA", r), ("rD", rc))
    check("layernorm_wgrad", [5, 9], [], ("uA", c), ("uA", c), ("rD", rc), ("rD", rc), ("rA", r), ("rA", r))
    check("rmsnorm_fwd", [5, 3, 3, 9, 9], [1e-5], ("wD", rc), ("wA", (5, 3)), ("rD", rc), ("rA", (3,)))
    check("rmsnorm_igrad", [5, 3, 3, 9, 9, 9, 1], [], *norm, ("rA", (3,)), ("rA", (5, 3)), ("rD", rc))
    check("rmsnorm_wgrad", [5, 3, 3, 9, 9], [], ("uA", (3,)), ("rD", rc), ("rD", rc), ("rA", (5, 3)))
    check(
        "linear_fwd", [5, 4, 9, 4, 9, 4], [], ("wD", (5, 4)), ("rD", rc), ("rD", (4, 9)), ("rA", (4,)), ("rD", (5, 4))
    )
    check("linear_igrad", [5, 4, 9, 9, 4, 1], [], ("uD", rc), ("rD", (5, 4)), ("rD", (4, 9)))
    check("linear_wgrad", [5, 4, 9, 4, 9, 1], [], ("uA", (4, 9)), ("uA", (4,)), ("rD", (5, 4)), ("rD", rc))
    qd, kd, bht = (5, 12), (5, 6), (1, 4, 5)
    fwd = [("wD", qd), ("wA", bht), ("rD", qd), ("rD", kd), ("rD", kd)]
    check("attention_fwd", [1, 5, 4, 2, 3, 12, 12, 6, 6], [0.5], *fwd)
    igrad = [("wD", qd), ("wD", kd), ("wD", kd), *[("rD", s) for s in (qd, qd, qd, kd, kd)], ("rA", bht), ("rA", bht)]
    check("attention_igrad", [1, 5, 4, 2, 3, 12, 6, 6, 12, 12, 12, 6, 6], [0.5], *igrad)
    check("rope_fwd", [5, 5, 2, 4, 9], [], ("uD", rc), ("rA", (5, 2, 2)))
    check("rope_igrad", [5, 5, 2, 4, 9], [], ("uD", rc), ("rA", (5, 2, 2)))
    check("gelu_fwd", [45], [], ("wD", rc), ("rD", rc))
    check("gelu_igrad", [45], [], ("wD", rc), ("rD", rc), ("rD", rc))
    check("swiglu_fwd", [5, 9], [], ("wD", rc), ("rD", (5, 18)))
    check("swiglu_igrad", [5, 9], [], ("wD", (5, 18)), ("rD", rc), ("rD", (5, 18)))
    cls = [("rD", rc), ("rD", (7, 9)), ("rI", r), ("sA", (2, 7))]
    check("classifier_fwd", [5, 9, 7, 2], [], ("wA", r), *cls)
    check("classifier_grad", [5, 9, 7, 2, 1], [0.5], ("wA", r), ("wD", rc), ("uA", (7, 9)), *cls, ("sD", (2, 7)))
    parts = ("sA", (4, 2, 9))
    head = [("wA", r), ("wD", rc), ("uA", (7, 9)), *cls, ("sD", (2, 7)), parts]
    check("vocab_head", [5, 9, 7, 2, 4, 2, 1], [0.5], *head)
    check("vocab_sums", [5, 9, 7, 4, 2, 0, 7], [], ("wA", (5, 7)), ("wA", (4, 5)), ("wA", (3, 5)), *cls[:3])
    check("logits", [5, 9, 7], [], ("wA", (5, 7)), ("rD", rc), ("rD", (7, 9)))
    check("add_acc", [45], [], ("uA", rc), ("rA", rc))
