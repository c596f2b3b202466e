"""Arithmetic of kernel calls: one table, for the layout's costs, the simulator's times and MFU.

Letters and order of a call's dims are those of ``wire/kernels.h``. Attention is causal: T (T + 1) / 2 pairs a head. The
input gradient of attention computes the scores again (5 products where the mathematics has 4). Elementwise operations
are a rounded number an element; memory traffic decides their time anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trainer.errors import PlanError
from trainer.models.base import Call

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


def _pairs(d: Dims) -> int:
    """Multiply-adds of one product of attention: batch, sequence, heads, groups, head size."""
    return d[0] * d[2] * d[4] * (d[1] * (d[1] + 1) // 2)


def _product(d: Dims) -> Operations:
    return Operations(d[0] * d[1] * d[2])


def _elements(each: int, dims: int) -> Callable[[Dims], Operations]:
    def work(d: Dims) -> Operations:
        count = each
        for size in d[:dims]:
            count *= size
        return Operations(elementwise=count)

    return work


_WORK: Mapping[str, Callable[[Dims], Operations]] = {
    "embed_fwd": _elements(1, 2),
    "embed_wgrad": _elements(2, 2),
    "layernorm_fwd": _elements(8, 2),
    "layernorm_igrad": _elements(11, 2),
    "layernorm_wgrad": _elements(4, 2),
    "rmsnorm_fwd": _elements(4, 3),
    "rmsnorm_igrad": _elements(7, 3),
    "rmsnorm_wgrad": _elements(3, 3),
    "linear_fwd": _product,
    "linear_igrad": _product,
    "linear_wgrad": _product,
    "attention_fwd": lambda d: Operations(2 * _pairs(d)),
    "attention_igrad": lambda d: Operations(4 * _pairs(d), again=_pairs(d)),
    "rope_table": _elements(20, 2),
    "rope_fwd": lambda d: Operations(elementwise=3 * d[0] * d[2] * d[3]),
    "rope_igrad": lambda d: Operations(elementwise=3 * d[0] * d[2] * d[3]),
    "gelu_fwd": _elements(20, 1),
    "gelu_igrad": _elements(30, 1),
    "swiglu_fwd": _elements(20, 2),
    "swiglu_igrad": _elements(30, 2),
    "classifier_fwd": lambda d: Operations(d[0] * d[1] * d[2], elementwise=20 * d[0] * d[2]),
    "classifier_grad": lambda d: Operations(3 * d[0] * d[1] * d[2], elementwise=20 * d[0] * d[2]),
    "logits": _product,
    "add_acc": _elements(1, 1),
    "sumsq": _elements(2, 1),
    "adamw": _elements(14, 1),
    "zero": _elements(0, 0),
    "init_normal": _elements(60, 1),
    "init_const": _elements(0, 0),
    "cast": _elements(1, 1),
}

# The calls with products that training makes of a forward call; their first dims are the forward call's. The head's
# one call gives losses and both gradients, whatever the forward program ends with.
_TRAINING: Mapping[str, tuple[str, ...]] = {
    "linear_fwd": ("linear_fwd", "linear_igrad", "linear_wgrad"),
    "attention_fwd": ("attention_fwd", "attention_igrad"),
    "classifier_fwd": ("classifier_grad",),
    "logits": ("classifier_grad",),
}


def work(kernel: str, dims: Dims) -> Operations:
    """What one call of ``kernel`` (a key of ``trainer.wire.KERNELS``) does."""
    try:
        return _WORK[kernel](dims)
    except KeyError:
        raise PlanError(f"nobody counts the operations of kernel {kernel!r}; add it to trainer/plan/flops.py") from None


def kernel_flops(name: str, dims: Dims) -> Flops:
    """Operations of one call of kernel ``name`` with ``dims`` in the table's order.

    >>> kernel_flops("linear_fwd", [8, 16, 32]).model
    8192
    """
    found = work(name, dims)
    return Flops(2 * found.products, 2 * (found.products + found.again) + found.elementwise)


def call_cost(call: Call) -> int:
    """Multiply-adds of a forward call with all its gradients, as executed; 0 where memory traffic decides.

    The layout's weight of a layer: arithmetic that a stage does for a microbatch.
    """
    parts = (work(kernel, call.dim) for kernel in _TRAINING.get(call.kernel, ()))
    return sum(part.products + part.again for part in parts)


def model_flops(calls: Sequence[Call]) -> int:
    """Operations of a forward program with all its gradients, as MFU counts them."""
    return 2 * sum(work(kernel, call.dim).products for call in calls for kernel in _TRAINING.get(call.kernel, ()))
