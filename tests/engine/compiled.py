"""Sources compiled and linked for tests, into the user's cache folder (`trainer.folders`), ``hotstage/kernel-tests``:
objects and what is linked of them are named by a digest of the sources, the flags and the compiler.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.folders import cache_folder

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "trainer" / "engine"

Unit = tuple[Path, list[str], list[Path]]
"""A source, what it is compiled with, and files that it alone includes."""


def linked(
    name: str,
    compiler: Sequence[str],
    units: Sequence[Unit],
    link: Sequence[str],
    rooms: Sequence[str],
    ext: str = ".so",
) -> Path:
    """Compiles what changed and links it with ``link``. ``rooms`` of the engine: whose headers are included. Several
    processes at once: one compiles, the others wait."""
    base = cache_folder() / "kernel-tests"
    base.mkdir(parents=True, exist_ok=True)
    version = subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout
    version += shlex.join(compiler).encode()
    headers = [p.read_bytes() for room in rooms for p in sorted((ENGINE / room).rglob("*.h"))]
    with (base / f".{name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=base) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def compiled(unit: Unit) -> Path:
            source, flags, parts = unit
            texts = [p.read_bytes() for p in (source, *parts)]
            target = base / f"{source.stem}-{_digest([version, shlex.join(flags).encode(), *headers, *texts])}.o"
            if not target.exists():
                made = Path(scratch) / target.name
                _run([*compiler, *flags, f"-I{ENGINE}", "-c", str(source), "-o", str(made)])
                made.replace(target)
            return target

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = list(pool.map(compiled, units))
        whole = base / f"{name}-{_digest([version, *(o.name.encode() for o in objects)])}{ext}"
        if not whole.exists():
            made = Path(scratch) / whole.name
            _run([*link, "-pthread", "-o", str(made), *map(str, objects), "-lm"])
            made.replace(whole)
    return whole


def _digest(parts: Sequence[bytes]) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "little") + part)
    return h.hexdigest()[:32]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
