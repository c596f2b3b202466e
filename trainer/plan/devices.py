"""Sheets of accelerators, and what a plan is on one: its memory there, and its step's time by roofline.

A sheet is what a maker says (dense, without sparsity), and which share of it real programs reach. The estimate takes a
rank a device: products run at ``product_share`` of the peak of their element type, attention at ``attention_share``,
and every call at no more than ``memory_share`` of the bandwidth. The shares are assumptions until `make gpu-session`
has measured ours; ``assumptions`` lists them for people.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainer import wire
from trainer.amounts import bytes_text
from trainer.errors import PlanError
from trainer.plan.compiled import Plan
from trainer.plan.draw import memory_text
from trainer.plan.flops import Dims, work
from trainer.plan.memory import RUNTIME_BYTES, staging_bytes, workspace_bytes
from trainer.plan.records import BoundCall, PositionPlan
from trainer.plan.simulate import CostModel
from trainer.spec import RunSpec
from trainer.wire.kernels import KERNELS

WORKSPACE_BYTES = 40 << 20
"""Of a device's kernels and libraries (``HS_CUDA_WORKSPACE``)."""
CONTEXT_BYTES = 700 << 20
"""What the driver and the libraries take of a device for one process: assumed, not measured yet."""
CALL_S = 2e-6
"""Between two kernels of a graph: assumed."""
TOGETHER, TOGETHER_CALLS = ("sumsq", "sumsq_parts", "sum", "adamw", "adamw_copy", "zero", "cast"), 64
"""Kernels whose calls for tensors are a launch, up to so many of them (``kernels/cuda/cuda.h``)."""

TILES = ((128, 128), (128, 192), (192, 128), (128, 256), (256, 128))
"""Of a product's result, what a processor computes at a time where tensor cores are kept busy."""
LINEARS = {
    "linear_fwd": "RN", "linear_igrad": "RK", "linear_wgrad": "NK",
    "linear8_fwd": "RN", "linear8_igrad": "RK", "linear8_wgrad": "NK",
}  # fmt: skip
"""Products by kernel, with the sides of their result."""


@dataclass(frozen=True)
class DeviceSheet:
    """One accelerator. Bytes, bytes a second, operations a second; links one way."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    peak: Mapping[str, float]
    """By train.precision."""
    product_share: Mapping[str, float]
    attention_share: float
    link_bytes_per_s: float
    """To another device of the node."""
    network_bytes_per_s: float
    """To another node."""
    memory_share: float = 0.9
    context_bytes: int = CONTEXT_BYTES
    """What a process takes of its memory beside the plan's buffers."""
    calls_a_launch: int = TOGETHER_CALLS
    """Of the kernels in ``TOGETHER``."""
    processors: int = 0
    """That have a tile of a product at a time; 0: tiles are not counted."""


