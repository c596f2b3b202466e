"""A command of the user's on an exported checkpoint: run with a time limit, ended whole, its numbers read.

Whatever it does costs the run nothing: a command that cannot start, fails, hangs or says nothing that can be read gives
a `Ran` that says why. It runs in a session of its own; at the time limit, where this process is to leave, and where it
is killed, every process of that session's group is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from checkpoint.codec import short
from checkpoint.evaluated import MAX_TEXT, Ran, kept_numbers
from trainer.spec_watch import EvalSpec

RESULT_BYTES = 16 << 20
TAIL_BYTES = 64 << 10
LOOK_S = 0.05
_WATCHED = 'exec 3<&0 </dev/null; ((read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 &) ; exec 3<&-; exec "$@"'
"""The command, and beside it one of its group, no child of its, that ends the group when our end of the pipe closes."""
SECTIONS = ("results", "metrics")
"""Where a JSON file's top level has one of these as a map, the numbers are those of it alone."""


def run_command(spec: EvalSpec, model: Path, facts: Mapping[str, str], stop: threading.Event) -> Ran:
    """Run it on the exported folder. ``facts``: what ``{step}`` and ``{run}`` stand for."""
    with tempfile.TemporaryDirectory(prefix="hotstage-eval-") as out:
        words = filled(spec.command, {**facts, "model": str(model), "out": out})
        began = time.monotonic()
        with tempfile.TemporaryFile() as said:
            why = _run(words, said, spec.timeout_s, stop)
            seconds = time.monotonic() - began
            text = _tail(said)
        if why:
            return Ran({}, seconds, short(f"{why}{_last_word(text)}", MAX_TEXT))
        try:
            found = numbers_of(read_result(spec, Path(out), text))
        except ValueError as error:
            return Ran({}, seconds, short(str(error), MAX_TEXT))
    return of_metrics(spec, found, seconds)


def filled(words: Sequence[str], facts: Mapping[str, str]) -> list[str]:
    """The words with the names in braces filled in; other braces stay as they are.

    >>> filled(["--model", "a={model},b={x}"], {"model": "m"})
    ['--model', 'a=m,b={x}']
    """
    out = []
    for word in words:
        for name, value in facts.items():
            word = word.replace("{" + name + "}", value)
        out.append(word)
    return out


def of_metrics(spec: EvalSpec, found: Mapping[str, Any], seconds: float) -> Ran:
    """Those that the spec names; all where it names none."""
    if spec.metrics:
        lacks = [name for name in spec.metrics if name not in found]
        if lacks:
            have = ", ".join(sorted(found)[:8]) or "none"
            return Ran({}, seconds, short(f"it gave no number {lacks[0]!r} (metrics); it has {have}", MAX_TEXT))
        found = {name: found[name] for name in spec.metrics}
    numbers = kept_numbers(found)
    return Ran(numbers, seconds, "" if numbers else "it gave no number")


def read_result(spec: EvalSpec, out: Path, said: str) -> Any:
    """The JSON that holds its numbers: a file below its folder, else the last line that it printed. ValueError."""
    pattern = spec.results or "*.json"
    files = [f for f in out.rglob(pattern) if f.is_file() and not f.is_symlink()]
    if not files and spec.results:
        raise ValueError(f"it wrote no file {spec.results!r} below {{out}} (results)")
    if not files:
        lines = [line for line in said.splitlines() if line.strip()]
        if not lines:
            raise ValueError("it ended without a word: its numbers are a JSON file below {out}, or its last line")
        return _parsed(lines[-1], "its last line")
    newest = max(files, key=lambda f: (f.stat().st_mtime_ns, str(f)))
    if newest.stat().st_size > RESULT_BYTES:
        raise ValueError(f"{newest.name} has {newest.stat().st_size} bytes, the limit is {RESULT_BYTES}")
    return _parsed(newest.read_text(encoding="utf-8", errors="replace"), newest.name)


def numbers_of(value: Any) -> dict[str, float]:
    """Numbers by name, of maps in maps by names joined with ``/``. ValueError where there is no map.

    >>> numbers_of({"results": {"hellaswag": {"acc,none": 0.5, "alias": "hellaswag"}}, "versions": {"hellaswag": 1}})
    {'hellaswag/acc,none': 0.5}
    """
    if not isinstance(value, dict):
        raise ValueError(f"its result is a {type(value).__name__}; it must be a JSON object of numbers by name")
    value = next((value[name] for name in SECTIONS if isinstance(value.get(name), dict)), value)
    found: dict[str, float] = {}
    rest: list[tuple[str, Any, int]] = [("", value, 0)]
    while rest:
        name, item, depth = rest.pop()
        if isinstance(item, dict) and depth < 8:
            rest += [(f"{name}/{key}" if name else str(key), below, depth + 1) for key, below in reversed(item.items())]
        elif isinstance(item, int | float) and not isinstance(item, bool) and name:
            found[name] = item
    return found


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON ({str(error)[:120]}): {short(text.strip(), 200)!r}") from error


def _run(words: Sequence[str], said: IO[bytes], timeout_s: float, stop: threading.Event) -> str:
    """Why it did not end well; empty where it did."""
    if shutil.which(words[0]) is None:
        return f"{words[0]} cannot be started: there is no such program" + ("" if "/" in words[0] else " in PATH")
    try:
        process = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHED, "sh", *words],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return f"{words[0]} cannot be started: {why}"
    try:
        deadline = time.monotonic() + timeout_s
        while not _has_ended(process):
            if stop.is_set():
                return "stopped on request"
            if time.monotonic() > deadline:
                return f"it had not ended after {timeout_s:g} s (timeout_s), and was killed"
            stop.wait(LOOK_S)
    finally:
        _kill_group(process)
    code = process.returncode
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name if -code in list(signal.Signals) else f'signal {-code}'}"
    return f"it exited with {code}" if code else ""


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without collecting it: until then the number of its group is nobody else's."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """It, and what it left behind in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _tail(said: IO[bytes]) -> str:
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - TAIL_BYTES))
    return said.read().decode(errors="replace")


def _last_word(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f"; it said last: {short(lines[-1], 400)}" if lines else ""
