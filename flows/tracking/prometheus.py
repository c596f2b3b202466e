"""What Prometheus asks of a driver: ``GET /metrics``, the runs that this process drives, one page for all of them.

It listens where ``HOTSTAGE_METRICS`` says (``127.0.0.1:7391``; unset: nowhere), one server a machine or pod, whatever
the number of its drivers: the first process answers, the others leave their figures beside it, in a folder of the
user's that is named by the port. What a dead process left there is not told.

The format and the server are the agent's (``checkpoint/agent/metrics.py``). The dashboard and the alerts on these
names: ``k8s/components/monitoring``, whose names a test compares.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.agent.metrics import Family, MetricsServer, address_of, page_text
from flows.drive.events import Event
from trainer.wire.files import write_file

log = logging.getLogger(__name__)

VARIABLE = "HOTSTAGE_METRICS"
PREFIX = "hotstage_run"
MOST_RUNS = 256
MOST_NUMBERS = 256


@dataclass
class RunFigures:
    """Of one run, at one moment; a sink of its driver. Counts are since this driver began."""

    run: str
    steps: int = 0
    step: int = 0
    last: dict[str, float] = field(default_factory=dict)  # of the newest step's line
    saved: int = -1
    attempts: int = 0
    failures: dict[str, int] = field(default_factory=dict)  # class -> attempts that ended so
    recovery_s: float = 0.0
    recoveries: int = 0
    evaluated: int = -1
    numbers: dict[str, float] = field(default_factory=dict)  # of the newest evaluation of each
    eval_failures: dict[str, int] = field(default_factory=dict)
    differing: int = 0  # steps computed again with another result
    symptoms: dict[str, int] = field(default_factory=dict)  # kind -> told of the run's health
    outcome: str = ""

    def tell(self, event: Event) -> None:
        facts = event.facts
        match event.kind:
            case "step":
                self.step = int(facts["step"])
                keys = ("loss", "grad_norm", "lr", "tokens_per_s", "step_us", "time")
                self.last = {key: float(facts[key]) for key in keys if isinstance(facts.get(key), int | float)}
            case "checkpoint":
                self.saved = max(self.saved, int(facts["step"]))
            case "known":
                self.attempts, self.steps = int(facts["attempts"]), int(facts["steps"] or self.steps)
                self.saved = max(self.saved, int(facts["step"]) or -1)
            case "attempt":
                self._attempt(facts)
            case "recovered":
                self.recovery_s += float(facts["seconds"])
                self.recoveries += 1
            case "evaluated":
                self._evaluated(facts)
            case "health" if not facts["over"]:
                kind = str(facts["finding"])
                self.symptoms[kind] = self.symptoms.get(kind, 0) + 1
            case "replay" if facts.get("found") == "differs":
                self.differing += 1
            case "ended":
                self.outcome = str(facts["outcome"])

    def _attempt(self, facts: Mapping[str, Any]) -> None:
        self.attempts, self.outcome = int(facts["number"]), ""
        self.steps = int(facts.get("steps") or self.steps)
        if cause := facts.get("cause"):
            cls = str(cause.get("class") or "unknown")
            self.failures[cls] = self.failures.get(cls, 0) + 1
        if facts.get("back"):
            self.saved = int(facts["step"]) if facts.get("from") == "checkpoint" else -1

    def _evaluated(self, facts: Mapping[str, Any]) -> None:
        for name in facts.get("failed") or ():
            self.eval_failures[name] = self.eval_failures.get(name, 0) + 1
        found = facts.get("numbers")
        if isinstance(found, Mapping) and isinstance(facts.get("step"), int):
            self.evaluated = max(self.evaluated, facts["step"])
            room = MOST_NUMBERS - len(self.numbers)
            fresh = [name for name in found if name not in self.numbers][: max(0, room)]
            self.numbers |= {n: float(v) for n, v in found.items() if n in self.numbers or n in fresh}


class DriverPage:
    """The figures of all runs of this process; the server that tells them, or the folder beside another process's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, RunFigures] = {}
        self._server: MetricsServer | None = None
        self._folder: Path | None = None
        self._left: dict[str, bytes] = {}

    def of(self, run: str) -> RunFigures:
        """The run's figures: new ones, as a new driver counts anew. Of ended runs the newest stay."""
        with self._lock:
            self._runs.pop(run, None)
            made = self._runs[run] = RunFigures(run)
            for name in [n for n, f in self._runs.items() if f.outcome][: max(0, len(self._runs) - MOST_RUNS)]:
                del self._runs[name]
            return made

    def serve(self, address: tuple[str, int]) -> int:
        """Begin to answer, or to leave the figures beside who does; the port. OSError where neither can be."""
        with self._lock:
            if self._server is None:
                folder = shared_folder(address[1])
                try:
                    self._server = MetricsServer(address, self.text, name="hotstage-driver")
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                    self._folder = folder
                    return address[1]
                self._folder = folder if address[1] else shared_folder(self._server.port)
                self._server.start()
                log.info("metrics are at http://%s:%d/metrics", address[0], self._server.port)
            return self._server.port

    def leave(self, figures: RunFigures) -> None:
        """The run's figures beside the process that answers, where that is another one."""
        if self._server is not None or self._folder is None:
            return
        data = json.dumps({"pid": os.getpid(), "figures": asdict(figures)}).encode()
        if self._left.get(figures.run) != data:
            with contextlib.suppress(OSError):
                write_file(self._folder / f"{os.getpid()}-{figures.run}.json", data)
                self._left[figures.run] = data

    def text(self) -> str:
        with self._lock:
            runs = dict(self._runs)
        return page_text(PREFIX, families([*runs.values(), *self._others(runs)]), {})

    def _others(self, own: Mapping[str, RunFigures]) -> Iterator[RunFigures]:
        """What living processes left; of a run one."""
        seen = set(own)
        for path in sorted(self._folder.glob("*.json")) if self._folder is not None else ():
            try:
                value = json.loads(path.read_bytes())
                figures = RunFigures(**value["figures"])
                os.kill(int(value["pid"]), 0)
            except (OSError, ValueError, TypeError, KeyError):
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            if figures.run not in seen:
                seen.add(figures.run)
                yield figures


