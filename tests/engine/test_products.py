"""Products under kernel path cuda: linear layers and the classifier through the library's seam (libraries.h), with an
emulated cuBLASLt (``emulate_cublaslt.cc`` says what it offers and how it is told to be otherwise).
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from tests.engine.cuda_lib import CudaLib, Refused, build
from tests.engine.kernel_calls import CASES, WITH_DTYPE, Call, Case, assert_close_to_ref
from tests.engine.kernel_lib import Array, KernelLib, decode, encode
from trainer import wire

FP8 = ("linear8_fwd", "linear8_igrad", "linear8_wgrad")
OPS = ("linear_fwd", "linear_igrad", "linear_wgrad", *FP8, "classifier_fwd", "classifier_grad", "logits")
OPS += ("vocab_head", "vocab_sums", "vocab_part")
BIAS = {"linear_fwd": 3, "linear8_fwd": 5}
SPLIT, REDUCE, TF32 = 3, 4, 5
UNSUPPORTED, CONFIG, BUG = -16, -6, -3


@pytest.fixture(scope="module")
def cuda() -> CudaLib:
    return CudaLib(build())


def numbers(table: list[wire.Algorithm]) -> list[int]:
    """Which of the emulated library's algorithms."""
    return [entry.algorithm[0] for entry in table]


def some_call(kernels: KernelLib, kernel: str = "linear_fwd", dtype: int = wire.F32) -> Call:
    return Call.make(kernels, next(case for case in CASES if case.kernel == kernel and min(case.dims[:3]) > 4), dtype)


def chosen(cuda: CudaLib, call: Call, known: list[wire.Algorithm] | None = None) -> list[wire.Algorithm]:
    nothing = [None if x is None else np.zeros_like(x) for x in call.inputs]
    table = cuda.chosen(call.case.kernel, call.dtype, nothing, call.case.dims, call.case.reals, known or [])
    assert not any(x.any() for x in nothing if x is not None), "zero operands did not stay zero"
    return table


def copies(call: Call) -> list[Array | None]:
    return [None if x is None else x.copy() for x in call.inputs]


def written(call: Call, arrays: list[Array | None]) -> list[bytes]:
    return [x.tobytes() for i, _ in call.outputs() if (x := arrays[i]) is not None]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [p for p in WITH_DTYPE if p.values[0].kernel in OPS],  # type: ignore[union-attr]
)
def test_right(kernels: KernelLib, cuda: CudaLib, case: Case, dtype: int) -> None:
    """Every layout, distance between rows, ACCUM, chunk: close to ref; the same bits in any order of the threads."""
    call = Call.make(kernels, case, dtype)
    at = BIAS.get(case.kernel)
    if at is not None and dtype == wire.BF16 and (bias := call.inputs[at]) is not None:
        bias[:] = decode(encode(bias, dtype), dtype)  # the library adds one of the result's type
    table, runs = chosen(cuda, call), []
    for seed in (1, 2):
        cuda.seed(seed)
        runs.append(copies(call))
        cuda.products(case.kernel, dtype, runs[-1], case.dims, case.reals, table)
    assert_close_to_ref(kernels, call, runs[0])
    assert written(call, runs[0]) == written(call, runs[1])


@pytest.mark.parametrize("kernel", FP8)
def test_fp8_is_the_library_s_where_its_sides_are_multiples_of_16(
    kernels: KernelLib, cuda: CudaLib, kernel: str
) -> None:
    """Elsewhere, and in f32, the plain kernel computes it; a device without FP8 is refused."""
    for case in (case for case in CASES if case.kernel == kernel):
        for dtype in (wire.F32, wire.BF16):
            table = chosen(cuda, Call.make(kernels, case, dtype))
            assert len(table) == int(dtype == wire.BF16 and not any(side % 16 for side in case.dims[:3]))
            assert all(entry.key.scale for entry in table)


def test_a_device_without_fp8_is_refused(kernels: KernelLib, cuda: CudaLib) -> None:
    call = Call.make(kernels, next(c for c in CASES if c.kernel == "linear8_fwd" and c.dims[0] == 32), wire.BF16)
    capability = ctypes.c_uint32.in_dll(cuda.c, "hs_test_capability")
    capability.value = 80
    try:
        with pytest.raises(Refused, match=r'"fp8" needs .*8\.9 or more, this device has 8\.0; use another') as refused:
            chosen(cuda, call)
        assert len(chosen(cuda, some_call(kernels))) == 1, "the others stay"
    finally:
        capability.value = 90
    assert refused.value.status == CONFIG


