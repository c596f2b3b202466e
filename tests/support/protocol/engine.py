"""A node's supervisor and its ranks (``run/supervisor/``, ``snapshot/``), simulated; slots are real.

The gang of an attempt is all its ranks: none steps before every one has said the same step, all step together, save
or skip is one decision, and who loses a peer ends. A rank keeps mappings of its slots of its own, so they outlive an
agent.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.slots import Slot
from checkpoint.log import AttemptInfo
from tests.support.protocol.hub import Process
from tests.support.protocol.state import State, advanced, first_state, read_state, write_state, wrong
from trainer import wire

if TYPE_CHECKING:
    from tests.support.protocol.world import Host, World

WIRE_S = 0.01
STEP_S = 1.0
REPORT_S = 0.05
"""From the ranks' reports to the gang's decision."""
LOST_S = 0.3
"""For a rank to see that a peer is gone."""


@dataclass
class Rank:
    number: int
    epoch: int
    peer: int
    engine: Engine
    slots: list[Slot] = field(default_factory=list)
    step: int = -1
    state: State = field(default_factory=dict)
    newest: int | None = None
    claimed: int | None = None
    """Slot that it fills next, if the gang saves."""
    final: int | None = None
    """Step of its last snapshot, which it waits for."""
    leaves: int = 0
    """Its exit code then."""

    @property
    def alive(self) -> bool:
        return self.engine.alive and self.engine.ranks.get(self.number) is self


class Engine(Process):
    """A supervisor with its ranks: killed as one, or a rank alone."""

    def __init__(self, world: World, host: Host) -> None:
        super().__init__(world.hub, "engine", f"engine of {host.name}")
        self.world, self.host = world, host
        self.pid = world.hub.number()
        self.peer: int | None = None
        self.at_: str = "NONE"
        self.epoch = 0
        self.ranks: dict[int, Rank] = {}
        self.exits: list[ev.RankExit] = []
        self.pending: int | None = None
        self.stopping = False

    # --- towards the agent --------------------------------------------------------------------------------

    def say(self, event: ev.Event) -> None:
        agent, peer = self.host.agent, self.peer
        if agent is not None and peer is not None:
            agent.hub.at(WIRE_S, agent, lambda: agent.hear(event) if self.peer == peer else None)

    def connect(self) -> None:
        """An agent is there."""
        if self.host.agent is None or not self.host.agent.alive:
            return
        self.peer = self.hub.number()
        self.say(ev.SupervisorHello(self.peer, self.pid, self.epoch, len(self.ranks)))
        if self.at_ == "PREPARED":
            self.ports()
        for e in self.exits:
            self.say(ev.RankExit(self.peer, e.epoch, e.rank, e.code, e.pid, e.how, 0))
        if self.at_ == "ENDED":
            self.say(ev.EngineIdle(self.peer, self.epoch))
        for rank in self.ranks.values():
            self.rank_hello(rank)

    def rank_hello(self, rank: Rank) -> None:
        rank.peer = self.hub.number()
        self.say(ev.RankHello(rank.peer, rank.epoch, rank.number, rank.peer, len(rank.slots)))

    def ports(self) -> None:
        if self.peer is not None:
            self.say(ev.Ports(self.peer, self.epoch, struct.pack("<H", 7000 + self.peer % 50000)))

    def prepare(self, epoch: int) -> None:
        self.at_, self.epoch, self.exits, self.pending = "PREPARED", epoch, [], None
        self.ports()

    # --- what it hears ------------------------------------------------------------------------------------

    def hear(self, effect: do.Send | do.Start) -> None:
        if isinstance(effect, do.Start):
            if not self.stopping and self.at_ == "PREPARED" and effect.gang.epoch == self.epoch:
                self.start(effect)
            return
        match effect.name:
            case "PREPARE" if not self.stopping:
                if self.at_ != "NONE" and effect.epoch <= self.epoch:
                    if self.at_ == "PREPARED" and effect.epoch == self.epoch:
                        self.ports()
                elif self.ranks:
                    self.pending = effect.epoch
                    self.end_all(9)
                else:
                    self.prepare(effect.epoch)
            case "COMMITTED":
                rank = self.ranks.get(effect.rank)
                if rank is not None and rank.epoch == effect.epoch and rank.final == effect.a:
                    self.world.believed(rank)
                    self.exit(rank, rank.leaves)
            case "KILL" | "END":
                if self.at_ == "PREPARED":
                    self.at_ = "ENDED"
                    self.say(ev.EngineIdle(self.peer or 0, self.epoch))
                self.end_all(9)
                if effect.name == "END":
                    self.kill()
            case "STOP":
                self.stopping = True
                for rank in self.ranks.values():
                    self.world.gang(rank.epoch).stopping = True
                self.leave()

    def start(self, effect: do.Start) -> None:
        gang = effect.gang
        self.at_ = "RUNNING"
        self.world.started(self.host, gang)
        for number in gang.local:
            self.ranks[number] = rank = Rank(number, gang.epoch, 0, self)
            self.rank_hello(rank)
            self.hub.at(gang.how("launch", "connect_s"), self, lambda rank=rank: self.lonely(rank))  # type: ignore[misc]
        self.world.strike_engine(self, "start")

    def give(self, rank: Rank, slots: list[Slot], restore: int) -> None:
        """SLOTS; its own mappings of them."""
        rank.slots = [Slot(os.dup(slot.fd), slot.layout) for slot in slots]
        self.world.opened += rank.slots
        layout = rank.slots[0].layout
        if restore < 0:
            rank.state, rank.step = first_state(layout), 0
        else:
            slot = rank.slots[restore]
            rank.newest, rank.step = restore, slot.look(restore).step
            with slot.data() as data:
                rank.state = read_state(layout, data)
        gang = self.world.gang(rank.epoch)
        if why := wrong(rank.state, rank.step, gang.course):
            self.world.silent(f"rank {rank.number} of attempt {rank.epoch} begins with a wrong state: {why}")
        if not self.world.strike_engine(self, "restore", rank):
            gang.join(rank)

    def lonely(self, rank: Rank) -> None:
        if rank.alive and not self.world.gang(rank.epoch).whole:
            self.exit(rank, 75)

    # --- ends ---------------------------------------------------------------------------------------------

    def exit(self, rank: Rank, code: int, how: int = wire.ENDED_ITSELF) -> None:
        if not rank.alive:
            return
        del self.ranks[rank.number]
        gone = ev.RankExit(self.peer or 0, rank.epoch, rank.number, code, rank.number + 1, how, 0)
        self.exits.append(gone)
        self.say(gone)
        if code != 0:
            self.world.gang(rank.epoch).lost()
        if not self.ranks:
            self.at_ = "ENDED"
            self.say(ev.EngineIdle(self.peer or 0, self.epoch))
            if self.pending is not None:
                self.prepare(self.pending)
            self.leave()

    def leave(self) -> None:
        """As ``loop.c``: a supervisor that was asked to stop ends once it has no rank."""
        if self.stopping and not self.ranks:
            self.hub.at(1.0, self, self.kill)

    def end_all(self, signal: int) -> None:
        for rank in list(self.ranks.values()):
            self.exit(rank, -signal, wire.ENDED_BY_SUPERVISOR)

    def kill(self) -> None:
        """SIGKILL of the supervisor: ranks go with it; the agent sees the connection end."""
        if not self.alive:
            return
        super().kill()
        ranks, self.ranks = list(self.ranks.values()), {}
        for rank in ranks:
            self.world.gang(rank.epoch).lost()
        agent, peer = self.host.agent, self.peer
        if agent is not None and peer is not None:
            self.hub.at(WIRE_S, agent, lambda: agent.hear(ev.PeerGone(peer)))


class Gang:
    """The ranks of an attempt, as they go together."""

    def __init__(self, world: World, attempt: AttemptInfo) -> None:
        self.world, self.epoch, self.count, self.amended = world, attempt.n, attempt.ranks, attempt.amendments
        self.course, self.steps = world.course(self.amended), self.amended.total(world.steps)
        self.every = int(attempt.how["checkpoint"]["every"])
        self.persists = self.every * world.persists
        self.asked = 0
        """Step at which it was decided last whether to save."""
        self.ranks: dict[int, Rank] = {}
        self.stopping = self.over = False

    @property
    def whole(self) -> bool:
        return len(self.ranks) == self.count

    def join(self, rank: Rank) -> None:
        self.ranks[rank.number] = rank
        if self.whole and not self.over:
            steps = {rank.step for rank in self.ranks.values()}
            if len(steps) > 1:
                self.world.silent(f"the ranks of attempt {self.epoch} begin from different steps {sorted(steps)}")
            self.asked = rank.step
            self.world.hub.at(STEP_S, None, self.step)

    def lost(self) -> None:
        """A rank is gone: the others see it soon."""
        if not self.over:
            self.over = True
            for rank in list(self.ranks.values()):
                self.world.hub.at(LOST_S, rank.engine, lambda rank=rank: rank.engine.exit(rank, 75))  # type: ignore[misc]

    def step(self) -> None:
        """One step, or the save that is due before it."""
        if not self._goes_on():
            return
        at = self._ranks()[0].step
        last = at >= self.steps or (self.stopping and at > 0)
        if last or (at and at % self.every == 0 and at != self.asked):
            self.asked = at
            self._claim()
            self.world.hub.at(REPORT_S, None, lambda: self._decide(last))
        else:
            self._train()

    def _ranks(self) -> list[Rank]:
        return [self.ranks[n] for n in sorted(self.ranks)]

    def _goes_on(self) -> bool:
        ranks = self._ranks()
        if self.over or not all(rank.alive for rank in ranks):
            return False
        if any(rank.engine.frozen_until > self.world.hub.now for rank in ranks):
            self.world.hub.at(STEP_S, None, self.step)
            return False
        return True

    def _claim(self) -> None:
        """Each rank says by its claim whether it has a slot (``hs_snapshot_claim``)."""
        for rank in self._ranks():
            rank.claimed = self._free(rank)
            if rank.claimed is not None:
                rank.slots[rank.claimed]._header.claim = 1

    def _decide(self, last: bool) -> None:
        """The gang saves where every rank has a slot; the last save waits for one."""
        saves = self._goes_on() and all(rank.claimed is not None for rank in self._ranks())
        for rank in self._ranks():
            index, rank.claimed = rank.claimed, None
            if saves and index is not None:
                if rank.alive:
                    self._fill(rank, index, final=last)
            elif index is not None and rank.alive:
                rank.slots[index]._header.claim = 0
        if not self._goes_on():
            return
        if last and not saves:
            self.world.hub.at(STEP_S, None, self.step)
        elif not last:
            self._train()

    def _train(self) -> None:
        first = self._ranks()[0]
        if self.world.diverges(self.amended, first.step + 1):
            words = b'{"why": "the loss is nan", "step": %d}' % (first.step + 1)
            first.engine.say(ev.RankSaid("WORDS", first.epoch, first.number, words))
            first.engine.exit(first, 87)
            return
        for rank in self._ranks():
            rank.step += 1
            rank.state = {key: advanced(data, self.course.mark(rank.step)) for key, data in rank.state.items()}
            rank.engine.say(ev.RankSaid("METRICS", rank.epoch, rank.number, b'{"step": %d}' % rank.step))
            if self.world.strike_engine(rank.engine, "step", rank):
                return
        self.world.said(self, first.step)
        self.world.hub.at(STEP_S, None, self.step)

    def _free(self, rank: Rank) -> int | None:
        """As ``choose`` in snapshot/fill.c."""
        best, age = None, (0, 0)
        for i, slot in enumerate(rank.slots):
            seen = slot.look(i)
            if i == rank.newest or slot.held:
                continue
            if seen.state == wire.SLOT_EMPTY:
                return i
            if best is None or (seen.epoch, seen.step) < age:
                best, age = i, (seen.epoch, seen.step)
        return best

    def _fill(self, rank: Rank, index: int, *, final: bool) -> None:
        """Part of the bytes are there for a moment before the rest is."""
        slot, step, state, engine = rank.slots[index], rank.step, dict(rank.state), rank.engine
        header = slot._header
        header.state, header.generation, header.claim = wire.SLOT_FILLING, header.generation + 1, 0
        with slot.data() as data:
            data[: len(data) // 2] = b"\xee" * (len(data) // 2)
        if final:
            rank.final, rank.leaves = step, 85 if step < self.steps else 0

        def close() -> None:
            if not rank.alive:
                return
            with slot.data() as data:
                write_state(slot.layout, data, state)
                size = wire.SLOT_CHUNK
                sums = [zlib.crc32(data[at : at + size]) for at in range(0, len(data), size)]
            struct.pack_into(f"<{len(sums)}Q", slot._map, wire.SLOT_HEADER_BYTES, *sums)
            header.step, header.epoch, header.final, header.checksum_kind = step, rank.epoch, final, wire.SUM_CRC32
            header.persist = final or step % self.persists == 0
            header.header_crc = slot._crc()
            header.state = wire.SLOT_READY
            rank.newest = index
            if self.world.strike_engine(engine, "ready", rank):
                return
            engine.say(ev.Ready(rank.epoch, rank.number, step, final))
            if final:
                engine.hub.at(60.0, engine, lambda: engine.exit(rank, 75))

        if not self.world.strike_engine(engine, "fill", rank):
            engine.hub.at(0.2, engine, close)
