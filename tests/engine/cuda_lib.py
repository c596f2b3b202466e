"""The CUDA backend and its kernels, compiled for the CPU with their emulator (trainer/engine/kernels/cuda/emulate.h and
emulate_runtime.h), for tests: a library that an ordinary engine opens where ``HOTSTAGE_CUDA`` names it.

Built like the other kernels' library (compiled.py) and kept beside it; no CUDA and no GPU is needed. The compiler is
the tests' clang (tests/support/compilers.py), or g++ with ``HOTSTAGE_TEST_CC=cc``; the system's C compiler links, so
that its address sanitizer serves both.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tests.engine.compiled import ENGINE, ROOT, Unit, linked
from tests.engine.kernel_lib import HERE, ROOMS, Array, cpu_has, marshalled
from tests.support.compilers import OTHER, find
from trainer import wire

CUDA = ENGINE / "kernels" / "cuda"
BACKEND = ENGINE / "backend" / "cuda"
COMMON = shlex.split("-O1 -g1 -fPIC -ffp-contract=off -Wall -Wextra -Wshadow -Wno-unknown-pragmas -Werror")
CXX = shlex.split(
    "-x c++ -std=c++17 -fno-exceptions -fno-rtti -fno-threadsafe-statics -DHS_CUDA_EMULATED -D_GNU_SOURCE"
)
C = shlex.split("-x c -std=c11 -D_GNU_SOURCE -Wno-psabi")
# the tests' own functions take their places (emulated_backend.cc)
BEHIND = shlex.split("-Dhs_cuda_backend=hs_cuda_backend_inside -Dhs_cuda_kernels=hs_emulated_kernels")
CPU = ENGINE / "kernels" / "cpu" / "all.c"  # the portable set, which may stand in for the kernels
SYNC, WAIT = -1, -2  # ops of __syncthreads and of waits for copies among the emulator's sites; others are a warp's


def compiler() -> list[str]:
    """The C++ compiler of the tests: clang, which the tests install, or the system's g++ where that is asked for."""
    if os.environ.get("HOTSTAGE_TEST_CC") == "cc" and shutil.which("g++"):
        return ["g++"]
    return [find(OTHER)]  # clang's driver takes -x c++


