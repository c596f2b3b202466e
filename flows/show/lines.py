"""Where a run's events go for people to see: the terminal, a pipe. Sinks never block and never decide."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.drive.events import WARNS, Event
from trainer.amounts import clock
from trainer.plan.devices import peak_of

_EACH = ("warning", "order", "unknown")
"""Phases whose words are each a fact of its own."""


@dataclass
class Meter:
    """What people want to know of a run, from its events: numbers smoothed over the last steps."""

    steps: int
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    step: int = 0
    loss: float = math.nan
    grad_norm: float = math.nan
    rate: float = 0.0
    durable: int = -1
    attempts: int = 0
    precision: str = "fp32"
    gpus: dict[int, list[str]] = field(default_factory=dict)
    """By node, the names of the devices that its ranks use; their sheets are the yardstick then."""
    _step_s: float = 0.0

    def take(self, event: Event) -> None:
        facts = event.facts
        if event.kind == "step":
            rate = float(facts.get("tokens_per_s") or 0.0)
            seconds = float(facts.get("step_us", 0)) / 1e6
            self.step, self.loss, self.grad_norm = int(facts["step"]), float(facts["loss"]), float(facts["grad_norm"])
            self.rate = rate if self.rate == 0 else 0.9 * self.rate + 0.1 * rate
            self._step_s = seconds if self._step_s == 0 else 0.9 * self._step_s + 0.1 * seconds
        elif event.kind == "checkpoint":
            self.durable = int(facts["step"])
        elif event.kind == "devices":
            self.gpus[int(facts["node"])] = list(facts["names"])
        elif event.kind in ("attempt", "known"):
            self.steps = int(facts.get("steps") or self.steps)  # an order may have changed it
            if facts.get("back"):  # by an order: what was saved behind that step is not the run's any more
                self.durable = int(facts["step"]) if facts["from"] == "checkpoint" else -1
            self.attempts = int(facts["number"] if event.kind == "attempt" else facts["attempts"])

    @property
    def mfu(self) -> float | None:
        names = [name for node in self.gpus.values() for name in node]
        peak = peak_of(names, self.precision) if names else self.peak_flops
        return self.rate * self.flops_per_token / peak if peak else None

    @property
    def eta(self) -> str:
        return clock((self.steps - self.step) * self._step_s)


@dataclass
class Lines:
    """Plain lines, one a fact: for terminals, logs and pipes alike.

    ``steps``: the run's last step, for percent and ETA; ``every_s``: at most one step line in so many seconds.
    """

    say: Callable[[str], None]
    steps: int
    every_s: float = 1.0
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _last: float = -1e9
    _phase: str = ""

    def __post_init__(self) -> None:
        self.meter = Meter(self.steps, self.flops_per_token, self.peak_flops)

    def tell(self, event: Event) -> None:
        facts = event.facts
        self.meter.take(event)
        match event.kind:
            case "step":
                self._step()
            case "attempt":
                cause = facts.get("cause")
                origin = {"memory": "from memory", "checkpoint": "from a checkpoint", "start": "from the start"}[
                    facts["from"]
                ]
                where = f"at step {max(facts['step'], 0)} {origin}"
                if facts.get("layout"):
                    where += f", now {facts['layout']}" + (f" ({facts['for_want_of']})" if facts["for_want_of"] else "")
                because = f"because {cause['text']}" if cause else facts.get("gave_way", "")
                self.say(f"attempt {facts['number']}: {where}" + (f"; {because}" if because else ""))
            case "known" if facts["ended"]:
                opens = "" if facts["ended"] == "succeeded" else "; `hotstage runs resume RUN` opens it again"
                self.say(f"this run had ended before ({facts['ended'].replace('_', ' ')}): nothing is trained{opens}")
            case "known":
                self.say(
                    f"this run has begun before: attempt {facts['attempts']}, step {facts['step']} saved; "
                    "this command goes on with it"
                )
            case "recovered":
                self.say(f"recovered: step {facts['step']} done {facts['seconds']:.2f} s after the failure was seen")
            case "devices":
                self.say(f"node {facts['node']}: {facts['text']}")
            case "damaged":
                record, why = facts["checkpoint"], facts["why"]
                self.say(f"{WARNS}checkpoint record {record} is damaged ({why}); an older one is used")
            case "replay" if facts["found"] != "same":
                warn = f"{WARNS}a step computed again differs\n" if facts["found"] == "differs" else ""
                self.say(f"{warn}{facts['text']}")
            case "health":
                self.say(("" if facts["over"] else WARNS) + facts["text"])
            case "evaluated":
                if facts["text"]:
                    self.say((WARNS if facts.get("failed") else "") + facts["text"])
            case "ended":
                said = facts.get("state_digest")
                digest = f", state digest {said[:16]}…" if said else ""
                gave_up = facts["outcome"] == "gave_up"  # why: the command says it last, with the mend
                reason = f" ({facts['reason']})" if facts.get("reason") and not gave_up else ""
                self.say(f"{facts['outcome'].replace('_', ' ')}{reason}: step {facts['step']}{digest}")
            case "phase":
                said = facts["phase"] + (f": {facts['text']}" if facts.get("text") else "")
                told = said if facts["phase"] in _EACH else facts["phase"]  # else once, whatever its details
                if told not in ("training", self._phase):
                    self._phase = told
                    self.say(said)

    def _step(self) -> None:
        meter = self.meter
        self._phase = ""
        now = self.clock()
        if now - self._last < self.every_s and meter.step != meter.steps:
            return
        self._last = now
        mfu = f"  MFU {meter.mfu:4.0%}" if meter.mfu is not None else ""
        saved = f"  saved {meter.durable}" if meter.durable >= 0 else ""
        self.say(
            f"step {meter.step:>6}/{meter.steps}  loss {meter.loss:.4f}  |g| {meter.grad_norm:.3f}  "
            f"{meter.rate:>8,.0f} tok/s{mfu}  ETA {meter.eta}{saved}"
        )


@dataclass
class JsonLines:
    """Every event as a JSON object on a line of its own; steps at most one each ``every_s``, and the last one.

    ``said`` is the line that a person would read, where there is one.
    """

    write: Callable[[str], None]
    steps: int
    every_s: float = 1.0
    clock: Callable[[], float] = time.monotonic
    _last: float = -1e9

    def __post_init__(self) -> None:
        self._said: list[str] = []
        self._lines = Lines(self._said.append, self.steps, every_s=math.inf)

    def tell(self, event: Event) -> None:
        self._said.clear()
        self._lines.tell(event)
        said = {"said": "\n".join(self._said)} if self._said and event.kind != "step" else {}
        if event.kind == "step":
            now = self.clock()
            if now - self._last < self.every_s and int(event.facts["step"]) != self._lines.meter.steps:
                return
            self._last = now
        self.write(json_line({"event": event.kind, **{k: v for k, v in event.facts.items() if k != "event"}, **said}))


def json_line(value: Mapping[str, Any]) -> str:
    """One line of JSON that every reader takes: numbers that JSON has no word for are null, and what is no text (of
    names that are not in UTF-8) or moves a terminal is escaped.
    """
    line = json.dumps(plain(value), ensure_ascii=False, allow_nan=False)
    return line if line.isprintable() else json.dumps(plain(value), allow_nan=False)


def plain(value: Any) -> Any:
    """The value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | type(None)) else str(value)
