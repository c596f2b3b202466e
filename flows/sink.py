"""Where a run's events go for people to see: the terminal, and Prefect's page. Sinks never block and never decide."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoint.errors import CheckpointError
from flows.loop import Event, Sink
from flows.prefect_api import Artifacts

log = logging.getLogger(__name__)


@dataclass
class Many:
    """Tells several sinks, each on its own risk."""

    sinks: Sequence[Sink]

    def tell(self, event: Event) -> None:
        for sink in self.sinks:
            sink.tell(event)


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
    _durable: int = -1
    _rate: float = 0.0
    _step_s: float = 0.0
    _phase: str = ""

    def tell(self, event: Event) -> None:
        facts = event.facts
        match event.kind:
            case "step":
                self._step(facts)
            case "attempt":
                cause = facts.get("cause")
                origin = {"memory": "from memory", "checkpoint": "from a checkpoint", "start": "from the start"}[
                    facts["from"]
                ]
                where = f"at step {max(facts['step'], 0)} {origin}"
                self.say(f"attempt {facts['number']}: {where}" + (f"; because {cause['text']}" if cause else ""))
            case "known" if facts["ended"]:
                opens = "" if facts["ended"] == "succeeded" else "; `hotstage runs resume` opens it again"
                self.say(f"this run had ended before ({facts['ended'].replace('_', ' ')}): nothing is trained{opens}")
            case "known":
                self.say(
                    f"this run has begun before: attempt {facts['attempts']}, step {facts['step']} saved; "
                    "this command goes on with it"
                )
            case "recovered":
                self.say(f"recovered: step {facts['step']} done {facts['seconds']:.2f} s after the failure was seen")
            case "checkpoint":
                self._durable = facts["step"]
            case "damaged":
                record, why = facts["checkpoint"], facts["why"]
                self.say(f"WARNING: checkpoint record {record} is damaged ({why}); an older one is used")
            case "ended":
                digest = f", state digest {facts['digest'][:16]}…" if facts.get("digest") else ""
                gave_up = facts["outcome"] == "gave_up"  # why: the command says it last, with the mend
                reason = f" ({facts['reason']})" if facts.get("reason") and not gave_up else ""
                self.say(f"{facts['outcome'].replace('_', ' ')}{reason}: step {facts['step']}{digest}")
            case "phase" if facts["phase"] not in ("training", self._phase):  # once, whatever its details
                self._phase = facts["phase"]
                self.say(f"{facts['phase']}" + (f": {facts['text']}" if facts.get("text") else ""))

    def _step(self, facts: dict[str, Any]) -> None:
        rate = float(facts.get("tokens_per_s") or 0.0)
        seconds = float(facts.get("step_us", 0)) / 1e6
        self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate
        self._step_s = seconds if self._step_s == 0 else 0.9 * self._step_s + 0.1 * seconds
        self._phase = ""
        step = int(facts["step"])
        now = self.clock()
        if now - self._last < self.every_s and step != self.steps:
            return
        self._last = now
        eta = (self.steps - step) * self._step_s
        mfu = f"  MFU {self._rate * self.flops_per_token / self.peak_flops:4.0%}" if self.peak_flops else ""
        saved = f"  saved {self._durable}" if self._durable >= 0 else ""
        self.say(
            f"step {step:>6}/{self.steps}  loss {float(facts['loss']):.4f}  |g| {float(facts['grad_norm']):.3f}  "
            f"{self._rate:>8,.0f} tok/s{mfu}  ETA {int(eta) // 60}:{int(eta) % 60:02d}{saved}"
        )


@dataclass
class PrefectSink:
    """Progress, loss curve and attempts as Prefect artifacts, from a thread of its own behind a bounded queue.

    Prefect may be slow or gone: events are dropped then (counted), the run is not touched. Create it inside a flow: the
    artifacts belong to the flow run whose context is copied. ``rows`` gives the attempts as the log knows them, so that
    the table is whole also where this driver attached to what another had begun. Progress is one artifact, updated in
    place each ``every_s``; the curve and the table are versioned by Prefect: written after a new attempt or checkpoint,
    at most each ``full_every_s``, and at the end.
    """

    run: str
    steps: int
    rows: Callable[[], list[dict[str, Any]]] = list
    artifacts: Artifacts = field(default_factory=Artifacts)
    every_s: float = 2.0
    full_every_s: float = 20.0
    dropped: int = 0

    def __post_init__(self) -> None:
        self._queue: queue.Queue[Event | None] = queue.Queue(maxsize=1000)
        self._curve: dict[int, float] = {}
        self._durable = -1
        self._news = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=lambda: context.run(self._work), name="prefect-sink", daemon=True)
        self._thread.start()

    def tell(self, event: Event) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def close(self, timeout_s: float = 10.0) -> bool:
        """Publish what is left, for at most so long; True where Prefect took everything."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive() and not self.artifacts.failures

    def _work(self) -> None:
        published = full = time.monotonic()
        while True:
            event: Event | None = Event("tick", {})
            with contextlib.suppress(queue.Empty):
                event = self._queue.get(timeout=self.every_s)
            now = time.monotonic()
            if event is None:
                self._publish_progress()
                self._publish_full()
                return
            self._take(event)
            if now - published >= self.every_s:
                self._publish_progress()
                published = time.monotonic()
            if self._news and now - full >= self.full_every_s:
                self._publish_full()
                full = time.monotonic()

    def _take(self, event: Event) -> None:
        if event.kind == "step":
            self._curve[int(event.facts["step"])] = float(event.facts["loss"])
        elif event.kind == "checkpoint":
            self._durable = int(event.facts["step"])
        self._news = self._news or event.kind in ("attempt", "recovered", "checkpoint")

    def _publish_progress(self) -> None:
        step = max(self._curve, default=0)
        saved = f"saved {self._durable}" if self._durable >= 0 else "nothing saved yet"
        percent = min(100.0, 100.0 * max(step, self._durable) / self.steps)
        self.artifacts.progress(self.run, percent, f"step {step} of {self.steps}, {saved}")

    def _publish_full(self) -> None:
        self._news = False
        self.artifacts.markdown(f"{self.run}-loss", loss_markdown(self.run, self._curve))
        try:
            rows = self.rows()
        except CheckpointError as error:
            log.info("the attempts are not told to Prefect now: %s", error)
            return
        self.artifacts.table(f"{self.run}-attempts", rows)


def loss_markdown(run: str, curve: dict[int, float], points: int = 60) -> str:
    """The loss curve as a Mermaid chart, which Prefect's page draws."""
    if len(curve) < 2:
        return f"# {run}\n\nno steps yet"
    steps = sorted(curve)
    picked = steps[:: max(1, len(steps) // points)]
    if picked[-1] != steps[-1]:
        picked.append(steps[-1])
    values = [curve[s] for s in picked]
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or 0.1
    return (
        f"# {run}\n\nloss {curve[steps[0]]:.4f} → {curve[steps[-1]]:.4f} at step {steps[-1]}\n\n"
        "```mermaid\nxychart-beta\n"
        f'    x-axis "step" {picked[0]} --> {picked[-1]}\n'
        f'    y-axis "loss" {low - pad:.4f} --> {high + pad:.4f}\n'
        f"    line [{', '.join(f'{v:.4f}' for v in values)}]\n```\n"
    )
