"""A device through the CUDA library's table, for tests and figures (device_lib.c): one kernel at a time, with
everything around its operands watched; times of kernels and copies. The library is the real one or the emulated one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.kernel_lib import Array, marshalled
from trainer import wire
from trainer.wire.kernels import KERNELS

ALIGN = 256
PRODUCTS = 200  # of a library, before the device is opened again: it keeps HS_ALGORITHMS_MAX
GUARD, PATTERN = 256, 0xA5  # bytes around each operand, and what they hold
COPIES = {"to device": 1, "from device": 2, "on device": 3}


class DeviceError(AssertionError):
    """What the device, or its backend, said."""


@dataclass(frozen=True)
class Facts:
    """What the open device says of itself."""

    device: str
    kernels: str
    capability: int
    memory_bytes: int
    free_bytes: int
    scratch_bytes: int


class DeviceLib:
    """The open device; one a process. ``call`` is KernelLib's (tests/engine/kernel_lib.py), so that a Call runs here
    too."""

    def __init__(
        self, way: Path, library: Path, path: str, *, arena: int = 1 << 28, window: int = 1 << 16, index: int = 0
    ) -> None:
        self.c = ctypes.CDLL(str(way))
        for name in ("hs_gpu_text", "hs_gpu_device", "hs_gpu_kernels", "hs_gpu_plain"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.arena, self.window, self.library, self.path, self.index = arena, window, library, path, index
        self.lost = self.failed = False
        self.open()

    def open(self) -> None:
        """From its beginning; what was in the arena is gone."""
        sizes = [ctypes.c_size_t(n) for n in (self.arena, self.window)]
        self._done(self.c.hs_gpu_open(str(self.library).encode(), self.index, wire.PATHS[self.path], *sizes))

    def reopen(self) -> None:
        """After a failure, which stays with a device; ``lost`` where this process gets none any more."""
        self.close()
        self.failed = False
        try:
            self.open()
        except DeviceError:
            self.lost = True

    def _done(self, status: int, what: str = "") -> None:
        if status != 0:
            self.failed = True
            raise DeviceError(f"{what}{': ' if what else ''}{self.c.hs_gpu_text().decode()} (status {status})")

    def close(self) -> None:
        self.c.hs_gpu_close()

    def facts(self) -> Facts:
        numbers = (ctypes.c_uint64 * 4)()
        self.c.hs_gpu_facts(numbers)
        return Facts(self.c.hs_gpu_device().decode(), self.c.hs_gpu_kernels().decode(), *(int(n) for n in numbers))

    # --- what a device is asked once (probe.py)

    def plain(self) -> list[str]:
        """The products so far that the library has no algorithm for."""
        return list(self.c.hs_gpu_plain().decode().splitlines())

    def pin(self, size: int) -> None:
        """A memory file of this size is pinned, and copied into."""
        self._done(self.c.hs_gpu_pin(ctypes.c_size_t(size)), "pinning")

    def links(self) -> tuple[bool, int, str]:
        """(memory can be shared, NCCL's version, what is missing)."""
        found = (ctypes.c_uint32 * 2)()
        self._done(self.c.hs_gpu_links(found))
        return bool(found[0]), int(found[1]), self.c.hs_gpu_text().decode()

    def share(self, word: int) -> bytes:
        """The arena's handle, for :meth:`reach` of another process."""
        out = ctypes.create_string_buffer(80)
        self._done(self.c.hs_gpu_share(ctypes.c_uint32(word), out), "sharing")
        return out.raw

    def reach(self, handle: bytes) -> int:
        """The word at the beginning of another process's arena."""
        word = ctypes.c_uint32()
        self._done(self.c.hs_gpu_reach(handle, ctypes.byref(word)), "reaching")
        return word.value

    def beside(self) -> None:
        """A thread waits for the device while another one makes a graph."""
        self._done(self.c.hs_gpu_beside(), "a wait beside a capture")

    def value(self) -> None:
        """A stream waits for a value that another one writes."""
        self._done(self.c.hs_gpu_value(), "a value")

    def together(self, kernel: str) -> int:
        """How many calls of it are a launch at most."""
        return int(self.c.hs_gpu_together(KERNELS[kernel].number))

    def extent(self, kernel: str, dtype: int, dims: Sequence[int], operand: int) -> int:
        """Bytes of an operand."""
        out = ctypes.c_uint64()
        d = (ctypes.c_int64 * wire.CALL_DIMS)(*dims)
        rc = int(self.c.hs_kernel_extent(KERNELS[kernel].number, dtype, d, operand, ctypes.byref(out)))
        assert rc == 0, f"{kernel} {list(dims)} operand {operand}: status {rc}"
        return out.value

    def put(self, data: Array, at: int) -> None:
        """Bytes into the arena."""
        self._done(
            self.c.hs_gpu_put(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(at), ctypes.c_size_t(data.nbytes))
        )

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
        shift: int = 0,
    ) -> None:
        """One call; the arrays get what the device has afterwards. Fails where it changed anything else: what it only
        reads, or bytes between operands. ``shift``: elements by which operands miss the alignment of the arena."""
        assert (set_name, threads, guard) == ("cuda", 1, None)
        if self.c.hs_gpu_products() > PRODUCTS:
            self.reopen()
        number, _, _, d, r = marshalled(kernel, ptrs, dims, reals)
        offsets = (ctypes.c_int64 * wire.CALL_PTRS)(*[-1] * wire.CALL_PTRS)
        end = GUARD
        for i, x in enumerate(ptrs):
            if x is not None:
                # what is read as a struct stays aligned
                whole = KERNELS[kernel].operands[i].kind in ("control", "byte")
                offsets[i] = end + (0 if whole else shift * x.itemsize)
                end = -(-(offsets[i] + x.nbytes + GUARD) // ALIGN) * ALIGN
        image = np.full(end, PATTERN, np.uint8)
        for i, x in enumerate(ptrs):
            if x is not None:
                image[offsets[i] : offsets[i] + x.nbytes] = x.reshape(-1).view(np.uint8)
        before, image = image, np.empty_like(image)
        there = [ctypes.c_void_p(x.ctypes.data) for x in (before, image)]
        done = self.c.hs_gpu_call(number, dtype, *there, ctypes.c_size_t(end), offsets, d, r)
        self._done(done, f"{kernel} {list(dims)}")
        for i, (x, operand) in enumerate(zip(ptrs, KERNELS[kernel].operands, strict=True)):
            if x is not None and operand.role != "read":
                part = slice(offsets[i], offsets[i] + x.nbytes)
                x.reshape(-1).view(np.uint8)[:] = image[part]
                before[part] = image[part]
        wrong = np.flatnonzero(before != image)
        if wrong.size:
            raise DeviceError(
                f"{kernel} {list(dims)} changed byte {wrong[0]} of the arena, which it must not write; "
                f"operands begin at {[int(o) for o in offsets if o >= 0]}"
            )

    def zeros(self, kernel: str, dtype: int, dims: Sequence[int]) -> None:
        """A call whose operands are all there, and zero; what it makes is not looked at."""
        place, end = [], 0
        for i in range(len(KERNELS[kernel].operands)):
            size = self.extent(kernel, dtype, dims, i)
            place.append(end)
            self.put(np.zeros(size, np.uint8), end)
            end += -(-size // ALIGN) * ALIGN
        self.time(kernel, dtype, [place], dims, (), 1)

    # --- times

    def time(
        self, kernel: str, dtype: int, places: Sequence[Sequence[int]], dims: Sequence[int], reals: Sequence[float],
        rounds: int,
    ) -> float:  # fmt: skip
        """Seconds of one call, the mean of ``rounds`` on each of the places (offsets of operands, -1: absent)."""
        at = (ctypes.c_int64 * (wire.CALL_PTRS * len(places)))(*[-1] * (wire.CALL_PTRS * len(places)))
        for s, place in enumerate(places):
            for i, offset in enumerate(place):
                at[s * wire.CALL_PTRS + i] = offset
        d = (ctypes.c_int64 * wire.CALL_DIMS)(*dims)
        r = (ctypes.c_double * wire.CALL_REALS)(*reals)
        seconds = ctypes.c_double()
        done = self.c.hs_gpu_time(
            KERNELS[kernel].number, dtype, len(places), at, d, r, rounds, ctypes.byref(seconds)
        )  # fmt: skip
        self._done(done, f"{kernel} {list(dims)}")
        return seconds.value / (rounds * len(places))

    def copy_rate(self, what: str, size: int, rounds: int) -> float:
        """Bytes a second; on the device those that are read and those that are written count."""
        seconds = ctypes.c_double()
        done = self.c.hs_gpu_copy_time(COPIES[what], ctypes.c_size_t(size), rounds, ctypes.byref(seconds))
        self._done(done, f"copy {what}")
        return size * rounds * (2 if what == "on device" else 1) / seconds.value


def fill(kind: str, dtype: int, size: int, below: int, rng: np.random.Generator) -> Array:
    """Bytes of an operand that a timed kernel reads: numbers as training has them, in a tile that is repeated."""
    if kind in ("tokens", "targets"):
        return rng.integers(0, below, size // 4).astype(np.int32)
    if kind == "control":
        control: Any = wire.StepControl(step=1, lr=1e-4, clip_scale=1.0, step_size=1e-4, v_scale=1.0, lr_decay=1e-5)
        return np.frombuffer(bytes(control), np.uint8).copy()
    tile = rng.normal(0, 0.05, 1 << 18).astype(np.float32)
    if kind == "dt" and dtype == wire.BF16:
        bits: Array = (tile.view(np.uint32) >> 16).astype(np.uint16)
        return np.resize(bits, size // 2)
    if kind == "f64":
        return np.resize(tile.astype(np.float64), size // 8)
    if kind == "byte":
        return np.zeros(size, np.uint8)
    return np.resize(np.abs(tile), size // 4)  # statistics and second moments are positive
