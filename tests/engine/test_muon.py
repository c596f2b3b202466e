"""A matrix made orthogonal by the calls that a plan has for it, in every set of kernels, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.kernel_lib import Array, KernelLib, control
from tests.reference.model import orthogonal
from trainer import wire
from trainer.plan.muon import HiddenMatrix
from trainer.plan.records import Ref

BETA = 0.95
SHAPES = [(1, 1), (1, 40), (40, 1), (48, 48), (33, 130), (150, 47)]


def made(kernels: KernelLib, m: Array, g: Array, set_name: str, threads: int) -> Array:
    """What becomes of a momentum and a gradient."""
    rows, columns = m.shape
    place = HiddenMatrix(rows, columns, 64)
    memory, ctl = np.zeros(64 + place.bytes, np.uint8), np.frombuffer(bytes(control(0.5)), np.uint8).copy()
    outside = {name: Ref(wire.SPACE_NONE, number, 0) for number, name in enumerate("mgc")}
    given = {outside["m"]: m.ravel(), outside["g"]: g.ravel(), outside["c"]: ctl}
    calls, result = place.orthogonal(outside["m"], outside["g"], outside["c"], BETA)

    def operand(ref: Ref | None) -> Array | None:
        if ref is None or ref in given:
            return None if ref is None else given[ref]
        return memory[ref.offset : ref.offset + ref.bytes]

    for call in calls:
        kernels.call(
            call.kernel, call.dtype, [operand(ref) for ref in call.ptr], call.dim, call.real,
            set_name=set_name, threads=threads,
        )  # fmt: skip
    found = operand(result)
    assert found is not None
    return found.view(np.float32).reshape(rows, columns).copy()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_values_are_near_1(kernels: KernelLib, rows: int, columns: int) -> None:
    """Of singular values that span a factor of thirty; a set's error is the chains' of f32, five times over."""
    rng, side = np.random.default_rng(rows), min(rows, columns)
    u, _, vt = np.linalg.svd(rng.normal(size=(rows, columns)), full_matrices=False)
    g = ((u * np.geomspace(1, 1 / 30, side)) @ vt).astype(np.float32)
    m = np.zeros_like(g)
    clipped = 0.5 * g.astype(np.float64)
    want = orthogonal(clipped + BETA * clipped)
    values = np.linalg.svd(want, compute_uv=False)
    assert 0.65 < values.min() <= values.max() < 1.25
    results = {name: made(kernels, m, g, name, 3) for name in kernels.sets}
    for name, found in results.items():
        assert np.abs(found - want).max() < 2e-5 * (1 if name != "ref" else 0.5), name
    fast = [found for name, found in results.items() if name != "ref"]
    assert all(np.array_equal(found, fast[0]) for found in fast)
    for threads in (1, 2):
        assert np.array_equal(made(kernels, m, g, next(n for n in results if n != "ref"), threads), fast[0])


def test_a_gradient_of_zero_makes_no_step(kernels: KernelLib) -> None:
    zero = np.zeros((8, 24), np.float32)
    assert not any(made(kernels, zero, zero, name, 1).any() for name in kernels.sets)
