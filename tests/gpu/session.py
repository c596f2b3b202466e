"""Runs the stages of a session one after the other within a call's time, and keeps what came out: a call that ends, or
is killed, is gone on with by the next one. Knows nothing of what a stage does (stages.py).

``session.json`` is the state: by stage how it went, and what it handed back. It belongs to one tree and one machine;
that of another is moved aside. A stage is a process of its own, so that a device that fails takes one stage with it;
what it starts ends with it (tests/support/contained.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.wire.files import write_file

ROOT = Path(__file__).resolve().parents[2]
STATE, LOG = "session.json", "log.txt"
TRIES = 2  # of a stage that was cut off
LEAVE_S = 15.0  # for a stage that is told to end
RESERVE_S = 5.0  # of a call, to write results

Outcome = Literal["passed", "failed", "skipped", "cut off"]
MORE, CANNOT = 75, 69  # exit codes: there is more to do; nothing can be done here


@dataclass(frozen=True)
class Stage:
    """``limit_s``: it is ended then, and has failed; ``least_s``: it is not begun with less left of the call;
    ``needs``: what of the machine; ``after``: stages that must have passed, or have figures in spite of a failure."""

    name: str
    about: str
    limit_s: float
    least_s: float
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


@dataclass
class Done:
    """How a stage went. ``told``: what it handed back: tests, rows, notes (stages.py)."""

    outcome: Outcome
    why: str = ""
    seconds: float = 0.0
    tries: int = 0
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        return self.outcome != "cut off"


def tree_digest(rooms: Sequence[str] = ("trainer", "tests/gpu", "tests/engine", "tests/e2e")) -> str:
    """Of the sources that results depend on."""
    h = hashlib.sha256()
    for room in rooms:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".c", ".h", ".cc", ".cu", ".txt") and path.is_file():
                h.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return h.hexdigest()[:16]


def stage_command(stage: Stage, folder: Path, result: Path) -> list[str]:
    """What does a stage: stages.py."""
    return [sys.executable, "-m", "tests.gpu.stages", stage.name, str(folder), str(result)]


class Session:
    """The stages in ``folder``. ``lacks``: what the machine has not, with the words that say so; ``key``: of which tree
    and machine results are; ``publish``: called after each stage, to write what people read."""

    def __init__(
        self,
        folder: Path,
        stages: Sequence[Stage],
        key: Mapping[str, str],
        lacks: Mapping[str, str],
        publish: Callable[[Session], None],
        environment: Mapping[str, str] | None = None,
        command: Callable[[Stage, Path, Path], list[str]] = stage_command,
    ) -> None:
        self.folder, self.stages, self.key, self.lacks, self.publish = folder, stages, dict(key), lacks, publish
        self.environment, self.command = dict(environment or {}), command
        self.done: dict[str, Done] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / LOG).open("ab", buffering=0)
        self._read()

    # --- state

    def _read(self) -> None:
        path = self.folder / STATE
        if not path.exists():
            return
        held = json.loads(path.read_text())
        if held["key"] != self.key:
            aside = next(p for n in range(1, 10_000) if not (p := self.folder / f"before-{n}").exists())
            aside.mkdir()
            for old in self.folder.iterdir():
                if old.is_file() and old.name != LOG:
                    old.rename(aside / old.name)
            differs = ", ".join(k for k in sorted({*held["key"], *self.key}) if held["key"].get(k) != self.key.get(k))
            self.say(f"results of another {differs} are now in {aside}; this session begins anew")
            return
        self.done = {name: Done(**value) for name, value in held["stages"].items()}

    def _write(self) -> None:
        text = json.dumps({"version": 1, "key": self.key, "stages": {n: asdict(d) for n, d in self.done.items()}})
        write_file(self.folder / STATE, text.encode(), 0o644)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(f"{time.strftime('%H:%M:%S')} {text}\n".encode())

    # --- stages

    def left(self) -> list[Stage]:
        """What is still to be done."""
        return [stage for stage in self.stages if stage.name not in self.done or not self.done[stage.name].over]

    def _cannot(self, stage: Stage) -> str:
        """Why a stage cannot be done; empty: it can."""
        for need in stage.needs:
            if need in self.lacks:
                return self.lacks[need]
        for name in stage.after:
            before = self.done.get(name)
            if before is not None and before.over and before.outcome != "passed" and not before.told.get("figures"):
                return f"{name} {'failed' if before.outcome == 'failed' else 'was skipped: ' + before.why}"
        return ""

    def run(self, budget_s: float, *, clock: Callable[[], float] = time.monotonic) -> int:
        """The exit code: 0 all is done and nothing failed, 1 something failed, MORE: call again."""
        end = clock() + budget_s - RESERVE_S
        for stage in self.left():
            why = self._cannot(stage)
            if why:
                self.done[stage.name] = Done("skipped", why)
                self.say(f"{stage.name:<26} skipped: {why}")
            elif end - clock() < stage.least_s:
                self.say(f"{stage.name:<26} waits for the next call: it needs {stage.least_s:.0f} s")
                continue
            else:
                self._one(stage, end - clock())
            self._write()
            self.publish(self)
        self._write()
        self.publish(self)
        if self.left():
            return MORE
        return 1 if any(done.outcome == "failed" for done in self.done.values()) else 0

    def _one(self, stage: Stage, room_s: float) -> None:
        before = self.done.get(stage.name)
        tries = (before.tries if before else 0) + 1
        if tries > TRIES:  # it took this process with it, twice
            self.done[stage.name] = Done("failed", f"was cut off {TRIES} times, and is left out", tries=tries - 1)
            self.say(f"{stage.name:<26} failed: {self.done[stage.name].why}")
            return
        limit = min(stage.limit_s, room_s)
        self.done[stage.name] = Done("cut off", "the call ended in it", tries=tries)
        self._write()
        result = self.folder / f".{stage.name}.json"
        result.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.support.contained", "--patience", "2"]
        command += self.command(stage, self.folder, result)
        self.log.write(f"\n=== {stage.name}: {stage.about}; at most {limit:.0f} s\n$ {shlex.join(command)}\n".encode())
        began = time.monotonic()
        code = self._ended(command, limit)
        seconds = round(time.monotonic() - began, 1)
        told = json.loads(result.read_text()) if result.exists() else {}
        result.unlink(missing_ok=True)
        if code is None and limit < stage.limit_s:
            done = Done("cut off", f"the call had {limit:.0f} s left", seconds, tries, told)
        elif code is None:
            done = Done("failed", f"took longer than {limit:.0f} s", seconds, tries, told)
        elif code == CANNOT:
            done = Done("skipped", told.get("why") or "it said that it cannot be done here", seconds, tries, told)
        elif code == 0 and told:
            done = Done("passed", "", seconds, tries, told)
        else:
            done = Done("failed", told.get("why") or f"ended with {code}; see {LOG}", seconds, tries, told)
        self.done[stage.name] = done
        told_tests = told.get("tests", [])
        counted = f", {len(told_tests)} tests" if told_tests else ""
        self.say(f"{stage.name:<26} {done.outcome}{': ' + done.why if done.why else ''} ({seconds:.0f} s{counted})")

    def _ended(self, command: list[str], limit_s: float) -> int | None:
        """The command's exit code; None: it took too long and was ended. It ends where this process does."""
        libc = ctypes.CDLL(None)
        process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=self.log,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=os.environ | self.environment,
            preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return None
        except BaseException:
            process.terminate()
            process.wait(LEAVE_S)
            raise


def mirrored(folder: Path, out: Path | None, names: Sequence[str]) -> None:
    """Copies of the results where files are fetched from."""
    if out is None or not out.is_dir() or out.resolve() == folder.resolve():
        return
    for name in names:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
