"""Every kernel on the device through the backend's table: near the oracle, with the CPU's bits where cuda.h promises
them, the same bits each time and wherever operands lie, and nothing but its outputs changed. One body for a GPU and for
the emulated library; ``HOTSTAGE_GPU_PATH`` is the kernel path, ``HOTSTAGE_GPU_CASES``: ``odd`` are the odd shapes,
``large`` the real ones, whose oracle takes the host long; ``few`` are the small cases (compute-sanitizer); ``one`` is
the smallest of each kernel that is no trifle, ``one-large`` a large one (rehearsal). ``HOTSTAGE_GPU_OURS=1`` leaves
products of a library out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.engine.kernel_calls import CASES, Call, Case, assert_close_to_ref, attention_cases
from tests.engine.kernel_lib import Array, KernelLib, decode, encode
from tests.engine.test_kernels_cuda import ON_DEVICES, OWN_ORDER
from tests.gpu.device_lib import DeviceLib
from tests.gpu.under_pytest import LOST
from trainer import wire

# on the path with tensor cores these have bits of their own: a library's products, our flash attention
TENSOR_CORES = ("attention", "linear", "logits", "classifier", "quant", "vocab")
PRODUCTS = ("linear", "logits")  # a library's alone on path cuda
FLASH = (32, 64, 96, 128)  # widths of a head that our attention on tensor cores takes
BIAS = {"linear_fwd": 3, "linear8_fwd": 5}  # which operand it is
# and these may round what is between two products (probabilities, gradients of logits) to bf16: of the largest output
ROUNDED, ROUNDED_REL = ("attention", "classifier", "vocab_head", "vocab_part"), 2.0**-6

# of a real model: loops that go round often, grids of many blocks; of rows as few as do, for the oracle has one thread:
# all of it takes less than two minutes a path
LARGE = [
    Case("embed_wgrad", (2048, 768, 50304, 1024)),
    Case("layernorm_fwd", (1024, 768), (1e-5,), rel=1e-5),
    Case("layernorm_wgrad", (4096, 768), rel=1e-5),
    Case("rmsnorm_igrad", (1024, 1, 2048, 2048, 2048, 2048, 0), rel=1e-5),
    Case("linear_fwd", (512, 2304, 768, 2304, 768, 2304)),
    Case("linear_igrad", (512, 3072, 768, 768, 3072, 0)),
    Case("linear_wgrad", (512, 768, 3072, 768, 3072, 1)),
    Case("attention_fwd", (1, 1024, 12, 12, 64, 768, 2304, 2304, 2304), (0.125,), rel=1e-5),
    Case("attention_igrad", (1, 1024, 12, 12, 64, 768, 2304, 2304, 2304, 768, 2304, 2304, 2304), (0.125,), rel=4e-5),
    Case("attention_fwd", (1, 2048, 8, 2, 128, 1024, 1024, 256, 256), (128**-0.5,), rel=1e-5),
    *attention_cases(1, 2048, 8, 2, 128, documents=True),
    *attention_cases(1, 2048, 4, 4, 64, window=512),
    Case("classifier_grad", (32, 768, 50304, 16, 0), (1 / 32,), rel=1e-5),
    Case("gelu_fwd", (1024 * 3072,), rel=1e-6),
    Case("gelu_fwd", (5 << 21,), rel=1e-6),  # so many are looked up
    Case("gelu_igrad", (5 << 21,), rel=1e-6),
    Case("swiglu_fwd", (640, 1 << 14), rel=1e-6),
    Case("swiglu_igrad", (512, 8192), rel=1e-6),
    Case("sumsq", (768 * 50304,), rel=1e-12, f32_only=True),
    Case("adamw", (768 * 3072, 1), (0.9, 0.95, 1e-8, 0.1), rel=1e-6),
    Case("init_normal", (768 * 3072, 3, 0), (0.0, 0.02), rel=2e-6, f32_only=True),
]


def _size(case: Case) -> float:
    return float(np.prod([float(d) for d in case.dims[:3]]))


def _chosen() -> Iterator[Case]:
    which = os.environ.get("HOTSTAGE_GPU_CASES", "all")
    kernels = [k for k in ON_DEVICES if not (os.environ.get("HOTSTAGE_GPU_OURS") and k.startswith(PRODUCTS))]
    if which == "one":
        for kernel in kernels:
            some = sorted((case for case in CASES if case.kernel == kernel), key=_size)
            yield next((case for case in some if _size(case) > 100), some[-1])
    if which == "one-large":
        yield next(case for case in LARGE if case.kernel == "layernorm_fwd")
    cases = (case for case in CASES if case.kernel in kernels)
    if which in ("all", "odd", "few"):
        yield from (case for case in cases if which != "few" or _size(case) < 40_000)
    if which in ("all", "large"):
        yield from LARGE


def _key(case: Case, dtype: int) -> str:
    return f"{case.name}-{'f32' if dtype == wire.F32 else 'bf16'}"


PARAMETERS = [
    pytest.param(case, dtype, id=_key(case, dtype))
    for case in _chosen()
    for dtype in (wire.F32, wire.BF16)
    if dtype == wire.F32 or not case.f32_only
]


def written(call: Call, arrays: list[Array | None]) -> list[bytes]:
    return [x.tobytes() for i, _ in call.outputs() if (x := arrays[i]) is not None]


@pytest.fixture(autouse=True)
def _a_device_that_works(device: DeviceLib) -> Iterator[None]:
    """A failure stays with a device, which is opened again. Where that fails (after a bad access CUDA gives a process
    none any more) the rest waits for another process (stages.py).
    """
    if device.lost:
        pytest.skip(LOST)
    yield
    if device.failed:
        device.reopen()


def on(device: DeviceLib, call: Call, shift: int = 0) -> list[Array | None]:
    """What the device makes of a call."""
    arrays = [None if x is None else x.copy() for x in call.inputs]
    device.call(call.case.kernel, call.dtype, arrays, call.case.dims, call.case.reals, shift=shift)
    return arrays


def by_plain_attention(case: Case, dtype: int) -> bool:
    """Attention that tensor cores do not take (hs_cuda_flash_takes): the CPU's bits on either path."""
    return case.kernel.startswith("attention") and (dtype == wire.F32 or case.dims[4] not in FLASH)