def shared_folder(port: int) -> Path:
    """This user's alone. OSError where it cannot be."""
    folder = Path(tempfile.gettempdir()) / f"hotstage-metrics-{os.getuid()}-{port}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} is another user's")
    return folder


PAGE = DriverPage()
"""Of this process."""


def figures_of(run: str, page: DriverPage = PAGE) -> tuple[RunFigures | None, str]:
    """A sink for a run's driver, where this process is told to listen, else None; and why it cannot."""
    told = os.environ.get(VARIABLE, "")
    if not told:
        return None, ""
    try:
        page.serve(address_of(told))
    except (ValueError, OSError) as error:
        return None, f"{VARIABLE}: {error}; Prometheus is told nothing by this driver"
    return page.of(run), ""


def families(runs: list[RunFigures]) -> list[Family]:
    """All that is told of them."""

    def each(value: Callable[[RunFigures], float | None]) -> Iterator[tuple[dict[str, str], float]]:
        for f in runs:
            found = value(f)
            if found is not None and not math.isnan(found):
                yield {"run": f.run}, found

    def line(key: str, scale: float = 1.0) -> Iterator[tuple[dict[str, str], float]]:
        return each(lambda f: f.last[key] * scale if key in f.last else None)

    def by(label: str, values: Callable[[RunFigures], Mapping[str, float]]) -> Iterator[tuple[dict[str, str], float]]:
        for f in runs:
            for name, value in sorted(values(f).items()):
                yield {"run": f.run, label: name}, value

    return [
        ("step", "gauge", "Newest training step that its driver knows of.", each(lambda f: f.step)),
        ("steps", "gauge", "Steps of the run in all.", each(lambda f: f.steps or None)),
        ("loss", "gauge", "Training loss of that step.", line("loss")),
        ("grad_norm", "gauge", "Norm of the gradient of that step.", line("grad_norm")),
        ("learning_rate", "gauge", "Learning rate of that step.", line("lr")),
        ("tokens_per_second", "gauge", "Tokens a second of that step.", line("tokens_per_s")),
        ("step_seconds", "gauge", "How long that step took.", line("step_us", 1e-6)),
        ("step_timestamp_seconds", "gauge", "When that step was done, in Unix seconds.", line("time")),
        ("saved_step", "gauge", "Step of the newest checkpoint in the store; -1: none.", each(lambda f: f.saved)),
        ("attempts", "gauge", "Attempts of the run so far.", each(lambda f: f.attempts)),
        (
            "failures_total",
            "counter",
            "Attempts that failed since this driver began, by the class of the cause.",
            by("class", lambda f: f.failures),
        ),
        (
            "symptoms_total",
            "counter",
            "What was told of the run's health since this driver began, by kind (docs/watch.md).",
            by("kind", lambda f: f.symptoms),
        ),
        ("recoveries_total", "counter", "Failures after which steps came again.", each(lambda f: f.recoveries)),
        (
            "recovery_seconds_total",
            "counter",
            "Time from a failure that was seen to the next step.",
            each(lambda f: f.recovery_s),
        ),
        (
            "evaluated_step",
            "gauge",
            "Step of the newest checkpoint that was evaluated; -1: none.",
            each(lambda f: f.evaluated),
        ),
        (
            "validation_loss",
            "gauge",
            "Loss on validation data of the newest checkpoint that has one.",
            each(lambda f: f.numbers.get("validation/loss")),
        ),
        (
            "evaluation",
            "gauge",
            "Newest number that a command of the user's gave (eval/command/number).",
            by("number", lambda f: {n: v for n, v in f.numbers.items() if n != "validation/loss"}),
        ),
        (
            "evaluation_failures_total",
            "counter",
            "Times that a command of the user's began to fail.",
            by("command", lambda f: f.eval_failures),
        ),
        (
            "differing_replays_total",
            "counter",
            "Steps computed again with another result.",
            each(lambda f: f.differing),
        ),
        ("ended", "gauge", "1 where the run has ended, by its outcome.", by("outcome", _ended)),
    ]


def _ended(figures: RunFigures) -> Mapping[str, float]:
    return {figures.outcome: 1.0} if figures.outcome else {}