# Memory, bandwidth, bf16 and fp8 peaks, links, network: the makers' tables as collected in August 2026 by
# stas00/ml-engineering (compute/accelerator); H200's memory and bandwidth: NVIDIA's sheet of it, the rest as H100's;
# processors: H100's and H200's as NVIDIA's paper on Hopper has them, Blackwell's as CUDA counts them (GB300's assumed);
# fp32 without tensor cores, as our products of that type run: the makers' sheets (GB300's as B200's: assumed).
# Shares of products: the best shape of torch's matrix products, same source ("MAMF"): H100 794.5 of 989 (bf16) and
# 1402.6 of 1979 (fp8), B200 1745 of 2250, B300 1769 (here of GB300's 2500), GB200 1822 of 2500, and fp8 3615.6 of 5000
# (B200's too).
# Of attention: forward and backward of head size 64 to 128 at 1k to 4k, figures of arXiv 2407.08608 (Hopper);
# Blackwell's forward reaches more (arXiv 2603.05451: 71 %), its backward is not published: assumed as Hopper's.
SHEETS: Mapping[str, DeviceSheet] = {
    sheet.name: sheet
    for sheet in (
        DeviceSheet(
            "H100", 80 * 10**9, 3.35e12, {"fp32": 67e12, "bf16": 989e12, "fp8": 1979e12},
            {"fp32": 0.8, "bf16": 0.80, "fp8": 0.71}, 0.45, 450e9, 50e9,
            processors=132,
        ),
        DeviceSheet(
            "H200", 141 * 10**9, 4.8e12, {"fp32": 67e12, "bf16": 989e12, "fp8": 1979e12},
            {"fp32": 0.8, "bf16": 0.80, "fp8": 0.71}, 0.45, 450e9, 50e9,
            processors=132,
        ),
        DeviceSheet(
            "B200", 180 * 10**9, 8.0e12, {"fp32": 75e12, "bf16": 2250e12, "fp8": 4500e12},
            {"fp32": 0.8, "bf16": 0.77, "fp8": 0.72}, 0.45, 900e9, 50e9,
            processors=148,
        ),
        DeviceSheet(
            "GB200", 186 * 10**9, 8.0e12, {"fp32": 75e12, "bf16": 2500e12, "fp8": 5000e12},
            {"fp32": 0.8, "bf16": 0.73, "fp8": 0.72}, 0.45, 900e9, 50e9,
            processors=152,
        ),
        DeviceSheet(
            "GB300", 279 * 10**9, 8.0e12, {"fp32": 75e12, "bf16": 2500e12, "fp8": 5000e12},
            {"fp32": 0.8, "bf16": 0.70, "fp8": 0.72}, 0.45, 900e9, 100e9,
            processors=152,
        ),
        # a core of a 2-core laptop: our own measurements of a Zen 4 core; FP8 is computed there as bf16
        DeviceSheet(
            "LAPTOP", 8 * 10**9, 15e9, {"fp32": 117e9, "bf16": 235e9, "fp8": 235e9},
            {"fp32": 0.8, "bf16": 0.75, "fp8": 0.5}, 0.4, 2e9, 0.1e9, 0.8, 3 << 20, 1,
        ),
    )
}  # fmt: skip


def sheet_of(name: str) -> DeviceSheet:
    """The sheet of this name, in either case of letters.

    >>> sheet_of("h100").memory_bytes
    80000000000
    """
    found = SHEETS.get(name.upper())
    if found is None:
        raise PlanError(f"there is no sheet of a device {name!r}; there are {', '.join(SHEETS)}")
    return found


def peak_of(names: Sequence[str], precision: str) -> float:
    """What devices of these names (as the driver says them) do at most, all together; 0 where one has no sheet here.

    >>> peak_of(["NVIDIA H100 80GB HBM3"] * 2, "bf16") / 1e12
    1978.0
    >>> peak_of(["NVIDIA H100 PCIe"], "bf16"), peak_of(["NVIDIA GB200"], "bf16") / 1e15
    (0.0, 2.5)
    """
    peaks = [
        next((s.peak[precision] for s in SHEETS.values() if s.name in name.split() and "PCIe" not in name), 0.0)
        for name in names
    ]
    return sum(peaks) if all(peaks) else 0.0


