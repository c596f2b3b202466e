"""The two formats of FP8, and what is quantised to them: every bf16 number and every code, against float64."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.engine.compiled import ENGINE
from tests.engine.cuda_lib import CudaLib
from tests.engine.cuda_lib import build as build_cuda
from tests.engine.kernel_lib import CPU_PATHS, FLAGS, Array, KernelLib, encode
from tests.support.compilers import find
from trainer import wire

PROGRAM = Path(__file__).parent / "programs" / "fp8_codes.c"
FORMATS = pytest.mark.parametrize("e5m2", [0, 1], ids=["e4m3", "e5m2"])
ONE = (0x38, 0x3C)  # the code of 1


def numbers(e5m2: int) -> Array:
    """The float64 of every code, from what the formats are by definition."""
    mantissa, bias = (2, 15) if e5m2 else (3, 7)
    code = np.arange(256)
    exponent, rest = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
    size = np.where(exponent > 0, (1 << mantissa) + rest, rest) * 2.0 ** (np.maximum(exponent, 1) - bias - mantissa)
    if e5m2:
        size[(exponent == 31) & (rest == 0)] = np.inf
        size[(exponent == 31) & (rest > 0)] = np.nan
    else:
        size[(code & 0x7F) == 0x7F] = np.nan
    return np.where(code < 128, size, -size)


def nearest(x: Array, e5m2: int) -> Array:
    """The codes of the numbers nearest to ``x``; of two the one with an even code; saturating."""
    finite = np.flatnonzero(np.isfinite(numbers(e5m2)[:128]))
    table = numbers(e5m2)[finite]
    size = np.minimum(np.abs(np.where(np.isnan(x), 0, x)), table[-1])
    above = np.minimum(np.searchsorted(table, size), len(table) - 1)
    below = np.maximum(above - 1, 0)
    up, down = table[above] - size, size - table[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.where(np.isnan(x), 0x7F, code | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("fp8")

    @cache
    def of(path: str) -> ctypes.CDLL:
        flags = [*FLAGS, *CPU_PATHS[path], f"-DHS_PATH={path}", f"-I{ENGINE}", "-shared"]
        command = [find("cc"), *flags, "-o", str(folder / f"{path}.so"), str(PROGRAM), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        return ctypes.CDLL(str(folder / f"{path}.so"))

    return of


def pointer(x: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


@FORMATS
@pytest.mark.parametrize("path", list(CPU_PATHS))
def test_every_bf16_and_every_code(kernels: KernelLib, build: object, path: str, e5m2: int) -> None:
    """Also f32 numbers just beside every middle between two codes, where rounding turns."""
    if path not in kernels.sets:
        pytest.skip(f"this machine or build has no set {path}")
    c = build(path)  # type: ignore[operator]
    bf16 = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    table = np.unique(numbers(e5m2)[np.isfinite(numbers(e5m2))])
    middles = ((table[1:] + table[:-1]) / 2).astype(np.float32)
    beside = np.concatenate([np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)])
    x = np.concatenate([bf16, middles, beside, np.zeros(-3 * len(middles) % 16, np.float32)])
    codes = np.empty(len(x), np.uint8)
    c.fp8_codes(pointer(x), pointer(codes), ctypes.c_int64(len(x)), e5m2)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(codes, nearest(x.astype(np.float64), e5m2))
    every, values = np.arange(256, dtype=np.uint8), np.empty(256, np.float32)
    c.fp8_values(pointer(every), pointer(values), ctypes.c_int64(256), e5m2)
    np.testing.assert_array_equal(values, numbers(e5m2).astype(np.float32))


def all_sets(kernels: KernelLib) -> list[tuple[KernelLib | CudaLib, str]]:
    return [*((kernels, name) for name in kernels.sets), (CudaLib(build_cuda()), "cuda")]


def quantised(lib: KernelLib | CudaLib, name: str, x: Array, dtype: int, e5m2: int) -> tuple[Array, Array, float]:
    """Codes, their transpose, scale."""
    rows, columns = x.shape
    q, qt = np.zeros((rows, columns), np.uint8), np.zeros((columns, rows), np.uint8)
    s, part = np.zeros(1, np.float32), np.zeros(wire.QUANTISE_PARTS, np.float32)
    operands = [q, qt, s, encode(x, dtype), part]
    lib.call("quantise", dtype, operands, (rows, columns, columns, e5m2), set_name=name)
    return q, qt, float(s[0])


@FORMATS
def test_every_bf16_through_the_kernel(kernels: KernelLib, e5m2: int) -> None:
    """All of one power of two and below, beside a largest number that fixes the scale; every set, the GPU's too."""
    x = (np.arange(1 << 15, dtype=np.uint32) << 16).view(np.float32)
    x = x[np.isfinite(x) & (x <= 2.0**40)]
    x = np.concatenate([x, -x, np.zeros(-2 * len(x) % 96)]).reshape(-1, 96)
    most = 448.0 if not e5m2 else 57344.0
    scale = 2.0 ** np.ceil(np.log2(x.max() / most))
    assert x.max() <= scale * most < 2 * x.max()
    for lib, name in all_sets(kernels):
        q, qt, s = quantised(lib, name, x, wire.BF16, e5m2)
        assert s == scale
        np.testing.assert_array_equal(q, nearest(x.astype(np.float64) / scale, e5m2))
        np.testing.assert_array_equal(qt, q.T)


