"""Every kernel call of a workload's step, timed alone on the device at its real sizes, beside what the device's own
probes of the same process allow: bytes at the rate of a copy, products at that of a large one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.gpu.device_lib import DeviceError, DeviceLib, fill
from trainer import wire
from trainer.plan.compiled import Plan
from trainer.plan.flops import work
from trainer.wire.kernels import KERNELS

CACHE_BYTES = 1 << 28  # operands are taken from sets of this much, several times the last cache: they come from memory
LONG_S = 0.02  # of a measurement
ELEMENTS = 1 << 27  # of a call for all tensors, at most: AdamW's operands are then 2.4 GB


@dataclass(frozen=True)
class Timed:
    """A distinct call: how often a step makes it, and what one took."""

    kernel: str
    dtype: int
    dims: tuple[int, ...]
    count: int
    seconds: float
    bytes: int
    operations: float  # of products

    def told(self, copy_rate: float, product_rate: float) -> dict[str, Any]:
        """With what bounds it: the longer of its times at both probes."""
        by_bytes, by_products = self.bytes / copy_rate, self.operations / product_rate
        computes = by_products > by_bytes
        return {
            "kernel": self.kernel,
            "dims": list(self.dims),
            "dtype": "bf16" if self.dtype == wire.BF16 else "f32" if self.dtype == wire.F32 else str(self.dtype),
            "count": self.count,
            "us": self.seconds * 1e6,
            "gb_per_s": self.bytes / self.seconds / 1e9,
            "tflop_per_s": self.operations / self.seconds / 1e12,
            "bound": "products" if computes else "bytes",
            "share": max(by_bytes, by_products) / self.seconds,
        }


def calls_of(
    plan: Plan, together: Collection[str]
) -> Counter[tuple[str, int, tuple[int, ...], tuple[float, ...], tuple[bool, ...]]]:
    """The step's calls of the first position that differ, and how often each is made. Those for tensors of kernels that
    go ``together`` are one of all their elements, or as few equal ones as hold no more than ELEMENTS."""
    position = plan.positions[0]
    found: Counter[tuple[str, int, tuple[int, ...], tuple[float, ...], tuple[bool, ...]]] = Counter()
    runs = Counter(action.program for action in position.step if action.program is not None)
    for name, times in runs.items():
        elements: Counter[tuple[str, int, tuple[int, ...], tuple[float, ...], tuple[bool, ...]]] = Counter()
        for call in position.programs[name].calls:
            absent = tuple(ref is None or ref.space == wire.SPACE_NONE for ref in call.ptr)
            if call.kernel in together:
                elements[call.kernel, call.dtype, tuple(call.dim[1:]), tuple(call.real), absent] += call.dim[0]
            else:
                found[call.kernel, call.dtype, tuple(call.dim), tuple(call.real), absent] += times
        for (kernel, dtype, rest, reals, absent), count in elements.items():
            parts = -(-count // ELEMENTS)
            found[kernel, dtype, (-(-count // parts), *rest), reals, absent] += times * parts
    return found


def moved(sizes: Sequence[int], kernel: str, absent: Sequence[bool], dims: Sequence[int]) -> int:
    """The fewest bytes that a call moves: what it reads and what it writes once each; scratch not. Of embeddings'
    tables the rows that are looked up."""
    total = 0
    for operand, size, none in zip(KERNELS[kernel].operands, sizes, absent, strict=True):
        if none or operand.role == "scratch":
            continue
        if kernel.startswith("embed") and operand.rows == "V":
            named = KERNELS[kernel].named(dims)
            size = min(size, size // named["V"] * named["R"])
        total += size * (2 if operand.role == "update" else 1)
    return total


def time_call(
    lib: DeviceLib, kernel: str, dtype: int, dims: Sequence[int], reals: Sequence[float], absent: Sequence[bool],
    long_s: float = LONG_S,
) -> tuple[float, int]:  # fmt: skip
    """(seconds, bytes moved) of one call, its operands coming from memory. ``long_s``: 0 is one call."""
    rng = np.random.default_rng(7)
    spec = KERNELS[kernel]
    sizes = [0 if none else lib.extent(kernel, dtype, dims, i) for i, none in enumerate(absent)]
    room = sum(-(-size // 256) * 256 for size in sizes)
    if room > lib.arena:
        raise MemoryError(f"{kernel} {list(dims)} needs {room} bytes, the arena has {lib.arena}")
    sets = max(1, min(8, CACHE_BYTES // max(room, 1), lib.arena // max(room, 1))) if long_s else 1
    places, at = [], 0
    datas: list[Any] = []
    for i, operand in enumerate(spec.operands):
        below = 0
        if operand.kind in ("tokens", "targets"):
            below = dims[spec.dim_names.split().index(operand.note.removeprefix("below "))]
        datas.append(None if absent[i] else fill(operand.kind, dtype, sizes[i], below, rng))
    for _ in range(sets):
        place = []
        for data, size in zip(datas, sizes, strict=True):
            if data is None:
                place.append(-1)
                continue
            place.append(at)
            lib.put(data, at)
            at += -(-size // 256) * 256
        places.append(place)
    once = lib.time(kernel, dtype, places, dims, reals, 1)
    rounds = min(200, math.ceil(long_s / max(once * sets, 1e-7)))
    best = sorted(lib.time(kernel, dtype, places, dims, reals, rounds) for _ in range(3))[1] if rounds else once
    return best, moved(sizes, kernel, absent, dims)


def timed(
    lib: DeviceLib, plan: Plan, long_s: float = LONG_S, so_far: Callable[[list[Timed]], None] = lambda found: None
) -> tuple[list[Timed], list[str]]:
    """Every distinct call of a step, the one that takes longest in all first; and what could not be timed. ``so_far``
    is called after each."""
    found, left_out = [], []
    together = {name for name in KERNELS if lib.together(name) > 1}
    for (kernel, dtype, dims, reals, absent), count in calls_of(plan, together).items():
        try:
            seconds, size = time_call(lib, kernel, dtype, dims, reals, absent, long_s)
        except (MemoryError, DeviceError) as error:
            left_out.append(str(error))
            if lib.failed:
                lib.reopen()
            if lib.lost:
                break
            continue
        found.append(Timed(kernel, dtype, dims, count, seconds, size, _products(kernel, dims)))
        so_far(found)
    return sorted(found, key=lambda t: -t.seconds * t.count), left_out


def _products(kernel: str, dims: Sequence[int]) -> float:
    """Operations of its matrix products; what else it does, memory's traffic hides."""
    done = work(kernel, dims)
    return 2.0 * (done.products + done.again)


def probes(lib: DeviceLib, tiny: bool) -> dict[str, float]:
    """The device's copy rates (bytes a second) and the rate of a large bf16 product (operations a second)."""
    size = 1 << 16 if tiny else 1 << 30
    window = min(lib.window, 1 << 28)
    n = 64 if tiny else 8192
    r = 3 if tiny else 20
    # y = x w^T, no bias and no residual; every dim n
    dims, absent = (n, n, n, n, n, n), (False, False, False, True, True)
    seconds, _ = time_call(lib, "linear_fwd", wire.BF16, dims, (), absent, 0 if tiny else LONG_S)
    return {
        "copy on device": lib.copy_rate("on device", min(size, lib.arena // 2), r),
        "copy to device": lib.copy_rate("to device", window, r),
        "copy from device": lib.copy_rate("from device", window, r),
        "product bf16": 2 * float(n) ** 3 / seconds,
    }
