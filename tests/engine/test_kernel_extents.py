"""What a call may touch: the extents are enough, exact, and refuse what makes no sense."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.engine.kernel_lib import SETS, KernelLib
from trainer import wire
from trainer.wire.kernels import product

CONFIG, OVERFLOW = -6, -11  # core/status.h

# Dims are different small primes where they may be, so that one letter taken for another shows.
CASES: dict[str, list[tuple[int, ...]]] = {
    "embed_fwd": [(15, 7, 11, 5), (1, 1, 1, 1), (4, 33, 311, 2)],
    "embed_wgrad": [(15, 7, 11, 5), (1, 1, 1, 1), (4, 33, 311, 2)],
    "layernorm_fwd": [(3, 7), (1, 1), (5, 67)],
    "layernorm_igrad": [(5, 67, 1), (3, 7, 0), (1, 1, 1)],
    "layernorm_wgrad": [(3, 7), (1, 1), (5, 67)],
    "rmsnorm_fwd": [(3, 2, 5, 11, 13), (1, 1, 1, 1, 1), (2, 3, 33, 99, 100)],
    "rmsnorm_igrad": [(2, 3, 33, 99, 100, 101, 1), (3, 2, 5, 11, 13, 17, 0)],
    "rmsnorm_wgrad": [(3, 2, 5, 11, 13), (2, 3, 33, 99, 100)],
    "linear_fwd": [(3, 5, 7, 11, 13, 17), (1, 1, 1, 1, 1, 1), (17, 70, 37, 71, 38, 73)],
    "linear_igrad": [(3, 5, 7, 11, 13, 0), (17, 70, 37, 38, 71, 1), (1, 1, 1, 1, 1, 0)],
    "linear_wgrad": [(3, 5, 7, 11, 13, 0), (17, 70, 37, 71, 38, 1), (1, 1, 1, 1, 1, 0)],
    "attention_fwd": [
        (2, 5, 6, 3, 7, 43, 47, 23, 29, 0),
        (1, 1, 1, 1, 16, 16, 16, 16, 16, 1),
        (1, 3, 4, 1, 33, 132, 198, 198, 198, 2),
    ],
    "attention_igrad": [
        (2, 5, 6, 3, 7, 43, 23, 29, 47, 53, 59, 31, 37, 0),
        (1, 1, 1, 1, 16, 16, 16, 16, 16, 16, 16, 16, 16, 1),
        (1, 19, 4, 1, 33, 132, 33, 33, 132, 132, 198, 198, 198, 7),
    ],
    "rope_table": [(5, 6), (1, 2), (3, 66)],
    "rope_fwd": [(15, 5, 3, 6, 19), (1, 1, 1, 2, 2), (4, 2, 2, 66, 140)],
    "rope_igrad": [(15, 5, 3, 6, 19), (1, 1, 1, 2, 2), (4, 2, 2, 66, 140)],
    "gelu_fwd": [(1,), (37,)],
    "gelu_igrad": [(1,), (37,)],
    "swiglu_fwd": [(3, 7), (1, 1), (2, 35)],
    "swiglu_igrad": [(3, 7), (1, 1), (2, 35)],
    "classifier_fwd": [(5, 3, 11, 2), (1, 1, 1, 1), (7, 33, 311, 7)],
    "classifier_grad": [(5, 3, 11, 2, 1), (1, 1, 1, 1, 0), (7, 33, 311, 7, 0)],
    "logits": [(5, 3, 11), (1, 1, 1), (2, 33, 311)],
    "add_acc": [(1,), (37,)],
    "sumsq": [(1,), (65536,), (65537,)],
    "adamw": [(1, 0), (37, 1)],
    "zero": [(1,), (37,)],
    "init_normal": [(1, 0, 0), (37, 5, -1)],
    "init_const": [(1,), (37,)],
    "cast": [(1,), (37,)],
    "quantise": [(3, 5, 7, 0), (1, 1, 1, 1), (70, 37, 41, 1)],
    "linear8_fwd": [(3, 5, 7, 11, 13), (1, 1, 1, 1, 1), (17, 70, 37, 71, 73)],
    "linear8_igrad": [(3, 5, 7, 11, 0), (17, 70, 37, 38, 1), (1, 1, 1, 1, 0)],
    "linear8_wgrad": [(3, 5, 7, 11), (17, 70, 37, 71), (1, 1, 1, 1)],
    "adamw_copy": [(1,), (37,)],
    "fold": [(1,), (37,)],
    "sumsq_parts": [(1,), (65536,), (65537,)],
    "sum": [(1,), (2,), (37,)],
    "delay": [(1,), (1000,)],
    "vocab_head": [(5, 3, 11, 2, 4, 3, 1), (1, 1, 1, 1, 1, 1, 0), (7, 33, 311, 7, 2, 160, 0)],
    "vocab_sums": [(5, 3, 11, 4, 3, 2, 17), (1, 1, 1, 1, 1, 0, 1), (7, 33, 311, 2, 160, 0, 311)],
    "vocab_part": [
        (5, 3, 11, 2, 4, 3, 2, 2, 17, 1),
        (1, 1, 1, 1, 1, 1, 1, 0, 1, 0),
        (7, 33, 311, 7, 2, 160, 4, 0, 311, 0),
    ],
    "borders": [(2, 5, 7, 3), (1, 1, 1, 0), (3, 700, 11, 11)],
    "muon_momentum": [(1,), (37,)],
    "muon_scale": [(1,), (37,)],
    "muon_poly": [(1,), (37,)],
    "muon": [(1,), (37,)],
    "muon_copy": [(1,), (37,)],
    "embed_wgrad_tied": [(15, 7, 11, 5), (1, 1, 1, 1), (4, 33, 311, 2)],
}
ADAMW = (0.9, 0.95, 1e-8, 0.1)
REALS = {"rope_table": (10000.0,), "adamw": ADAMW, "adamw_copy": ADAMW, "init_normal": (0.0, 0.02)}


def reals_of(kernel: str) -> tuple[float, ...]:
    return REALS.get(kernel, (0.125,) * wire.KERNELS[kernel].reals)


def test_every_kernel_has_cases_and_operands() -> None:
    assert list(CASES) == list(wire.KERNELS)
    for kernel, spec in wire.KERNELS.items():
        assert all(len(dims) == spec.dims for dims in CASES[kernel]), kernel


@pytest.mark.parametrize("set_name", SETS)
@pytest.mark.parametrize("kernel", list(CASES))
def test_nothing_outside_the_extents_is_touched(kernels: KernelLib, kernel: str, set_name: str) -> None:
    """Every operand lies flush against a page that nobody may touch, after it and before it."""
    if set_name not in kernels.sets:
        pytest.skip(f"this machine or build has no set {set_name}")
    rng = np.random.default_rng(7)
    runs = [
        (dtype, dims, guard, 1)
        for dtype in (wire.F32, wire.BF16, wire.F64)
        for dims in CASES[kernel]
        for guard in ("after", "before")
        if dtype != wire.F64 or set_name == "ref"
    ]
    if set_name != "ref":
        runs.append((wire.BF16, CASES[kernel][-1], "after", 3))
    for dtype, dims, guard, threads in runs:
        ptrs = kernels.operands(kernel, dtype, dims, rng)
        before = [None if p is None else p.copy() for p in ptrs]
        kernels.call(kernel, dtype, ptrs, dims, reals_of(kernel), set_name=set_name, threads=threads, guard=guard)
        for operand, old, new in zip(wire.KERNELS[kernel].operands, before, ptrs, strict=True):
            if operand.role == "read" and old is not None and new is not None:
                assert old.tobytes() == new.tobytes(), f"{kernel} wrote an operand that it may only read"


@pytest.mark.parametrize("kernel", list(CASES))
def test_the_extents_are_exact(kernels: KernelLib, kernel: str) -> None:
    """With one element less, ref reaches the forbidden page: the extents ask for no more than is needed."""
    rng = np.random.default_rng(7)
    dims = CASES[kernel][0]
    for i, spec in enumerate(wire.KERNELS[kernel].operands):
        if spec.kind in ("control", "byte"):
            continue  # a record; its last bytes are spare
        if kernel in ("quantise", "sum") and spec.role == "scratch":
            continue  # room for as many parts as a set may make; ref makes none
        ptrs = kernels.operands(kernel, wire.F32, dims, rng)
        for x, other in zip(ptrs, wire.KERNELS[kernel].operands, strict=True):
            if other.kind == "places" and x is not None:
                x[:] = 0  # one document, which has all positions
        operand = ptrs[i]
        assert operand is not None
        ptrs[i] = operand[:-1].copy()
        with pytest.raises(AssertionError, match="status 1011 "):
            kernels.call(kernel, wire.F32, ptrs, dims, reals_of(kernel), guard="after")


@pytest.mark.parametrize("kernel", list(CASES))
def test_work_is_counted_alike_in_both_languages(kernels: KernelLib, kernel: str) -> None:
    spec = wire.KERNELS[kernel]
    for dims in CASES[kernel]:
        named = spec.named(dims)
        assert work(kernels, kernel, dims) == [product(text, named) for text in (spec.products, spec.again, spec.each)]


def work(kernels: KernelLib, kernel: str, dims: tuple[int, ...]) -> list[int]:
    """hs_kernel_work: products, products again, others."""
    found = (ctypes.c_int64 * 3)()
    d = (ctypes.c_int64 * wire.CALL_DIMS)(*dims)
    assert kernels.c.hs_kernel_work(wire.KERNELS[kernel].number, d, found) == 0
    return list(found)


@pytest.mark.parametrize("kernel", list(CASES))
def test_optional_operands_may_be_absent(kernels: KernelLib, kernel: str) -> None:
    rng = np.random.default_rng(7)
    optional = [i for i, operand in enumerate(wire.KERNELS[kernel].operands) if operand.note == "optional"]
    for set_name in kernels.sets:
        for i in optional:
            ptrs = kernels.operands(kernel, wire.F32, CASES[kernel][0], rng, absent=[i])
            kernels.call(kernel, wire.F32, ptrs, CASES[kernel][0], reals_of(kernel), set_name=set_name, guard="after")


@pytest.mark.parametrize("set_name", SETS)
def test_gaps_between_rows_are_left_alone(kernels: KernelLib, set_name: str) -> None:
    """A strided output shares its rows with neighbours: what lies beyond the columns keeps its bytes."""
    if set_name not in kernels.sets:
        pytest.skip(f"this machine or build has no set {set_name}")
    rng = np.random.default_rng(7)
    # kernel, dims, {written operand: (columns, ld)}
    strided: list[tuple[str, tuple[int, ...], dict[int, tuple[int, int]]]] = [
        ("rmsnorm_fwd", (3, 2, 5, 11, 13), {0: (10, 13)}),
        ("rmsnorm_igrad", (3, 2, 5, 11, 13, 17, 1), {0: (10, 11)}),
        ("linear_fwd", (17, 70, 37, 71, 38, 73), {0: (70, 71)}),
        ("linear_igrad", (17, 70, 37, 38, 71, 0), {0: (37, 38)}),
        ("linear8_fwd", (17, 70, 37, 71, 73), {0: (70, 71)}),
        ("linear8_igrad", (17, 70, 37, 38, 0), {0: (37, 38)}),
        ("attention_fwd", (2, 5, 6, 3, 7, 43, 47, 23, 29), {0: (42, 43)}),
        ("attention_igrad", (2, 5, 6, 3, 7, 43, 23, 29, 47, 53, 59, 31, 37), {0: (42, 43), 1: (21, 23), 2: (21, 29)}),
        ("rope_fwd", (15, 5, 3, 6, 19), {0: (18, 19)}),
        ("rope_igrad", (15, 5, 3, 6, 19), {0: (18, 19)}),
    ]
    for kernel, dims, outputs in strided:
        for dtype in (wire.F32, wire.BF16):
            ptrs = kernels.operands(kernel, dtype, dims, rng)
            before = {i: ptrs[i].copy() for i in outputs}  # type: ignore[union-attr]
            kernels.call(kernel, dtype, ptrs, dims, reals_of(kernel), set_name=set_name)
            for i, (columns, ld) in outputs.items():
                new = ptrs[i]
                assert new is not None
                gaps = np.arange(new.size) % ld >= columns
                assert gaps.any()
                assert np.array_equal(new[gaps], before[i][gaps]), (kernel, i)
                assert not np.array_equal(new[~gaps], before[i][~gaps]), (kernel, i)


def test_senseless_dims_are_refused(kernels: KernelLib) -> None:
    for kernel, cases in CASES.items():
        good = list(cases[0])
        size_letters = range(len(good))
        for i in size_letters:
            for value in (0, -1, -(2**63)):
                dims = [*good]
                dims[i] = value
                answers = [kernels.extent(kernel, wire.F32, dims, o) for o in range(wire.KERNELS[kernel].ptrs)]
                is_row_distance = (
                    kernel.startswith(("rmsnorm", "linear", "attention", "rope_", "quantise"))
                    and i >= {"rm": 3, "li": 3, "at": 5, "ro": 4, "qu": 2}[kernel[:2]]
                )
                # a switch that is off; the part of a vocabulary that begins it; no window; a token
                may_be_zero = ("ACCUM", "ZERO_G", "E5M2", "FIRST", "WINDOW", "END")
                is_zero = value == 0 and wire.KERNELS[kernel].dim_names.split()[i] in may_be_zero
                if kernel == "init_normal" and i > 0:
                    assert (answers == [CONFIG]) == (i == 1 and value < 0)
                elif is_row_distance:
                    assert CONFIG in answers or is_zero, (kernel, i, value)
                elif not is_zero:
                    assert answers == [CONFIG] * len(answers), (kernel, i, value)


@pytest.mark.parametrize(
    ("kernel", "dims", "operand"),
    [
        ("attention_fwd", (1, 4, 6, 4, 8, 48, 48, 32, 32), 0),  # 6 heads on 4
        ("attention_fwd", (1, 4, 4, 8, 8, 32, 32, 64, 64), 0),  # fewer query heads than key heads
        ("attention_fwd", (1, 4, 1, 1, 513, 513, 513, 513, 513), 0),  # HS_ATTENTION_HEAD_MAX
        ("attention_fwd", (1, 4, 6, 3, 8, 47, 48, 24, 24), 0),  # rows overlap
        ("rope_fwd", (4, 4, 1, 7, 7), 0),  # odd head size
        ("rope_fwd", (5, 4, 1, 8, 8), 0),  # not whole sequences
        ("rope_table", (4, 7), 0),
        ("rope_table", (2**30 + 1, 2), 0),
        ("embed_fwd", (5, 4, 9, 4), 0),
        ("embed_fwd", (4, 4, 2**31, 4), 0),  # tokens are i32
        ("classifier_fwd", (4, 4, 2**31, 4), 0),
        ("linear_fwd", (2, 8, 8, 7, 8, 8), 0),
        ("linear_igrad", (2, 8, 8, 8, 8, 2), 0),  # a switch is 0 or 1
        ("adamw", (8, 7), 0),
        ("init_normal", (8, 2**32, 0), 0),
    ],
)
def test_refusals(kernels: KernelLib, kernel: str, dims: tuple[int, ...], operand: int) -> None:
    assert kernels.extent(kernel, wire.F32, dims, operand) == CONFIG


def test_unknown_kernels_operands_and_types_are_refused(kernels: KernelLib) -> None:
    assert kernels.extent(0, wire.F32, [1], 0) == CONFIG
    assert kernels.extent(len(wire.KERNELS) + 1, wire.F32, [1], 0) == CONFIG
    assert kernels.extent(65535, wire.F32, [1], 0) == CONFIG
    for operand in (-1, 2, 11, 12, 2**31 - 1):
        assert kernels.extent("gelu_fwd", wire.F32, [1], operand) == CONFIG
    for dtype in (0, wire.I32, 5, 65535):
        assert kernels.extent("gelu_fwd", dtype, [1], 0) == CONFIG


def test_an_absent_operand_s_row_distance_does_not_matter(kernels: KernelLib) -> None:
    dims = (3, 5, 7, 5, 7, 0)
    assert kernels.extent("linear_fwd", wire.F32, dims, 0) == 60
    assert kernels.extent("linear_fwd", wire.F32, dims, 4) == CONFIG


def test_overflow_is_found(kernels: KernelLib) -> None:
    big = 2**62
    assert kernels.extent("gelu_fwd", wire.BF16, [big - 1], 0) == 2 * (big - 1)
    assert kernels.extent("gelu_fwd", wire.F32, [big], 0) == OVERFLOW
    assert kernels.extent("layernorm_fwd", wire.F32, [2**31, 2**31], 0) == OVERFLOW
    assert kernels.extent("layernorm_fwd", wire.F32, [2**32, 2**32], 0) == OVERFLOW
    assert kernels.extent("linear_fwd", wire.F32, [2**32, 8, 8, 2**32, 8, 8], 0) == OVERFLOW
    assert kernels.extent("linear_fwd", wire.F32, [2**32, 8, 8, 8, 8, 8], 0) == 2**32 * 8 * 4
    assert kernels.extent("attention_fwd", wire.F32, [2**40, 2**40, 1, 1, 8, 8, 8, 8, 8], 0) == OVERFLOW
    assert kernels.extent("swiglu_fwd", wire.F32, [1, big], 1) == OVERFLOW
    assert kernels.extent("sumsq", wire.F32, [2**61 - 1], 2) == 2**45 * 8
    assert work(kernels, "attention_fwd", (1, 2**31, 1, 1, 1, 1, 1, 1, 1))[0] == 2 * (2**30 * (2**31 + 1))
    with pytest.raises(AssertionError, match="-11"):
        work(kernels, "attention_fwd", (1, 2**32, 1, 1, 1, 1, 1, 1, 1))


def test_pick_follows_the_attempt_s_numbers(kernels: KernelLib) -> None:
    """0 is the best that runs here; a set that this CPU lacks, a path of GPUs and none at all are refused."""
    if kernels.sets == ("ref",):
        pytest.skip("built without the fast sets")
    assert kernels.c.hs_test_pick(0) == kernels.sets[-1].encode()
    for name in SETS:
        picked = kernels.c.hs_test_pick(wire.PATHS[name]).decode()
        assert picked == name if name in kernels.sets else picked.startswith(f"this CPU lacks kernel path {name}; ")
    for name in ("cuda-exact", "cuda"):
        picked = kernels.c.hs_test_pick(wire.PATHS[name]).decode()
        assert picked.startswith(f"kernel path {name} runs on CUDA devices, and this rank runs on the CPU; choose ")
    for path in (len(wire.PATHS), 2**32 - 1):
        assert kernels.c.hs_test_pick(path).decode().startswith(f"there is no kernel path {path}; ")
