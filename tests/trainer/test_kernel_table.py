"""What the rows of the table of kernels must say for programs to be derived and counted from them."""

from __future__ import annotations

import doctest

import pytest

from trainer.wire import kernels
from trainer.wire.kernels import KERNELS, Kernel

GRADIENTS = {name for k in KERNELS.values() for name in (k.input_gradient, k.weight_gradient) if name}
DERIVED = [name for name, kernel in KERNELS.items() if kernel.derived]
CONSTANT = {"rope_fwd": {"tab"}}  # what forward reads, is no index, and has no gradient
IDLE = {"zero", "init_const", "delay"}


def names(kernel: Kernel) -> list[str]:
    """What its operands are called; beside codes ``<v>8`` what the table says may stand in a gradient's row."""
    found = [operand.name for operand in kernel.operands]
    return [*found, *(more for name in found if name.endswith("8") for more in (f"{name}t", name.removesuffix("8")))]


def codes(kernel: Kernel) -> list[str]:
    """The gradients of its outputs in FP8, where it takes FP8."""
    if not any(operand.name.endswith("8") for operand in kernel.operands):
        return []
    outputs = [operand.name for operand in kernel.operands if operand.role == "write"]
    return [f"d{name}{end}" for name in outputs for end in ("8", "8t", "s")]


def test_every_forward_kernel_has_gradients_and_no_gradient_has() -> None:
    assert set(DERIVED) == {name for name in KERNELS if name.endswith("_fwd")}
    assert {name for name in KERNELS if name.endswith("grad")} == GRADIENTS
    assert not GRADIENTS & set(DERIVED)


@pytest.mark.parametrize("name", DERIVED)
def test_a_gradient_is_given_only_what_its_forward_call_can_name(name: str) -> None:
    forward = KERNELS[name]
    given: set[str] = set()
    for gradient in {forward.input_gradient, forward.weight_gradient} - {""}:
        row = KERNELS[gradient]
        given |= {operand.name for operand in row.operands if operand.role != "read"}
        for operand in row.operands:
            known = operand.name in names(forward) or operand.name.removeprefix("d") in names(forward)
            known |= operand.name in codes(forward) or (operand.name == "old" and "ACCUM" in row.dim_names.split())
            assert operand.role == "scratch" or known, f"{gradient}: nobody can give {operand.name}"
        for dim in row.dim_names.split():
            known = dim.startswith("ld") and dim[2:] in names(row)
            assert known or dim in {*forward.dim_names.split(), "ACCUM", "CHUNK"}, f"{gradient}: nobody can give {dim}"
        assert set(row.real_names.split()) <= {*forward.real_names.split(), "scale"}
    for operand in forward.operands:
        if operand.role not in ("read", "update") or operand.kind in ("tokens", "targets", "places"):
            continue
        if operand.name in CONSTANT.get(name, ()) or operand.name == forward.passes:
            continue
        if operand.name.endswith("s") and f"{operand.name[:-1]}8" in names(forward):
            continue  # a scale
        own = operand.name if operand.role == "update" else f"d{operand.name.removesuffix('8')}"
        assert own in given, f"{name}: no gradient of {operand.name}"


@pytest.mark.parametrize("name", list(KERNELS))
def test_every_kernel_counts_its_work_in_its_own_dims(name: str) -> None:
    kernel = KERNELS[name]
    dims = kernel.named([3] * kernel.dims)
    work = [kernels.product(factors, dims) for factors in (kernel.products, kernel.again, kernel.each)]
    assert (sum(work) == 0) == (name in IDLE)
    assert kernel.products != "0" or kernel.again == "0"
    for operand in kernel.operands:
        assert kernels.product(operand.rows, dims) * kernels.product(operand.columns, dims) > 0


def test_products_of_the_table() -> None:
    assert doctest.testmod(kernels).failed == 0
    assert kernels.product("", {}) == 1
    assert kernels.product("BLOCKS n", {"n": 65537}) == 2
    for window, keys in ((0, 6), (1, 3), (2, 5), (3, 6), (9, 6)):
        assert kernels.product("20 BAND T W D", {"T": 3, "W": window, "D": 5}) == 20 * keys * 5
