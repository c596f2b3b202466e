"""The emulated CUDA kernels under the address sanitizer, in a process that has its runtime preloaded (cuda_lib.py).

python -m tests.engine.cuda_asan LIBRARY both       every case once in each element type; operands are exactly as long
                                                    as the extents say
python -m tests.engine.cuda_asan LIBRARY turns      every case in one type: of each kernel by turns
python -m tests.engine.cuda_asan LIBRARY sick KIND  a kernel with a fault, of cuda_lib.cc
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.engine.cuda_lib import CudaLib
from tests.engine.kernel_calls import CASES, Call, Case
from tests.engine.kernel_lib import KernelLib, build
from tests.engine.test_flash import FLASH_CASES
from tests.engine.test_kernels_cuda import ON_DEVICES
from trainer import wire


def typed(turns: bool) -> Iterator[tuple[Case, int]]:
    """Cases with their element types."""
    before = Counter[str]()
    for case in CASES:
        if case.kernel in ON_DEVICES:
            types = (wire.F32,) if case.f32_only else (wire.F32, wire.BF16)
            n = before[case.kernel]
            # 0 1 1 0 …: cases of a shape come two by two, so each of the two has both types
            for dtype in (types[(n + n // 2) % len(types)],) if turns else types:
                yield case, dtype
            before[case.kernel] += 1


def main() -> int:
    lib = CudaLib(Path(sys.argv[1]))
    if sys.argv[2] == "sick":
        x, out = np.arange(64, dtype=np.float32), np.empty(64, np.float32)
        addresses = [ctypes.c_void_p(a.ctypes.data) for a in (out, x)]
        return abs(int(lib.c.hs_test_sick(*addresses, int(sys.argv[3]))))
    oracle = KernelLib(build())
    for case, dtype in typed(sys.argv[2] == "turns"):
        Call.make(oracle, case, dtype).run(lib, "cuda")
        if case.kernel.startswith(("classifier", "vocab")):
            Call.make(oracle, case, dtype).run(lib, "library")
    for case in FLASH_CASES:
        Call.make(oracle, case, wire.BF16).run(lib, "flash")
    return 0


if __name__ == "__main__":
    sys.exit(main())
