"""The engine's kernels as a shared library, for tests: built here from the engine's sources (``compiled.py``), called
through ctypes.

``HOTSTAGE_TEST_CC`` picks the compiler (tests/support/compilers.py; ``cc`` where absent); ``HOTSTAGE_TEST_SETS=ref``
leaves the fast sets out.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tests.engine.compiled import ENGINE, Unit, linked
from tests.support.compilers import find
from trainer import wire

Array = NDArray[Any]

HERE = Path(__file__).resolve().parent
FLAGS = shlex.split(
    "-std=c11 -D_GNU_SOURCE -O2 -g1 -fPIC -pthread -ffp-contract=off -Wall -Wextra -Wshadow -Wstrict-prototypes "
    "-Wmissing-prototypes -Wvla -Wundef -Wformat=2 -Werror"
)
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mavx2"]
CPU_PATHS: dict[str, list[str]] = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
}
"""By kernel path, slower ones first: what it is compiled with."""
SETS = ("ref", *CPU_PATHS)
ROOMS = ("core", "kernels", "wire")
DTYPES = {"f32": wire.F32, "bf16": wire.BF16, "f64": wire.F64}
NUMPY = {wire.F32: np.float32, wire.BF16: np.uint16, wire.F64: np.float64, wire.I32: np.int32}


ARM64_PATHS: dict[str, list[str]] = {"portable": [], "neon": []}


def cpu_has(path: str) -> bool:
    """Whether this CPU runs what is compiled for a kernel path."""
    needs = {flag.removeprefix("-m").replace("avx512bf16", "avx512_bf16") for flag in CPU_PATHS[path]}
    flags = Path("/proc/cpuinfo")
    return not needs or (flags.exists() and needs <= set(flags.read_text().split()))


def fastest_path() -> str:
    """The kernel path that the engine takes here."""
    return [path for path in CPU_PATHS if cpu_has(path)][-1]


def flags_of(strict: bool) -> list[str]:
    """``strict``: a compiler's warning fails the build."""
    return [flag for flag in FLAGS if strict or flag != "-Werror"]


def _units(machine: str, *, strict: bool = True) -> list[Unit]:
    """Everything in the library."""
    cpu = ENGINE / "kernels" / "cpu" / "all.c"
    fast = os.environ.get("HOTSTAGE_TEST_SETS") != "ref"
    flags = flags_of(strict)
    core = [ENGINE / "core" / f"{name}.c" for name in ("arena", "status", "text", "math", "hash", "crc32", "threads")]
    core += [ENGINE / "kernels" / f"{name}.c" for name in ("deferred", "extent")]
    core += sorted((ENGINE / "kernels" / "ref").glob("*.c"))
    units: list[Unit] = [(source, flags, []) for source in core]
    check = ENGINE / "backend" / "check.c"
    units.append((HERE / "kernel_lib.c", [*flags, *(["-DHS_TEST_CPU"] if fast else [])], [check.with_suffix(".h")]))
    units.append((check, flags, [check.with_suffix(".h")]))
    if fast:
        parts = sorted(cpu.parent.glob("*.c"))
        paths = {"x86_64": CPU_PATHS, "aarch64": ARM64_PATHS}.get(machine, {"portable": []})
        units += [(cpu, [*flags, f"-DHS_PATH={name}", *own], parts) for name, own in paths.items()]
        units += [(ENGINE / "kernels" / "pick.c", flags, [])]
    return units


def build(*, strict: bool = True) -> Path:
    """The library, for this machine. ``strict``: not on a box whose compiler is another one than ours, and may warn of
    what ours does not."""
    cc = find(os.environ.get("HOTSTAGE_TEST_CC") or ("cc" if shutil.which("cc") else "gcc"))
    return linked("kernels", [cc], _units(platform.machine(), strict=strict), [cc, "-shared"], ROOMS)


def build_server(cross_compiler: str) -> Path:
    """A static program for arm64 that calls the kernels (programs/kernel_serve.c)."""
    units = [*_units("aarch64"), (HERE / "programs" / "kernel_serve.c", FLAGS, [])]
    return linked("kernel-serve", [cross_compiler], units, [cross_compiler, "-static"], ROOMS, "")


