"""What a driver tells people: events as they happen, and how its part of a run ended. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

WARNS = "WARNING: "
"""How a line for people begins that they should act on."""


@dataclass(frozen=True)
class Event:
    """What people should see: ``kind`` is step, phase, devices, attempt, checkpoint, damaged, replay, evaluated,
    health or ended.
    """

    kind: str
    facts: dict[str, Any]


class Sink(Protocol):
    """Takes events. Must return at once; may lose them."""

    def tell(self, event: Event) -> None: ...


@dataclass(frozen=True)
class Sinks:
    """Tells several."""

    sinks: Sequence[Sink]

    def tell(self, event: Event) -> None:
        for sink in self.sinks:
            sink.tell(event)


class NoSink:
    """Tells nobody."""

    def tell(self, event: Event) -> None:
        return None


@dataclass(frozen=True)
class Outcome:
    """How a run (or this driver's part of it) ended. ``outcome``: succeeded, cancelled, gave_up, parked (its hours are
    used), stopped, or superseded (an order stands that this driver cannot follow; the run goes on elsewhere). ``cls``:
    of the cause of giving up.
    """

    run: str
    outcome: str
    reason: str
    step: int
    state_digest: str | None
    attempts: int
    exit_code: int
    lost_steps: int = 0
    recovery_s: float | None = None
    cls: str = ""