def test_the_table_decides_the_bits(kernels: KernelLib, cuda: CudaLib, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which algorithm is the fastest decides what a table says, and a table what is computed, whatever is fastest."""
    call, results = some_call(kernels), []
    tables = []
    for fastest in (0, 1):
        monkeypatch.setenv("HS_EMULATED_CUBLASLT", f"fastest {fastest}")
        tables.append(chosen(cuda, call))
        assert numbers(tables[-1]) == [fastest]
    for table in (*tables, tables[0]):
        arrays = copies(call)
        cuda.products(call.case.kernel, call.dtype, arrays, call.case.dims, call.case.reals, table)
        results.append(written(call, arrays))
    assert results[0] == results[2] != results[1]


def test_an_algorithm_is_kept_for_the_alignment_that_it_was_offered_for(kernels: KernelLib, cuda: CudaLib) -> None:
    """A library's fast kernels take operands at multiples of 16 bytes alone, and refuse others."""
    case = Case("linear_fwd", (16, 8, 16, 8, 16, 8), absent=(4,))
    call = Call.make(kernels, case, wire.F32)

    def at(byte: int) -> list[Array | None]:
        found = copies(call)
        for i, x in enumerate(found):
            if x is not None:
                room = np.zeros(x.nbytes + 32, np.uint8)
                room = room[(-room.ctypes.data + byte) % 16 :][: x.nbytes].view(x.dtype)
                room[:] = x.reshape(-1)
                found[i] = room
        return found

    tables = {byte: cuda.chosen(case.kernel, wire.F32, at(byte), case.dims) for byte in (0, 4)}
    assert {byte: table[0].key.align_a for byte, table in tables.items()} == {0: 16, 4: 4}
    cuda.products(case.kernel, wire.F32, at(4), case.dims, (), tables[4])
    tables[4][0].algorithm[:] = tables[0][0].algorithm[:]
    with pytest.raises(Refused, match="an unsupported value") as refused:
        cuda.products(case.kernel, wire.F32, at(4), case.dims, (), tables[4])
    assert refused.value.status == BUG


def test_what_a_run_has_is_not_chosen_again(kernels: KernelLib, cuda: CudaLib) -> None:
    call = some_call(kernels, "classifier_grad")
    table = chosen(cuda, call)
    assert len(table) == 6, "a whole chunk's products, and the last one's"
    assert chosen(cuda, call, table) == []
    rest = chosen(cuda, call, table[:2])
    assert [bytes(entry.key) for entry in rest] == [bytes(entry.key) for entry in table[2:]]
    foreign = chosen(cuda, some_call(kernels))
    assert len(chosen(cuda, call, foreign)) == len(table)


@pytest.mark.parametrize("number", [SPLIT, REDUCE, TF32])
def test_a_sum_in_parts_or_of_rounded_operands_is_never_chosen(
    kernels: KernelLib, cuda: CudaLib, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """It is offered first and is the fastest; where nothing else is, none is taken; in a table it is refused."""
    call = some_call(kernels)
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", f"fastest {number}")
    table = chosen(cuda, call)
    assert numbers(table) == [0]
    assert table[0].candidates == 2
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", f"only {number}")
    (plain,) = chosen(cuda, call)
    assert (plain.candidates, bytes(plain.algorithm)) == (0, bytes(64))
    table[0].algorithm[0] = number
    with pytest.raises(
        Refused, match=r"cuBLASLt 13\.1\.0 refuses the algorithm that this run has for a product of"
    ) as no:
        chosen(cuda, call, table)
    assert no.value.status == CONFIG


def test_a_table_that_the_library_refuses_is_told(
    kernels: KernelLib, cuda: CudaLib, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = some_call(kernels)
    table = chosen(cuda, call)
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", f"refuse {numbers(table)[0]}")
    with pytest.raises(
        Refused, match=r"not supported\); go on with the library and device that it began with, or "
    ) as no:
        chosen(cuda, call, table)
    assert no.value.status == CONFIG


@pytest.mark.parametrize(
    ("said", "status", "words"),
    [
        ("missing", UNSUPPORTED, "said to be missing"),
        ("version 120800", UNSUPPORTED, r"cuBLASLt 12\.8\.0 was found, and this build needs version 13"),
    ],
)
def test_a_library_that_does_not_do(
    kernels: KernelLib, cuda: CudaLib, monkeypatch: pytest.MonkeyPatch, said: str, status: int, words: str
) -> None:
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", said)
    with pytest.raises(Refused, match=words) as refused:
        chosen(cuda, some_call(kernels))
    assert refused.value.status == status


def test_a_candidate_that_the_library_refuses_after_all_is_passed_over(
    kernels: KernelLib, cuda: CudaLib, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", "fastest 0 balk 0")
    assert numbers(chosen(cuda, some_call(kernels))) == [1]


@pytest.mark.parametrize("said", [f"only {SPLIT}", "only 1 balk 1"])
@pytest.mark.parametrize("kernel", OPS)
def test_what_the_library_has_none_for_is_the_plain_kernel_s(
    kernels: KernelLib, cuda: CudaLib, monkeypatch: pytest.MonkeyPatch, kernel: str, said: str
) -> None:
    """Every kind of product, types, bias and what is added; a library that can do it later changes no bits."""
    some = sorted((case for case in CASES if case.kernel == kernel), key=lambda case: math.prod(case.dims[:3]))
    some = [case for case in some if kernel not in FP8 or not any(side % 16 for side in case.dims[:3])]
    for dtype in (wire.F32, wire.BF16)[kernel in FP8 :]:
        for case in {some[0], some[len(some) // 2 if said.startswith("only 3") else 0]}:
            call = Call.make(kernels, case, dtype)
            at = BIAS.get(kernel)
            if at is not None and dtype == wire.BF16 and (bias := call.inputs[at]) is not None:
                bias[:] = decode(encode(bias, dtype), dtype)
            monkeypatch.setenv("HS_EMULATED_CUBLASLT", said)
            table, runs = chosen(cuda, call), []
            assert table
            assert {entry.candidates for entry in table} == {0}
            for _ in range(2):
                runs.append(copies(call))
                cuda.products(kernel, dtype, runs[-1], case.dims, case.reals, table)
                monkeypatch.delenv("HS_EMULATED_CUBLASLT", raising=False)
            assert_close_to_ref(kernels, call, runs[0])
            assert written(call, runs[0]) == written(call, runs[1])


def test_a_product_that_fails_is_told(kernels: KernelLib, cuda: CudaLib, monkeypatch: pytest.MonkeyPatch) -> None:
    call = some_call(kernels)
    table = chosen(cuda, call)
    monkeypatch.setenv("HS_EMULATED_CUBLASLT", f"balk {numbers(table)[0]}")
    with pytest.raises(Refused, match=r"cuBLASLt 13\.1\.0 failed in a product of .*not supported") as refused:
        cuda.products(call.case.kernel, call.dtype, copies(call), call.case.dims, call.case.reals, table)
    assert refused.value.status == BUG


def test_a_product_without_an_algorithm_is_a_bug(kernels: KernelLib, cuda: CudaLib) -> None:
    call = some_call(kernels)
    with pytest.raises(Refused, match="was never asked for") as refused:
        cuda.products(call.case.kernel, call.dtype, copies(call), call.case.dims, call.case.reals, [])
    assert refused.value.status == BUG


def test_every_block_of_rows_has_the_same_key(kernels: KernelLib, cuda: CudaLib) -> None:
    """A chunk's rows may begin at odd addresses: alignment is that of all rows."""
    case = Case("classifier_grad", (21, 33, 40, 5, 0), (0.5,))
    call = Call.make(kernels, case, wire.BF16)
    assert_close_to_ref(kernels, call, call.run(cuda, "library"))


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_rows_of_logits_in_shared_memory_have_the_same_bits(kernels: KernelLib, cuda: CudaLib, dtype: int) -> None:
    """Several rows a block, one of them left out, the last pack half there; without processors rows are read twice."""
    call = Call.make(kernels, Case("classifier_grad", (13, 3, 8204, 6, 0), (0.5,)), dtype)
    processors = ctypes.c_uint32.in_dll(cuda.c, "hs_test_processors")
    found = []
    for number in (1, 0):
        processors.value = number
        try:
            results = call.run(cuda, "library")
        finally:
            processors.value = 1
        found.append([x.tobytes() for x in results])
        assert_close_to_ref(kernels, call, results)
    assert found[0] == found[1]


def test_numbers_and_sizes_are_those_of_the_header() -> None:
    assert (ctypes.sizeof(wire.AlgorithmKey), ctypes.sizeof(wire.Algorithm), ctypes.sizeof(wire.Algorithms)) == (
        72, 152, 152,
    )  # fmt: skip
