"""What the tests need and `make setup` does not bring, made before they run, so that no test waits for it: the second
compiler, the engine and its kernels by both compilers, the emulated CUDA kernels, the S3 server, Prometheus' parser.
All of it is kept in the user's cache folder.

    python -m tests.support.parts
"""

from __future__ import annotations

import os
import sys

from tests.engine import cuda_lib, kernel_lib
from tests.engine.engine_build import build_engine
from tests.support import compilers, promql, s3_server


def main() -> int:
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
    os.sync()  # else the servers' databases wait for hundreds of MB of freshly installed files at their first fsync
    return 0


if __name__ == "__main__":
    sys.exit(main())
