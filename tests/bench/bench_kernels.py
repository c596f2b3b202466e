"""Speed of the fast CPU kernels: ``python -m tests.bench.bench_kernels [--path avx512] [--threads 1] [--json FILE]``.

Builds bench_kernels.c with the engine's sources, runs it, and prints a table. Products are given as a fraction of the
peak that a loop of independent fused multiply-adds reached in the same rounds on the same cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.engine.kernel_lib import CPU_PATHS, ENGINE

FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-ffp-contract=off", "-pthread", f"-I{ENGINE}"]
UNITS = {"flop": ("GFLOP/s", 1e-9), "byte": ("GB/s", 1e-9), "element": ("elements/ns", 1e-9)}


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
    for name in ("core/threads", "core/status", "core/text", "core/math", "kernels/extent"):
        compile_one(ENGINE / f"{name}.c", name.replace("/", "-"))
    program = folder / "bench"
    subprocess.run([compiler, "-pthread", "-o", str(program), *objects, "-lm"], check=True)
    return program


def measure(path: str, threads: int, rounds: int = 20, only: str = "") -> list[dict[str, Any]]:
    """One entry a kernel: {name, value, unit, peer, peer_value, ratio}; the peer of a product is the fma peak."""
    with tempfile.TemporaryDirectory() as folder:
        program = build(path, Path(folder))
        command = [str(program), str(threads), str(rounds), *([only] if only else [])]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    out: list[dict[str, Any]] = []
    for line in lines:
        row = json.loads(line)
        unit, scale = UNITS[row["unit"]]
        value = row["work"] / row["seconds"] * scale
        entry = {"name": f"{row['name']} [{path}, {threads}]", "value": value, "unit": unit, "ms": row["seconds"] * 1e3}
        if row["unit"] == "flop":
            peer = row["peak_flops"] * scale
            entry |= {"peer": "fma peak", "peer_value": peer, "ratio": value / peer}
        out.append(entry)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", choices=sorted(CPU_PATHS), default="avx512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="write the list here")
    options = parser.parse_args()
    entries = measure(options.path, options.threads, options.rounds, options.only)
    for e in entries:
        share = f"{e['ratio']:6.1%} of {e['peer_value']:.0f}" if "ratio" in e else ""
        print(f"{e['name']:52} {e['ms']:9.3f} ms {e['value']:8.1f} {e['unit']:12} {share}")
    if options.json:
        options.json.write_text(json.dumps(entries, indent=1))


if __name__ == "__main__":
    main()
