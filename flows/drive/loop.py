"""The thin loop around ``flows.drive.decide.decide``: observe, ask, act, tell. It may be killed at any instruction.

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
from dataclasses import dataclass, field
from typing import Any, Protocol

from checkpoint.errors import CheckpointError, Conflict, StoreError, StoreRefused, StoreUnavailable
from checkpoint.log import EndedInfo, RunLog, RunState, ended_body
from checkpoint.store import Store
from flows.drive.aside import Aside, TurnedAway
from flows.drive.decide import decide, rank_class
from flows.drive.hints import step_line
from flows.drive.history import avoided
from flows.drive.launches import alive_nodes, launch_of, loss_of, next_launch, placed
from flows.drive.live import MetricsReader, StatusReader
from flows.drive.orders import CannotFollow, changes, elsewhere, unreadable, who_ruled
from flows.drive.run import (
    Prepared,
    attempt_body,
    compiled,
    fold_view,
    order_view,
    publish_plan,
    relayout,
    ruling_how,
    spec_under,
)
from flows.drive.views import (
    Cause,
    Decision,
    End,
    Finished,
    LogView,
    MarkDamaged,
    NodeView,
    Phase,
    Policy,
    StartAttempt,
    Watch,
    short,
)
from trainer.errors import LaunchUnknown, PlanError, SpecError
from trainer.failures import FAILURES, Failure
from trainer.launch import Launch, Launcher
from trainer.spec import how_map

log = logging.getLogger(__name__)

POLL_S = 0.05
POLL_MOST_S = 2.0
CALM = (Phase.TRAINING, Phase.WAITING)
CALM_SHARE = 0.02
"""Of a core: what looking may cost while all is well. Stores and gangs differ a thousandfold in what a look costs."""
PATIENCE_S = 1.0
REFUSED_PATIENCE_S = 5.0
HEARD_S = 0.5
"""After a wish to stop, for the look that is being made; then it is left."""


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
    """How a run (or this driver's part of it) ended. ``outcome``: succeeded, cancelled, gave_up, stopped, or superseded
    (an order stands that this driver cannot follow; the run goes on elsewhere). ``cls``: of the cause of giving up.
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


DETACHED = "the gang trains on; `hotstage runs resume {run}` attaches again, `hotstage runs cancel {run}` ends it"
EXIT_CANCELLED = 1
EXIT_STOPPED = 85
EXIT_SUPERSEDED = 78


def calm_pause_s(look_s: float, least_s: float) -> float:
    """How long to wait after a look that took so much of a core, so that looking stays at `CALM_SHARE` of one."""
    return min(max(least_s, look_s * (1 / CALM_SHARE - 1)), POLL_MOST_S)


@dataclass
class Ages:
    """Since when this driver sees a launch wait, or ranks leave: its own monotonic clock; a new driver begins anew."""

    clock: Callable[[], float] = time.monotonic
    _since: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def of(self, what: str, key: Any) -> float:
        """Seconds since ``what`` has had this key; 0 where it has none."""
        if key is None:
            self._since.pop(what, None)
            return 0.0
        if self._since.get(what, (None, 0.0))[0] != key:
            self._since[what] = (key, self.clock())
        return self.clock() - self._since[what][1]


@dataclass
class Driver:
    """Drives one run to its end. ``stop``: set it to have the gang save its state and leave (local runs).

    ``prepared`` is the run in the How that rules: the log's, as of the last look.
    """

    prepared: Prepared
    store: Store
    launcher: Launcher
    make_launch: Callable[[Prepared, str, tuple[str, ...]], Launch]
    """From the prepared run, the launch's name, and the machines that it must not use."""
    sink: Sink = field(default_factory=NoSink)
    stop: threading.Event = field(default_factory=threading.Event)
    poll_s: float = POLL_S
    last_s: float = 5.0
    """For the store, to say what the gang saved as it left."""
    ages: Ages = field(default_factory=Ages)
    # what this driver saw, for people; never for decisions
    max_step: dict[int, int] = field(default_factory=dict)
    recoveries: list[float] = field(default_factory=list)
    lost_steps: int = 0
    _failed_at: float | None = None
    _told: set[Any] = field(default_factory=set)
    _left_running: bool = False
    # the last look, and caches of what the log says
    _state: RunState | None = None
    _status: StatusReader | None = None
    _reached: bool = True
    _followed: Any = None
    _view: tuple[RunState, LogView] | None = None
    _told_of: RunState | None = None

    def __post_init__(self) -> None:
        self._log = RunLog(self.store, self.prepared.run, writer="driver")
        self._metrics = MetricsReader(self.store, self.prepared.run, attach=True)
        self._aside = Aside()

    def run(self) -> Outcome:
        """Look again and again until the log has an end, or until ``stop`` was set and the gang has saved and left.

        Each look is made aside: a store that does not answer keeps it for long, and nobody may wait for that.
        """
        aside = self._aside
        try:
            while True:
                pause_s = self.poll_s
                try:
                    found = aside.call(self._look, self.stop, HEARD_S)
                except TurnedAway:
                    return self._leave()
                except CannotFollow as error:
                    return self._outcome(self._known(), "superseded", str(error))
                except Conflict as conflict:
                    log.info("another driver was first: record %d; deciding again", conflict.state.n)
                    self._state = conflict.state
                    continue
                except (StoreUnavailable, LaunchUnknown, StoreRefused) as error:
                    pause_s = self._unanswered(error)
                    if self.stop.is_set():
                        return self._leave()
                else:
                    if isinstance(found, Outcome):
                        return found
                    if found is None:
                        return self._stop(self._known())
                    pause_s = found
                self.stop.wait(pause_s)
        finally:
            aside.close()

    def _look(self) -> Outcome | float | None:
        """One look and what follows from it: the end, or the pause until the next look; None where it is to stop."""
        began, pause_s = time.thread_time(), self.poll_s
        run_log, known = self._log, self._state
        state = self._state = run_log.fold(known, quick=True)
        if known is None and state.attempts:
            self._tell_known(state)
        view = self._log_view(state)
        if self.stop.is_set() and not state.ended and not state.attempts:
            return None
        if self._finish_stop(state):
            return 0.0
        self._follow(state)
        launch_id = launch_of(state, self.prepared, self.launcher)
        if self._status is None or self._status.launch != launch_id:
            self._status = StatusReader(self.store, self.prepared.run, launch_id)
        seen = self.launcher.observe(launch_id)
        was, self._reached = self._reached, seen.state != "elsewhere"
        launch = self._launch(view, launch_id)
        nodes = placed(self._status.poll(self.prepared.nodes, alive_nodes(seen)), seen)
        self._tell_state(state, nodes, self._metrics if known is not None else None)  # what to do comes first
        if seen.note:
            where = "attached" if self._reached else "elsewhere"
            self._tell_once(("launch", seen.note), Event("phase", {"phase": where, "text": seen.note}))
        if self._reached and not was:
            self.sink.tell(Event("phase", {"phase": "here", "text": "the run goes on from here"}))
        if self.stop.is_set() and not state.ended:
            return None
        if seen.state == "unknown":
            told = Event("phase", {"phase": "unknown", "text": seen.detail})
            self._tell_once(("launcher", seen.detail[:80]), told)
        lost = loss_of(seen, nodes, state, self.launcher)
        waits = seen.state == "waiting"
        decision = decide(
            view,
            nodes,
            self.prepared.policy(launch_id, detaches=self.launcher.detaches),
            lost=lost,
            waiting=seen.detail if waits else "",
            waited_s=self.ages.of("waiting", launch_id if waits else None),
            left_s=self.ages.of("left", left_on_request(nodes, state.epoch)),
        )
        self._aside.go_on()
        done = self._act(decision, run_log, state, launch, lost)
        if done:
            state = run_log.fold(state)
            if known is not None:  # what the nodes said last, on their way out
                self._tell_state(state, nodes, self._metrics)
            return self._outcome(state, done)
        if isinstance(decision, Watch) and decision.phase in CALM:
            pause_s = calm_pause_s(time.thread_time() - began, self.poll_s)
        return pause_s

    def _known(self) -> RunState:
        """The log as of the last look."""
        return self._state or RunState(self.prepared.run)

    def _unanswered(self, error: StoreError | LaunchUnknown) -> float:
        """Unknown is never failure: the gang trains on, and after this pause it is asked again.

        A store that refuses is no different once the run has begun: credentials are rotated, rights are mended, and the
        store looks for newer ones at each call. Before that it is a refusal, and raised.
        """
        refused = isinstance(error, StoreRefused)
        if refused and not self._known().attempts:
            raise error
        kind, phase = ("launcher" if isinstance(error, LaunchUnknown) else "store"), "warning" if refused else "unknown"
        more = "; the gang trains on, and this command tries again until that is mended" if refused else ""
        self._tell_once((kind, str(error)[:80]), Event("phase", {"phase": phase, "text": f"{error}{more}"}))
        return REFUSED_PATIENCE_S if refused else PATIENCE_S

    # --- following the log --------------------------------------------------------------------------------

    def _log_view(self, state: RunState) -> LogView:
        if self._view is None or self._view[0] is not state:
            self._view = (state, fold_view(state))
        return self._view[1]

    def _follow(self, state: RunState) -> None:
        """Take the How that rules by the log. Raises CannotFollow where this driver cannot serve it."""
        how = ruling_how(state)
        if how is None or how == self._followed:
            return
        before = how_map(self.prepared.spec)
        try:
            spec = spec_under(self.prepared.spec, how)
            same = how_map(spec) == before
            here, there = (f"{s.launch.target} {s.launch.namespace}".split() for s in (self.prepared.spec, spec))
            if here[0] != there[0] or (there[0] != "local" and here != there):
                raise CannotFollow(elsewhere(state, self.prepared, spec.launch.target))
            prepared = self.prepared if same else compiled(self.prepared, spec)
        except (SpecError, PlanError) as error:
            raise CannotFollow(unreadable(state, self.prepared, error)) from error
        if not same:
            publish_plan(self.store, prepared.run, prepared.plan)
            by = who_ruled(state)
            log.info("the layout is %s: %s", by, changes(before, how))
            text = f"the layout is {by}: {changes(before, how)}; this command goes on with that"
            self._tell_once(("order", by), Event("phase", {"phase": "order", "text": text}))
        self.prepared, self._followed = prepared, how

    # --- acting -------------------------------------------------------------------------------------------

    def _launch(self, view: LogView, launch_id: str) -> Launch:
        return self.make_launch(self.prepared, launch_id, avoided(view, launch_id, Policy.strikes))

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
                run_log.append("damaged", {"checkpoint": checkpoint, "reason": short(why, 4000)}, state)
                log.warning("checkpoint record %d is damaged: %s; an older one is used", checkpoint, why)
                self.sink.tell(Event("damaged", {"checkpoint": checkpoint, "why": why}))
            case End(outcome, reason, cause):
                text = short(f"{cause.cls}: {reason}" if cause else reason, 4000)
                run_log.append("ended", ended_body(state, outcome, text, str(cause.cls) if cause else ""), state)
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
        prepared = self.prepared
        if order.fallback is not None:
            prepared = relayout(prepared, self.store, order.fallback.stages)
        renew = order.renew or state.ended is not None  # its nodes have left, or are about to
        cause = order.cause.to_map() if order.cause else None
        more: dict[str, Any] = {}
        if order.fallback is not None:
            more["fallback"] = order.fallback.to_map()
        if order.pardon:
            more["pardon"] = list(order.pardon)
        body = attempt_body(
            prepared,
            next_launch(state, prepared) if renew else launch.launch_id,
            order.restore.to_map(),
            plan=state.attempts[-1].plan if order.same_plan else None,
            order=state.orders[-1].n if state.orders else 0,
            slot_epochs=list(order.slot_epochs),
            reason=short(order.reason, 2000),
            cause=cause,
            **more,
        )
        state = self._state = run_log.append("attempt", body, state)
        self._aside.go_on()
        self.prepared = prepared
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
                    "reason": order.reason,
                    "cause": cause,
                    "step": order.restore.step,
                    "from": order.restore.origin,
                },
            )
        )
        old = state.attempts[-2].launch if len(state.attempts) > 1 else newest.launch
        if self.launcher.detaches and old != newest.launch:
            # its agents see the record and leave by themselves; this frees their place sooner
            self.launcher.stop(old, 0.0)
        self.launcher.ensure(self._launch(self._log_view(state), newest.launch))

    def _leave(self) -> Outcome:
        """To stop while something does not answer: by what is known."""
        state = self._known()
        return self._outcome(state, state.ended.outcome) if state.ended else self._stop(state)

    def _stop(self, state: RunState) -> Outcome:
        """Have the gang save one agreed step and leave; the run can be resumed. What is out of reach trains on."""
        newest = state.newest_attempt
        if self.launcher.detaches or not self._reached:
            self._left_running = True
            self.sink.tell(Event("phase", {"phase": "detached", "text": DETACHED.format(run=self.prepared.run)}))
            return self._outcome(state, "stopped")
        self.sink.tell(Event("phase", {"phase": "stopping", "text": "saving one agreed step, then leaving"}))
        if newest is not None:
            self.launcher.stop(newest.launch, self.prepared.spec.checkpoint.commit_s)
        asked_at, now, unsure = state.n, threading.Event(), ""
        now.set()
        last = Aside()
        try:
            state = last.call(lambda: self._log.fold(self._state), now, self.last_s)
        except (TurnedAway, CheckpointError):
            unsure = ", as far as is known: the store does not answer"
        finally:
            last.close()
        return self._outcome(state, "stopped", self._saved(state, asked_at) + unsure)

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
        orders = [order_view(o) for o in state.orders]
        again = state.ended is None or any(o.again and o.n > state.ended.n for o in orders)
        self.sink.tell(Event("known", {**facts, "ended": None if again or not state.ended else state.ended.outcome}))

    def _tell_once(self, key: Any, event: Event) -> None:
        if key not in self._told:
            self._told.add(key)
            self.sink.tell(event)
        if event.kind == "phase":  # a phase may come back: only the last one is not repeated
            self._told = {k for k in self._told if not (isinstance(k, tuple) and k[0] == "phase") or k == key}

    def _tell_state(self, state: RunState, nodes: list[NodeView], metrics: MetricsReader | None) -> None:
        epochs = [a.epoch for a in state.attempts]
        for said in metrics.poll(epochs[-2:]) if metrics is not None else ():
            line = step_line(said)
            if line is None:
                continue
            epoch, step = line["epoch"], line["step"]
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
        for checkpoint in state.checkpoints if state is not self._told_of else ():
            facts = {"n": checkpoint.n, "step": checkpoint.step, "epoch": checkpoint.epoch}
            self._tell_once(("checkpoint", checkpoint.n), Event("checkpoint", facts))
        self._told_of = state

    def _saved(self, state: RunState, asked_at: int) -> str:
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

    def _outcome(self, state: RunState, outcome: str, reason: str = "") -> Outcome:
        newest = state.at_step()  # by step: a slower upload may be recorded after a later one
        code, cls = 0, ""
        if outcome == "gave_up" and state.ended:
            reason, cls = state.ended.reason, ended_class(state.ended)
            code = FAILURES[Failure.read(cls) or Failure.INFRA].exit_code
        elif outcome == "superseded":
            code = EXIT_SUPERSEDED
        elif outcome == "cancelled":
            reason, code = (state.ended.reason if state.ended else ""), EXIT_CANCELLED
        elif outcome == "stopped":
            reason, code = ("the gang trains on" if self._left_running else reason), EXIT_STOPPED
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
            cls=cls,
        )
        said = "" if outcome == "superseded" else reason  # whoever runs the driver says that: it is why it leaves
        self.sink.tell(
            Event("ended", {"outcome": outcome, "reason": said, "step": result.step, "digest": result.state_digest})
        )
        return result


def ended_class(ended: EndedInfo) -> str:
    """The class of the cause that ended a run (logs before the typed field: the first word of the reason)."""
    return ended.cls or ended.reason.partition(":")[0]


def left_on_request(nodes: list[NodeView], epoch: int) -> int | None:
    """The epoch, where one of its ranks saved and left because it was asked to."""
    ranks = [r for n in nodes if n.epoch == epoch for r in n.ranks]
    return epoch if any(r.ended and rank_class(r) == Failure.PREEMPTED for r in ranks) else None
