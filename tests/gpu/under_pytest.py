"""Tests on a device in processes of pytest's, each test's outcome told as it comes: a test that hangs, or takes its
process or its device with it, costs that test, and the others are done in another process.

conftest.py tells: a line of JSON for all tests that were collected, for each that begins, and for each phase of each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.session import ROOT

Told = dict[str, Any]
HERE = Path(__file__).resolve().parent
PROCESSES = 8  # at most, for tests that lost their device or their process
QUIET_S = 120.0  # a test that takes longer hangs
BEGIN_S = 120.0  # to collect them
LOST = "the device was lost in a test before this one"
LOOK_S = 0.25


@dataclass
class Heard:
    """What a process told: all tests, those that are through, the one that it was in."""

    every: list[str] | None = None
    tests: list[Told] = field(default_factory=list)
    inside: str = ""


def heard(lines: Iterable[str]) -> Heard:
    """Of the file's lines; the last one may be half of one.

    >>> heard(['{"all": ["a", "b"]}', '{"begun": "a"}']).inside
    'a'
    """
    found = Heard()
    open_: dict[str, Told] = {}
    for line in lines:
        try:
            told = json.loads(line)
        except ValueError:
            break
        if "all" in told:
            found.every = told["all"]
        elif "begun" in told:
            found.inside = told["begun"]
        else:
            test = open_.setdefault(
                told["name"], {"name": told["name"], "outcome": "passed", "seconds": 0.0, "why": ""}
            )
            test["seconds"] = round(test["seconds"] + told["seconds"], 3)
            if told["outcome"] != "passed" and test["outcome"] != "failed":
                test |= {"outcome": told["outcome"], "why": told["why"]}
            if told["when"] == "teardown":
                found.tests.append(test)
                found.inside = ""
    return found


def _ended(
    command: Sequence[str], told: Path, out: Path, more: dict[str, str], quiet_s: float, tick: Callable[[], None]
) -> int | None:
    """The exit code of the process; None: it told nothing for too long, and was killed with all that it started."""
    size, since = -1, time.monotonic()
    with out.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, cwd=ROOT, env=os.environ | more, start_new_session=True
        )
        try:
            while True:
                try:
                    return process.wait(LOOK_S)
                except subprocess.TimeoutExpired:
                    pass
                now = told.stat().st_size if told.exists() else 0
                if now != size:
                    size, since = now, time.monotonic()
                    tick()
                if time.monotonic() - since > (quiet_s if size else max(quiet_s, BEGIN_S)):
                    return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def under_pytest(
    file: str,
    path: str,
    more: dict[str, str] | None = None,
    prefix: Sequence[str] = (),
    *,
    quiet_s: float = QUIET_S,
    so_far: Callable[[Told], None] = lambda told: None,
) -> Told:
    """pytest over a file of this folder under a kernel path. ``prefix``: a program that runs it. ``so_far`` is called
    with the tests that are through whenever there are more."""
    tests: list[Told] = []
    code, said = 0, ""
    with tempfile.TemporaryDirectory(prefix="hotstage-gpu-") as scratch:
        told, out, wanted = (Path(scratch) / name for name in ("told", "out", "wanted"))
        variables = {"HOTSTAGE_GPU_PATH": path, "HOTSTAGE_GPU_TOLD": str(told)} | (more or {})
        variables["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what a box has installed besides
        command = [*prefix, sys.executable, "-m", "pytest", "-q", "-ra", "--tb=short", "-p", "no:cacheprovider"]
        command += [f"--basetemp={scratch}/tmp", str(HERE / file)]

        def half_way() -> None:
            so_far({"tests": [*tests, *of_path(now().tests)]})

        def now() -> Heard:
            return heard(told.read_text(errors="replace").splitlines()) if told.exists() else Heard()

        def of_path(found: Iterable[Told]) -> list[Told]:
            return [test | {"name": f"{test['name']}[{path}]"} for test in found]

        left: list[str] = []
        for _ in range(PROCESSES):
            told.unlink(missing_ok=True)
            print(f"$ {' '.join(f'{k}={v}' for k, v in variables.items())} {' '.join(command)}", flush=True)
            ended = _ended(command, told, out, variables, quiet_s, half_way)
            output = out.read_text(errors="replace")
            print(f"{output[-20000:]}\n-> {ended}", flush=True)
            found = now()
            if found.every is None:
                raise AssertionError(f"pytest ended with {ended}: {output[-800:]}")
            code, said = code or (ended if ended is not None else -signal.SIGKILL), said + output
            through = [test for test in found.tests if LOST not in test["why"]]
            if found.inside:
                how = f"told nothing for {quiet_s:.0f} s" if ended is None else f"ended with {ended}"
                why = f"the process of the tests {how} in this test: {output[-400:]}"
                through.append({"name": found.inside, "outcome": "failed", "seconds": 0.0, "why": why})
            tests.extend(of_path(through))
            so_far({"tests": tests})
            names = {test["name"] for test in through}
            left = [name for name in found.every if name not in names]
            if not left or not names:
                break
            wanted.write_text("\n".join(left))
            variables["HOTSTAGE_GPU_ONLY"] = str(wanted)
    why = f"{LOST}, in {PROCESSES} processes"
    tests.extend(of_path({"name": name, "outcome": "skipped", "seconds": 0.0, "why": why} for name in left))
    failed = [test["name"] for test in tests if test["outcome"] == "failed"]
    # a tool that runs the tests begins with what it cannot do, and ends with what it found
    handed: Told = {
        "tests": tests,
        "code": code,
        "said": said if len(said) < 6000 else f"{said[:3000]}\n...\n{said[-3000:]}",
    }
    if failed or (code != 0 and not prefix):
        first = next((test["why"] for test in tests if test["outcome"] == "failed"), handed["said"])
        handed["why"] = f"{len(failed)} of {len(tests)} tests failed, the first {failed[:1]}: {first[-400:]}"
        handed["failed"] = True
    return handed
