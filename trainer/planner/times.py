"""Seconds of a model's pieces on one device, by roofline, split over tensor and context devices where they are.

Products run at the sheet's share of peak (the best that torch's matrix products reach), times ``SUSTAINED``: what whole
published runs reach of that, because of power limits, stragglers, shapes that are not the best. Those three numbers are
fitted, each on one run (``published.py``, docs/planner.md); all else here is a maker's figure or an assumption that
stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

from trainer.errors import PlanError
from trainer.plan.devices import CALL_S, DeviceSheet
from trainer.plan.muon import HiddenMatrix
from trainer.planner.costs import CallWork, ModelPiece

SUSTAINED = {"H100": 0.692, "GB200": 0.683, "GB300": 0.787}
"""Fitted: of the best products' rate, what a whole run keeps up."""
LIKE = {"H200": "H100", "B200": "GB200"}
"""Whose share a device takes that has none of its own."""


def longer(sequence: int) -> float:
    """What attention gains over the sheet's share, which is of 1k to 4k tokens: with 8k and more, forward 600 and
    backward 520 to 560 TFLOP/s of an H100's 989, head size 128 (the figures of arXiv 2407.08608), so 0.55.

    >>> longer(2048), round(longer(1 << 17), 2)
    (1.0, 1.22)
    """
    return 1.0 + 0.22 * min(1.0, max(0.0, (log2(max(1, sequence)) - 11) / 2))


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of forward, input gradient and weight gradient, and what of the input gradient is done again."""

    f: float = 0.0
    i: float = 0.0
    w: float = 0.0
    again: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(self.f + other.f, self.i + other.i, self.w + other.w, self.again + other.again)

    def __mul__(self, times: float) -> Parts:
        return Parts(self.f * times, self.i * times, self.w * times, self.again * times)

    @property
    def whole(self) -> float:
        """Of a microbatch."""
        return self.f + self.i + self.w


@dataclass(frozen=True)
class DeviceTimes:
    """How fast a device is at a precision."""

    sheet: DeviceSheet
    precision: str
    sustained: float

    @classmethod
    def of(cls, sheet: DeviceSheet, precision: str, sustained: float | None = None) -> DeviceTimes:
        """With the share that published runs of such devices reach; PlanError where the sheet lacks the precision."""
        if precision not in sheet.peak or (precision == "fp8" and "bf16" not in sheet.peak):
            missing = precision if precision not in sheet.peak else "bf16"
            raise PlanError(
                f"the sheet of {sheet.name} has no peak for {missing}, which train.precision {precision!r} needs; it "
                f"has {', '.join(sheet.peak)}: add device.peak_tflops.{missing}, or take another precision"
            )
        share = SUSTAINED.get(LIKE.get(sheet.name, sheet.name), 1.0) if sustained is None else sustained
        return cls(sheet, precision, share)

    @property
    def peak(self) -> float:
        """What MFU is of."""
        return self.sheet.peak[self.precision]

    def rate(self, kind: str, sequence: int = 0) -> float:
        """Operations a second of calls of a kind; FP8 is of the layers' linears alone."""
        precision = "bf16" if self.precision == "fp8" and kind != "linear" else self.precision
        share = self.sheet.product_share[precision]
        if kind == "attention":
            share = self.sheet.attention_share * longer(sequence)
        return share * self.sustained * self.sheet.peak[precision]

    def orthogonal(self, matrices: Sequence[HiddenMatrix], tensor: int) -> float:
        """Seconds of a step of Muon, whose products are of float32 in every precision."""
        if "fp32" not in self.sheet.peak:
            raise PlanError(
                f"the sheet of {self.sheet.name} has no peak for fp32, in which train.optimizer.name 'muon' makes its "
                "products: add device.peak_tflops.fp32"
            )
        rate = self.sheet.product_share["fp32"] * self.sustained * self.sheet.peak["fp32"]
        return sum(CALL_S * one.calls + 2 * one.products / tensor / rate for one in matrices)

    def call(self, work: CallWork, tensor: int, context: int) -> float:
        """Seconds of a kernel call whose tokens and matrices are split: the slower of arithmetic and memory."""
        split = tensor * context
        memory = (work.bytes / split + work.weight_bytes / tensor) / self._memory
        return CALL_S + max(2 * work.products / split / self.rate(work.kind, work.sequence), memory)

    @property
    def _memory(self) -> float:
        return self.sheet.memory_share * self.sheet.memory_bytes_per_s

    def stream(self, bytes_touched: float) -> float:
        """Seconds of going through so many bytes of its memory."""
        return bytes_touched / self._memory

    def piece(self, piece: ModelPiece, tensor: int, context: int) -> Parts:
        """Seconds of a piece for one microbatch."""
        by_part = {"F": 0.0, "I": 0.0, "W": 0.0}
        for work in piece.calls:
            by_part[work.part] += self.call(work, tensor, context)
        return Parts(by_part["F"], by_part["I"], by_part["W"])
