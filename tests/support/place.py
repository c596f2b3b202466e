"""A folder with a spec and a corpus, and the real command run in it: what the end-to-end tests share.

A command that trains, or whose process is what a test is about, is one (``start``, ``call``, ``run``); what only looks,
writes a file or is refused is called in the test's own process (``here``, ``said``): the same code, without a second of
imports each time.

Owns the processes that it starts, and those that they leave behind: ``stop_all`` ends whatever works below the folder,
by process id. Judges nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.support.calls import outcome
from tests.support.wait import wait_for

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
TEXT = "the quick brown fox jumps over the lazy dog and then over the next one, which is as lazy as the first. " * 400

SPEC = f"""
name = "chaos"
[model]
family = "gpt2"
layers = 4
width = 32
heads = 4
context = 64
[data]
source = "text:corpus/*.txt"
vocab_size = 300
[train]
steps = {STEPS}
batch = 8
microbatch = 2
sequence = 16
seed = 3
[parallel]
stages = 2
threads = 1
[checkpoint]
every = 4
[recovery]
backoff_s = 0.05
"""


LONG_STEPS = 4 * STEPS
LONG = (
    SPEC.replace(f"steps = {STEPS}", f"steps = {LONG_STEPS}")
    .replace("width = 32", "width = 64")
    .replace("sequence = 16", "sequence = 32")
)
"""For tests that act while a run trains: a fast machine has 60 steps behind it before they do. Steps of some
milliseconds, so that a watcher that waits for a processor does not miss a hundred of them; what a driver sees, who
looks each second or two, is not counted on but waited for (``caught``)."""


LEARNT = SPEC.replace("width = 32", "width = 64").replace("sequence = 16", "sequence = 64")
"""For tests that read what a run has learnt, or has told at length: sixteen times the work of a step."""
LASTING = LEARNT.replace(f"steps = {STEPS}", f"steps = {LONG_STEPS}")
"""For those who strike at moments that nobody holds: seconds of training."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        """What stderr tells a person: of lines of JSON their text."""
        return "\n".join(_text_of(line) for line in self.err.splitlines())

    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


def _text_of(line: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        return line
    if not isinstance(value, dict) or not value.keys() & {"said", "text"}:
        return line
    return (
        str(value["said"])
        if "said" in value
        else "\n".join(str(value[key]) for key in ("text", "mend") if value.get(key))
    )


class Place:
    """``store``: where its runs are kept, a folder below the place where none is named."""

    def __init__(
        self, folder: Path, spec: str = SPEC, *, store: str | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        (folder / "corpus").mkdir(parents=True)
        (folder / "corpus" / "a.txt").write_text(TEXT)
        (folder / "spec.toml").write_text(spec)
        self.env = _environment(folder, store, env or {})

    @classmethod
    def again(cls, folder: Path) -> Place:
        """The place that another process made in this folder."""
        place = cls.__new__(cls)
        place.folder = folder
        place.env = _environment(folder, None, {})
        return place

    def hide_queue(self) -> None:
        """A file named as a module of Python's own: what lies where a person works is no module of a command's."""
        (self.folder / "queue.py").write_text("")

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-P", "-m", "flows.cli", *args]

    def start(self, *args: str, err: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
        """``err``: where its stderr goes, a pipe where none is named."""
        env = self.env | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            self.command(*args), cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=err or subprocess.PIPE
        )

    def call(self, *args: str, seconds: float = 120) -> Done:
        """Run it to its end, whatever the code."""
        return finish(self.start(*args), seconds)

    def run(self, *args: str, code: int = 0) -> str:
        done = self.call(*args)
        assert done.code == code, done.out + done.err
        return done.out

    def here(self, *args: str) -> Done:
        """The command in this process, with the place's folder and environment."""
        before = dict(os.environ)
        with contextlib.chdir(self.folder):
            try:
                os.environ.clear()
                os.environ.update(self.env)
                return Done(*outcome(list(args)))
            finally:
                os.environ.clear()
                os.environ.update(before)

    def said(self, *args: str) -> str:
        """What it says there when all is well."""
        done = self.here(*args)
        assert done.code == 0, done.out + done.err
        return done.out

    def start_train(self, *sets: str) -> subprocess.Popen[bytes]:
        return self.start("train", "spec.toml", "--no-prefect", "--json", *_set_args(sets))

    def refused_train(self, *sets: str) -> Done:
        """A `train` that is refused before anything is started."""
        return self.here("train", "spec.toml", "--no-prefect", "--json", *_set_args(sets))

    def train(self, *sets: str, code: int = 0) -> dict[str, Any]:
        return dict(json.loads(self.run("train", "spec.toml", "--no-prefect", "--json", *_set_args(sets), code=code)))

    def run_folder(self, run: str) -> Path:
        """The run in the place's own folder store."""
        return self.folder / "store" / "runs" / run

    def left(self) -> dict[int, str]:
        """Processes that work below the folder, by their command lines."""
        return {pid: line for pid, line in _processes() if _below(pid, self.folder)}

    def rank_pids(self) -> list[int]:
        return [pid for pid, line in self.left().items() if "hotstage-engine rank" in line]

    def all_gone(self, seconds: float = 60) -> None:
        """Fail where something still runs after a while."""
        wait_for(lambda: not self.left(), f"the processes to leave: {self.left()}", seconds)

    def stop_all(self) -> None:
        """Whatever still works below the folder."""
        for pid in self.left():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _environment(folder: Path, store: str | None, more: Mapping[str, str]) -> dict[str, str]:
    """This process's own, without what it says of Prefect."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    return env | {"HOTSTAGE_STORE": store or str(folder / "store")} | dict(more)


def finish(process: subprocess.Popen[bytes], seconds: float = 120) -> Done:
    """What the process said, and its code. Where it does not end in time it is killed and the test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the command does not end within {seconds} s:\n{(out + (err or b'')).decode()}") from None
    return Done(process.returncode, out.decode(), (err or b"").decode())


def _set_args(sets: tuple[str, ...]) -> list[str]:
    return [item for s in sets for item in ("--set", s)]


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue


def _below(pid: int, folder: Path) -> bool:
    try:
        home = os.readlink(f"/proc/{pid}/cwd").removesuffix(" (deleted)")
    except OSError:
        return False
    return home == str(folder) or home.startswith(f"{folder}/")
