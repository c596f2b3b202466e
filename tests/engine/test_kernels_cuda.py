"""The CUDA kernels, emulated: against the oracle, bit for bit against the CPU set where they promise it, under the
address sanitizer, and with faults planted: what the emulator does not see, no test here sees.

The emulated build is the same .cu source (trainer/engine/kernels/cuda/emulate.h says what it models). No GPU is needed.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from tests.engine.chains import least_numbers
from tests.engine.cuda_lib import CUDA, SYNC, WAIT, CudaLib, build, sanitized
from tests.engine.kernel_calls import (
    CASES,
    WITH_DTYPE,
    WRITING,
    Call,
    Case,
    assert_close_to_ref,
    assert_written_as_added_to_zero,
    attention_cases,
    bits_by_chunk,
    head_in_parts,
    head_in_place,
)
from tests.engine.kernel_lib import Array, KernelLib, decode, encode
from trainer import wire

# cuda.h: operands whose sums have an order of this set's own; everything else has the CPU set's bits
OWN_ORDER = {
    "layernorm_wgrad": {"dw", "db"},
    "rmsnorm_wgrad": {"dw"},
    "linear_wgrad": {"db"},
    "linear8_wgrad": {"db"},
    "classifier_fwd": {"loss"},
    "classifier_grad": {"loss", "dx", "dw"},
    "vocab_head": {"loss", "dx", "dw"},
    "vocab_sums": {"sums"},
}
CONTROL_BYTES = ctypes.sizeof(wire.StepControl)
HALF_WARP = 0xFFFF0000  # lanes that walk past
SEEDS = range(1, 9)


@pytest.fixture(scope="module")
def cuda() -> CudaLib:
    return CudaLib(build())


def bits(call: Call, arrays: list[Array | None]) -> list[bytes]:
    """What the kernel wrote."""
    return [x.tobytes() for i, _ in call.outputs() if (x := arrays[i]) is not None]


ON_DEVICES = [name for name in wire.KERNELS if name != "delay"]


@pytest.mark.parametrize(("case", "dtype"), [p for p in WITH_DTYPE if p.values[0].kernel in ON_DEVICES])  # type: ignore[union-attr]
def test_right_and_equal(kernels: KernelLib, cuda: CudaLib, case: Case, dtype: int) -> None:
    """Close to ref; the same bits in any order of threads and blocks, and wherever operands lie; the CPU set's bits
    where cuda.h says so."""
    call = Call.make(kernels, case, dtype)
    cuda.seed(1)
    got = call.run(cuda, "cuda")
    assert_close_to_ref(kernels, call, got)
    cuda.seed(2)
    assert bits(call, call.run(cuda, "cuda")) == bits(call, got)
    if max(case.dims) <= (130 if case.kernel.startswith(("attention", "classifier", "linear", "vocab")) else 50_000):
        assert bits(call, one_element_later(cuda, call)) == bits(call, got)
    fast = call.run(kernels, kernels.sets[-1])
    for i, _ in call.outputs():
        name, x, y = wire.KERNELS[case.kernel].operands[i].name, got[i], fast[i]
        assert x is not None
        assert y is not None
        if name not in OWN_ORDER.get(case.kernel, set()):
            assert x.tobytes() == y.tobytes(), f"{name} has other bits than the CPU's"


def one_element_later(cuda: CudaLib, call: Call) -> list[Array | None]:
    """What comes out where operands begin an element after a multiple of 16 bytes: wide accesses are for addresses that
    allow them."""
    shifted: list[Array | None] = []
    for x in call.inputs:
        buffer = None if x is None else np.zeros(x.size + 16, x.dtype)
        if buffer is not None and x is not None:
            first = (-buffer.ctypes.data % 16) // x.itemsize + (0 if x.nbytes == CONTROL_BYTES else 1)
            buffer = buffer[first : first + x.size]
            buffer[:] = x.reshape(-1)
        shifted.append(buffer)
    cuda.call(call.case.kernel, call.dtype, shifted, call.case.dims, call.case.reals)
    return shifted


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
@pytest.mark.parametrize("case", WRITING, ids=lambda case: case.name)
def test_a_gradient_that_is_written(kernels: KernelLib, cuda: CudaLib, case: Case, dtype: int) -> None:
    assert_written_as_added_to_zero(cuda, Call.make(kernels, case, dtype), "cuda")


@pytest.mark.parametrize("types", ["turns", pytest.param("both", marks=pytest.mark.slow)])
def test_nothing_outside_the_operands_is_touched(types: str) -> None:
    done = sanitized(types)
    assert done.returncode == 0, done.stderr[-4000:]


ODD_NUMBERS = [
    np.nan,
    np.inf,
    -np.inf,
    0.0,
    -0.0,
    1e-40,
    -3e-39,
    3e38,
    -3e38,
    88.5,
    -87.0,
    1 + 2.0**-8,
    1 + 3 * 2.0**-9,
]


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
@pytest.mark.parametrize("kernel", [name for name in ON_DEVICES if name not in OWN_ORDER])
def test_odd_numbers(kernels: KernelLib, cuda: CudaLib, kernel: str, dtype: int) -> None:
    """NaN, infinities, denormals, ties of rounding: NaN where the CPU has it, the CPU's bits elsewhere."""
    cases = [case for case in CASES if case.kernel == kernel]
    case = min(cases, key=lambda case: abs(kernels.extent(kernel, dtype, case.dims, 0) - 4000))  # of some size
    call = Call.make(kernels, case, dtype)
    for x, operand in zip(call.inputs, wire.KERNELS[kernel].operands, strict=True):
        if x is not None and operand.kind in ("dt", "acc") and operand.role != "write":
            at = np.random.default_rng(5).permutation(x.size)[: min(len(ODD_NUMBERS), x.size // 3)]
            kind = dtype if operand.kind == "dt" else wire.F32
            x.reshape(-1)[at] = encode(np.array(ODD_NUMBERS[: at.size], np.float32), kind)
    with np.errstate(all="ignore"):
        got, want = call.run(cuda, "cuda"), call.run(kernels, kernels.sets[-1])
        for i, kind in call.outputs():
            x, y = got[i], want[i]
            assert x is not None
            assert y is not None
            if kind == 0:
                assert x.tobytes() == y.tobytes()
                continue
            nan = np.isnan(decode(x, kind))
            assert np.array_equal(nan, np.isnan(decode(y, kind)))
            assert x[~nan].tobytes() == y[~nan].tobytes()


def test_a_nan_that_is_rounded_keeps_its_sign_and_payload(kernels: KernelLib, cuda: CudaLib) -> None:
    """Sixteen bytes of bf16 are rounded in pairs, one by one where a NaN is among them; infinity is none."""
    case = max((case for case in CASES if case.kernel == "cast"), key=lambda case: case.dims[0])
    call = Call.make(kernels, case, wire.BF16)
    numbers = call.inputs[1]
    assert numbers is not None
    words = numbers.reshape(-1).view(np.uint32)
    words[::19], words[5::23], words[3::7] = 0xFFC12345, 0x7F80FFFF, 0xFF800000
    got, want = call.run(cuda, "cuda")[0], call.run(kernels, kernels.sets[-1])[0]
    assert got is not None
    assert want is not None
    assert got.tobytes() == want.tobytes()
    assert {0xFFC1, 0x7FC0, 0xFF80} <= set(got.view(np.uint16).reshape(-1).tolist())


def test_denormal_numbers_of_bf16_products_are_zero(kernels: KernelLib, cuda: CudaLib) -> None:
    """As on CPUs, where sums are about the least normal number; the inner length is odd."""
    rng = np.random.default_rng(13)
    r, n, k = 13, 64, 65
    dy, x = least_numbers(rng, (r, n), -70, -55), least_numbers(rng, (r, k), -75, -60)
    old = np.ldexp(rng.normal(size=(n, k)), rng.integers(-135, -120, (n, k))).astype(np.float32)
    ours, theirs = old.copy(), old.copy()
    kernels.call("linear_wgrad", wire.BF16, [ours, None, dy, x], (r, n, k, n, k, 1), set_name="portable")
    cuda.call("linear_wgrad", wire.BF16, [theirs, None, dy, x], (r, n, k, n, k, 1))
    assert theirs.tobytes() == ours.tobytes()


# So many elements of bf16 that one processor looks them up.
LOOKUP_CASES = [Case("gelu_fwd", (1 << 17,)), Case("gelu_igrad", (1 << 17,)), Case("swiglu_fwd", (2, 1 << 16))]


@pytest.mark.parametrize("case", LOOKUP_CASES, ids=lambda case: case.kernel)
def test_every_number_of_bf16_is_looked_up(kernels: KernelLib, cuda: CudaLib, case: Case) -> None:
    """Each of the 65,536, times others of any size, some whose products are ties of rounding, and denormal ones."""
    call = Call.make(kernels, case, wire.BF16)
    numbers = np.arange(1 << 16, dtype=np.uint16)
    x = call.inputs[2 if case.kernel == "gelu_igrad" else 1]
    assert x is not None
    mixed = np.random.default_rng(8).permutation(numbers)
    for others in (mixed, mixed % 128 | 0x3F81, mixed % 32 | 0xBF60, mixed % 128 | 0x0001):
        for operand in call.inputs:
            if operand is not None:
                operand.reshape(-1, numbers.size)[:] = others
        x.reshape(-1, numbers.size)[0] = numbers
        with np.errstate(all="ignore"):
            got, want = call.run(cuda, "cuda")[0], call.run(kernels, kernels.sets[-1])[0]
            assert got is not None
            assert want is not None
            assert any(file.endswith("lookup.h") for file, _, _ in cuda.sites())
            nan = np.isnan(decode(want, wire.BF16))
            assert np.array_equal(nan, np.isnan(decode(got, wire.BF16)))
        assert got[~nan].tobytes() == want[~nan].tobytes()


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_in_place(cuda: CudaLib, dtype: int) -> None:
    """What the table calls MAY_BE: the output on top of an input gives the same bits."""
    rng = np.random.default_rng(6)
    n, r, f = 4099, 37, 56
    x, dy = (encode(rng.normal(size=n), dtype) for _ in range(2))
    dx = np.empty_like(x)
    cuda.call("gelu_igrad", dtype, [dx, dy, x], (n,))
    cuda.call("gelu_igrad", dtype, [dy, dy, x], (n,))
    assert dx.tobytes() == dy.tobytes()
    gu, g = encode(rng.normal(size=(r, 2 * f)), dtype), encode(rng.normal(size=(r, f)), dtype)
    dgu = np.empty_like(gu)
    cuda.call("swiglu_igrad", dtype, [dgu, g, gu], (r, f))
    cuda.call("swiglu_igrad", dtype, [gu, g, gu], (r, f))
    assert dgu.tobytes() == gu.tobytes()
    if dtype == wire.F32:
        for path in ("cuda", "library"):
            assert head_in_place(cuda, path, True) == head_in_place(cuda, path, False)


@pytest.mark.parametrize("kernel", ["layernorm_wgrad", "rmsnorm_wgrad", "linear_wgrad"])
def test_a_column_s_sum_does_not_know_its_neighbours(cuda: CudaLib, kernel: str) -> None:
    rng = np.random.default_rng(3)
    r, c = 201, 75
    x, dy = (rng.normal(size=(r, c)).astype(np.float32) for _ in range(2))
    mean, rstd = (rng.normal(size=r).astype(np.float32) for _ in range(2))

    def sums(columns: slice) -> Array:
        d, v = dy[:, columns].copy(), x[:, columns].copy()
        n = d.shape[1]
        dw, db = np.ones(n, np.float32), np.ones(n, np.float32)
        if kernel == "layernorm_wgrad":
            cuda.call(kernel, wire.F32, [dw, db, d, v, mean, rstd], (r, n))
        elif kernel == "rmsnorm_wgrad":
            cuda.call(kernel, wire.F32, [dw, d, v, rstd], (r, 1, n, n, n))
        else:
            cuda.call(kernel, wire.F32, [np.ones((n, n), np.float32), db, d, v], (r, n, n, n, n, 1))
        return np.stack([dw, db])

    assert sums(slice(0, c))[:, 37:70].tobytes() == sums(slice(37, 70)).tobytes()


@pytest.mark.parametrize("dtype", [wire.F32, wire.BF16])
def test_a_head_in_parts_has_the_bits_of_the_whole(cuda: CudaLib, dtype: int) -> None:
    for path in ("cuda", "library"):
        whole = head_in_parts(cuda, path, dtype, 0)
        assert all(head_in_parts(cuda, path, dtype, parts) == whole for parts in (1, 2, 4, 8)), path


def test_chunks_do_not_change_bits(cuda: CudaLib) -> None:
    results = bits_by_chunk(cuda, "cuda")
    assert all(x == results[0] for x in results)


# --- the emulator sees what is wrong ----------------------------------------------------------------------


HERE = r"cuda_lib\.cc:\d+"


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        pytest.param(2, f"wait for each other .*0-39 .* __syncthreads, {HERE}; 40-63 .* a shuffle", id="some threads"),
        pytest.param(3, f"0-15 stand at a shuffle of mask ffffffff, {HERE}; 16-31 have returned", id="half a warp"),
        pytest.param(4, r"thread \d+ reads lane \d+, which is not in the mask 0000ffff", id="a lane outside the mask"),
        pytest.param(7, r"16 bytes at an address that is no multiple of 16, device\.h:\d+", id="not aligned"),
        pytest.param(8, f"0-31 stand at __syncthreads, {HERE}; 32-63 stand at __syncthreads", id="two barriers"),
    ],
)
def test_faults_are_told(cuda: CudaLib, kind: int, told: str) -> None:
    rc, _ = sick(cuda, kind)
    assert rc == -3
    assert cuda.text().startswith("sick, block (0,0,0): ")
    assert re.search(told, cuda.text()), cuda.text()


