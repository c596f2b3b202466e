"""A run without processes: its log, and the lines that its ranks left in a store, as trackers meet it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from checkpoint.evaluated import Evaluation
from checkpoint.keys import evaluated_key, segment_key
from checkpoint.log import RunLog, RunState
from checkpoint.store.memory import MemoryStore
from flows.drive.events import Event
from flows.drive.live import load_evaluations
from flows.tracking.tracker import Tracker
from tests.checkpoint.samples import attempt_body, point_body

RUN = "demo-0a1b2c"


def line(step: int, epoch: int, branch: int = 0) -> dict[str, Any]:
    """As the engine writes it: other numbers only where an order sent the run back."""
    loss = 10.0 / step + branch / 1000
    told = {"event": "step", "run": RUN, "epoch": epoch, "rank": 0, "time": 1e9 + step, "step": step, "loss": loss}
    return {**told, "grad_norm": 1.5, "lr": 1e-3, "tokens_per_s": 1000.0, "step_us": 2000, "sums": "", "sent": ""}


@dataclass
class World:
    store: MemoryStore = field(default_factory=MemoryStore)
    state: RunState = field(default_factory=lambda: RunState(RUN))
    objects: dict[int, int] = field(default_factory=dict)
    branch: int = 0

    def __post_init__(self) -> None:
        self.log = RunLog(self.store, RUN, writer="test")

    def fork_of(self, run: str, step: int) -> World:
        """Its log's first record, as a fork has it."""
        body = {"kind": "parent", "run": run, "checkpoint": 3, "step": step, "state_digest": "1" * 64}
        self.state = self.log.append("intervention", body, self.log.fold())
        return self

    def attempt(self, step: int = 0, checkpoint: int | None = None, order: int = 0) -> Event:
        body = attempt_body(checkpoint, step, **({"order": order} if order else {}))
        self.state = self.log.append("attempt", body, self.log.fold())
        return Event("attempt", {"number": 1, "epoch": self.state.epoch, "step": step, "back": bool(order)})

    def back_to(self, step: int) -> Event:
        """A person's order sends it back to that checkpoint, and the next attempt follows."""
        info = self.state.at_step(step)
        assert info is not None
        how = self.state.attempts[-1].how
        body = {"kind": "order", "how": how, "by": "me", "via": "test", "checkpoint": info.n, "step": step}
        self.state = self.log.append("intervention", body, self.state)
        event = self.attempt(step, info.n, self.state.n)
        self.branch = self.state.epoch
        return event

    def steps(self, first: int, last: int, a_time: int = 3) -> list[Event]:
        """The lines of these steps, in the store; what a driver would tell of them."""
        epoch = self.state.epoch
        lines = [line(step, epoch, self.branch) for step in range(first, last + 1)]
        for at in range(0, len(lines), a_time):
            number = self.objects.get(epoch, 0)
            data = "\n".join(json.dumps(one) for one in lines[at : at + a_time]).encode()
            self.store.create(segment_key(RUN, epoch, number), data)
            self.objects[epoch] = number + 1
        return [Event("step", one) for one in lines]

    def save(self, step: int) -> None:
        self.state = self.log.append(
            "checkpoint", point_body(step, self.state.epoch), self.state, epoch=self.state.epoch
        )

    def evaluated(self, step: int, **more: Any) -> Event:
        there = load_evaluations(self.store, RUN)
        there.add(Evaluation(step, self.state.epoch, time=1e9 + step, **more))
        self.store.put(evaluated_key(RUN), there.to_bytes())
        return Event("evaluated", {"found": "numbers", "step": step})


def tells(tracker: Tracker, events: Iterable[Event], outcome: str = "") -> None:
    """One driver's life: what it tells the tracker, and its end where it has an outcome. Nothing went wrong."""
    for event in events:
        tracker.tell(event)
    if outcome:
        tracker.tell(Event("ended", {"outcome": outcome}))
    assert tracker.close(60)
    assert tracker.trouble.empty(), tracker.trouble.get()