@FORMATS
def test_scales(kernels: KernelLib, e5m2: int) -> None:
    """The least power of two that holds the largest number, its limits, and what is not finite."""
    most = 57344.0 if e5m2 else 448.0
    cases = {
        most: 1.0,
        np.nextafter(np.float32(most), np.float32(np.inf)): 2.0,
        most / 2: 0.5,
        0.0: 1.0,
        1e-38: 2.0**-100,
    }
    for lib, name in all_sets(kernels):
        for largest, scale in cases.items():
            x = np.zeros((5, 33), np.float32)
            x[3, 17] = -largest
            q, _, s = quantised(lib, name, x, wire.F32, e5m2)
            assert s == scale, (name, largest)
            np.testing.assert_array_equal(q, nearest(x.astype(np.float64) / scale, e5m2))
        for odd in (np.nan, np.inf, -np.inf):
            x = np.ones((70, 40), np.float32)
            x[69, 39] = odd
            q, qt, s = quantised(lib, name, x, wire.F32, e5m2)
            assert np.isnan(s), (name, odd)
            assert (q == 0x7F).all()
            assert (qt == 0x7F).all()


def test_the_oracle_s_products(kernels: KernelLib) -> None:
    """linear8.h in f64: codes as numbers, scales, bias, residual, the old value."""
    r, n, k, pad = 5, 7, 9, 2
    rng = np.random.default_rng(4)

    def codes(rows: int, columns: int, e5m2: int) -> tuple[Array, Array]:
        found = rng.choice(np.flatnonzero(np.abs(numbers(e5m2)) < 60), (rows, columns)).astype(np.uint8)
        return found, numbers(e5m2)[found]

    (x8, x), (w8, w), (dy8, dy) = codes(r, k, 0), codes(n, k, 0), codes(r, n, 1)
    xs, ws, dys = (np.array([2.0**e]) for e in (-3, 2, -9))
    b, res, y = rng.normal(size=n), rng.normal(size=(r, n + pad)), np.zeros((r, n + pad))
    kernels.call("linear8_fwd", wire.F64, [y, x8, xs, w8, ws, b, res], (r, n, k, n + pad, n + pad))
    np.testing.assert_allclose(y[:, :n], x @ w.T * xs * ws + b + res[:, :n], rtol=1e-12)
    assert not y[:, n:].any()
    old = rng.normal(size=(r, k))
    dx = old.copy()
    kernels.call("linear8_igrad", wire.F64, [dx, dy8, dys, w8.T.copy(), ws], (r, n, k, k, 1))
    np.testing.assert_allclose(dx, old + dy @ w * dys * ws, rtol=1e-12)
    dw, db, given = rng.normal(size=(n, k)), rng.normal(size=n), rng.normal(size=(r, n))
    want_w, want_b = dw + dy.T @ x * dys * xs, db + given.sum(axis=0)
    kernels.call("linear8_wgrad", wire.F64, [dw, db, dy8.T.copy(), dys, x8.T.copy(), xs, given], (r, n, k, n))
    np.testing.assert_allclose(dw, want_w, rtol=1e-12)
    np.testing.assert_allclose(db, want_b, rtol=1e-12)


@FORMATS
def test_products_read_every_code(kernels: KernelLib, e5m2: int) -> None:
    """Each code times 1: fwd's first operand is E4M3, igrad's E5M2; scales of either sign of exponent."""
    codes, one = np.arange(256, dtype=np.uint8).reshape(256, 1), np.array([[ONE[0]]], np.uint8)
    left, right = np.array([2.0**-7], np.float32), np.array([2.0**3], np.float32)
    want = (numbers(e5m2) * 2.0**-4).astype(np.float32)
    for lib, name in all_sets(kernels):
        y = np.zeros((256, 1), np.float32)
        if e5m2:
            lib.call("linear8_igrad", wire.F32, [y, codes, left, one, right], (256, 1, 1, 1, 0), set_name=name)
        else:
            operands = [y, codes, left, one, right, None, None]
            lib.call("linear8_fwd", wire.F32, operands, (256, 1, 1, 1, 0), set_name=name)
        np.testing.assert_array_equal(y[:, 0], want)
