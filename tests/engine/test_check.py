"""backend/check.h: what a rank asks of its machine before the first step."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from typing import NamedTuple

import numpy as np
import pytest

from tests.engine.compiled import ENGINE
from tests.engine.kernel_lib import Array, KernelLib
from trainer import wire

SICK = -17  # core/status.h
ROWS, OUT, INNER = 96, 128, 512
UNIT = 2 << 20


class Checked(NamedTuple):
    status: int
    text: str
    gflops: float


def check(
    kernels: KernelLib, memory: Array, *, set_name: str = "portable", threads: int = 1, wrong: int = 0
) -> Checked:
    gflops, text = ctypes.c_double(), ctypes.create_string_buffer(768)
    status = kernels.c.hs_test_check(
        set_name.encode(),
        threads,
        ctypes.c_void_p(memory.ctypes.data),
        ctypes.c_size_t(memory.nbytes),
        wrong,
        ctypes.byref(gflops),
        text,
    )
    return Checked(status, text.value.decode(), gflops.value)


def sheet(name: str) -> int:
    source = "".join((ENGINE / "backend" / file).read_text() for file in ("check.c", "cuda/check.cu"))
    found = re.search(rf"{name} = (0x[0-9a-f]{{8}})", source)
    assert found, name
    return int(found.group(1), 16)


def stream(kernels: KernelLib, count: int, number: int) -> Array:
    """The inputs, from core/rng.h's documentation."""
    key = (1 ^ (number * 0x9E3779B9 & 0xFFFFFFFF), 0)
    words = [kernels.philox((quad, 0, 0, 0), key) for quad in range(count // 4)]
    return ((np.array(words, np.int64).reshape(-1) >> 8) - (1 << 23)).astype(np.float32) * np.float32(2**-24)


@pytest.mark.parametrize(
    ("name", "set_name", "rows", "out"),
    [
        ("SHEET_REF", "ref", ROWS, OUT),
        *[("SHEET_FAST", name, ROWS, OUT) for name in ("portable", "avx2", "avx512", "avx512_bf16")],
        ("SHEET_CUDA", "portable", 16, 64),
    ],
)
def test_the_sheet_is_the_product_of_every_set(
    kernels: KernelLib, name: str, set_name: str, rows: int, out: int
) -> None:
    """CUDA's is smaller, of the fast sets' bits."""
    if set_name not in kernels.sets:
        pytest.skip(f"this CPU lacks {set_name}")
    x = stream(kernels, rows * INNER, 1).reshape(rows, INNER)
    w = stream(kernels, out * INNER, 2).reshape(out, INNER)
    y = np.zeros((rows, out), np.float32)
    kernels.call("linear_fwd", wire.F32, [y, x, w, None, None], [rows, out, INNER, out, INNER, 0], set_name=set_name)
    np.testing.assert_allclose(y, x.astype(np.float64) @ w.astype(np.float64).T, rtol=0, atol=2e-5)
    crc = kernels.c.hs_crc32c(0, ctypes.c_void_p(y.ctypes.data), ctypes.c_size_t(y.nbytes))
    assert crc == sheet(name), f"{crc:#010x}"


@pytest.mark.parametrize("size", [0, 8, 4096 + 4, UNIT, 40 * UNIT + 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sound_machine_passes_and_its_memory_is_zero(kernels: KernelLib, size: int, threads: int) -> None:
    memory = np.zeros(size, np.uint8)
    for set_name in kernels.sets:
        told = check(kernels, memory, set_name=set_name, threads=threads)
        assert (told.status, told.text) == (0, "")
        assert told.gflops > 0
    assert not memory.any()


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_a_core_that_computes_one_bit_wrong_is_named(kernels: KernelLib, wrong: int) -> None:
    told = check(kernels, np.zeros(64, np.uint8), threads=3, wrong=wrong)
    assert told.status == SICK
    assert re.fullmatch(
        r"this machine computes wrong numbers: thread [0-2], on CPU \d+, has a product with checksum [0-9a-f]{8} "
        rf"instead of {sheet('SHEET_FAST'):08x} \(kernels portable\); take the machine out of service and test it",
        told.text,
    )


def test_memory_with_two_addresses_of_one_cell_is_named(kernels: KernelLib) -> None:
    """Real bad memory: two pages of the arena are one page of the machine."""
    page = mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (*[ctypes.c_void_p, ctypes.c_size_t], *[ctypes.c_int] * 3, ctypes.c_long)
    fd = os.memfd_create("bad")
    os.ftruncate(fd, 4 * page)
    with mmap.mmap(-1, 4 * page) as room:
        memory = np.frombuffer(room, np.uint8)
        base = memory.ctypes.data
        for at, of in ((0, 0), (1, 1), (2, 2), (3, 1)):
            shared = mmap.MAP_SHARED | 0x10  # MAP_FIXED
            where = libc.mmap(base + at * page, page, mmap.PROT_READ | mmap.PROT_WRITE, shared, fd, of * page)
            assert where == base + at * page
        told = check(kernels, memory)
        del memory
    os.close(fd)
    assert told.status == SICK
    assert told.text.startswith(f"this machine's memory does not hold: word {page // 8} of the arena reads ")
