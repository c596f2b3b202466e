"""`make check`'s engine half: warnings are errors under gcc and clang, then the engine's tests under the sanitizers.

    python -m tests.tools.sanitize            everything
    python -m tests.tools.sanitize thread     one of: warnings, address, thread

Each sanitizer builds the whole engine (kept by content, see tests/engine/engine_build.py) and runs the tests of ranks,
data, inference, supervisor and links with it; address and undefined behaviour also a few thousand mutated plans, thread
also every kernel on several threads. A finding ends the process with a code that no test expects.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.engine.engine_build import ROOT, build_engine
from tests.engine.native import build_program
from tests.engine.plans import GPT2, LLAMA, small_plan
from tests.support.compilers import OTHER

TESTS = (
    "test_rank.py",
    "test_data.py",
    "test_infer.py",
    "test_supervisor.py",
    "test_agent_link.py",
    "test_comm.py",
    "test_comm_failures.py",
    "test_comm_order.py",
    "test_messages.py",
    "test_snapshot.py",
    "test_executor.py",
    "test_hostile.py",
)
KERNELS = ("test_kernels_threads.py",)
# A library loaded before the engine and a sanitizer both want malloc.
NOT = "not allocates and not allocation"


def warnings() -> None:
    """Builds with -Werror by both compilers of the tests."""
    for compiler in ("cc", OTHER):
        build_engine(compiler)


def _pytest(engine: Path, sanitize: str, tests: Sequence[str] = TESTS, which: str = "not slow") -> None:
    found = [str(ROOT / "tests" / "engine" / name) for name in tests]
    environment = os.environ | {
        "HOTSTAGE_ENGINE": str(engine),
        "HOTSTAGE_TEST_SANITIZE": sanitize,
        "ASAN_OPTIONS": "exitcode=99:detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=99:halt_on_error=1",
    }
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", which, "-k", NOT, *found],
        check=True,
        cwd=ROOT,
        env=environment,
    )


def address() -> None:
    """Address, leak and undefined-behaviour sanitizers; the mutated plans too."""
    _pytest(build_engine(sanitize="address,undefined"), "address,undefined")
    fuzz = build_program("plan_fuzz", sanitize="address,undefined")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan"
        for seed, (stages, model) in enumerate(((1, GPT2), (2, GPT2), (1, LLAMA), (2, LLAMA))):
            path.write_bytes(small_plan(stages=stages, model=model).to_bytes())
            subprocess.run([str(fuzz), str(path), "1000", str(seed)], check=True)


def thread() -> None:
    """Thread sanitizer; the kernels too."""
    engine = build_engine(sanitize="thread")
    _pytest(engine, "thread")
    _pytest(engine, "thread", KERNELS, "slow")


PARTS = {"warnings": warnings, "address": address, "thread": thread}


def main() -> int:
    """All parts, or those named."""
    named = sys.argv[1:] or list(PARTS)
    for name in named:
        if name not in PARTS:
            print(f"no part {name!r}: one of {', '.join(PARTS)}", file=sys.stderr)
            return 64
        PARTS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
