"""The thin loop around ``flows.drive.decide.decide``: observe, ask, act, tell. It may be killed at any instruction.

Order of calls, and who makes each (one driver; a second one beside it is harmless, because every act begins with
winning a log record):
  1. fold the log (truth), read the nodes' status (hints), ask the launcher who is alive;
  2. ``decide``, with the memory that it gave at the last look;
  3. act: append ``attempt`` / ``damaged`` / ``ended`` (on a conflict: read the winner, decide again), keep the launch
     up;
  4. tell what people see (``telling.py``). The sink never blocks and never decides.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from checkpoint.codec import short
from checkpoint.curve import Curve
from checkpoint.errors import CheckpointError, Conflict, StoreError, StoreRefused, StoreUnavailable
from checkpoint.log import AttemptInfo, RunLog, RunState, ended_body
from checkpoint.store import Pace, Store
from flows.drive.aside import Aside, TurnedAway
from flows.drive.collecting import Collecting
from flows.drive.decide import decide, leaving
from flows.drive.driving import STOPPED, Driving
from flows.drive.evaluations import Evaluating
from flows.drive.events import NoSink, Outcome, Sink
from flows.drive.foreseen import pass_steps, plan_shares
from flows.drive.health import Health
from flows.drive.history import avoided
from flows.drive.hours import worked
from flows.drive.launches import alive_nodes, choose_launch, loss_of, next_launch, placed, still_stops, was_stopped
from flows.drive.line import ordered_back
from flows.drive.live import MetricsReader, StatusReader, load_curve
from flows.drive.orders import CannotFollow, followed, own_order
from flows.drive.replays import Replays
from flows.drive.run import (
    Prepared,
    attempt_body,
    fallback_body,
    fold_view,
    layouts_of,
    still_read,
    under,
)
from flows.drive.telling import DETACHED, Teller
from flows.drive.views import (
    AwaitStop,
    Decision,
    End,
    Finished,
    Leave,
    LogView,
    Look,
    MarkDamaged,
    Memory,
    NodeView,
    OwnOrder,
    Phase,
    Policy,
    RunLayout,
    StartAttempt,
    Watch,
)
from flows.tracking.tracker import Trackers
from trainer.errors import LaunchUnknown
from trainer.launch import Launch, Launcher

log = logging.getLogger(__name__)

POLL_S = 0.05
POLL_MOST_S = 2.0
CALM = (Phase.TRAINING, Phase.WAITING, Phase.BACKOFF)
CALM_SHARE = 0.02
"""Of a core: what looking may cost where nothing is due. Stores and gangs differ a thousandfold in what one costs."""
PATIENCE_S = 1.0
REFUSED_PATIENCE_S = 5.0
UNWATCHED_S = 5.0
"""Of time in which no look was made, so much counts: a process may be stopped, a machine may be suspended."""
HEARD_S = 0.5
"""After a wish to stop, for the look that is being made; then it is left."""


def calm_pause_s(look_s: float, least_s: float) -> float:
    """How long to wait after a look that took so much of a core, so that looking stays at `CALM_SHARE` of one."""
    return min(max(least_s, look_s * (1 / CALM_SHARE - 1)), POLL_MOST_S)


def pause_after(decision: Decision, look_s: float, least_s: float, pace: Pace) -> float:
    """How long to wait after a look that led to this and took so much of a core."""
    if isinstance(decision, Watch) and decision.phase in CALM:
        return calm_pause_s(look_s, max(least_s, pace.look_s))
    return 0.0 if isinstance(decision, AwaitStop) else least_s


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
    replays: Replays | None = None
    """Computes steps again beside the run, where its spec asks for that."""
    evaluating: Evaluating | None = None
    """Evaluates stored checkpoints beside the run, where its spec asks for that."""
    trackers: Trackers | None = None
    """Get what the sink gets, as the spec names them."""
    last_s: float = 5.0
    """For the store, to say what the gang saved as it left."""
    driving: Driving | None = None
    """Says that this driver drives, for those who look after runs that nobody drives."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    # the last look, and what `decide` wants remembered of it
    _state: RunState | None = None
    _seen: Look | None = None
    _memory: Memory = field(default_factory=Memory)
    # time that was watched, and the clock's last reading
    _watched_s: float = 0.0
    _read_at: float | None = None
    # the log's newest record when another terminal had the gang stopped
    _asked_at: int | None = None
    # readers, and the view of a state that was made last
    _status: StatusReader | None = None
    _view: tuple[RunState, LogView] | None = None
    _layouts: tuple[RunLayout, ...] = ()
    _health: Health = field(default_factory=Health)
    _curve: Curve | None = None  # where hours are limited
    _hours: float = 0.0

    def __post_init__(self) -> None:
        self._log = RunLog(self.store, self.prepared.run, writer="driver")
        self._metrics = MetricsReader(self.store, self.prepared.run, attach=True)
        self._aside = Aside()
        self._teller = Teller(self.prepared.run, self.sink)
        self._collecting = Collecting(self.store, self.prepared.run)
        if self.replays is not None:
            self.replays.tell = lambda found, facts: self._teller.tell("replay", found=found, **facts)
        if self.evaluating is not None:
            self.evaluating.tell = lambda facts: self._teller.tell("evaluated", **facts)

    def run(self) -> Outcome:
        """Look again and again until the log has an end, or until ``stop`` was set and the gang has saved and left.

        Each look is made aside: a store that does not answer keeps it for long, and nobody may wait for that.
        """
        left = "failed"
        try:
            while True:
                found = self.round(lambda look: self._aside.call(look, self.stop, HEARD_S))
                if isinstance(found, Outcome):
                    left = found.outcome
                    return found
                self.stop.wait(found)
        finally:
            self._aside.close()
            self._collecting.close()
            if self.replays is not None:
                self.replays.close()
            if self.evaluating is not None:
                self.evaluating.close()
            if self.trackers is not None:
                for text in self.trackers.close():
                    self._teller.phase("warning", text)
            if self.driving is not None:
                self.driving.leave(left)

    def round(self, ask: Callable[[Callable[[], Outcome | float]], Outcome | float]) -> Outcome | float:
        """A look, made by ``ask``, and what follows whatever it meets: the end, or the pause until the next one."""
        try:
            return ask(self._look)
        except TurnedAway:
            return self._turn_away()
        except CannotFollow as error:
            return self._teller.outcome(self._known(), "superseded", str(error))
        except Conflict as conflict:
            log.info("another driver was first: record %d; deciding again", conflict.state.n)
            self._state = conflict.state
            return 0.0
        except (StoreUnavailable, LaunchUnknown, StoreRefused) as error:
            pause_s = self._unanswered(error)
            return self._turn_away() if self.stop.is_set() else pause_s

    def _look(self) -> Outcome | float:
        """One look and what follows from it: the end, or the pause until the next look."""
        began, known = time.thread_time(), self._state
        state = self._state = self._log.fold(known, quick=True).of_this_version()
        if known is None and state.attempts:
            self._teller.known(state, state.amendments.total(self.prepared.spec.train.steps))
        self._collecting.look(state)
        if self.trackers is not None:
            for text in self.trackers.look(self.prepared.spec):
                self._teller.phase("warning", text, key=("tracker", text))
        if self.driving is not None:
            self.driving.beat(state.n)
            if self.driving.full:
                self._teller.silence("warning", self.driving.full, "store", "full")
        if self._view is None or self._view[0] is not state:
            self.prepared = followed(self.store, state, self.prepared, self._teller.phase)
            self._layouts = layouts_of(self.prepared, state)
        policy, seen, launch = self._observe(state, tell_steps=known is not None)
        decision, self._memory = decide(self._log_view(state), seen, policy, self._memory)
        self._aside.go_on()
        outcome = self._act(decision, state, seen, launch)
        if outcome is not None:
            return outcome
        if self.replays is not None:
            self.replays.look(self.prepared.spec, state, self._teller.max_step.get(state.epoch, -1))
        if self.evaluating is not None:
            self.evaluating.look(self.prepared.spec, state, state.amendments.total(self.prepared.spec.train.steps))
        return pause_after(decision, time.thread_time() - began, self.poll_s, self.store.pace)

    def _observe(self, state: RunState, *, tell_steps: bool) -> tuple[Policy, Look, Launch]:
        """The launch that is to be used, and all that can be seen of it. Asks the store and the launcher."""
        newest, was, log_view = state.newest_attempt, self._seen, self._log_view(state)
        view = self.launcher.observe(newest.launch) if newest is not None else None
        finishing = still_stops(view)
        if was_stopped(view) and not self.stop.is_set() and not state.ended:
            self._stop_too(newest)
        launch_id = choose_launch(log_view, state, self.prepared, self.launcher, view)
        if view is None or newest is None or launch_id != newest.launch:
            view = self.launcher.observe(launch_id)
        before = was.nodes if was is not None else ()
        if self._status is None or self._status.launch != launch_id:
            self._status, before = StatusReader(self.store, self.prepared.run, launch_id, self._watched), ()
        launch = self._launch(log_view, launch_id)
        nodes = placed(self._status.poll(self.prepared.nodes, alive_nodes(view)), view, before)
        self._tell(state, nodes, steps=tell_steps)  # not before the first decision: what to do comes first
        seen = self._seen = Look(
            now_s=self._watched(),
            nodes=tuple(nodes),
            lost=loss_of(view, nodes, state, self.launcher, self._runs_here),
            waiting=view.detail if view.state == "waiting" else "",
            room=sum(1 for node in view.nodes if node.place and node.alive is not False),
            finishing=finishing,
            reached=view.state != "elsewhere",
            stop=self.stop.is_set(),
            exploded=self._health.explosion,
            hours=self._device_hours(state),
        )
        if view.note:
            self._teller.phase("attached" if seen.reached else "elsewhere", view.note, key=("launch", view.note))
        if seen.reached and was is not None and not was.reached:
            self._teller.phase("here", "the run goes on from here")
        if view.state == "unknown" and not seen.stop:
            self._teller.silence("unknown", view.detail, "launcher", view.detail)
        policy = self.prepared.policy(
            launch_id, self._layouts, detaches=self.launcher.detaches, amendments=state.amendments
        )
        return policy, seen, launch

    def _stop_too(self, newest: AttemptInfo | None) -> None:
        """A person who stops a run from one of several terminals has it stopped in all of them."""
        if newest is None or self.driving is None or self.launcher.detaches:
            return
        other = self.driving.stopped_beside(newest.epoch)
        if other is not None:
            self._teller.phase("stopping", f"the run was stopped from another terminal ({other.describe()})")
            self._asked_at = other.n
            self.stop.set()

    def _runs_here(self, attempt: AttemptInfo) -> bool:
        """Whether nodes of this version run that attempt's plan."""
        ours = attempt.plan == self.prepared.plan.digest
        return ours or still_read(self.store, self.prepared, attempt)

    def _watched(self) -> float:
        """For how long this driver has watched: its clock, but a jump or a standstill between two readings counts
        `UNWATCHED_S` at most. What nobody looked at is unknown, not silent (D2).
        """
        now, before = self.clock(), self._read_at
        if before is not None:
            self._watched_s += min(max(now - before, 0.0), UNWATCHED_S)
        self._read_at = now
        return self._watched_s

    def _log_view(self, state: RunState) -> LogView:
        if self._view is None or self._view[0] is not state:
            self._view = (state, fold_view(state))
        return self._view[1]

    def _launch(self, view: LogView, launch_id: str) -> Launch:
        return self.make_launch(self.prepared, launch_id, avoided(view, launch_id, Policy.strikes))

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
        self._teller.silence(phase, f"{error}{more}", kind, str(error))
        return REFUSED_PATIENCE_S if refused else PATIENCE_S

    # --- acting -------------------------------------------------------------------------------------------

    def _act(self, decision: Decision, state: RunState, seen: Look, launch: Launch) -> Outcome | None:
        """Carry the decision out; the outcome where this driver's part is over."""
        match decision:
            case Finished(outcome):
                self._settle(launch)
                state = self._log.fold(state)
                if not self._metrics.attach:  # what the nodes said last, on their way out
                    self._tell(state, list(seen.nodes), steps=True, last=True)
                if self.evaluating is not None and outcome == "succeeded":
                    self._evaluate_last(self.evaluating, state)
                return self._teller.outcome(state, outcome)
            case Leave(detach):
                return self._leave(state, detach)
            case AwaitStop(why):
                self._teller.phase(Phase.DRAINING, why or "what was asked to stop saves and leaves")
                if state.newest_attempt is not None:
                    self.launcher.stop(state.newest_attempt.launch, self.prepared.spec.checkpoint.commit_s)
            case Watch(phase, text, ensure):
                if ensure:
                    self.launcher.ensure(launch)
                if phase in (Phase.DRAINING, Phase.BACKOFF):
                    self._teller.failed()
                self._teller.phase(phase, text, key=("phase", phase, text))
            case StartAttempt():
                self._start(decision, state, launch)
            case MarkDamaged(checkpoint, why):
                self._log.append("damaged", {"checkpoint": checkpoint, "reason": short(why, 4000)}, state)
                log.warning("checkpoint record %d is damaged: %s; an older one is used", checkpoint, why)
                self._teller.tell("damaged", checkpoint=checkpoint, why=why)
            case OwnOrder():
                self._log.append("intervention", own_order(state, decision), state)
            case End(outcome, _, cause):
                text = short(decision.said(self.prepared.run), 4000)
                self._log.append("ended", ended_body(state, outcome, text, str(cause.cls) if cause else ""), state)
        return None

    def _start(self, order: StartAttempt, state: RunState, launch: Launch) -> None:
        """Win the attempt's record, then keep its launch up."""
        if state.attempts and order.cause is not None:
            self._teller.failed()
        prepared, cause, more = self.prepared, order.cause.to_map() if order.cause else None, dict[str, Any]()
        if order.layout is not None:
            prepared = under(prepared, self.store, order.layout.how)
        if (fallback := fallback_body(state, order)) is not None:
            more["fallback"] = fallback
        if order.pardon:
            more["pardon"] = list(order.pardon)
        same = state.attempts[-1] if order.same_plan else None
        if same and order.restore.slots is None and not still_read(self.store, prepared, same):
            same = None  # its gang is gone, and nothing in memory depends on it
        body = attempt_body(
            prepared,
            next_launch(state, prepared) if order.renew else launch.launch_id,
            order.restore.to_map(),
            same=same,
            order=state.orders[-1].n if state.orders else 0,
            amendments=state.amendments,
            slot_epochs=list(order.slot_epochs),
            reason=short(order.reason, 2000),
            cause=cause,
            **more,
        )
        old = state.newest_attempt
        state = self._state = self._log.append("attempt", body, state)
        self._aside.go_on()
        self.prepared, newest = prepared, state.attempts[-1]
        log.info("attempt %d: %s, from step %d", newest.epoch, order.reason, order.restore.step)
        if old is not None and old.numerics != newest.numerics:
            log.warning(
                "from step %d on the run's bits are those of numerics version %d; up to there they are version %d's",
                newest.step + 1,
                newest.numerics,
                old.numerics,
            )
        self._teller.began(state, order, cause, steps=state.amendments.total(prepared.spec.train.steps))
        if self.launcher.detaches and old is not None and old.launch != newest.launch:
            # its agents see the record and leave by themselves; this frees their place sooner
            self.launcher.stop(old.launch, 0.0)
        if not order.gives_way:
            self.launcher.ensure(self._launch(self._log_view(state), newest.launch))

    def _turn_away(self) -> Outcome:
        """To stop while something does not answer: by what is known."""
        state = self._known()
        if state.ended:
            return self._teller.outcome(state, state.ended.outcome)
        return self._leave(state, leaving(self._seen, detaches=self.launcher.detaches).detach)

    def _leave(self, state: RunState, detach: bool) -> Outcome:
        """Have the gang save one agreed step and leave; the run can be resumed. Detached, it trains on."""
        newest = state.newest_attempt
        if self.driving is not None:  # a person's word, before anything follows from it
            self.driving.leave("detached" if detach else STOPPED, state.n)
        if detach:
            self._teller.phase("detached", DETACHED.format(run=self.prepared.run))
            return self._teller.outcome(state, "stopped", left_running=True)
        told = partial(self._teller.phase, "stopping", "saving one agreed step, then leaving")
        if newest is not None:
            self.launcher.stop(newest.launch, self.prepared.spec.checkpoint.commit_s, told)
        else:
            told()
        asked_at = state.n if self._asked_at is None else self._asked_at
        now, unsure = threading.Event(), ""
        now.set()
        last = Aside()
        try:
            state = last.call(lambda: self._log.fold(self._state), now, self.last_s)
        except (TurnedAway, CheckpointError):
            unsure = ", as far as is known: the store does not answer"
        finally:
            last.close()
        return self._teller.outcome(state, "stopped", self._teller.saved(state, asked_at) + unsure)

    def _settle(self, launch: Launch) -> None:
        """The log has ended: agents end their engines and themselves; wait for that, then make sure."""
        deadline = self.clock() + 10.0 + self.store.pace.idle_s  # when an agent hears of it, and 10 s to leave
        while self.clock() < deadline:
            view = self.launcher.observe(launch.launch_id)
            if view.state in ("absent", "gone", "done", "elsewhere"):
                return
            if view.state == "lost" and not any(n.alive for n in view.nodes):
                break  # nobody is there to leave
            self.sleep(self.poll_s)
        self.launcher.stop(launch.launch_id, 0.0)

    def _examine(self, line: Mapping[str, Any]) -> None:
        """What a step says of the run's health is told."""
        if line["epoch"] > self._health.epoch:  # an attempt has a layout of its own
            self._health.pass_steps, self._health.shares = pass_steps(self.prepared), plan_shares(self.prepared)
            self._health.clip = self.prepared.spec.train.optimizer.clip
        for symptom in self._health.see(line):
            self._teller.tell("health", **symptom.facts())

    def _device_hours(self, state: RunState) -> float:
        """That devices have worked for the run, where there is a limit: by the index, and what was said since."""
        if not self.prepared.spec.limits.device_hours:
            return 0.0
        if self._curve is None:
            self._curve = load_curve(self.store, self.prepared.run) or Curve()
        self._hours = max(self._hours, worked(state.attempts, self._curve, dict(ordered_back(state))).used)
        return self._hours

    def _evaluate_last(self, evaluating: Evaluating, state: RunState) -> None:
        """What the last checkpoint still lacks; nobody trains any more, and who stops this leaves it."""
        spec = self.prepared.spec
        last = state.amendments.total(spec.train.steps)
        evaluating.look(spec, state, last)
        if evaluating.busy:
            self._teller.phase("evaluating", "the run has succeeded; its last checkpoint is evaluated")
            evaluating.finish(spec, state, last, lambda: self.stop.is_set() or self._aside.left.is_set())

    def _tell(self, state: RunState, nodes: list[NodeView], *, steps: bool, last: bool = False) -> None:
        """What the ranks and nodes said, and what was saved since the last look."""
        if steps:
            for line in self._teller.steps(
                state, self._metrics.poll([a.epoch for a in state.attempts[-2:]], last=last)
            ):
                self._examine(line)
                if self._curve is not None:
                    self._curve.add(line, 0)
        self._teller.nodes(state, nodes)
        self._teller.checkpoints(state)
