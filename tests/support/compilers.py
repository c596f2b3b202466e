"""The C compilers of the tests: the system's (``cc``) and one other (``zig``: clang, from the wheel that the images'
engine is built with), so that both are there wherever the tests run. The system's own clang is not used.

    python -m tests.support.compilers    install and try the other one (`make test` does it first)
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from k8s.images.static import compiler

OTHER = "zig"
TARGET = f"{platform.machine()}-linux-gnu"  # what it makes is loaded by this machine's Python


def find(name: str) -> str:
    """Path of the compiler that a test names: ``zig``, or a command of the system."""
    if name == OTHER:
        return str(compiler(TARGET) / "cc")
    found = shutil.which(name)
    assert found, f"no C compiler {name!r}: install gcc and libc6-dev, or name another one in HOTSTAGE_TEST_CC"
    return found


def other_than(name: str) -> str:
    """The compiler whose bits are compared with this one's."""
    return "cc" if name == OTHER else OTHER


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "try.c"
        source.write_text("int main(void) { return 0; }\n")
        made = source.with_suffix("")
        subprocess.run([find(OTHER), str(source), "-lm", "-pthread", "-o", str(made)], check=True)
        return subprocess.run([str(made)]).returncode


if __name__ == "__main__":
    sys.exit(main())
