"""The small C programs of the tests (``tests/engine/programs``), linked with the engine's library.

``HOTSTAGE_TEST_CC`` picks the compiler (tests/support/compilers.py), ``HOTSTAGE_TEST_SANITIZE`` a sanitizer
(``address,undefined`` or ``thread``).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engine.engine_build import ROOT, build_folder
from tests.support.compilers import find

PROGRAMS = Path(__file__).resolve().parent / "programs"
FLAGS = "-std=c11 -D_GNU_SOURCE -O1 -g1 -pthread -ffp-contract=off -Wall -Wextra -Wshadow -Werror"


@functools.cache
def build_program(name: str, *more: str, beside: tuple[Path, ...] = (), sanitize: str | None = None) -> Path:
    """The program's path, in the engine's build folder; built where a source changed since the last time. ``more``:
    flags; ``beside``: further sources; ``sanitize``: not what the environment says.
    """
    compiler = os.environ.get("HOTSTAGE_TEST_CC", "cc")
    sanitize = os.environ.get("HOTSTAGE_TEST_SANITIZE", "") if sanitize is None else sanitize
    folder, source = build_folder(compiler, sanitize), PROGRAMS / f"{name}.c"
    flags = (
        shlex.split(FLAGS) + list(more) + ([f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else [])
    )
    sources = [source, *beside]
    digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources) + shlex.join(flags).encode()).hexdigest()[:16]
    target = folder / f"{name}-{digest}"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}")
        include, library = f"-I{ROOT / 'trainer' / 'engine'}", str(folder / "libhotstage.a")
        command = [find(compiler), *flags, include, "-o", str(made), *map(str, sources), library, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        made.replace(target)
    return target


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[None]:
    """The process is killed and its streams are closed behind the block."""
    with process:
        try:
            yield
        finally:
            process.kill()
