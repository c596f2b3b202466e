"""What the agent decides: events, and when they came, into effects. Pure: no thread, store, socket, file or clock here.

``service.py`` is the thin loop that hears events (``events.py``), asks here, and runs the effects (``effects.py``) in
their order. An attempt's phases and the moves between them are in ``attempt.py``. Order of an attempt, as in
``wire/agent.h``:

    log       a new attempt record of this launch        -> KILL what runs, wait for IDLE
    work      plan, data, slots, restore point           -> PREPARE
    engine    PORTS                                      -> addresses of all nodes, attempt file, START
    ranks     HELLO -> SLOTS; METRICS, OUTPUT, READY ... -> hints; uploads; COMMITTED
    engine    EXIT of each rank, IDLE                    -> status; the driver decides what comes next

Invariants; ``rules.py`` asserts them by number after every event:
  A1  ranks of at most one attempt run: START goes out after the supervisor's IDLE for the one before, or to a new one;
  A2  an attempt is started at most once on a node: its attempt file, written before START, is the mark; an agent that
      finds it adopts it;
  A3  slots that a rank may have are written by the agent only while no rank of the node runs, and by one preparation
      at a time; what was prepared while ranks turned out to run is prepared again;
  A4  nothing of an epoch older than the newest attempt record is uploaded or committed (also enforced by the log);
  A5  no failure of the store ends a rank;
  A6  an attempt's node is the place that claims it first: a second one, a pod of the same index or an agent of another
      folder, stands by, silent, for that attempt;
  A7  nothing is waited for that may never come: a message of a supervisor that is there, a result of work that was
      asked for, or a timer;
  A8  an agent that leaves, on request or because the run has ended, prepares and starts nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.attempt import STARTED, NodePhase
from checkpoint.agent.course import EXIT_ENDED, EXIT_FENCED, KILL_S, LAST_RANKS_S, LOST_S, Course, Life
from checkpoint.agent.events import Timer
from checkpoint.agent.gang import Options
from checkpoint.agent.rules import Before, check
from trainer import wire

log = logging.getLogger(__name__)


class Machine(Course):
    """One agent. ``on`` is all that happens to it; ``due`` says which timers have to be heard.

    Example::

        machine = Machine(options)
        for effect in machine.on(clock(), LogRead(state)): ...
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._first_ended: int | None = None

    def on(self, now: float, event: ev.Event) -> list[do.Effect]:
        """What is to be done about an event."""
        self._now, self._out = now, []
        if self.exit is None:
            before = Before.of(self)
            _HANDLERS[type(event)](self, event)
            check(self, before, event, self._out)
        return self._out

    def due(self, now: float) -> list[Timer]:
        """Timers to be heard now, as ``Due``; which one fires is forgotten."""
        fired = sorted((at, timer.name) for timer, at in self.timers.items() if at <= now)
        return [Timer[name] for _, name in fired]

    @property
    def phase(self) -> str:
        """As the node's status says it."""
        if self.life in (Life.DRAINING, Life.LEFT):
            return "ended"
        return "idle" if self.attempt is None else self.attempt.shown

    def speaks(self, log_error: str | None) -> bool:
        """Whether this agent is known to be the node's (A6); one that cannot read the log has to say so."""
        if self.attempt is None:
            return self.state is not None or log_error is not None
        return self.attempt.held

    # --- the log ------------------------------------------------------------------------------------------

    def _on_log(self, event: ev.LogRead) -> None:
        state = event.state
        if self.state is not None and state.n < self.state.n:
            return
        self.state, self.changed = state, True
        candidates = state.restore_candidates()
        self.durable = candidates[0].step if candidates else -1
        if self._first_ended is None:
            self._first_ended = state.ended.n if state.ended else 0
        if state.unreadable is not None:
            return  # halted: nothing is started, uploaded or committed until a person has mended the log
        newest, launch = state.newest_attempt, self.options.launch
        mine = any(attempt.launch == launch for attempt in reversed(state.attempts))
        if newest is not None and mine and newest.launch != launch:
            log.warning("attempt %d of launch %s holds the run now: this launch ends", newest.n, newest.launch)
            self._leave("fenced", EXIT_FENCED)
        elif state.ended is not None and (mine or state.ended.n > self._first_ended):
            self._on_ended(state.ended.outcome)
        else:
            self._tell_committed()
            if mine and newest is not None and (self.attempt is None or newest.n > self.attempt.epoch):
                self._begin(newest)
                if self.stopping:  # asked before it had read the log: ranks may run here, and save
                    self._arm_terminate()
            elif self.stopping:
                self._do(do.AskDrained())

    def _on_ended(self, outcome: str) -> None:
        if self.life is not Life.SERVING:
            return
        self._tell_committed()
        self.life = Life.LAST_RANKS
        if outcome == "succeeded" and self.attempt is not None and self.attempt.phase is NodePhase.RUN:
            # the ranks have just been told that their last state is safe: they leave by themselves
            self._arm(Timer.LAST_RANKS, LAST_RANKS_S)
        else:
            self._end()

    # --- the supervisor -----------------------------------------------------------------------------------

    def _on_supervisor(self, event: ev.SupervisorHello) -> None:
        engine, attempt = self.engine, self.attempt
        if engine.peer == event.peer:
            return  # once a connection: what it says again is older than what was sent meanwhile
        if engine.peer is not None:
            if event.rival:
                log.error("a second supervisor is refused: the node's own one is alive")
                self._do(do.Send(event.peer, "END"))
                self._do(do.Drop(event.peer))
                return
            self._do(do.Drop(engine.peer))
        engine.peer, engine.pid, engine.epoch = event.peer, event.pid, event.epoch if event.live > 0 else 0
        self.changed = True
        self._disarm(Timer.LOST)
        log.info("the supervisor is here, pid %d: %d ranks of attempt %d", event.pid, event.live, event.epoch)
        if self.life is Life.DRAINING:
            self._tell("END")
        elif self.stopping and engine.epoch:
            self._tell("STOP")
        if attempt is None or attempt.phase is NodePhase.IDLE:
            return
        if attempt.phase in STARTED:
            self._meet_engine(attempt, event.epoch)
        elif not self.serves:
            return
        elif engine.epoch:
            self._kill(attempt)
        elif attempt.phase is NodePhase.KILL:
            self._prepare(attempt)
        elif attempt.phase in (NodePhase.PORTS, NodePhase.PEERS):
            if attempt.phase is NodePhase.PEERS:
                attempt.enter(NodePhase.PORTS)
            self._ask_ports(attempt)

    def _on_gone(self, event: ev.PeerGone) -> None:
        self.changed = True
        attempt = self.attempt
        if event.peer == self.engine.peer:
            self.engine.peer = self.engine.pid = None
            log.warning("the supervisor's connection ended")
            if attempt is not None and attempt.phase in (NodePhase.KILL, NodePhase.RUN):
                self._arm(Timer.LOST, LOST_S)
        elif attempt is not None:
            attempt.peers = {rank: peer for rank, peer in attempt.peers.items() if peer != event.peer}

    def _on_exit(self, event: ev.RankExit) -> None:
        attempt = self._of(event.epoch or self.epoch)
        if attempt is not None and attempt.ended(event):
            log.info("rank %d of attempt %d is gone: %d", event.rank, attempt.epoch, event.code)
            self.changed = True
            self._remember(attempt)
            ended_ill = event.code not in (0, 85) and event.how == wire.ENDED_ITSELF
            if ended_ill and attempt.devices.kind == "cuda":
                bus = attempt.devices.bus(event.rank - attempt.gang.first)
                self._do(do.AskKernel(attempt.epoch, event.rank, attempt.began_s, [bus]))

    def _on_kernel(self, event: ev.KernelSaid) -> None:
        attempt = self._of(event.epoch)
        if attempt is not None and event.rank in attempt.ranks:
            log.error("rank %d: the kernel's log has: %s", event.rank, event.line)
            status = attempt.ranks[event.rank]
            status.xid, status.kernel, self.changed = event.xid, event.line, True
            self._remember(attempt)

    def _on_refused(self, event: ev.EngineRefused) -> None:
        attempt = self._of(event.epoch or self.epoch)
        if attempt is not None:
            self._cannot_start(attempt, event.code, event.words or "the supervisor cannot prepare the attempt")

    def _on_idle(self, event: ev.EngineIdle) -> None:
        attempt = self.attempt
        if event.peer != self.engine.peer or event.epoch not in (0, self.engine.epoch or event.epoch):
            return
        self.engine.epoch = 0
        if attempt is None:
            return
        if attempt.phase is NodePhase.KILL:
            self._prepare(attempt)
        elif attempt.phase in STARTED and event.epoch in (0, attempt.epoch):
            attempt.gone(75, "the supervisor says that it is gone, not how")
            self._over(attempt)

    # --- ranks --------------------------------------------------------------------------------------------

    def _on_rank(self, event: ev.RankHello) -> None:
        attempt, rank = self._of(event.epoch), event.rank
        if attempt is None or rank not in attempt.gang.local or attempt.phase not in STARTED:
            log.warning("rank %d of attempt %d is refused: it is not of the attempt that runs", rank, event.epoch)
            self._do(do.Drop(event.peer))
            return
        attempt.peers[rank] = event.peer
        attempt.ranks[rank].pid = event.pid
        self.changed = True
        if attempt.has_slots(rank):
            if not event.handed:
                self._do(do.GiveSlots(event.peer, event.epoch, rank, attempt.restore(rank)))
        elif event.handed:
            self._do(do.TakeSlots(event.epoch, rank))
        else:
            attempt.bare.add(rank)
            if attempt.phase is NodePhase.RUN:
                self._kill_bare(attempt)
        self._tell_committed()

    def _on_slots_taken(self, event: ev.SlotsTaken) -> None:
        attempt = self._of(event.epoch)
        if attempt is None:
            return
        log.info("the slots of rank %d are taken over", event.rank)
        attempt.taken.add(event.rank)
        self.shared = True
        if event.final is not None:
            attempt.ranks[event.rank].final, attempt.ranks[event.rank].step = True, event.final
            attempt.finals[event.rank] = event.final
        self._do(do.LookForSnapshots())
        self._tell_committed()

    def _on_slots_lost(self, event: ev.SlotsLost) -> None:
        log.error("the slots of rank %d cannot be taken over: %s", event.rank, event.why)
        self.slot_error, self.changed = event.why, True

    def _on_ready(self, event: ev.Ready) -> None:
        attempt = self._of(event.epoch)
        if attempt is not None:
            attempt.snapshot(event.rank, event.step, event.final)
            self.changed = True
            self._do(do.LookForSnapshots())
            self._tell_committed()

    def _on_said(self, event: ev.RankSaid) -> None:
        kind, output = event.kind, event.kind == "OUTPUT"
        attempt = self._of(event.epoch or self.epoch) if output else self._of(event.epoch)
        if attempt is None or (output and event.rank < 0):
            return
        if kind == "WORDS":
            if event.rank in attempt.ranks:
                attempt.ranks[event.rank].words = event.payload.decode(errors="replace")
                self.changed = True
            return
        self._do(do.Publish(kind, event.rank, event.payload))
        if kind == "METRICS":
            attempt.stepped(event.rank, event.payload)

    def _on_proposed(self, event: ev.Proposed) -> None:
        if self._of(event.epoch) is not None:
            self._do(do.Agree(event.peer, event.epoch, event.rank, event.table))

    def _on_agreed(self, event: ev.Agreed) -> None:
        attempt = self._of(event.epoch)
        if attempt is not None and attempt.peers.get(event.rank) == event.peer:  # else it proposes them once more
            self._do(do.Send(event.peer, "ALGORITHMS", event.epoch, event.rank, event.code, event.table))

    def _on_no_memory(self, event: ev.NoMemory) -> None:
        attempt = self._of(event.epoch)
        if attempt is not None and attempt.phase is NodePhase.RUN and self.engine.peer is not None:
            for status in attempt.ranks.values():
                status.words = event.why
            self.slot_error, self.changed = event.why, True
            self._tell("KILL", attempt.epoch)

    # --- checkpoints --------------------------------------------------------------------------------------

    def _on_part(self, event: ev.PartStored) -> None:
        state = self.state
        if state is not None and not state.unreadable and self.epoch == event.epoch == state.epoch:  # A4
            self._do(do.Commit(event.epoch, event.step, state))
        self.changed = True

    def _on_slots_seen(self, event: ev.SlotsSeen) -> None:
        attempt = self._of(event.epoch)
        if attempt is not None:
            attempt.finals.update(event.finals)
        self._tell_committed()  # again: a rank that missed the word must not wait for its deadline

    def _tell_committed(self) -> None:
        """COMMITTED to every rank whose final snapshot is in the log."""
        attempt, state = self.attempt, self.state
        if attempt is None or state is None:
            return
        for rank, step in attempt.finals.items():
            peer = attempt.peers.get(rank)
            if peer is not None and state.find(step, attempt.epoch):
                self._do(do.Send(peer, "COMMITTED", rank=rank, epoch=attempt.epoch, a=step))

    # --- leaving ------------------------------------------------------------------------------------------

    def _on_terminate(self, event: ev.Terminate) -> None:
        """SIGTERM: have the ranks saved and gone, upload what they saved, leave. Whoever takes over a run that is being
        stopped asks again, and waits for the same: what ends an agent now is SIGKILL.
        """
        log.info("asked to leave%s", " again" if self.stopping else "")
        if self.stopping:
            return
        self.stopping = True
        self._arm_terminate()
        if self.attempt is not None and self.attempt.phase in STARTED:
            self._tell("STOP")
        self._do(do.AskDrained())

    def _arm_terminate(self) -> None:
        commit_s = float(self.attempt.gang.how("checkpoint", "commit_s")) if self.attempt is not None else 0.0
        self._arm(Timer.TERMINATE, commit_s + KILL_S)

    def _may_run(self) -> bool:
        """Whether ranks may run here: an agent that was started anew has to find that out."""
        if self.attempt is None:
            return self.state is None
        phase, here = self.attempt.phase, self.engine.peer is not None
        return phase in (NodePhase.RECALL, NodePhase.ADOPT) or (phase is NodePhase.RUN and here)

    def _on_drained(self, event: ev.Drained) -> None:
        self.changed = True
        if not event.idle:
            return
        if self.life is Life.DRAINING:
            self._leave("ended", EXIT_ENDED)
        elif self.stopping and not self._may_run():
            self.exit = EXIT_ENDED

    def _on_due(self, event: ev.Due) -> None:
        timer, attempt = event.timer, self.attempt
        if self.timers.get(timer, self._now + 1) > self._now:
            return  # armed anew, or of no use any more
        del self.timers[timer]
        match timer:
            case Timer.LAST_RANKS:
                self._end()
            case Timer.END:
                self._leave("ended", EXIT_ENDED)
            case Timer.TERMINATE:
                self.exit = EXIT_ENDED
            case _ if attempt is None:
                pass
            case Timer.KILL:
                self._cannot_start(attempt, 75, "the supervisor did not reap the ranks of the attempt before")
            case Timer.LOST if attempt.phase is NodePhase.KILL:
                self.engine.epoch = 0
                self._prepare(attempt)
            case Timer.LOST | Timer.ADOPT | Timer.ENDS:
                self._lost(attempt)


