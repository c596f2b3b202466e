"""How many instructions the main kernels take, beside the figures that are kept: `make check`'s guard of their speed.

    python -m tests.tools.counts            count, compare; a kernel that takes 3 % more fails
    python -m tests.tools.counts --renew    count, and keep what was found in counts.json

Counts do not depend on the machine's load. valgrind's callgrind counts one call of each small case of
tests/bench/bench_kernels.c, built by the pinned compiler of the static engine, so that other compilers do not show. It
knows no AVX-512, and the portable build's fma is the C library's: the AVX2 build is counted, whose source is the same.
What only the paths avx512, avx512_bf16 and neon do is not counted: `make bench` times it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.bench_kernels import build
from tests.support.compilers import OTHER, find

KEPT = Path(__file__).with_suffix(".json")
PATH = "avx2"
MORE = 1.03
"""A kernel may take so many times what is kept: a small change of another kernel's code moves it by less."""
RENEW = "python -m tests.tools.counts --renew"


def counted(program: Path, name: str) -> int:
    """Instructions of one call."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = ["valgrind", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=hs_counted"]
        done = subprocess.run(
            [*command, f"--callgrind-out-file={out}", str(program), "count", name], capture_output=True, text=True
        )
        found = re.search(r"^(?:summary|totals): (\d+)$", out.read_text() if out.exists() else "", re.MULTILINE)
        if done.returncode or found is None or not int(found[1]):
            raise SystemExit(f"counts: {name} was not counted (exit {done.returncode}):\n{done.stderr[-2000:]}")
        return int(found[1])


def count() -> dict[str, int]:
    """By case."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        program = build(PATH, Path(folder), find(OTHER))
        names = subprocess.run([str(program), "list"], capture_output=True, text=True, check=True).stdout.splitlines()
        counts = pool.map(lambda name: counted(program, name), names)
        return dict(zip(names, counts, strict=True))


def compared(found: Mapping[str, int], kept: Mapping[str, int]) -> list[str]:
    """What is wrong, a line each: too many instructions, or not the cases that are kept."""
    wrong = [f"{name}: {n} instructions, not kept" for name, n in found.items() if name not in kept]
    wrong += [f"{name}: is kept, and there is no such case" for name in kept if name not in found]
    wrong += [
        f"{name}: {n} instructions, {n / kept[name] - 1:+.1%} of the {kept[name]} that are kept"
        for name, n in found.items()
        if name in kept and n > MORE * kept[name]
    ]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--renew", action="store_true", help="keep what is found")
    options = parser.parse_args()
    missing = "valgrind is not here (Debian: apt install valgrind)" if shutil.which("valgrind") is None else ""
    if platform.machine() != "x86_64":
        missing = f"the kept figures are of x86_64, and this is {platform.machine()}"
    if missing:
        print(f"NOT COUNTED: {missing}; the kernels' instructions are compared where it is", file=sys.stderr)
        return 69 if options.renew else 0
    found = count()
    if options.renew:
        KEPT.write_text(json.dumps(found, indent=1) + "\n")
        print(f"kept: {len(found)} counts, {KEPT}")
        return 0
    kept: dict[str, int] = json.loads(KEPT.read_text())
    wrong = compared(found, kept)
    fewer = [
        f"{name}: {n / kept[name] - 1:+.1%}" for name, n in found.items() if name in kept and MORE * n < kept[name]
    ]
    print(f"{len(found)} counts of instructions, {len(wrong)} wrong, {len(fewer)} much smaller than what is kept")
    for line in [*wrong, *fewer]:
        print(f"  {line}")
    if wrong or fewer:
        print(f"where that is meant: {RENEW}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
