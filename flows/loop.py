"""The thin loop around ``flows.driver.decide``: observe, ask, act, tell. It may be killed at any instruction.

Order of calls, and who makes each (one driver; a second one beside it is harmless, because every act begins with
winning a log record):
  1. fold the log (truth), read the nodes' status (hints), ask the launcher who is alive;
  2. ``decide``;
  3. act: append ``attempt`` / ``damaged`` / ``ended`` (on a conflict: read the winner, decide again), keep the launch
     up;
  4. tell the sink what people see. The sink never blocks and never decides.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from checkpoint.errors import Conflict, StoreUnavailable
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from flows.driver import (
    Cause,
    Decision,
    End,
    Finished,
    MarkDamaged,
    NodeView,
    Phase,
    Policy,
    Restore,
    StartAttempt,
    Watch,
    choose_restore,
    decide,
    struck,
)
from flows.live import MetricsReader, StatusReader
from flows.run import Prepared, attempt_body, fold_view, relayout
from trainer.errors import LaunchUnknown
from trainer.launch import Launch, Launcher, LaunchView

log = logging.getLogger(__name__)

POLL_S = 0.05
POLL_MOST_S = 2.0
CALM = (Phase.TRAINING, Phase.WAITING)
CALM_SHARE = 0.02
"""Of a core: what looking may cost while all is well. Stores and gangs differ a thousandfold in what a look costs."""
STORE_PATIENCE_S = 1.0
LAUNCHER_PATIENCE_S = 1.0
LEAVING_S = 5.0


@dataclass(frozen=True)
class Event:
    """Something that people should see: ``kind`` is step, phase, attempt, checkpoint, damaged or ended."""

    kind: str
    facts: dict[str, Any]


class Sink(Protocol):
    """Takes events. Must return at once; may lose them."""

    def tell(self, event: Event) -> None: ...


class NoSink:
    """Tells nobody."""

    def tell(self, event: Event) -> None:
        return None


@dataclass(frozen=True)
class Outcome:
    """How a run (or this driver's part of it) ended. ``outcome``: succeeded, cancelled, gave_up or stopped."""

    run: str
    outcome: str
    reason: str
    step: int
    state_digest: str | None
    attempts: int
    exit_code: int
    lost_steps: int = 0
    recovery_s: float | None = None


EXIT_OF_CLASS = {
    "config": 78,
    "data": 65,
    "bug": 70,
    "signal": 75,
    "infra": 75,
    "restore": 76,
    "stall": 86,
    "numeric": 87,
    "memory": 78,
    "sick": 88,
}
DETACHED = "the gang trains on; `hotstage runs resume {run}` attaches again, `hotstage runs cancel {run}` ends it"
EXIT_CANCELLED = 1
EXIT_STOPPED = 85


def calm_pause_s(look_s: float, least_s: float) -> float:
    """How long to wait after a look that took so much of a core, so that looking stays at `CALM_SHARE` of one."""
    return min(max(least_s, look_s * (1 / CALM_SHARE - 1)), POLL_MOST_S)


@dataclass
class Driver:
    """Drives one run to its end. ``stop``: set it to have the gang save its state and leave (local runs)."""

    prepared: Prepared
    store: Store
    launcher: Launcher
    make_launch: Callable[[Prepared, str, tuple[str, ...]], Launch]
    """From the prepared run, the launch's name, and the machines that it must not use."""
    sink: Sink = field(default_factory=NoSink)
    stop: threading.Event = field(default_factory=threading.Event)
    reopen: bool = False
    poll_s: float = POLL_S
    # what this driver saw, for people; never for decisions
    max_step: dict[int, int] = field(default_factory=dict)
    recoveries: list[float] = field(default_factory=list)
    lost_steps: int = 0
    _failed_at: float | None = None
    _told: set[Any] = field(default_factory=set)
    _waits: tuple[str, float] | None = None
    _leaving_since: float | None = None
    _amnesty: bool = False
    _avoids: bool = False
    _as_asked: bool = False
    _reason: str = ""
    _left_running: bool = False

    def run(self) -> Outcome:
        """Loop until the log has an end, or until ``stop`` was set and the gang has saved and left."""
        run = self.prepared.run
        self._as_asked = self.reopen  # a person said how: not what an earlier driver had to make of it
        run_log = RunLog(self.store, run, writer="driver")
        state: RunState | None = None
        metrics = MetricsReader(self.store, run, attach=True)
        status: StatusReader | None = None
        while True:
            began, pause_s = time.thread_time(), self.poll_s
            try:
                begun, state = state is not None, run_log.fold(state, quick=True)
                if not begun and state.attempts:
                    self._tell_known(state)
                if self.reopen and state.ended and state.ended.outcome != "succeeded":
                    state = self._reopen(run_log, state)
                if self._finish_stop(state):
                    continue
                self._take_layout(state)
                launch_id = launch_of(state, self.prepared, self.launcher)
                if status is None or status.launch != launch_id:
                    status = StatusReader(self.store, run, launch_id)
                view = self.launcher.observe(launch_id)
                launch = self._launch(state, launch_id)
                nodes = placed(status.poll(self.prepared.nodes, alive_nodes(view)), view)
                self._tell_state(state, nodes, metrics if begun else None)  # what to do comes first
                if view.note:
                    where = "elsewhere" if view.state == "elsewhere" else "attached"
                    self._tell_once(("launch", view.note), Event("phase", {"phase": where, "text": view.note}))
                if self.stop.is_set() and not state.ended:
                    return self._stop(run_log, state, launch, reached=view.state != "elsewhere")
                if view.state == "unknown":
                    told = Event("phase", {"phase": "unknown", "text": view.detail})
                    self._tell_once(("launcher", view.detail[:80]), told)
                lost = loss_of(view, nodes, state, self.launcher)
                if lost is None and self._out_of_patience(view):
                    continue
                if lost is None and self._pardoned(view):
                    lost = Cause("infra", f"no room without the machines that failed twice: {view.detail}")
                policy = self.prepared.policy(launch_id)
                waiting = view.detail if view.state == "waiting" else ""
                decision = decide(fold_view(state), nodes, policy, lost=lost, waiting=waiting)
                if self._may_be_leaving(decision):
                    self.stop.wait(self.poll_s)
                    continue
                done = self._act(decision, run_log, state, launch, lost)
                if done:
                    return self._outcome(run_log.fold(state), done)
                if isinstance(decision, Watch) and decision.phase in CALM:
                    pause_s = calm_pause_s(time.thread_time() - began, self.poll_s)
            except Conflict as conflict:
                log.info("another driver was first: record %d; deciding again", conflict.state.n)
                state = conflict.state
                continue
            except StoreUnavailable as error:  # unknown is never failure: the gang trains on
                self._tell_once(("store", str(error)[:80]), Event("phase", {"phase": "unknown", "text": str(error)}))
                time.sleep(STORE_PATIENCE_S)
                continue
            except LaunchUnknown as error:
                self._tell_once(("launcher", str(error)[:80]), Event("phase", {"phase": "unknown", "text": str(error)}))
                self.stop.wait(LAUNCHER_PATIENCE_S)
                continue
            self.stop.wait(pause_s)

    # --- acting -------------------------------------------------------------------------------------------

    def _launch(self, state: RunState, launch_id: str) -> Launch:
        avoid = () if self._amnesty else avoided(state, launch_id)
        self._avoids = bool(avoid)
        return self.make_launch(self.prepared, launch_id, avoid)

    def _take_layout(self, state: RunState) -> None:
        """Go on with fewer stages where an earlier driver had to, and the spec allows it."""
        newest = state.newest_attempt
        allowed = self.prepared.spec.recovery.allowed_stages
        if newest is None or self._as_asked:
            return
        stages = newest.ranks // self.prepared.spec.parallel.replicas
        had_to = any(a.reason.startswith("fewer nodes") and a.ranks == newest.ranks for a in state.attempts)
        if newest.ranks < self.prepared.ranks and stages in allowed and had_to:
            self.prepared = relayout(self.prepared, self.store, stages)

    def _may_be_leaving(self, decision: Decision) -> bool:
        """Ranks that saved and left on request are mostly on a node that leaves with them, and its launcher shows that
        a moment later: an attempt in that launch would only be lost with it.
        """
        cause = decision.cause if isinstance(decision, StartAttempt) and not decision.renew else None
        if cause is None or cause.cls != "preempted" or not self.launcher.detaches:
            self._leaving_since = None
            return False
        self._leaving_since = self._leaving_since or time.monotonic()
        return time.monotonic() - self._leaving_since < LEAVING_S

    def _waited(self, view: LaunchView) -> bool:
        """Whether this launch has waited for longer than ``recovery.capacity_s``."""
        if view.state != "waiting":
            self._waits = None
            return False
        if self._waits is None or self._waits[0] != view.launch_id:
            self._waits = (view.launch_id, time.monotonic())
        return time.monotonic() - self._waits[1] >= self.prepared.spec.recovery.capacity_s

    def _out_of_patience(self, view: LaunchView) -> bool:
        """True where the run now has fewer stages, because there is no room for as many nodes as asked for."""
        was = self.prepared.spec.parallel.stages
        fewer = [s for s in self.prepared.spec.recovery.allowed_stages if s < was]
        if not fewer or not self._waited(view):
            return False
        self._waits = None
        self.prepared = relayout(self.prepared, self.store, fewer[0])
        self._reason = f"fewer nodes: {fewer[0]} stages instead of {was}; {view.detail}"[:500]
        return True

    def _pardoned(self, view: LaunchView) -> bool:
        """True, once, where a launch finds no room beside the machines that it avoids: the next one may use them."""
        if self._amnesty or not self._avoids or not self._waited(view):
            return False
        self._amnesty = True
        return True

    def _act(
        self, decision: Decision, run_log: RunLog, state: RunState, launch: Launch, lost: Cause | None
    ) -> str | None:
        match decision:
            case Finished(outcome):
                self._settle(launch)
                return outcome
            case Watch(phase, text):
                if lost is None:
                    self.launcher.ensure(launch)
                self._tell_once(("phase", phase, text), Event("phase", {"phase": phase.value, "text": text}))
                if phase is Phase.DRAINING and self._failed_at is None:
                    self._failed_at = time.monotonic()
            case StartAttempt():
                self._start(decision, run_log, state, launch)
            case MarkDamaged(checkpoint, why):
                run_log.append("damaged", {"checkpoint": checkpoint, "reason": why}, state)
                log.warning("checkpoint record %d is damaged: %s; an older one is used", checkpoint, why)
                self.sink.tell(Event("damaged", {"checkpoint": checkpoint, "why": why}))
            case End(outcome, reason, cause):
                newest = state.at_step()  # by step: a slower upload may be recorded after a later one
                run_log.append(
                    "ended",
                    {
                        "outcome": outcome,
                        "reason": f"{cause.cls}: {reason}" if cause else reason,
                        "step": newest.step if newest else 0,
                        "state_digest": newest.state_digest if newest else None,
                    },
                    state,
                )
        return None

    def _start(self, order: StartAttempt, run_log: RunLog, state: RunState, launch: Launch) -> None:
        if self._failed_at is None and state.attempts:
            self._failed_at = time.monotonic()
        if order.delay_s:
            self.sink.tell(
                Event("phase", {"phase": Phase.BACKOFF.value, "text": f"next attempt in {order.delay_s:.0f} s"})
            )
            if self.stop.wait(order.delay_s):
                return
        if order.renew:
            launch = self._launch(state, next_launch(state, self.prepared))
        cause = order.cause.to_map() if order.cause else None
        reason, self._reason = self._reason or order.reason, ""
        body = attempt_body(
            self.prepared,
            launch.launch_id,
            order.restore.to_map(),
            slot_epochs=list(order.slot_epochs),
            reason=reason,
            cause=cause,
        )
        state = run_log.append("attempt", body, state)
        newest = state.attempts[-1]
        log.info("attempt %d: %s, from step %d", newest.epoch, order.reason, order.restore.step)
        if len(state.attempts) > 1:
            reached = self.max_step.get(state.attempts[-2].epoch, order.restore.step)
            self.lost_steps += max(0, reached - max(order.restore.step, 0))
        self.sink.tell(
            Event(
                "attempt",
                {
                    "number": len(state.attempts),
                    "epoch": newest.epoch,
                    "reason": reason,
                    "cause": cause,
                    "step": order.restore.step,
                    "from": origin_of(order.restore),
                },
            )
        )
        old = state.attempts[-2].launch if len(state.attempts) > 1 else newest.launch
        if self.launcher.detaches and old != newest.launch:
            # its agents see the record and leave by themselves; this frees their place sooner
            self.launcher.stop(old, 0.0)
        self.launcher.ensure(self._launch(state, newest.launch))

    def _reopen(self, run_log: RunLog, state: RunState) -> RunState:
        """A user asks for a run that had ended without success: an attempt record opens it again."""
        self.reopen = False
        launch_id = launch_of(replace(state, ended=None), self.prepared, self.launcher)
        if self.launcher.detaches:
            launch_id = next_launch(state, self.prepared)
        view = replace(fold_view(state), ended=None)
        restore = choose_restore(view, (), self.prepared.policy(launch_id), use_slots=False)
        body = attempt_body(
            self.prepared, launch_id, restore.to_map(), slot_epochs=[], reason="resumed by the user", cause=None
        )
        return run_log.append("attempt", body, state)

    def _stop(self, run_log: RunLog, state: RunState, launch: Launch, *, reached: bool) -> Outcome:
        """Have the gang save one agreed step and leave; the run can be resumed. What is out of reach trains on."""
        if self.launcher.detaches or not reached:
            self._left_running = True
            self.sink.tell(Event("phase", {"phase": "detached", "text": DETACHED.format(run=self.prepared.run)}))
            return self._outcome(state, "stopped")
        self.sink.tell(Event("phase", {"phase": "stopping", "text": "saving one agreed step, then leaving"}))
        if state.attempts:
            self.launcher.stop(launch.launch_id, self.prepared.spec.checkpoint.commit_s)
        state = run_log.fold(state)
        return self._outcome(state, "stopped")

    def _finish_stop(self, state: RunState) -> bool:
        """True where a launch was still leaving that another driver had asked to stop: what it saves comes first, since
        the next attempt's record would fence it. It has left when this returns.
        """
        newest = state.newest_attempt
        if newest is None or state.ended:
            return False
        nodes = self.launcher.observe(newest.launch).nodes
        if not any(n.done == "stopped" and (n.agent_pid or n.supervisor_pid) for n in nodes):
            return False
        self.sink.tell(
            Event("phase", {"phase": Phase.DRAINING.value, "text": "what was asked to stop saves and leaves"})
        )
        self.launcher.stop(newest.launch, self.prepared.spec.checkpoint.commit_s)
        return True

    def _settle(self, launch: Launch) -> None:
        """The log has ended: agents end their engines and themselves; wait for that, then make sure."""
        deadline = time.monotonic() + 10.0
        while time.monotonic() < deadline:
            view = self.launcher.observe(launch.launch_id)
            if view.state in ("absent", "gone", "done", "elsewhere"):
                return
            if view.state == "lost" and not any(n.alive for n in view.nodes):
                break  # nobody is there to leave
            time.sleep(self.poll_s)
        self.launcher.stop(launch.launch_id, 0.0)

    # --- telling ------------------------------------------------------------------------------------------

    def _tell_known(self, state: RunState) -> None:
        """The run had begun, or ended, before this driver: whoever started it twice should see that."""
        newest = state.at_step()
        facts = {"attempts": len(state.attempts), "step": newest.step if newest else 0}
        again = state.ended is None or (self.reopen and state.ended.outcome != "succeeded")
        self.sink.tell(Event("known", {**facts, "ended": None if again or not state.ended else state.ended.outcome}))

    def _tell_once(self, key: Any, event: Event) -> None:
        if key not in self._told:
            self._told.add(key)
            self.sink.tell(event)
        if event.kind == "phase":  # a phase may come back: only the last one is not repeated
            self._told = {k for k in self._told if not (isinstance(k, tuple) and k[0] == "phase") or k == key}

    def _tell_state(self, state: RunState, nodes: list[NodeView], metrics: MetricsReader | None) -> None:
        epochs = [a.epoch for a in state.attempts]
        for line in metrics.poll(epochs[-2:]) if metrics is not None else ():
            if line.get("event") != "step":
                continue
            epoch, step = int(line["epoch"]), int(line["step"])
            if self._failed_at is not None and epochs and epoch == epochs[-1] and epoch not in self.max_step:
                self.recoveries.append(time.monotonic() - self._failed_at)
                self._failed_at = None
                self.sink.tell(Event("recovered", {"epoch": epoch, "step": step, "seconds": self.recoveries[-1]}))
            self.max_step[epoch] = max(step, self.max_step.get(epoch, -1))
            self.sink.tell(Event("step", line))
        for node in nodes:
            for rank in node.ranks:
                bad = rank.ended and (rank.code or rank.signal) and epochs and node.epoch == epochs[-1]
                if bad and self._failed_at is None:
                    self._failed_at = time.monotonic()
            key = ("trouble", node.node)
            if node.error:  # training goes on; but a person should know that checkpoints do not
                facts: dict[str, Any] = {"phase": "warning", "text": f"node {node.node}: {node.error}"}
                self._tell_once(key, Event("phase", facts))
            else:
                self._told.discard(key)
        for checkpoint in state.checkpoints:
            facts = {"n": checkpoint.n, "step": checkpoint.step, "epoch": checkpoint.epoch}
            self._tell_once(("checkpoint", checkpoint.n), Event("checkpoint", facts))

    def _saved(self, step: int | None) -> str:
        """What a stop left in the store, honestly: the gang's last state may not have got there."""
        reached = max(self.max_step.values(), default=0)
        if step is not None and step >= reached:
            return "state saved"
        where = "nothing was saved yet" if step is None else f"step {step} is saved"
        return f"{where}; the steps up to {reached} will be trained again" if reached else where

    def _outcome(self, state: RunState, outcome: str) -> Outcome:
        newest = state.at_step()  # by step: a slower upload may be recorded after a later one
        reason, code = "", 0
        if outcome == "gave_up" and state.ended:
            reason = state.ended.reason
            code = EXIT_OF_CLASS.get(state.ended.reason.partition(":")[0], 75)
        elif outcome == "cancelled":
            reason, code = (state.ended.reason if state.ended else ""), EXIT_CANCELLED
        elif outcome == "stopped":
            left = "the gang trains on" if self._left_running else self._saved(newest.step if newest else None)
            reason, code = left, EXIT_STOPPED
        result = Outcome(
            run=self.prepared.run,
            outcome=outcome,
            reason=reason,
            step=newest.step if newest else 0,
            state_digest=newest.state_digest if newest else None,
            attempts=len(state.attempts),
            exit_code=code,
            lost_steps=self.lost_steps,
            recovery_s=max(self.recoveries) if self.recoveries else None,
        )
        self.sink.tell(
            Event("ended", {"outcome": outcome, "reason": reason, "step": result.step, "digest": result.state_digest})
        )
        return result


def launch_of(state: RunState, prepared: Prepared, launcher: Launcher) -> str:
    """The launch to use: the newest attempt's where its layout fits and it has not ended for good, else a new one."""
    newest = state.newest_attempt
    if newest is not None and newest.nodes == prepared.nodes and newest.ranks == prepared.ranks:
        same_place = newest.launch.startswith(f"{prepared.run}-{prepared.spec.launch.target[0]}")
        if same_place and (state.ended or launcher.observe(newest.launch).state != "done"):
            return newest.launch
    return next_launch(state, prepared)


def next_launch(state: RunState, prepared: Prepared) -> str:
    """A launch's name that no attempt has used: ``<run>-<l or k><number>`` (local, kubernetes); unique in a store."""
    launches = {a.launch for a in state.attempts}
    return f"{prepared.run}-{prepared.spec.launch.target[0]}{len(launches) + 1}"


def avoided(state: RunState, launch_id: str) -> tuple[str, ...]:
    """The machines that a launch must not use, by what the log said when it began."""
    first = next((n for n, a in enumerate(state.attempts) if a.launch == launch_id), len(state.attempts))
    causes = [a.body.get("cause") for a in state.attempts[: first + 1]]
    return tuple(sorted(struck(causes, Policy.strikes)))


def placed(nodes: list[NodeView], view: LaunchView) -> list[NodeView]:
    """The nodes with the names of their machines, where the launcher knows them."""
    places = {n.node: n.place for n in view.nodes}
    return [replace(n, place=places.get(n.node, "")) for n in nodes]


def loss_of(view: LaunchView, nodes: list[NodeView], state: RunState, launcher: Launcher) -> Cause | None:
    """Why the launch cannot be made whole in place; None where it can, or where nobody knows."""
    if view.loss is not None:
        return Cause(view.loss.cls, view.loss.text, view.loss.mend, None, place=view.loss.place)
    newest = state.newest_attempt
    left = view.state == "absent" and launcher.detaches and newest is not None and not state.ended
    if left and newest is not None and any(n.epoch == newest.epoch for n in nodes):
        return Cause("infra", f"launch {view.launch_id} ran and is not there any more")
    return None


def origin_of(restore: Restore) -> str:
    """Where an attempt's state comes from, in a word."""
    if restore.slots:
        return "memory"
    return "checkpoint" if restore.checkpoint or restore.parent else "start"


def alive_nodes(view: LaunchView) -> dict[int, bool | None]:
    """Node -> running, known to be gone, or unknown."""
    if view.state in ("unknown", "absent"):
        return {}
    return {node.node: node.alive for node in view.nodes}