def build(sanitize: str = "") -> Path:
    """The library, with a sanitizer of the compiler's where one is named."""
    cxx = compiler()
    extra = [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else []
    # else fmaf, which is most of what the kernels do, is a call of the C library's, which gives the instruction's bits
    fma = ["-mfma"] if cpu_has("avx2") else []
    sources = [p for room in (BACKEND, CUDA) for p in sorted(room.iterdir()) if p.suffix in (".cu", ".cc")]
    sources += [HERE / "cuda_lib.cc", HERE / "emulated_backend.cc"]
    sources += [ENGINE / "core" / f"{name}.c" for name in ("hash", "math", "status", "threads")]
    sources += [ENGINE / "kernels" / f"{name}.c" for name in ("deferred", "extent")]
    # not what the sanitizer is for, and a large file
    units: list[Unit] = [(CPU, [*COMMON, "-O2", *C, "-DHS_PATH=portable"], sorted(CPU.parent.glob("*.c")))]
    for source in sources:
        flags = [*COMMON, *extra, *fma, *(C if source.suffix == ".c" else CXX)]
        units.append((source, flags + (BEHIND if source.parent == BACKEND else []), []))
    return linked("cuda", cxx, units, [find("cc"), *extra, "-shared"], ("backend", *ROOMS))


class Refused(AssertionError):
    """A status of the library's, and what it said."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"status {status}: {words}")
        self.status, self.words = status, words


class CudaLib:
    """The table of libhs_cuda.so, on the CPU. ``call`` is KernelLib's, so that a Call runs on either."""

    def __init__(self, library: Path) -> None:
        self.c = ctypes.CDLL(str(library))
        self.c.hs_emulated_text.restype = ctypes.c_char_p
        self.c.hs_emulated_conflicts.restype = ctypes.c_uint64
        self.c.hs_emulated_products.restype = ctypes.c_uint64
        self.seed(1)

    def seed(self, seed: int) -> None:
        self.c.hs_emulated_seed(ctypes.c_uint64(seed))

    def text(self) -> str:
        """What the emulator said of the last fault."""
        return str(self.c.hs_emulated_text().decode())

    def call(
        self,
        kernel: str,
        dtype: int,
        ptrs: Sequence[Array | None],
        dims: Sequence[int],
        reals: Sequence[float] = (),
        *,
        set_name: str = "cuda",
        threads: int = 1,
        guard: str | None = None,
    ) -> None:
        assert (threads, guard) == (1, None)
        assert set_name in ("cuda", "library", "flash")  # kernel path cuda-exact; cuda; cuda with no library at hand
        if set_name == "library":
            nothing = [None if x is None else np.zeros_like(x) for x in ptrs]
            self.products(kernel, dtype, ptrs, dims, reals, self.chosen(kernel, dtype, nothing, dims, reals))
            return
        number, pointers, _, d, r = marshalled(kernel, ptrs, dims, reals)
        path = wire.PATHS["cuda" if set_name == "flash" else "cuda-exact"]
        rc = self.c.hs_test_cuda(path, number, dtype, pointers, d, r)
        assert rc == 0, f"{kernel}: status {rc}, dims {list(dims)}: {self.text()}"

    def chosen(
        self,
        kernel: str,
        dtype: int,
        ptrs: Sequence[Array | None],
        dims: Sequence[int],
        reals: Sequence[float] = (),
        known: Sequence[wire.Algorithm] = (),
    ) -> list[wire.Algorithm]:
        """What would compute the call's products under path cuda, beside what is known: by the emulated cuBLASLt."""
        return self._products(False, kernel, dtype, ptrs, dims, reals, known)

    def products(
        self,
        kernel: str,
        dtype: int,
        ptrs: Sequence[Array | None],
        dims: Sequence[int],
        reals: Sequence[float],
        known: Sequence[wire.Algorithm],
    ) -> None:
        """The call under path cuda, by these algorithms."""
        self._products(True, kernel, dtype, ptrs, dims, reals, known)

    def _products(
        self,
        run: bool,
        kernel: str,
        dtype: int,
        ptrs: Sequence[Array | None],
        dims: Sequence[int],
        reals: Sequence[float],
        known: Sequence[wire.Algorithm],
    ) -> list[wire.Algorithm]:
        number, pointers, _, d, r = marshalled(kernel, ptrs, dims, reals)
        table, count = (wire.Algorithm * wire.ALGORITHMS_MAX)(*known), ctypes.c_uint32(len(known))
        why = ctypes.create_string_buffer(1024)
        rc = self.c.hs_test_products(number, dtype, pointers, d, r, table, ctypes.byref(count), int(run), why)
        if rc != 0:
            raise Refused(rc, why.value.decode() or self.text())
        return list(table[: count.value])

    def sites(self) -> list[tuple[str, int, int]]:
        """(file, line, op) of the barriers and warp operations that were passed so far."""
        found, file, line, op = [], ctypes.c_char_p(), ctypes.c_int(), ctypes.c_int()
        while self.c.hs_emulated_site(len(found), ctypes.byref(file), ctypes.byref(line), ctypes.byref(op)):
            assert file.value is not None
            found.append((file.value.decode(), line.value, op.value))
        return found

    @contextmanager
    def without(self, file: str, line: int, lanes: int = 0xFFFFFFFF) -> Iterator[None]:
        """These lanes of every warp walk past the call at that place."""
        self.c.hs_emulated_skip(file.encode(), line, ctypes.c_uint32(lanes))
        try:
            yield
        finally:
            self.c.hs_emulated_skip(b"", 0, ctypes.c_uint32(0))


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m tests.engine.cuda_asan`` over a library with the address sanitizer."""
    library = build("address")
    runtime = subprocess.run(
        [find("cc"), "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "PYTHONMALLOC": "malloc",  # else small arrays share the interpreter's own blocks, which have no red zones
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:allocator_may_return_null=1",
    }
    command = [sys.executable, "-m", "tests.engine.cuda_asan", str(library), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
