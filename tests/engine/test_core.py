"""core/: elementary functions, random numbers, digests, against independent implementations."""

from __future__ import annotations

import ctypes
import hashlib
import hmac
import math
import os
import platform
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from tests.engine.kernel_lib import Array, KernelLib

N = 40_000
WIDE = np.longdouble  # 64-bit mantissa on x86-64: the true value for these bounds
needs_wide = pytest.mark.skipif(np.finfo(WIDE).nmant < 63, reason="needs an 80-bit long double to know the true value")


def worst_ulp(got: Array, true: Array) -> float:
    """Largest error in units in the last place of the true value's double."""
    with np.errstate(over="ignore"):
        unit = np.spacing(np.abs(true.astype(np.float64)))
    return float(np.max(np.abs((got.astype(WIDE) - true) / unit.astype(WIDE))))


def uniform(low: float, high: float) -> Array:
    return np.random.default_rng(1).uniform(low, high, N)


@needs_wide
@pytest.mark.parametrize(
    ("function", "x", "bound"),
    [
        ("exp", uniform(-1, 1), 1),
        ("exp", uniform(-708, 709.7), 1),
        ("exp", uniform(-745, -708), 1),  # into the subnormals
        ("exp", uniform(-1e-9, 1e-9), 1),
        ("log", uniform(0.3, 3), 1),
        ("log", 1 + uniform(-1e-6, 1e-6), 1),
        ("log", np.exp(uniform(-744, 709)), 1),
        ("tanh", uniform(-3, 3), 3),
        ("tanh", uniform(-25, 25), 3),
        ("tanh", uniform(-1e-3, 1e-3), 3),
        ("sin", uniform(-8, 8), 1),
        ("cos", uniform(-8, 8), 1),
        ("sin", uniform(-1e9, 1e9), 1),
        ("cos", uniform(-1e9, 1e9), 1),
        ("sin", np.arange(N) * (np.pi / 2), 1),  # next to the zeros
        ("cos", np.arange(N) * (np.pi / 2), 1),
    ],
)
def test_elementary_functions(kernels: KernelLib, function: str, x: Array, bound: float) -> None:
    assert worst_ulp(kernels.map(function, x), getattr(np, function)(x.astype(WIDE))) < bound


@needs_wide
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (np.array(0.999), np.arange(N)),  # bias corrections of the optimizer
        (np.array(10000.0), uniform(0, 1)),  # rope
        (np.array(500000.0), uniform(0, 1)),
        (uniform(0, 10), uniform(-50, 50)),
        (np.exp(uniform(-300, 300)), uniform(-2, 2)[::-1]),
        (1 + uniform(-1e-9, 1e-9), np.full(N, 1e9)),
    ],
)
def test_pow(kernels: KernelLib, x: Array, y: Array) -> None:
    x, y = np.broadcast_arrays(x.astype(float), y.astype(float))
    assert worst_ulp(kernels.map("pow", x, y), np.power(x.astype(WIDE), y.astype(WIDE))) < 1