@pytest.mark.parametrize(("case", "dtype"), PARAMETERS)
def test_kernel(kernels: KernelLib, device: DeviceLib, path: str, case: Case, dtype: int) -> None:
    call = Call.make(kernels, case, dtype)
    at = BIAS.get(case.kernel)
    if path == "cuda" and at is not None and dtype == wire.BF16 and (bias := call.inputs[at]) is not None:
        bias[:] = decode(encode(bias, dtype), dtype)  # a library adds one of the result's type
    got = on(device, call)
    assert written(call, on(device, call)) == written(call, got), "a second call gives other bits"
    own = path == "cuda" and case.kernel.startswith(TENSOR_CORES) and not by_plain_attention(case, dtype)
    if own and dtype == wire.BF16 and case.kernel.startswith(ROUNDED):
        assert_near(kernels, call, got)
    else:
        assert_close_to_ref(kernels, call, got)
    if own:
        return
    assert written(call, on(device, call, shift=1)) == written(call, got), "other bits where operands are not aligned"
    fast = call.run(kernels, kernels.sets[-1], threads=len(os.sched_getaffinity(0)))
    for i, _ in call.outputs():
        name, x, y = wire.KERNELS[case.kernel].operands[i].name, got[i], fast[i]
        assert x is not None
        assert y is not None
        if name not in OWN_ORDER.get(case.kernel, set()):
            assert x.tobytes() == y.tobytes(), f"{name} has other bits than the CPU's"


def assert_near(kernels: KernelLib, call: Call, got: list[Array | None]) -> None:
    """Each output within a part of its largest element."""
    want = call.run(kernels, "ref")
    for i, kind in call.outputs():
        w, x = want[i], got[i]
        assert w is not None
        assert x is not None
        if kind == 0:
            continue
        w, x = decode(w, kind), decode(x, kind)
        assert np.isfinite(x).all()
        worst = np.abs(x - w).max() / max(np.abs(w).max(), 1e-30)
        assert worst <= ROUNDED_REL, f"operand {i}: off by {worst:.3g} of its largest element"
