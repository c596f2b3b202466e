"""Small C programs of the tests, built from the engine's real sources and kept while these do not change.

They lie in ``tests/engine/programs`` and go to ``hotstage/engine-tests`` in the user's cache folder, named by a digest
of everything that went in. ``HOTSTAGE_TEST_CC`` picks the compiler, ``HOTSTAGE_TEST_SANITIZE`` adds ``-fsanitize=...``.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "trainer" / "engine"
PROGRAMS = Path(__file__).resolve().parent / "programs"
FLAGS = shlex.split(
    "-std=c11 -D_GNU_SOURCE -O1 -g -pthread -ffp-contract=off -Wall -Wextra -Wshadow -Wstrict-prototypes "
    "-Wmissing-prototypes -Wvla -Wundef -Wformat=2 -Werror"
)
SOURCES = {
    "comm_drive": ("core", "comm"),
    "snapshot_drive": ("core", "snapshot"),
    "node_drive": ("core", "run/supervisor", "run/output", "run/spawn", "run/message"),
    "link_drive": ("core", "snapshot", "run/message", "run/agent_link"),
}


def _sources(program: str) -> list[Path]:
    found = [PROGRAMS / f"{program}.c"]
    for part in SOURCES[program]:
        path = ENGINE / part
        found += sorted(path.glob("*.c")) if path.is_dir() else [path.with_suffix(".c")]
    return found


def build_program(program: str) -> Path:
    """The program's path; compiles it where its sources changed. Safe in several processes at once."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hotstage" / "engine-tests"
    base.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("HOTSTAGE_TEST_CC", "cc"))
    sanitize = os.environ.get("HOTSTAGE_TEST_SANITIZE", "")
    flags = [*FLAGS, *([f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"] if sanitize else [])]
    sources = _sources(program)
    headers = [p for room in ("core", "wire", "comm", "snapshot", "run") for p in sorted((ENGINE / room).glob("*.h"))]
    digest = hashlib.sha256(shlex.join([*compiler, *flags]).encode())
    digest.update(subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout)
    for path in [*sources, *headers]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    target = base / f"{program}-{digest.hexdigest()[:32]}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=base) as scratch:
            made = Path(scratch) / program
            command = [*compiler, *flags, f"-I{ENGINE}", "-o", str(made), *map(str, sources), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
            made.replace(target)
    return target
