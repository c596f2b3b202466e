"""Arithmetic of kernel calls, as the table of kernels counts it: the layout's costs, the simulator's times and MFU.

Attention is causal: T (T + 1) / 2 pairs a head, within a window those of it. Borders of documents are in the data, so
what they leave out is not counted: there, operations are an upper bound. The input gradient of attention computes the
scores again (5 products where the mathematics has 4). Elementwise operations are a rounded number an element; memory
traffic decides their time anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.errors import PlanError
from trainer.models.base import Call
from trainer.wire.kernels import KERNELS, product

Dims = Sequence[int]


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of a call: ``model`` as MFU counts them (matrix products of the mathematics), ``done`` as executed."""

    model: float
    done: float

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.model + other.model, self.done + other.done)


@dataclass(frozen=True, slots=True)
class Operations:
    """What a call does: multiply-adds of products that the mathematics has, of products done again, and the rest."""

    products: int = 0
    again: int = 0
    elementwise: int = 0


def _training(kernel: str) -> tuple[str, ...]:
    """The calls that training makes of a forward call. One that gives both gradients gives the outputs too; where
    inference ends with logits, training ends with losses."""
    kernel = "classifier_fwd" if kernel == "logits" else kernel
    row = KERNELS[kernel]
    if row.derived and row.input_gradient == row.weight_gradient:
        return (row.input_gradient,)
    return tuple(name for name in (kernel, row.input_gradient, row.weight_gradient) if name)


def work(kernel: str, dims: Dims, of: str = "") -> Operations:
    """What one call of ``kernel`` (a key of ``trainer.wire.KERNELS``) does. ``of``: the forward kernel whose dims these
    are, where they are not its own."""
    row = KERNELS.get(kernel)
    if row is None:
        raise PlanError(f"nobody counts the operations of kernel {kernel!r}; it has no row in trainer/wire/kernels.py")
    named = KERNELS[of or kernel].named(dims)
    return Operations(*(product(factors, named) for factors in (row.products, row.again, row.each)))


def kernel_flops(name: str, dims: Dims) -> Flops:
    """Operations of one call of kernel ``name`` with ``dims`` in the table's order.

    >>> kernel_flops("linear_fwd", [8, 16, 32]).model
    8192
    """
    found = work(name, dims)
    return Flops(2 * found.products, 2 * (found.products + found.again) + found.elementwise)


def call_cost(call: Call, alone: bool = False) -> int:
    """Multiply-adds of a forward call with all its gradients (``alone``: without), as executed; 0 where memory traffic
    decides.

    The layout's weight of a layer: arithmetic that a stage does for a microbatch.
    """
    parts = (work(kernel, call.dim, call.kernel) for kernel in ((call.kernel,) if alone else _training(call.kernel)))
    return sum(part.products + part.again for part in parts)


def model_flops(calls: Sequence[Call]) -> int:
    """Operations of a forward program with all its gradients, as MFU counts them."""
    return 2 * sum(work(kernel, call.dim, call.kernel).products for call in calls for kernel in _training(call.kernel))
