"""The way of an attempt on this node, from its record to its end: the steps that the machine (``machine.py``) takes.

What the machine knows is here too. The invariants are listed there, the phases in ``attempt.py``.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass, replace
from enum import Enum

from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.attempt import NodeAttempt, NodePhase
from checkpoint.agent.devices import NoDevice, asked_kind, choose, read_devices, same_kind
from checkpoint.agent.events import Timer, Work
from checkpoint.agent.gang import Gang, Options
from checkpoint.log import AttemptInfo, RunState
from trainer import wire

log = logging.getLogger(__name__)

_WORDS = 400  # bytes of why data is late
EXIT_ENDED, EXIT_FENCED = 0, 75
KILL_S = 10.0  # for a supervisor to reap ranks that were sent SIGKILL
LOST_S = 2.0  # for a supervisor that went away to connect again (it tries each 50 ms)
ADOPT_S = 5.0  # for a supervisor to find a restarted agent
LAST_RANKS_S = 2.0  # for ranks to leave after their last commit
END_S = 30.0  # for uploads when the run has ended
_OF_AN_ATTEMPT = (Timer.KILL, Timer.LOST, Timer.ADOPT, Timer.ENDS)


class Life(Enum):
    """Of the agent."""

    SERVING = "runs what the log orders"
    LAST_RANKS = "the run has ended well: ranks leave by themselves"
    DRAINING = "the engine was told END: what is being stored is waited for"
    LEFT = "for good"


@dataclass
class Engine:
    """The supervisor, as far as it has said."""

    peer: int | None = None
    pid: int | None = None
    epoch: int = 0
    """Of the attempt whose ranks it has; 0: of none. Stays when it goes away, until it is given up."""


class Course:
    """What one agent knows, and its steps through one attempt after another."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.state: RunState | None = None
        self.attempt: NodeAttempt | None = None
        self.engine = Engine()
        self.life = Life.SERVING
        self.stopping = False
        self.exit: int | None = None
        self.preparing: int | None = None
        """Epoch of the preparation in progress."""
        self.shared = False
        """Ranks were given the slots that the next preparation may write into."""
        self.started = 0
        """The newest attempt that was started here."""
        self.timers: dict[Timer, float] = {}
        self.changed = True
        """The node's status is not what it was; the loop says so and takes this back."""
        self.durable = -1
        self.slot_error: str | None = None
        self._now = 0.0
        self._out: list[do.Effect] = []

    @property
    def epoch(self) -> int:
        return self.attempt.epoch if self.attempt is not None else 0

    @property
    def serves(self) -> bool:
        return self.life is Life.SERVING and not self.stopping

    def _arm(self, timer: Timer, seconds: float) -> None:
        self.timers[timer] = self._now + seconds

    def _disarm(self, *timers: Timer) -> None:
        for timer in timers:
            self.timers.pop(timer, None)

    def _do(self, effect: do.Effect) -> None:
        self._out.append(effect)

    def _tell(self, name: str, epoch: int = 0) -> None:
        """To the supervisor, where it is there."""
        if self.engine.peer is not None:
            self._do(do.Send(self.engine.peer, name, epoch=epoch))

    # --- an attempt, step by step -------------------------------------------------------------------------

    def _begin(self, newest: AttemptInfo) -> None:
        if self.life is not Life.SERVING:
            return
        if self.stopping and self.attempt is not None:  # what is still being saved is void now
            self._do(do.Cancel())
            self._tell("KILL", self.engine.epoch)
            self.exit = EXIT_ENDED
            return
        before, self.attempt = self.attempt, NodeAttempt(Gang.of(newest, self.options.node))
        self.slot_error = None
        self._disarm(*_OF_AN_ATTEMPT)
        log.info("attempt %d begins: %s", newest.n, newest.reason, extra={"epoch": newest.n})
        self._do(do.Begin(self.attempt.gang))
        if before is None:
            self._do(do.Recall(self.attempt.gang))
        else:
            self._set_out(self.attempt)

    def _set_out(self, attempt: NodeAttempt) -> None:
        self._do(do.Claim(attempt.gang))  # beside the preparation: it is not waited for where the node is ours
        if self.engine.epoch:
            self._kill(attempt)
        else:
            self._prepare(attempt)

    def _kill(self, attempt: NodeAttempt) -> None:
        """Ranks of an older attempt run: they go first."""
        if attempt.phase is not NodePhase.KILL:
            attempt.enter(NodePhase.KILL)
        if self.shared:  # A3
            attempt.found, attempt.used, attempt.spoiled = None, False, self.preparing == attempt.epoch
        log.info("ranks of attempt %d are killed", self.engine.epoch)
        if self.engine.peer is None:
            self._arm(Timer.LOST, LOST_S)
        else:
            self._tell("KILL", self.engine.epoch)
            self._arm(Timer.KILL, KILL_S)

    def _prepare(self, attempt: NodeAttempt) -> None:
        if attempt.phase is not NodePhase.PREPARE:
            attempt.enter(NodePhase.PREPARE)
        self.changed = True
        self._disarm(Timer.KILL, Timer.LOST)
        if not self.serves:
            return
        if attempt.found is not None:
            attempt.enter(NodePhase.PORTS)
            if not attempt.used:
                attempt.used = True
                self._do(do.Use(attempt.gang))
            self._ask_ports(attempt)
        elif self.preparing is None and self.state is not None:
            self.preparing = attempt.epoch
            self._do(do.Prepare(attempt.gang, self.state))
        # else the end of the preparation in progress comes here again (A3)

    def _prepared(self, epoch: int) -> NodeAttempt | None:
        """A preparation has ended: the attempt that it holds for. Where another one is due, that begins."""
        self.preparing, attempt = None, self.attempt
        if attempt is None:
            return None
        if attempt.epoch == epoch and not attempt.spoiled:
            return attempt
        attempt.spoiled = False
        if attempt.phase is NodePhase.PREPARE:
            self._prepare(attempt)
        return None

    def _on_provided(self, event: ev.Provided) -> None:
        attempt = self._prepared(event.epoch)
        if attempt is not None:
            attempt.found = event
            if attempt.phase is NodePhase.PREPARE:
                self._prepare(attempt)

    def _on_failed(self, event: ev.Failed) -> None:
        attempt = self._prepared(event.epoch) if event.work is Work.PREPARE else self._of(event.epoch)
        if attempt is not None and (event.work is Work.PREPARE or attempt.phase is NodePhase.PEERS):
            self._cannot_start(attempt, event.code, event.words)

    def _on_claimed(self, event: ev.Claimed) -> None:
        attempt, place = self._of(event.epoch), self.options.place
        if attempt is None:
            return
        attempt.held, self.changed = event.holder.same(place), True
        if not attempt.held:
            log.error(
                "node %d of attempt %d is held by %s (%s): this second one (%s) waits, and starts no rank",
                self.options.node,
                attempt.epoch,
                event.holder.address,
                event.holder.describe(),
                place.describe(),
            )
            self._over(attempt)
        elif attempt.phase is NodePhase.PORTS:
            self._ask_ports(attempt)

    def _ask_ports(self, attempt: NodeAttempt) -> None:
        if self.engine.peer is None or not attempt.held or not self.serves:
            return  # its HELLO, or the claim, comes here again
        gang = attempt.gang
        shared = int(gang.how("launch", "port_base"))  # by nodes of one machine: each has ports of its own
        base = self.options.port_base or (shared + gang.first if shared else 0)
        prepare = wire.MsgPrepare(gang.count, base, self.options.bind.encode())
        try:
            asked = asked_kind(*gang.device)
        except NoDevice as error:
            self._cannot_start(attempt, 78, str(error))
            return
        attempt.asked = self.engine.peer
        payload, look = bytes(prepare), int(asked != "cpu")
        self._do(do.Send(self.engine.peer, "PREPARE", epoch=gang.epoch, a=look, payload=payload))

    def _on_ports(self, event: ev.Ports) -> None:
        attempt = self._of(event.epoch)
        if attempt is None or attempt.phase is not NodePhase.PORTS or not self.serves:
            return
        if event.peer != self.engine.peer or event.peer != attempt.asked:
            return  # what an agent before this one asked for: the claim may not be ours (A6)
        count, got = attempt.gang.count, len(event.payload)
        if got < 2 * count:
            self._cannot_start(attempt, 70, f"the supervisor sent {got} bytes of ports for {count} ranks")
            return
        try:
            # nodes that share a machine, and so its ports, share its devices too
            here = 0 if self.options.port_base else attempt.gang.attempt.ranks - count
            first = attempt.gang.first if here else 0
            found = read_devices(event.payload[2 * count :])
            devices = choose(asked_kind(*attempt.gang.device), count, found, first=first, others=here)
        except NoDevice as error:
            self._cannot_start(attempt, 78, f"node {self.options.node}: {error}")
            return
        if devices.note:
            log.info("the ranks of this node: %s", devices.note, extra={"epoch": attempt.epoch})
        attempt.enter(NodePhase.PEERS)
        attempt.ports, self.changed = struct.unpack_from(f"<{count}H", event.payload), True
        attempt.devices = devices
        address = ev.Address(self.options.host, attempt.ports, devices)
        if self.options.nodes == 1 and devices.kind == "cpu":
            self._do(do.Mark(attempt.gang, {0: address}))
        else:
            self._do(do.Meet(attempt.gang, address))

    def _on_met(self, event: ev.Met) -> None:
        attempt = self._of(event.epoch)
        if attempt is None or attempt.phase is not NodePhase.PEERS or not self.serves:
            return
        try:
            same_kind({node: address.devices for node, address in event.nodes.items()})
        except NoDevice as error:
            self._cannot_start(attempt, 78, str(error))
            return
        if self.engine.peer is not None and tuple(event.nodes[self.options.node].ports) == attempt.ports:
            self._do(do.Mark(attempt.gang, event.nodes))  # else a supervisor is waited for, which binds new ports

    def _on_marked(self, event: ev.Marked) -> None:
        attempt = self._of(event.epoch)
        if attempt is None or attempt.phase is not NodePhase.PEERS or self.engine.peer is None or not self.serves:
            return
        attempt.enter(NodePhase.RUN)
        self.changed, self.shared = True, True
        self.engine.epoch = self.started = attempt.epoch
        attempt.began_s = self._now
        self._do(do.Start(self.engine.peer, attempt.gang))
        self._remember(attempt)
        self._offer_uploads(attempt)

    def _offer_uploads(self, attempt: NodeAttempt) -> None:
        """From here on the uploader takes the newest ready snapshot of this attempt by itself."""
        found = attempt.found
        point, start = (found.from_slot, found.start_step) if found is not None else (None, -1)
        # slots that were filled from a checkpoint need not go up again (after an adoption this is not known: one goes)
        stored = start if start >= 0 and point is None else None
        if point is not None and self.durable >= point[0]:
            point = None
        deadline_s = float(attempt.gang.how("checkpoint", "deadline_s"))
        bytes_per_s = 1e6 * float(attempt.gang.how("checkpoint", "bandwidth_mb_s"))
        self._do(do.Upload(attempt.epoch, deadline_s, point, stored, attempt.gang.attempt.amendments, bytes_per_s))

    def _cannot_start(self, attempt: NodeAttempt, code: int, words: str) -> None:
        """The attempt is over on this node before it began, or its engine is gone: say so as if the ranks had."""
        if attempt.phase is NodePhase.IDLE:
            return
        log.error("attempt %d cannot run here (%d): %s", attempt.epoch, code, words, extra={"epoch": attempt.epoch})
        attempt.gone(code, words)
        self._over(attempt)

    def _over(self, attempt: NodeAttempt) -> None:
        if attempt.phase is NodePhase.IDLE:
            return
        attempt.enter(NodePhase.IDLE)
        self.changed = True
        self._disarm(*_OF_AN_ATTEMPT)
        self._do(do.Cancel())
        self._remember(attempt)
        self._end()
        if self.stopping:
            self._do(do.AskDrained())

    def _remember(self, attempt: NodeAttempt) -> None:
        ranks = {rank: replace(status) for rank, status in attempt.ranks.items()}
        self._do(do.Remember(attempt.epoch, attempt.phase is NodePhase.IDLE, ranks))

    def _of(self, epoch: int) -> NodeAttempt | None:
        """The attempt, where the epoch is its."""
        return self.attempt if self.attempt is not None and self.attempt.epoch == epoch else None

    def _on_data_read(self, event: ev.DataRead) -> None:
        attempt = self._of(event.epoch)
        if attempt is not None and attempt.peers.get(event.rank) == event.peer:
            attempt.has_read(event.rank, event.step, event.told)
            self._do(do.HasRead(event.epoch, event.rank, event.step, event.told))
            self._tell_data(attempt)

    def _on_data_there(self, event: ev.DataThere) -> None:
        if (attempt := self._of(event.epoch)) is not None:
            attempt.data = event.step, event.code, event.words
            self._tell_data(attempt)

    def _tell_data(self, attempt: NodeAttempt) -> None:
        step, code, words = attempt.data
        for rank, peer in attempt.tell_data():
            self._do(do.Send(peer, "DATA", attempt.epoch, rank, step, words.encode()[:_WORDS], code))

    # --- an agent that was restarted ----------------------------------------------------------------------

    def _on_recalled(self, event: ev.Recalled) -> None:
        attempt = self._of(event.epoch)
        if attempt is None or attempt.phase is not NodePhase.RECALL:
            return
        if not event.started:
            if self.stopping:
                self.exit = EXIT_ENDED
            else:
                self._set_out(attempt)
            return
        attempt.held = attempt.adopted = True
        attempt.devices, attempt.began_s = event.devices, self._now
        attempt.ranks.update(event.ranks)
        self.started = attempt.epoch
        if event.refusal is not None:
            self._cannot_start(attempt, *event.refusal)
        elif event.over:
            self._over(attempt)
        else:
            attempt.enter(NodePhase.ADOPT)
            self._arm(Timer.ADOPT, ADOPT_S)
            log.info("attempt %d was running before this agent: waiting for its engine", attempt.epoch)
            self._offer_uploads(attempt)
            if self.engine.peer is not None:
                self._meet_engine(attempt, self.engine.epoch or attempt.epoch)

    def _meet_engine(self, attempt: NodeAttempt, known: int) -> None:
        """A supervisor is there, and the attempt was started: does it have its ranks?"""
        if known != attempt.epoch:
            self._lost(attempt)
            return
        if attempt.phase is NodePhase.ADOPT:
            attempt.enter(NodePhase.RUN)
            self.changed = True
            log.info("attempt %d goes on under this agent", attempt.epoch)
        self._disarm(Timer.ADOPT, Timer.ENDS)
        if not self.engine.epoch:  # its ranks are gone, and it says so now; or they were never started
            self._arm(Timer.ENDS, LOST_S)
        elif attempt.bare:
            self._kill_bare(attempt)

    def _kill_bare(self, attempt: NodeAttempt) -> None:
        """Ranks were started, but had no slots yet when the agent before this one died: its descriptors are gone."""
        for rank in sorted(attempt.bare):
            log.error("rank %d has no slots and its agent died with them: the attempt ends", rank)
            attempt.ranks[rank].words = "the agent died between START and SLOTS"
        self._tell("KILL", attempt.epoch)

    def _lost(self, attempt: NodeAttempt) -> None:
        if self.engine.peer is None:
            self.engine.epoch = 0  # ranks die with their supervisor
        self._cannot_start(attempt, 75, f"the supervisor of node {self.options.node} was lost, and its ranks with it")

    # --- the end ------------------------------------------------------------------------------------------

    def _end(self) -> None:
        if self.life is not Life.LAST_RANKS:
            return
        self.life, self.changed = Life.DRAINING, True
        self._disarm(Timer.LAST_RANKS)
        self._tell("END")
        self._arm(Timer.END, END_S)
        self._do(do.AskDrained())

    def _leave(self, why: str, code: int) -> None:
        """For good: the launcher does not start this node again."""
        self.life, self.exit, self.changed = Life.LEFT, code, True
        self._do(do.Cancel())
        self._tell("END")
        self._do(do.MarkDone(why))
