"""The kernels for arm64, under qemu: the bits of the paths ``neon`` and ``portable`` there are those of x86's."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

from tests.engine.kernel_calls import WITH_DTYPE, Call, Case
from tests.engine.kernel_lib import KernelLib, build_server
from tests.engine.kernel_served import ServedKernels, cross_compiler, emulator
from trainer import wire

pytestmark = pytest.mark.slow

QEMU = emulator()


@pytest.fixture(scope="module", params=["gcc", "zig"])
def arm64(request: pytest.FixtureRequest) -> Iterator[ServedKernels]:
    """The kernels as each compiler makes them."""
    if QEMU is None:
        pytest.skip("no qemu-user here (on Debian: apt-get install qemu-user-static)")
    cc = cross_compiler(request.param)
    if cc is None:
        pytest.skip("no cross compiler here (on Debian: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross)")
    served = ServedKernels(QEMU, build_server(cc))
    yield served
    served.close()


@pytest.mark.parametrize(("case", "dtype"), WITH_DTYPE)
def test_equal_bits(kernels: KernelLib, arm64: ServedKernels, case: Case, dtype: int) -> None:
    call = Call.make(kernels, case, dtype)
    first = call.run(kernels, kernels.sets[-1])
    runs = {
        "portable": call.run(arm64, "portable"),
        "neon": call.run(arm64, "neon"),
        "neon, guarded behind": call.run(arm64, "neon", guard="after"),
        "neon, guarded before": call.run(arm64, "neon", guard="before"),
        "neon, 3 threads": call.run(arm64, "neon", threads=3),
    }
    for label, arrays in runs.items():
        for i, _ in call.outputs():
            x, want = arrays[i], first[i]
            assert x is not None
            assert want is not None
            assert x.tobytes() == want.tobytes(), f"operand {i} differs: {label}"


def test_numbers_that_are_not_finite_and_denormal_ones(kernels: KernelLib, arm64: ServedKernels) -> None:
    """NaN, infinities, both zeros and denormal numbers through kernels that compare, round and divide: what is a NaN on
    one processor is one on the other, and all else has the same bits."""
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 3.4e38, -3.4e38, 1.0], np.float32)
    rng = np.random.default_rng(5)
    for kernel, dims in (("gelu_fwd", (257,)), ("cast", (257,)), ("add_acc", (257,)), ("swiglu_fwd", (3, 43))):
        for dtype in (wire.F32, wire.BF16):
            inputs = kernels.operands(kernel, dtype, dims, rng)
            for x in inputs:
                assert x is not None
                if x.dtype == np.float32:
                    x[:] = rng.choice(odd, x.size)
                else:
                    x[:] = rng.choice((odd.view(np.uint32) >> 16).astype(np.uint16), x.size)
            sides = []
            for lib, name in ((kernels, "portable"), (arm64, "portable"), (arm64, "neon")):
                arrays = [None if x is None else x.copy() for x in inputs]
                lib.call(kernel, dtype, arrays, dims, set_name=name)
                out = arrays[0]
                assert out is not None
                wide = out if out.dtype == np.float32 else (out.astype(np.uint32) << 16).view(np.float32)
                sides.append(np.where(np.isnan(wide), np.float32(np.nan), wide).tobytes())
            assert sides[1] == sides[0], (kernel, dtype)
            assert sides[2] == sides[0], (kernel, dtype)


def test_digests_by_the_processors_instructions(arm64: ServedKernels) -> None:
    data = np.random.default_rng(0).bytes(100_003)
    for count in (1, 2, 55, 56, 63, 64, 65, 127, 128, 129, 1000, 4097, 100_003):
        piece = data[:count]
        sha, crcs, has = arm64.digests(piece)
        assert has
        assert sha == [hashlib.sha256(piece).digest()] * 2
        assert crcs[0] == crcs[1]
        assert crcs[2] == zlib.crc32(piece)
