"""Every kernel of the table on 2 and 4 threads under ThreadSanitizer, odd shapes: no two threads meet in memory where
one of them writes. `make check` runs this, and `make nightly`. What masked vector instructions touch the sanitizer does
not see; the path `portable`, whose loops are the same, has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.kernel_calls import WITH_DTYPE, Call, Case
from tests.engine.kernel_lib import CPU_PATHS, KernelLib, fastest_path
from tests.engine.kernel_served import ServedKernels
from tests.engine.native import PROGRAMS, build_program
from trainer import wire

pytestmark = pytest.mark.slow

FOUND = 99
"""The exit code of a program in which a race was seen."""
SERVED = PROGRAMS.parent / "kernel_lib.c"


def served(*more: str, beside: tuple[Path, ...] = ()) -> ServedKernels:
    program = build_program("kernel_serve", "-DHS_TEST_CPU", *more, beside=(SERVED, *beside), sanitize="thread")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TSAN_OPTIONS", f"halt_on_error=1:exitcode={FOUND}")
        return ServedKernels(program)


@pytest.fixture(scope="module")
def watched() -> Iterator[ServedKernels]:
    """The kernels as ThreadSanitizer builds them."""
    kernels = served()
    yield kernels
    kernels.close()


@pytest.mark.parametrize(("case", "dtype"), WITH_DTYPE)
def test_no_race(kernels: KernelLib, watched: ServedKernels, case: Case, dtype: int) -> None:
    """On the path that the engine takes here, and on 4 threads on the others, whose widths are others."""
    call = Call.make(kernels, case, dtype)
    for threads in (2, 4):
        call.run(watched, fastest_path(), threads)
    others = [path for path in CPU_PATHS if path in kernels.sets and path != fastest_path()]
    for path in others:
        call.run(watched, path, 4)


def test_a_planted_race_is_found(kernels: KernelLib) -> None:
    """Ranges that overlap by an item, in the engine's own loop."""
    racing = served("-Wl,--wrap=hs_parallel_for", beside=(PROGRAMS / "overlapping_ranges.c",))
    call = Call.make(kernels, Case("linear_fwd", (300, 97, 130, 97, 130, 97)), wire.F32)
    call.run(racing, fastest_path(), 1)
    with pytest.raises(AssertionError, match=f"the program ended with {FOUND}"):
        call.run(racing, fastest_path(), 2)