def sick(cuda: CudaLib, kind: int, seed: int = 1) -> tuple[int, Array]:
    buffer = np.arange(68, dtype=np.float32)
    x, out = buffer[(-buffer.ctypes.data // 4) % 4 :][:64], np.zeros(64, np.float32)  # x is a multiple of 16
    cuda.seed(seed)
    return int(cuda.c.hs_test_sick(*(ctypes.c_void_p(a.ctypes.data) for a in (out, x)), kind)), out


def test_shared_memory_of_a_launch_and_of_arrays_is_one(cuda: CudaLib) -> None:
    """99 KiB where nobody said more: what fits alone does not fit beside an array."""
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    addresses = [ctypes.c_void_p(a.ctypes.data) for a in (out, x)]
    own = x.nbytes  # of sick's array
    assert cuda.c.hs_test_beside(*addresses, ctypes.c_uint64((99 << 10) - own)) == 0
    assert cuda.c.hs_test_beside(*addresses, ctypes.c_uint64((99 << 10) - own + 1)) == -3
    assert "256 bytes in arrays of shared memory beside 101121 that the launch asks for" in cuda.text()


def test_a_barrier_that_is_missing_and_an_element_that_nobody_wrote_show(cuda: CudaLib) -> None:
    rc, good = sick(cuda, 0)
    assert rc == 0
    assert good[0] == sum(range(1, 33))
    wrong = [sick(cuda, 1, seed) for seed in SEEDS]
    assert all(rc == 0 for rc, _ in wrong)
    assert all(out.tobytes() != good.tobytes() for _, out in wrong)
    _, unwritten = sick(cuda, 5)
    assert np.isnan(unwritten[:32]).all()


def test_a_read_beyond_a_shared_array_is_found() -> None:
    done = sanitized("sick", "6")
    assert done.returncode == 99
    assert "global-buffer-overflow" in done.stderr


# Enough of every kernel that has barriers or shuffles: loops that go round more than once, ragged ends.
FAULT_CASES = [
    *(case for case in CASES if case.kernel.startswith("attention") and case.dims[1] in (65, 130)),
    *(case for case in CASES if case.kernel.startswith("layernorm") and case.dims[0] == 40),
    *(case for case in CASES if case.kernel.startswith("rmsnorm") and case.dims[0] == 33),
    *(case for case in CASES if case.kernel.startswith("linear") and case.dims[0] == 13),
    *(case for case in CASES if case.kernel.startswith(("classifier", "vocab")) and case.dims[0] == 20),
    *(case for case in CASES if case.kernel.startswith("embed_wgrad")),
    *(case for case in CASES if case.kernel == "quantise" and case.dims[0] == 130),
    *(case for case in CASES if case.kernel == "borders" and case.dims[1] == 700),
    *(case for case in CASES if case.kernel in ("sumsq", "sumsq_parts") and case.dims[0] > 65536 * 3),
    *(case for case in CASES if case.kernel == "sum" and case.dims[0] > 512),
    Case("classifier_grad", (6, 3, 36, 6, 0), (0.5,)),  # V is a multiple of 4: path cuda takes rows into shared memory
]


# The same of path cuda's attention: several tiles of both sides.
FLASH_FAULT_CASES = [
    *attention_cases(1, 200, 2, 1, 64, 8),
    attention_cases(1, 200, 1, 1, 128)[0],
    *attention_cases(1, 200, 1, 1, 32, documents=True),
]

Passed = dict[tuple[str, int, int], list[tuple[Call, str, list[bytes]]]]


@pytest.fixture(scope="module")
def passed(kernels: KernelLib, cuda: CudaLib) -> Passed:
    """By barrier, wait or warp operation the calls that pass it, with what they should write; the shortest first."""
    found: Passed = {}
    for case in [*FAULT_CASES, *FLASH_FAULT_CASES, *LOOKUP_CASES]:
        flash = case in FLASH_FAULT_CASES
        call = Call.make(kernels, case, wire.F32 if case in FAULT_CASES else wire.BF16)
        for path in (
            ("flash",)
            if flash
            else ("cuda", "library")
            if case.kernel.startswith(("classifier", "vocab"))
            else ("cuda",)
        ):
            cuda.seed(1)
            good = bits(call, call.run(cuda, path))
            for site in cuda.sites():
                found.setdefault(site, []).append((call, path, good))
    return found


def shows(cuda: CudaLib, call: Call, path: str, good: list[bytes], seed: int) -> bool:
    """Whether something is seen to be wrong: other bits, or a fault that the emulator tells."""
    cuda.seed(seed)
    try:
        return bits(call, call.run(cuda, path)) != good
    except AssertionError:
        assert cuda.text()
        return True


@pytest.mark.parametrize(
    ("op", "text"), [(SYNC, "__syncthreads()"), (WAIT, "hs_copies_wait<")], ids=["barrier", "wait"]
)
def test_every_barrier_is_needed_and_missed(cuda: CudaLib, passed: Passed, op: int, text: str) -> None:
    """Each taken out in turn: at least one call shows it, under one of a few orders of the threads."""
    places = [site for site in passed if site[2] == op]
    assert len(places) == sum(
        path.read_text().count(text)
        for path in CUDA.iterdir()
        if not path.name.startswith("emulate") and path.name != "tensor.h"
    ), f"the cases pass only {places}"
    for file, line, _ in places:
        with cuda.without(file, line):
            seen = any(shows(cuda, *call, seed) for seed in SEEDS for call in passed[file, line, op])
        assert seen, f"without the barrier at {file}:{line} nothing comes out wrong"


def test_every_warp_operation_by_half_a_warp_is_told(cuda: CudaLib, passed: Passed) -> None:
    """Shuffles, mma, ldmatrix."""
    operations = [site for site in passed if site[2] not in (SYNC, WAIT)]
    assert len({file for file, _, _ in operations}) >= 6
    for file, line, op in operations:
        call, path, _ = passed[file, line, op][0]
        cuda.seed(1)
        with cuda.without(file, line, HALF_WARP), pytest.raises(AssertionError, match="threads wait for each other"):
            call.run(cuda, path)
