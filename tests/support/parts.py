"""What the tests need and `make setup` does not bring, made before they run, so that no test waits for it: the second
compiler, the engine and its kernels by both compilers, the emulated CUDA kernels, the S3 server, Prometheus' parser.
All of it is kept in the user's cache folder. Beside that, in a new checkout, pytest's own form of the test modules:
each of its processes would make all of it again, 8 s of a core.

    python -m tests.support.parts
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engine import cuda_lib, kernel_lib
from tests.engine.engine_build import build_engine
from tests.support import compilers, promql, s3_server

ROOT = Path(__file__).resolve().parents[2]


def _compiling() -> subprocess.Popen[bytes] | None:
    """pytest at work on a checkout where it never was; None where it was, or keeps nothing."""
    kept = any((ROOT / "tests" / "__pycache__").glob("conftest.*-pytest-*.pyc"))
    if kept or sys.dont_write_bytecode:
        return None
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "--collect-only", "-q"], cwd=ROOT, stdout=subprocess.DEVNULL
    )


def main() -> int:
    compiling = _compiling()
    s3_server.binary()
    promql.checker()
    compilers.main()
    for compiler in ("cc", compilers.OTHER):
        build_engine(compiler)
        os.environ["HOTSTAGE_TEST_CC"] = compiler
        kernel_lib.build()
    os.environ.pop("HOTSTAGE_TEST_CC")
    for sanitize in ("", "address"):
        cuda_lib.build(sanitize)
    if compiling is not None:
        compiling.wait()  # of what it could not collect the tests will tell
    os.sync()  # else the servers' databases wait for hundreds of MB of freshly installed files at their first fsync
    return 0


if __name__ == "__main__":
    sys.exit(main())
