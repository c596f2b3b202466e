"""The order contract of products (kernels/cpu/gemm.h), as NumPy computes it to the last bit."""

from __future__ import annotations

import numpy as np

from tests.engine.kernel_lib import Array, to_bf16
from trainer import wire


def _fma32(a: Array, b: Array, c: Array) -> Array:
    """fma in f32, correctly rounded: exact product in f64, the sum rounded to odd, then to f32."""
    p, x = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + x
    t = s - p
    e = (p - (s - t)) + (x - t)
    bits = s.view(np.int64).copy()
    even = (e != 0) & (bits & 1 == 0)
    bits += np.where(even, np.where((e > 0) == (s > 0), 1, -1), 0)
    return bits.view(np.float64).astype(np.float32)


def flushed(x: Array) -> Array:
    """Denormal numbers are zero of their sign."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def _fma32_flushed(a: Array, b: Array, c: Array) -> Array:
    """The same, where denormal operands and results are zero of their sign. What is denormal is said after rounding to
    24 bits of whatever exponent: there the sum is computed 2^100 times as large.
    """
    a, b, c = flushed(a), flushed(b), flushed(c)
    small = np.abs(a.astype(np.float64) * b + c) < 2.0**-100
    up = np.float32(2.0**50)
    with np.errstate(over="ignore", invalid="ignore"):
        large = _fma32(a * up, b * up, c * up * up)
    low = np.where(np.abs(large) < 2.0**-26, np.copysign(np.float32(0), large), (large / up) / up)
    return np.where(small, low, _fma32(a, b, c))


def chain_of(a: Array, b: Array, start: Array, dtype: int) -> Array:
    """gemm.h's contract: start[m, n] + a[m, k] times b[n, k], one fma after the other."""
    k = a.shape[1]
    a, b = a.astype(np.float32), b.astype(np.float32)
    order = list(range(k)) if dtype == wire.F32 else [i ^ 1 for i in range((k + 1) // 2 * 2)]
    if k % 2:
        a, b = (np.concatenate([x, np.zeros((len(x), 1), np.float32)], 1) for x in (a, b))
    chain, fma = start, _fma32 if dtype == wire.F32 else _fma32_flushed
    for i in order:
        chain = fma(np.broadcast_to(a[:, i][:, None], start.shape), np.broadcast_to(b[:, i], start.shape), chain)
    return chain


def least_numbers(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int) -> Array:
    """bf16 with exponents from low to high, and some that are denormal or zero, of both signs."""
    x = np.ldexp(1 + rng.integers(0, 128, shape) / 128, rng.integers(low, high, shape))
    x = np.where(rng.random(shape) < 0.1, rng.integers(0, 3, shape) * 2.0**-130, x)
    return to_bf16((x * rng.choice([-1.0, 1.0], shape)).astype(np.float32))