def to_bf16(x: Array) -> Array:
    """float -> bf16 bits as uint16, nearest, ties to even (through float32)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    nan = np.uint16(0x7FC0)
    return np.where(np.isnan(np.asarray(x, np.float32)), nan, rounded)


def encode(x: Array, dtype: int) -> Array:
    """Numbers to the array that a kernel of this dtype reads."""
    return to_bf16(x) if dtype == wire.BF16 else np.ascontiguousarray(x, NUMPY[dtype])


def decode(x: Array, dtype: int) -> Array:
    """The float64 values of an array of this dtype."""
    if dtype == wire.BF16:
        return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return x.astype(np.float64)


def acc_of(dtype: int) -> int:
    return wire.F64 if dtype == wire.F64 else wire.F32


def marshalled(
    kernel: str, ptrs: Sequence[Array | None], dims: Sequence[int], reals: Sequence[float]
) -> tuple[int, Any, Any, Any, Any]:
    """A call's number, operands, their bytes, dims and reals, as C takes them. Optional operands and a window that are
    the last may be left out: absent, and 0."""
    spec = wire.KERNELS[kernel]
    assert all(operand.note == "optional" for operand in spec.operands[len(ptrs) :]), kernel
    assert spec.dim_names.split()[len(dims) :] in ([], ["WINDOW"]), kernel
    assert len(ptrs) <= spec.ptrs, kernel
    assert len(reals) == spec.reals, kernel
    pointers = (ctypes.c_void_p * wire.CALL_PTRS)()
    sizes = (ctypes.c_uint64 * wire.CALL_PTRS)()
    for i, array in enumerate(ptrs):
        if array is not None:
            assert array.flags.c_contiguous, (kernel, i)
            pointers[i], sizes[i] = array.ctypes.data, array.nbytes
    d = (ctypes.c_int64 * wire.CALL_DIMS)(*dims)
    return spec.number, pointers, sizes, d, (ctypes.c_double * wire.CALL_REALS)(*reals)


class Kernels(Protocol):
    """Kernels that can be called, wherever they run."""

    def call(
        self,
        kernel: str,
        dtype: int,
        ptrs: Sequence[Array | None],
        dims: Sequence[int],
        reals: Sequence[float] = (),
        *,
        set_name: str = "ref",
        threads: int = 1,
        guard: str | None = None,
    ) -> None:
        """One call. ``guard``: None, "before" or "after": where the page lies that nobody may touch."""


class KernelLib:
    """The loaded library. Arrays go in as they are (C-contiguous) and are written in place."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.hs_crc32c.restype = self.c.hs_crc32c_portable.restype = ctypes.c_uint32
        self.c.hs_crc32_by.restype = ctypes.c_bool
        self.c.hs_test_pick.restype = ctypes.c_char_p
        self.sets = tuple(name for name in SETS if self.c.hs_test_has_set(name.encode()))

    def call(
        self,
        kernel: str,
        dtype: int,
        ptrs: Sequence[Array | None],
        dims: Sequence[int],
        reals: Sequence[float] = (),
        *,
        set_name: str = "ref",
        threads: int = 1,
        guard: str | None = None,
    ) -> None:
        """One call. ``guard``: None, "before" or "after": where the page lies that nobody may touch."""
        number, pointers, sizes, d, r = marshalled(kernel, ptrs, dims, reals)
        name = set_name.encode()
        if guard is None:
            rc = self.c.hs_kernel_call(name, number, dtype, pointers, d, r, threads)
        else:
            rc = self.c.hs_kernel_call_guarded(
                name, number, dtype, pointers, sizes, d, r, threads, int(guard == "after")
            )
        assert rc == 0, f"{kernel} of {set_name}: status {rc} (1000 + n: signal n), dims {list(dims)}"

    def deferred(
        self,
        calls: Sequence[tuple[str, int, Sequence[Array | None], Sequence[int], Sequence[float]]],
        watched: Array,
        *,
        set_name: str,
        threads: int,
    ) -> list[Array]:
        """Calls (kernel, dtype, operands, dims, reals) one after the other, where AdamW may wait; ``watched`` as it is
        after each, and when nothing waits any more."""
        made = [marshalled(kernel, ptrs, dims, reals) for kernel, _, ptrs, dims, reals in calls]
        seen = np.zeros((len(calls) + 1, *watched.shape), watched.dtype)

        def joined(kind: Any, column: int) -> Any:
            values = [value for call in made for value in call[column]]
            return (kind * len(values))(*values)

        count = len(calls)
        rc = self.c.hs_kernel_calls_deferred(
            set_name.encode(), count, (ctypes.c_uint32 * count)(*(call[0] for call in made)),
            (ctypes.c_uint32 * count)(*(dtype for _, dtype, *_ in calls)), joined(ctypes.c_void_p, 1),
            joined(ctypes.c_int64, 3), joined(ctypes.c_double, 4), threads, ctypes.c_void_p(watched.ctypes.data),
            ctypes.c_size_t(watched.nbytes), ctypes.c_void_p(seen.ctypes.data),
        )  # fmt: skip
        assert rc == 0, f"status {rc} of {[call[0] for call in calls]} by {set_name}"
        return list(seen)

    def extent(self, kernel: str | int, dtype: int, dims: Sequence[int], operand: int) -> int:
        """Bytes of an operand, or the negative status."""
        number = kernel if isinstance(kernel, int) else wire.KERNELS[kernel].number
        out = ctypes.c_uint64()
        d = (ctypes.c_int64 * wire.CALL_DIMS)(*dims)
        rc = int(self.c.hs_kernel_extent(number, dtype, d, operand, ctypes.byref(out)))
        return out.value if rc == 0 else rc

    def map(self, function: str, x: Array, y: Array | None = None) -> Array:
        """One of the functions of core/math.h over an array."""
        x = np.ascontiguousarray(x, np.float64)
        y = x if y is None else np.ascontiguousarray(np.broadcast_to(y, x.shape), np.float64)
        out = np.empty_like(x)
        rc = self.c.hs_test_map(
            function.encode(), *(ctypes.c_void_p(a.ctypes.data) for a in (x, y, out)), ctypes.c_int64(x.size)
        )
        assert rc == 0, function
        return out

    def philox(self, counter: Sequence[int], key: Sequence[int]) -> list[int]:
        out = (ctypes.c_uint32 * 4)()
        self.c.hs_test_philox((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
        return list(out)

    def normals(self, seed: int, tensor: int, use: int, first: int, n: int) -> Array:
        out = np.empty(n)
        self.c.hs_test_normals(
            ctypes.c_uint64(seed), ctypes.c_uint32(tensor), ctypes.c_uint32(use),
            ctypes.c_uint64(first), ctypes.c_int64(n), ctypes.c_void_p(out.ctypes.data),
        )  # fmt: skip
        return out

    def operands(
        self, kernel: str, dtype: int, dims: Sequence[int], rng: np.random.Generator, absent: Sequence[int] = ()
    ) -> list[Array | None]:
        """Random operands of exactly the bytes that the extents say; tokens and targets end with V - 1, places are
        where documents begin."""
        out: list[Array | None] = []
        spec = wire.KERNELS[kernel]
        for i, operand in enumerate(spec.operands):
            if i in absent:
                out.append(None)
                continue
            size = self.extent(kernel, dtype, dims, i)
            assert size > 0, (kernel, dims, i, size)
            kind = {"dt": dtype, "acc": acc_of(dtype), "f64": wire.F64}.get(operand.kind, 0)
            array: Array
            if kind:
                array = encode(rng.normal(size=size // wire.DTYPE_BYTES[kind]), kind)
                if (kernel.startswith("adamw") and operand.name == "v") or operand.name == "sumsq":
                    array = np.abs(array)  # of squares
            elif operand.kind in ("tokens", "targets"):
                vocabulary = dims[spec.dim_names.split().index(operand.note.removeprefix("below "))]
                array = rng.integers(0, vocabulary, size // 4).astype(np.int32)
                array[-1] = vocabulary - 1
            elif operand.kind == "places" and operand.role == "scratch":
                array = rng.integers(-(2**31), 2**31, size // 4).astype(np.int32)
            elif operand.kind == "places":
                array = places(rng, size // 4, sequence_of(kernel, dims))
            elif operand.kind == "control":
                array = np.frombuffer(bytes(control()), np.uint8).copy()
            else:
                array = rng.integers(0, 256, size).astype(np.uint8)
            assert array.nbytes == size
            out.append(array)
        return out


def sequence_of(kernel: str, dims: Sequence[int]) -> int:
    """The T of a call."""
    return dims[wire.KERNELS[kernel].dim_names.split().index("T")]


def places(rng: np.random.Generator, rows: int, sequence: int, borders: int = 4) -> Array:
    """What `borders` makes of sequences with a few documents each: by row, where its document begins."""
    starts = np.zeros((rows // sequence, sequence), np.int32)
    for row in starts:
        for start in np.sort(rng.integers(0, sequence, borders)):
            row[start:] = start
    return starts.reshape(-1)


def control(
    clip_scale: float = 0.5, step_size: float = 0.01, v_scale: float = 2.0, lr_decay: float = 0.003
) -> wire.StepControl:
    """A control block for ADAMW."""
    return wire.StepControl(
        step=1, lr=lr_decay, clip_scale=clip_scale, step_size=step_size, v_scale=v_scale, lr_decay=lr_decay
    )
