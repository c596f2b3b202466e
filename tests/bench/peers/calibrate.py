"""What the cores can do at this moment, asked between samples; see calibrate.c."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.engine.compiled import ENGINE
from tests.engine.kernel_lib import CPU_PATHS, fastest_path


def build(folder: Path) -> Path:
    """The program, for what this CPU has."""
    path = fastest_path()
    program = folder / "calibrate"
    command = ["cc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-pthread", f"-I{ENGINE}", f"-DHS_PATH={path}"]
    command += [*CPU_PATHS[path], "-o", str(program), str(Path(__file__).with_suffix(".c")), "-lm"]
    subprocess.run(command, check=True)
    return program


@dataclass(frozen=True)
class Peak:
    """FLOP/s by precision, of one thread and of all."""

    one: dict[str, float]
    all: dict[str, float]

    @property
    def cores(self) -> float:
        """How many cores the threads are worth: two threads of one real core are worth about one."""
        return self.all["fp32"] / self.one["fp32"]


class Calibration:
    """A process that is asked."""

    def __init__(self, process: subprocess.Popen[str], threads: int) -> None:
        self._process, self._threads = process, threads

    def _ask(self, threads: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{threads}\n")
        self._process.stdin.flush()
        told: dict[str, float] = json.loads(self._process.stdout.readline())
        return told

    def now(self) -> Peak:
        return Peak(self._ask(1), self._ask(self._threads))


@contextmanager
def calibration(folder: Path, threads: int) -> Iterator[Calibration]:
    with subprocess.Popen([str(build(folder))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Calibration(process, threads)
        assert process.stdin is not None
        process.stdin.close()