def test_special_values(kernels: KernelLib) -> None:
    inf, nan = math.inf, math.nan
    expected: dict[str, list[tuple[float, ...]]] = {
        "exp": [(0, 1), (-0.0, 1), (inf, inf), (-inf, 0), (nan, nan), (710, inf), (-746, 0), (-745.1, 5e-324)],
        "log": [(1, 0), (0, -inf), (-0.0, -inf), (-1, nan), (inf, inf), (nan, nan), (5e-324, math.log(5e-324))],
        "tanh": [(0, 0), (inf, 1), (-inf, -1), (nan, nan), (30, 1), (-30, -1), (1e-300, 1e-300)],
        "sin": [(0, 0), (inf, nan), (nan, nan), (2.0**30, nan), (1e-300, 1e-300)],
        "cos": [(0, 1), (-inf, nan), (nan, nan), (-(2.0**30), nan), (1e-300, 1)],
        "pow": [
            (2, 10, 1024), (0, 0, 1), (0, 2, 0), (0, -1, inf), (inf, 1, inf), (inf, -1, 0), (nan, 0, 1), (1, nan, 1),
            (2, nan, nan), (-1, 2, nan), (2, 1024, inf), (2, -1080, 0), (2, inf, inf), (0.5, inf, 0), (2, -inf, 0),
            (4, 0.5, 2), (10, 3, 1000), (2, -1074, 5e-324),
        ],
    }  # fmt: skip
    for function, rows in expected.items():
        for row in rows:
            got = kernels.map(function, np.array([row[0]]), np.array([row[-2]]))[0]
            want = row[-1]
            assert got == want or (math.isnan(got) and math.isnan(want)), (function, row, got)
    assert math.copysign(1, kernels.map("sin", np.array([-0.0]))[0]) == -1
    assert math.copysign(1, kernels.map("tanh", np.array([-0.0]))[0]) == -1


# Known answers of Random123 (kat_vectors, philox4x32 with 10 rounds).
PHILOX = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox_known_answers(kernels: KernelLib, counter: list[int], key: list[int], words: list[int]) -> None:
    assert kernels.philox(counter, key) == words


def test_normals_follow_the_documented_layout(kernels: KernelLib) -> None:
    """rng.h word by word: which key, which counter, which half of Box-Muller."""
    seed, tensor, use = 0x0123456789ABCDEF, 7, 1
    key = [(seed & 0xFFFFFFFF) ^ (tensor * 0x9E3779B9 & 0xFFFFFFFF), (seed >> 32) ^ use]
    for element in (0, 1, 2, 3, 4, 41, 2**33 + 2, 2**34 - 1, 2**40 + 1):
        quad, place = divmod(element, 4)
        words = kernels.philox([quad & 0xFFFFFFFF, quad >> 32, 0, 0], key)
        a, b = words[place // 2 * 2], words[place // 2 * 2 + 1]
        radius = math.sqrt(-2 * math.log((a + 1) / 2**32))
        angle = 2 * math.pi * b / 2**32
        want = radius * (math.sin(angle) if place % 2 else math.cos(angle))
        got = kernels.normals(seed, tensor, use, element, 1)[0]
        assert got == pytest.approx(want, rel=1e-12, abs=1e-14)


def test_normals_are_normal_and_apart(kernels: KernelLib) -> None:
    n = 200_000
    x = kernels.normals(1, 2, 1, 0, n)
    sigma = 1 / math.sqrt(n)
    assert abs(x.mean()) < 5 * sigma
    assert abs(x.std() - 1) < 5 * sigma
    assert abs((x**3).mean()) < 5 * math.sqrt(15) * sigma
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96) * sigma
    for lag in (1, 2, 3, 4):
        assert abs((x[lag:] * x[:-lag]).mean()) < 5 * sigma
    for other in (kernels.normals(2, 2, 1, 0, n), kernels.normals(1, 3, 1, 0, n), kernels.normals(1, 2, 2, 0, n)):
        assert abs((x * other).mean()) < 5 * sigma
    assert np.array_equal(kernels.normals(1, 2, 1, 1001, 50), x[1001:1051])


# --- digests ----------------------------------------------------------------------------------------------


class Sha256(ctypes.Structure):
    _fields_ = (
        ("state", ctypes.c_uint32 * 8),
        ("bytes", ctypes.c_uint64),
        ("block", ctypes.c_uint8 * 64),
        ("by_instructions", ctypes.c_bool),
    )


class Hmac(ctypes.Structure):
    _fields_ = (("inner", Sha256), ("outer", Sha256))


def payload(n: int) -> bytes:
    return np.random.default_rng(n).bytes(n)


@pytest.mark.parametrize("init", ["hs_sha256_init", "hs_sha256_init_portable"])
def test_sha256_in_pieces(kernels: KernelLib, init: str) -> None:
    rng = np.random.default_rng(3)
    for n in [*range(200), 1000, 4096, 100_003]:
        data, sha, digest = payload(n), Sha256(), ctypes.create_string_buffer(32)
        getattr(kernels.c, init)(ctypes.byref(sha))
        at = 0
        while at < n:
            take = int(rng.integers(0, max(2, min(n, 300))))
            piece = data[at : at + take]
            kernels.c.hs_sha256_update(ctypes.byref(sha), piece, ctypes.c_size_t(len(piece)))
            at += take
        kernels.c.hs_sha256_final(ctypes.byref(sha), digest)
        assert digest.raw == hashlib.sha256(data).digest(), n


def test_sha256_known_answers(kernels: KernelLib) -> None:
    digest = ctypes.create_string_buffer(32)
    for data, want in [
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ]:
        kernels.c.hs_sha256_of(data, ctypes.c_size_t(len(data)), digest)
        assert digest.raw.hex() == want


def test_hmac(kernels: KernelLib) -> None:
    digest = ctypes.create_string_buffer(32)
    for key_bytes in (0, 1, 32, 63, 64, 65, 200):
        for n in (0, 1, 55, 56, 64, 1000):
            key, data, mac = payload(key_bytes), payload(n), Hmac()
            want = hmac.digest(key, data, "sha256")
            kernels.c.hs_hmac_of(key, ctypes.c_size_t(key_bytes), data, ctypes.c_size_t(n), digest)
            assert digest.raw == want
            kernels.c.hs_hmac_init(ctypes.byref(mac), key, ctypes.c_size_t(key_bytes))
            for piece in (data[: n // 3], data[n // 3 :]):
                kernels.c.hs_hmac_update(ctypes.byref(mac), piece, ctypes.c_size_t(len(piece)))
            kernels.c.hs_hmac_final(ctypes.byref(mac), digest)
            assert digest.raw == want
            assert bytes(mac) == bytes(ctypes.sizeof(mac)), "the key is still in memory"


def test_bytes_equal(kernels: KernelLib) -> None:
    kernels.c.hs_bytes_equal.restype = ctypes.c_bool
    a = payload(32)
    assert kernels.c.hs_bytes_equal(a, bytes(a), ctypes.c_size_t(32))
    for i in range(32):
        b = bytearray(a)
        b[i] ^= 1 << (i % 8)
        assert not kernels.c.hs_bytes_equal(a, bytes(b), ctypes.c_size_t(32))
    assert kernels.c.hs_bytes_equal(a, b"", ctypes.c_size_t(0))


# The check value of the CRC catalogues, and RFC 3720 appendix B.4.
CRC32C = [
    (b"123456789", 0xE3069283),
    (b"", 0),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(reversed(range(32))), 0x113FDB5C),
]


@pytest.mark.parametrize("way", [0, 1, 2])
def test_crc32_is_that_of_zlib_by_every_way_and_copies_what_it_sums(kernels: KernelLib, way: int) -> None:
    def crc(data: bytes, to: int | None, before: int) -> int | None:
        found, size = ctypes.c_uint32(before), ctypes.c_size_t(len(data))
        done = kernels.c.hs_crc32_by(way, ctypes.byref(found), ctypes.c_void_p(to), data, size)
        return found.value if done else None

    if crc(b"123456789", None, 0) is None:
        pytest.skip("this machine has not these instructions")
    assert crc(b"123456789", None, 0) == 0xCBF43926
    room = ctypes.create_string_buffer(9000)
    base = -ctypes.addressof(room) % 64
    for n in (0, 1, 3, 8, 15, 63, 64, 65, 127, 255, 256, 257, 511, 512, 1000, 4096, 8191):
        data = payload(n)
        assert crc(data, None, 0x1234567) == zlib.crc32(data, 0x1234567), n
        for shift in (0, 1, 16, 63):  # borders that the stores do not have
            ctypes.memset(room, 0xAB, len(room))
            assert crc(data, ctypes.addressof(room) + base + shift, 7) == zlib.crc32(data, 7), (n, shift)
            assert room.raw[base + shift : base + shift + n] == data
            assert set(room.raw[: base + shift] + room.raw[base + shift + n :]) <= {0xAB}


@pytest.mark.parametrize("way", [1, 2])
def test_crc32_leaves_no_wide_register_in_use(kernels: KernelLib, way: int) -> None:
    """SSE instructions wait for upper halves that are in use: SHA-256 took 2.5 times as long after a CRC-32."""
    wide = kernels.c.hs_test_wide_after_crc32(way, payload(4096), ctypes.c_size_t(4096))
    if wide < 0:
        pytest.skip("this machine has not these instructions, or does not tell")
    assert wide == 0


@pytest.mark.parametrize("function", ["hs_crc32c", "hs_crc32c_portable"])
def test_crc32c(kernels: KernelLib, function: str) -> None:
    crc = getattr(kernels.c, function)
    for data, want in CRC32C:
        assert crc(0, data, ctypes.c_size_t(len(data))) == want
    for n in (1, 7, 8, 9, 63, 1000, 12_287, 12_288, 40_005):
        data = payload(n)
        whole = crc(0, data, ctypes.c_size_t(n))
        assert whole == kernels.c.hs_crc32c_portable(0, data, ctypes.c_size_t(n))
        for cut in range(0, n, max(1, n // 5)):
            first = crc(0, data[:cut], ctypes.c_size_t(cut))
            assert crc(first, data[cut:], ctypes.c_size_t(n - cut)) == whole


# --- core/arena.h -----------------------------------------------------------------------------------------


class CArena(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("map", ctypes.c_void_p),
        ("map_bytes", ctypes.c_size_t),
    )


HUGE = 2 << 20
needs_collapse = pytest.mark.skipif(
    tuple(int(n) for n in platform.release().split(".")[:2]) < (6, 1), reason="huge pages for a memfd: Linux 6.1"
)


@contextmanager
def opened(kernels: KernelLib, fd: int, size: int) -> Iterator[Array]:
    """The bytes of the arena whose pages the memfd keeps, as a process sees them."""
    arena, why = CArena(), ctypes.create_string_buffer(4096)
    status = kernels.c.hs_arena_open(fd, ctypes.c_size_t(size), None, ctypes.byref(arena), why)
    assert status == 0, why.value
    try:
        assert arena.bytes == size
        assert arena.base % (HUGE if size >= HUGE else 4096) == 0
        yield np.ctypeslib.as_array(ctypes.cast(arena.base, ctypes.POINTER(ctypes.c_uint8)), (size,))
    finally:
        kernels.c.hs_arena_destroy(ctypes.byref(arena))


@pytest.mark.parametrize(
    "size",
    [64, 4096 * 3 + 64, *(pytest.param(n, marks=needs_collapse) for n in (HUGE, 3 * HUGE + 64))],
)
def test_a_kept_arena_is_zero_every_time(kernels: KernelLib, size: int) -> None:
    fd = os.memfd_create("arena")
    try:
        with opened(kernels, fd, size) as seen:
            assert not seen.any()
            seen[:] = 0xA5
        for other in (size, size + HUGE, size):  # the next attempt's, and that of another plan
            with opened(kernels, fd, other) as seen:
                assert not seen.any()
                seen[:] = 0xA5
    finally:
        os.close(fd)


@needs_collapse
def test_a_kept_arena_lies_in_huge_pages(kernels: KernelLib) -> None:
    def mapped() -> int:
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("ShmemPmdMapped"))

    fd, before = os.memfd_create("arena"), mapped()
    try:
        with opened(kernels, fd, 4 * HUGE):
            assert mapped() - before == 4 * HUGE // 1024
        assert os.fstat(fd).st_blocks * 512 == 4 * HUGE  # the pages outlive the process
    finally:
        os.close(fd)