def head_again(kernel: str, dims: Dims, element: int) -> int:
    """Bytes that a head moves beside its operands' own, as its rows go in chunks: for each chunk but the first its
    matrix once a product, and the gradient of it read and written in fp32. No cache of a device holds them.

    >>> head_again("classifier_grad", [128, 10, 100, 64, 0], 2), head_again("classifier_grad", [64, 10, 100, 64, 0], 2)
    (12000, 0)
    """
    named = KERNELS[kernel].named(dims)
    if "CHUNK" not in named:
        return 0
    products = {"classifier_fwd": 1, "vocab_part": 1}.get(kernel, 2)
    gradient = 0 if kernel == "classifier_fwd" else 8
    chunks = -(-named["R"] // named["CHUNK"])
    return (chunks - 1) * named["V"] * named["C"] * (products * element + gradient)


def launches(calls: Sequence[BoundCall], most: int = TOGETHER_CALLS) -> int:
    """Of a program's calls on a device, as far as those in ``TOGETHER`` may change places with what stands between them
    (``trainer/engine/run/together.h`` finds which may)."""
    made = Counter((call.kernel, call.dtype) for call in calls if call.kernel in TOGETHER)
    return len(calls) - sum(count - -(-count // most) for count in made.values())


def busy(kernel: str, dims: Dims, processors: int) -> float:
    """Of a device's processors, the share that a linear's product keeps busy: the last round of tiles leaves some idle.

    >>> busy("linear_wgrad", [32768, 768, 768], 132), busy("linear_wgrad", [32768, 3072, 768], 132)
    (0.2727272727272727, 0.7272727272727273)
    """
    sides = LINEARS.get(kernel)
    if not sides or not processors:
        return 1.0
    named = KERNELS[kernel].named(dims)
    rows, columns = (named[side] for side in sides)
    best = 0.0
    for high, wide in TILES:
        tiles = -(-rows // high) * -(-columns // wide)
        rounds = -(-tiles // processors)
        best = max(best, rows * columns / (rounds * processors * high * wide))
    return best


@dataclass(frozen=True, kw_only=True)
class DeviceCost(CostModel):
    """A sheet's costs, for products of one precision."""

    sheet: DeviceSheet
    precision: str

    def call_seconds(self, kernel: str, dims: Dims, bytes_touched: int) -> float:
        # fp8 is of the blocks' linears alone, which have kernels of their own
        kind = "bf16" if self.precision == "fp8" and not kernel.startswith("linear8") else self.precision
        share = self.sheet.attention_share if kernel.startswith("attention") else self.sheet.product_share[kind]
        rate = share * self.sheet.peak[kind]
        found = work(kernel, dims)
        done = 2 * (found.products + found.again)
        moved = bytes_touched + head_again(kernel, dims, 4 if self.precision == "fp32" else 2)
        if kind != "fp32":  # whose tiles may be small: it needs no tensor cores
            rate *= busy(kernel, dims, self.sheet.processors)
        return self.call_s + max(done / rate, moved / self.memory_bytes_per_s)

    def bound_seconds(self, call: BoundCall) -> float:
        """As the sheet has it; the optimizer's products are in float32 whatever the precision."""
        cost = replace(self, precision="fp32") if call.part == "O" and self.precision != "fp32" else self
        return cost.call_seconds(call.kernel, call.dim, call.bytes_touched)

    def program_seconds(self, calls: Sequence[BoundCall]) -> float:
        spared = len(calls) - launches(calls, self.sheet.calls_a_launch)
        return super().program_seconds(calls) - spared * self.call_s


def cost_of(sheet: DeviceSheet, spec: RunSpec) -> DeviceCost:
    """What a step of ``spec`` costs on this device, a rank on each."""
    link = sheet.link_bytes_per_s if spec.launch.nodes == 1 else sheet.network_bytes_per_s
    precision = spec.train.precision
    return DeviceCost(
        flops_per_s=sheet.product_share[precision] * sheet.peak[precision],
        memory_bytes_per_s=sheet.memory_share * sheet.memory_bytes_per_s,
        link_bytes_per_s=0.8 * link,
        link_latency_s=10e-6,
        call_s=CALL_S,
        sheet=sheet,
        precision=precision,
    )


def assumptions(sheet: DeviceSheet, spec: RunSpec) -> str:
    """What the estimate stands on, for people."""
    precision = spec.train.precision
    tiles = f", tiles of 128 x 256 or less on {sheet.processors} processors" * (
        sheet.processors > 0 and precision != "fp32"
    )
    return (
        f"by roofline of {sheet.name}'s sheet, a rank a device; assumed: products at "
        f"{sheet.product_share[precision]:.0%} of {sheet.peak[precision] / 1e12:,.0f} TFLOP/s ({precision}), attention "
        f"at {sheet.attention_share:.0%} of its peak, the rest at {sheet.memory_share:.0%} of "
        f"{sheet.memory_bytes_per_s / 1e12:.2f} TB/s, {CALL_S * 1e6:.0f} us a launch{tiles}; nothing of it is measured"
    )


CHUNK_HERE = 4096
"""Rows of logits at a time that a device's head loses nothing by."""


def smaller_chunks(plan: Plan, spec: RunSpec, sheet: DeviceSheet) -> str:
    """What train.classifier_chunk costs a step on this device beside CHUNK_HERE, where that is a millisecond or more;
    else empty."""
    cost, chunk = cost_of(sheet, spec), spec.train.classifier_chunk
    saved = 0.0
    for position in plan.positions:
        made = Counter(action.program for action in position.step if action.program is not None)
        for name, times in made.items():
            for call in position.programs[name].calls:
                names = KERNELS[call.kernel].dim_names.split()
                if "CHUNK" in names:
                    larger = list(call.dim)
                    larger[names.index("CHUNK")] = CHUNK_HERE
                    now = cost.call_seconds(call.kernel, call.dim, call.bytes_touched)
                    saved += times * (now - cost.call_seconds(call.kernel, larger, call.bytes_touched))
    if saved < 1e-3:
        return ""
    rows = min(CHUNK_HERE, spec.train.microbatch * spec.train.sequence)
    room = (rows - min(chunk, rows)) * spec.model.vocab * (8 if spec.train.precision == "fp32" else 6)
    return (
        f"train.classifier_chunk = {chunk} costs {saved * 1e3:.0f} ms of it: the head moves its matrix and its "
        f"gradient once for so many rows; {rows} would take {bytes_text(room)} more for logits"
    )


def on_device(position: PositionPlan, spec: RunSpec) -> dict[str, int]:
    """Bytes by kind that a rank at this position takes of its device."""
    kinds = {kind: position.bytes_by_kind[kind] for kind in wire.MEMORY_KINDS if kind not in ("slots", "channels")}
    kinds["other"] -= RUNTIME_BYTES + workspace_bytes(spec.parallel.threads)
    return {**kinds, "workspace": WORKSPACE_BYTES, "context": CONTEXT_BYTES}


def on_host(plan: Plan, position: PositionPlan) -> dict[str, int]:
    """Bytes of the host that it takes beside that: pinned ones (``slots`` of snapshots, which the agent reads, and
    ``staging``, between host and device), and the rest.
    """
    kinds, parts = position.bytes_by_kind, len(plan.tensors)
    staging = staging_bytes(plan.config, position, plan.channels, parts)
    return {"slots": kinds["slots"], "staging": staging, "channels": kinds["channels"], "process": RUNTIME_BYTES}


def fits(plan: Plan, spec: RunSpec, sheet: DeviceSheet) -> str:
    """The tables of device and host memory; PlanError with them where a rank does not fit its device."""
    device = [on_device(position, spec) for position in plan.positions]
    host = [on_host(plan, position) for position in plan.positions]
    text = (
        f"memory of each {sheet.name} ({bytes_text(sheet.memory_bytes)}):\n{memory_text(device, sheet.memory_bytes)}"
        f"memory of the host, by rank (slots and staging are pinned):\n{memory_text(host)}"
    )
    over = _over(device, sheet.memory_bytes)
    if over is not None:
        needs = sum(device[over].values())
        raise PlanError(
            f"position {over} needs {needs} bytes ({bytes_text(needs)}) of a {sheet.name}, which has "
            f"{sheet.memory_bytes} ({bytes_text(sheet.memory_bytes)}): take more stages (parallel.stages) or a smaller "
            f"microbatch (train.microbatch)\n{text}"
        )
    return text


def _over(by_position: Sequence[Mapping[str, int]], most: int) -> int | None:
    """The position that is furthest above ``most``; None where all fit."""
    worst = max(range(len(by_position)), key=lambda p: sum(by_position[p].values()))
    return worst if sum(by_position[worst].values()) > most else None
