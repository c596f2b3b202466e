"""Prometheus' own parser of its query language, from its Go module, built once into the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from tests.support.go import cache, go

SOURCE = Path(__file__).resolve().parent


def checker() -> Path:
    """The program (a minute of CPU where it is not there yet), keyed by what it is made of."""
    made_of = b"".join((SOURCE / name).read_bytes() for name in ("go.mod", "go.sum", "main.go"))
    program = cache() / "promql" / hashlib.sha256(made_of).hexdigest()[:16]
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        scratch = program.with_name(f".{program.name}-{os.getpid()}")
        env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOWORK": "off"}
        subprocess.run([go(), "build", "-o", str(scratch), "."], cwd=SOURCE, env=env, check=True)
        os.replace(scratch, program)
    return program


def refused(expressions: list[str]) -> tuple[int, str]:
    """1 and which of these the parser refuses with why; 0 and nothing."""
    done = subprocess.run([checker()], input="\n".join(expressions), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout
