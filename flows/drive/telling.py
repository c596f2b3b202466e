"""What people see of a run that is driven: the driver's events, in the words of people, each told once.

Nothing here decides anything, and nothing that decides is kept here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from checkpoint.log import RunState
from flows.drive.events import Event, NoSink, Outcome, Sink
from flows.drive.hints import step_line
from flows.drive.line import beginning_of, ordered_back
from flows.drive.run import opened_again
from flows.drive.views import NodeView, Phase, StartAttempt
from trainer.failures import FAILURES, Failure
from trainer.spec_layouts import layout_words

DETACHED = "the gang trains on; `hotstage runs resume {run}` attaches again, `hotstage runs cancel {run}` ends it"
NOT_TOLD = ("sums", "sent", "busy")
"""Of a step's line: for replays and the run's health alone."""
OVER_S = 60.0
"""Since it was seen last something that did not answer is over: the next time is told again."""
QUIET_S = 30.0
"""A node whose agent was not heard of for so long is told."""
EXIT_CANCELLED = 1
EXIT_STOPPED = 85
PARKED = "parked"
"""What people call a run that ended ``preempted``: it has used what it may."""
EXIT_SUPERSEDED = 78


def quiet_words(node: NodeView) -> str:
    """Of a node that is not known to be gone: its agent is stopped, starved, or cannot reach the store."""
    return (
        f"node {node.node}: its agent was not heard of for {node.age_s:.0f} s (stopped, starved, or without the "
        "store); its ranks may train on, and nothing ends them for that. A stopped process goes on with kill -CONT"
    )


@dataclass
class Teller:
    """Tells the sink, and counts what people want to know at the end: lost steps, seconds to recover."""

    run: str
    sink: Sink = field(default_factory=NoSink)
    clock: Callable[[], float] = time.monotonic
    max_step: dict[int, int] = field(default_factory=dict)
    recoveries: list[float] = field(default_factory=list)
    _begins: list[tuple[int, int]] = field(default_factory=list)  # (epoch that was left, step from which it goes on)
    _failed_at: float | None = None
    _told: set[tuple[Any, ...]] = field(default_factory=set)
    _silences: dict[tuple[Any, ...], float] = field(default_factory=dict)  # key -> when it was seen last
    _told_n: int | None = None  # the newest checkpoint record that was told

    def tell(self, kind: str, **facts: Any) -> None:
        self.sink.tell(Event(kind, facts))

    def phase(self, phase: Phase | str, text: str, *, key: tuple[Any, ...] | None = None) -> None:
        """A phase of the run; with a key only where that is not the last one told."""
        if key is not None and key in self._told:
            return
        self.tell("phase", phase=phase.value if isinstance(phase, Phase) else phase, text=text)
        if key is not None:  # a phase may come back: of those only the last one is not repeated
            self._told = {k for k in self._told if k[0] != "phase"} | {key}

    def silence(self, phase: Phase | str, text: str, of: str, why: str) -> None:
        """What does not answer now, ``of`` a kind: told once while it lasts, and again where it comes back after
        `OVER_S`.
        """
        now, key = self.clock(), (of, why[:80])
        over = {k for k, at in self._silences.items() if now - at > OVER_S}
        self._told -= over
        self._silences = {k: at for k, at in self._silences.items() if k not in over} | {key: now}
        self.phase(phase, text, key=key)

    def known(self, state: RunState, steps: int) -> None:
        """The run had begun, or ended, before this driver: whoever started it twice should see that. ``steps``: of the
        run, in all.
        """
        newest = state.at_step()
        saved = newest.step if newest else beginning_of(state).step
        facts = {"attempts": len(state.attempts), "step": saved, "steps": steps}
        again = state.ended is None or opened_again(state)
        self.tell("known", **facts, ended=None if again or not state.ended else state.ended.outcome)

    def failed(self) -> None:
        """Something failed: from now on until a step of the next attempt is the time to recover."""
        if self._failed_at is None:
            self._failed_at = self.clock()

    def steps(self, state: RunState, lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the ranks said of their steps, but for those that an order has left; the lines that hold."""
        back, found = ordered_back(state), []
        for line in filter(None, map(step_line, lines)):
            epoch, step = line["epoch"], line["step"]
            if any(epoch < later and step > first for later, first in back):
                continue
            found.append(line)
            line = {key: value for key, value in line.items() if key not in NOT_TOLD}
            if self._failed_at is not None and epoch == state.epoch and epoch not in self.max_step:
                self.recoveries.append(self.clock() - self._failed_at)
                self._failed_at = None
                self.tell("recovered", epoch=epoch, step=step, seconds=self.recoveries[-1])
            self.max_step[epoch] = max(step, self.max_step.get(epoch, -1))
            self.sink.tell(Event("step", line))
        return found

    def nodes(self, state: RunState, nodes: Iterable[NodeView]) -> None:
        """Their trouble: training goes on, but a person should know that checkpoints do not."""
        for node in nodes:
            if state.epoch and node.epoch == state.epoch and any(r.ended and (r.code or r.signal) for r in node.ranks):
                self.failed()
            if node.devices and node.epoch == state.epoch and ("devices", node.node, node.devices) not in self._told:
                self._told.add(("devices", node.node, node.devices))
                self.tell("devices", node=node.node, text=node.devices, names=list(node.gpus))
            if node.error:
                self.phase("warning", f"node {node.node}: {node.error}", key=("trouble", node.node))
            else:
                self._told.discard(("trouble", node.node))
            if node.epoch == state.epoch and node.age_s >= QUIET_S and any(r.pid and not r.ended for r in node.ranks):
                self.silence("unknown", quiet_words(node), "node", f"{node.node}")

    def checkpoints(self, state: RunState) -> None:
        """Those that were not told yet; of a run that had begun before this driver the newest of its line alone."""
        if (told := self._told_n) is None:
            fresh = [newest] if (newest := state.at_step()) is not None else []
        else:
            fresh = [*takewhile(lambda checkpoint: checkpoint.n > told, reversed(state.checkpoints))]
        for checkpoint in reversed(fresh):
            self.tell("checkpoint", n=checkpoint.n, step=checkpoint.step, epoch=checkpoint.epoch)
        self._told_n = state.n

    def began(self, state: RunState, order: StartAttempt, cause: Mapping[str, Any] | None, *, steps: int) -> None:
        """An attempt, the newest of the log. ``steps``: of the run, in all."""
        attempts = state.attempts
        back = (attempts[-1].epoch, attempts[-1].step) in ordered_back(state)
        if len(attempts) > 1 and not back:
            self._begins.append((attempts[-2].epoch, max(order.restore.step, 0)))
        facts = {"number": len(attempts), "epoch": attempts[-1].epoch, "reason": order.reason, "cause": cause}
        facts |= {"steps": steps, "back": back}
        if order.layout is not None:
            facts["layout"] = layout_words(order.layout.how)
            facts["for_want_of"] = order.fallback.why if order.fallback else ""
        if order.gives_way:
            facts["gave_way"] = order.reason
        self.tell("attempt", **facts, **{"step": order.restore.step, "from": order.restore.origin})

    @property
    def lost_steps(self) -> int:
        """Done twice, by all that was heard until now: the last lines of an attempt may come after its end."""
        return sum(max(0, self.max_step.get(epoch, step) - step) for epoch, step in self._begins)

    def saved(self, state: RunState, asked_at: int) -> str:
        """What a stop left in the store: the gang's last state may not have got there. ``asked_at``: the log's newest
        record when the gang was asked to stop; what it saves then is recorded after that.
        """
        newest = state.at_step()  # by step: a slower upload may be recorded after a later one
        reached = max(self.max_step.values(), default=0)
        if newest is None:
            return "nothing was saved yet" + (f"; the steps up to {reached} will be trained again" if reached else "")
        if newest.step >= reached and newest.n > asked_at:
            return "state saved"
        after = f"the steps up to {reached}" if reached > newest.step else "what was trained after it"
        return f"step {newest.step} is saved; {after} will be trained again"

    def outcome(self, state: RunState, outcome: str, reason: str = "", *, left_running: bool = False) -> Outcome:
        newest = state.at_step()  # by step: a slower upload may be recorded after a later one
        code, cls = 0, ""
        if outcome == "gave_up" and state.ended:
            reason, cls = state.ended.reason, state.ended.failure
            code = FAILURES[Failure.read(cls) or Failure.INFRA].exit_code
        elif outcome == "superseded":
            code = EXIT_SUPERSEDED
        elif outcome == "cancelled":
            reason, code = (state.ended.reason if state.ended else ""), EXIT_CANCELLED
        elif outcome == "preempted":
            reason = state.ended.reason.replace("RUN", self.run) if state.ended else ""
            outcome, code = PARKED, EXIT_STOPPED
        elif outcome == "stopped":
            reason, code = ("the gang trains on" if left_running else reason), EXIT_STOPPED
        result = Outcome(
            run=self.run,
            outcome=outcome,
            reason=reason,
            step=newest.step if newest else beginning_of(state).step,
            state_digest=newest.state_digest if newest else None,
            attempts=len(state.attempts),
            exit_code=code,
            lost_steps=self.lost_steps,
            recovery_s=max(self.recoveries) if self.recoveries else None,
            cls=cls,
        )
        said = "" if outcome == "superseded" else reason  # whoever runs the driver says that: it is why it leaves
        self.tell("ended", outcome=outcome, reason=said, step=result.step, state_digest=result.state_digest)
        return result
