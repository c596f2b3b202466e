"""The machine's invariants (``machine.py``), asserted by number after every event; a few microseconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.attempt import BEFORE_START, STARTED, NodeAttempt, NodePhase
from checkpoint.agent.course import Course, Life
from checkpoint.agent.events import Timer

_OF_THE_STORE = (ev.Claimed, ev.Provided, ev.Met, ev.Failed, ev.PartStored, ev.Drained)
_BEGINNINGS = (do.Claim, do.Prepare, do.Use, do.Meet, do.Mark, do.Start)


class Broken(AssertionError):
    """An invariant does not hold: a bug, of which no rank may suffer (the next agent adopts the attempt)."""


@dataclass(frozen=True, slots=True)
class Before:
    """What an event found."""

    epoch: int
    phase: NodePhase | None
    engine: int
    started: int
    preparing: int | None

    @classmethod
    def of(cls, m: Course) -> Before:
        phase = m.attempt.phase if m.attempt is not None else None
        return cls(m.epoch, phase, m.engine.epoch, m.started, m.preparing)


def check(m: Course, before: Before, event: ev.Event, effects: Sequence[do.Effect]) -> None:
    """Raise Broken, with the invariant's number, where one does not hold after ``event``."""
    attempt = m.attempt
    phase = attempt.phase if attempt is not None else None
    for effect in effects:
        _check_effect(m, attempt, before, event, effect)
    if attempt is not None and attempt.epoch != before.epoch:
        _hold(attempt.epoch > before.epoch, "A4: an older attempt begins")
        _hold(any(isinstance(effect, do.Begin) for effect in effects), "A4: work for the attempt before goes on")
    if m.engine.epoch:
        _hold(not m.serves or phase not in BEFORE_START, "A1: an attempt gets ready while ranks run")
        _hold(phase not in STARTED or m.engine.epoch == m.epoch, "A1: ranks of two attempts")
        if m.shared and attempt is not None and m.preparing == m.epoch and phase is not NodePhase.IDLE:
            _hold(attempt.spoiled, "A3: what is written while ranks run would be used")
    if isinstance(event, _OF_THE_STORE):
        _hold(before.phase not in STARTED or phase in STARTED, "A5: the store ends an attempt that runs")
    if m.exit is None:
        _check_waits(m, attempt, effects)


def _check_effect(m: Course, attempt: NodeAttempt | None, before: Before, event: ev.Event, effect: do.Effect) -> None:
    if isinstance(effect, _BEGINNINGS):
        _hold(m.serves, "A8: an agent that leaves begins something")
        _hold(attempt is not None and effect.gang.epoch == attempt.epoch, "A4: work for an older attempt")
    match effect:
        case do.Start():
            _hold(before.engine == 0, "A1: START before the ranks of the attempt before are gone")
            _hold(effect.gang.epoch > before.started, "A2: an attempt is started twice")
            _hold(isinstance(event, ev.Marked), "A2: START without its mark")
            _hold(attempt is not None and attempt.held, "A6: START of a node that is not ours")
        case do.Prepare():
            ended = isinstance(event, ev.Provided | ev.Failed)
            _hold(before.preparing is None or ended, "A3: two preparations at a time")
            _hold(m.engine.epoch == 0 or not m.shared, "A3: slots are written while ranks run")
        case do.Use():
            _hold(m.preparing is None and m.engine.epoch == 0, "A3: slots are used that may still be written")
        case do.Upload() | do.Commit():
            newest = m.state.epoch if m.state is not None and m.state.unreadable is None else effect.epoch
            _hold(effect.epoch == m.epoch == newest, "A4: an older attempt is stored")
        case do.Send(name="PREPARE"):
            _hold(m.serves, "A8: an agent that leaves begins something")
            _hold(attempt is not None and attempt.held, "A6: the engine hears of a node that is not ours")
        case do.Send(name="KILL" | "STOP"):
            _hold(not isinstance(event, _OF_THE_STORE), "A5: the store ends ranks")


def _check_waits(m: Course, attempt: NodeAttempt | None, effects: Sequence[do.Effect]) -> None:
    """A7"""
    here, timers = m.engine.peer is not None, m.timers
    if m.life is not Life.SERVING:
        timer = Timer.LAST_RANKS if m.life is Life.LAST_RANKS else Timer.END
        _hold(timer in timers, "A7: nothing ends the agent")
        return
    if m.stopping:
        _hold(Timer.TERMINATE in timers, "A7: nothing ends the agent")
        return
    if attempt is None:
        return
    match attempt.phase:
        case NodePhase.RECALL:
            waits = any(isinstance(effect, do.Recall) for effect in effects)
        case NodePhase.KILL:
            waits = m.engine.epoch != 0 and (Timer.KILL if here else Timer.LOST) in timers
        case NodePhase.PREPARE:
            waits = m.preparing is not None
        case NodePhase.PORTS:
            waits = not here or not attempt.held or attempt.asked == m.engine.peer
        case NodePhase.ADOPT:
            waits = Timer.ADOPT in timers
        case NodePhase.RUN if here:
            waits = m.engine.epoch == attempt.epoch or Timer.ENDS in timers
        case NodePhase.RUN:
            waits = Timer.LOST in timers
        case _:
            waits = True  # PEERS: a result; IDLE: the next attempt
    _hold(waits, f"A7: {attempt.phase.name} waits for nothing")


def _hold(holds: bool, broken: str) -> None:
    if not holds:
        raise Broken(broken)
