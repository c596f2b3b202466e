"""Speed of the fast CPU kernels: ``python -m tests.bench.bench_kernels [--path avx512] [--threads 1] [--json FILE]``.

Builds bench_kernels.c with the engine's sources, runs it, and prints a table: every kernel warm (its operands lie in
the caches as far as they fit) and cold (they come from memory), medians. A kernel is given as a fraction of what bounds
it, the longer time of its operations at the peak of independent fused multiply-adds and of its bytes at the rate of a
copy; both peaks are of the same rounds on the same cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.engine.compiled import ENGINE
from tests.engine.kernel_lib import CPU_PATHS

FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-ffp-contract=off", "-pthread", f"-I{ENGINE}"]


def build(path: str, folder: Path, compiler: str = "cc") -> Path:
    """The benchmark of one instruction set, in ``folder``."""
    objects = []

    def compile_one(source: Path, label: str, *extra: str) -> None:
        target = folder / f"{label}.o"
        subprocess.run([compiler, *FLAGS, *extra, "-c", str(source), "-o", str(target)], check=True)
        objects.append(str(target))

    cpu = ENGINE / "kernels" / "cpu" / "all.c"
    for name in {"portable", path}:
        compile_one(cpu, name, f"-DHS_PATH={name}", *CPU_PATHS[name])
    compile_one(Path(__file__).with_suffix(".c"), "bench", f"-DHS_PATH={path}", *CPU_PATHS[path])
    for name in (
        *("core/arena", "core/threads", "core/status", "core/text", "core/math"),
        *("kernels/deferred", "kernels/extent"),
    ):
        compile_one(ENGINE / f"{name}.c", name.replace("/", "-"))
    program = folder / "bench"
    subprocess.run([compiler, "-pthread", "-o", str(program), *objects, "-lm"], check=True)
    return program


def measure(path: str, threads: int, rounds: int = 11, only: str = "") -> list[dict[str, Any]]:
    """Two entries a kernel, warm and cold: {name, value, unit, ms, peer, peer_value, ratio}."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(path, Path(folder))
        command = [str(program), str(threads), str(rounds), *([only] if only else [])]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    out: list[dict[str, Any]] = []
    for line in lines:
        row = json.loads(line)
        computes = row["operations"] / row["peak_operations"] > row["bytes"] / row["peak_bytes"]
        unit, peer, what = ("GFLOP/s", "fma peak", "operations") if computes else ("GB/s", "copy probe", "bytes")
        peak = row[f"peak_{what}"] / 1e9
        for state in ("warm", "cold"):
            value = row[what] / row[state] / 1e9
            name = f"{row['name']}, {state} [{path}, {threads}]"
            entry = {"name": name, "value": value, "unit": unit, "ms": row[state] * 1e3}
            out.append(entry | {"peer": peer, "peer_value": peak, "ratio": value / peak})
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", choices=sorted(CPU_PATHS), default="avx512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write the list here")
    options = parser.parse_args()
    entries = measure(options.path, options.threads, options.rounds, options.only)
    for e in entries:
        share = f"{e['ratio']:6.1%} of the {e['peer']}, {e['peer_value']:.0f}"
        print(f"{e['name']:56} {e['ms']:9.3f} ms {e['value']:8.1f} {e['unit']:8} {share}")
    if options.json:
        options.json.write_text(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