_HANDLERS: dict[type, Callable[[Machine, Any], None]] = {
    ev.LogRead: Machine._on_log,
    ev.Due: Machine._on_due,
    ev.Terminate: Machine._on_terminate,
    ev.PeerGone: Machine._on_gone,
    ev.SupervisorHello: Machine._on_supervisor,
    ev.Ports: Machine._on_ports,
    ev.RankExit: Machine._on_exit,
    ev.KernelSaid: Machine._on_kernel,
    ev.EngineRefused: Machine._on_refused,
    ev.EngineIdle: Machine._on_idle,
    ev.RankHello: Machine._on_rank,
    ev.Ready: Machine._on_ready,
    ev.RankSaid: Machine._on_said,
    ev.Proposed: Machine._on_proposed,
    ev.DataRead: Machine._on_data_read,
    ev.DataThere: Machine._on_data_there,
    ev.Recalled: Machine._on_recalled,
    ev.Claimed: Machine._on_claimed,
    ev.Provided: Machine._on_provided,
    ev.Met: Machine._on_met,
    ev.Marked: Machine._on_marked,
    ev.Failed: Machine._on_failed,
    ev.Agreed: Machine._on_agreed,
    ev.SlotsTaken: Machine._on_slots_taken,
    ev.SlotsLost: Machine._on_slots_lost,
    ev.SlotsSeen: Machine._on_slots_seen,
    ev.NoMemory: Machine._on_no_memory,
    ev.PartStored: Machine._on_part,
    ev.Drained: Machine._on_drained,
}
