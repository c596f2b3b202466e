"""A node without its machine: everything around the agent's pure machine, as plain data, driven by a seed.

Plays the supervisor (by ``run/supervisor/``), its ranks, the store's answers, the node's disk and the log; loses
connections, processes and messages' company at will. Knows what really runs, and says where the agent broke a promise.
"""

from __future__ import annotations

import random
import re
import struct
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.attempt import NodePhase
from checkpoint.agent.gang import Gang, Options
from checkpoint.agent.machine import Machine
from checkpoint.agent.status import RankStatus
from checkpoint.claims import Place
from checkpoint.log import AttemptInfo, CheckpointInfo, EndedInfo, RunState
from trainer import wire

HERE = Place("here", "boot", "space", "/work", "token", "127.0.0.1")
THERE = Place("there", "boot", "space", "/work", "another", "127.0.0.2")
LAUNCH = "launch-1"
_GANG = re.compile(r"gang=Gang\(attempt=AttemptInfo\(n=(\d+).*?count=\d+\)")


def options(nodes: int = 1) -> Options:
    return Options("run", LAUNCH, 0, nodes, Path("sock"), Path("work"), b"k" * 16, HERE, "127.0.0.1", "127.0.0.1", 0, 1)


def attempt_info(
    n: int, nodes: int = 1, launch: str = LAUNCH, step: int = 0, how: Mapping[str, Any] | None = None
) -> AttemptInfo:
    return AttemptInfo(n, 0.0, launch, nodes, 2 * nodes, "00", "00", None, step, None, "a test", {"how": how or {}})


def checkpoint_info(n: int, epoch: int, step: int) -> CheckpointInfo:
    return CheckpointInfo(n, epoch, 0.0, step, "m", 1, "00", "00", 1, step)


@dataclass
class Rank:
    epoch: int
    peer: int
    slots: int | None = None
    """Of which table, once it has them."""


@dataclass
class Supervisor:
    pid: int
    peer: int | None = None
    at: str = "NONE"
    epoch: int = 0
    ranks: dict[int, Rank] = field(default_factory=dict)
    inbox: deque[do.Effect] = field(default_factory=deque)
    exits: list[ev.RankExit] = field(default_factory=list)
    pending: int | None = None
    stopping: bool = False
    heard: bool = False
    """The agent has heard its HELLO of this connection."""


@dataclass
class Preparation:
    gang: Gang
    table: int
    tainted: bool = False


class World:
    """``act`` does one thing that may happen; ``settle`` lets everything come to rest, with nothing lost any more."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.nodes = self.rng.choice((1, 1, 2))
        self.slow = self.rng.random() < 0.25  # a supervisor that takes its time to connect again
        self.torn = self.rng.random() < 0.25  # connections that end all the time
        self.brief = self.rng.random() < 0.2  # agents that are asked to leave, while the store is slow
        self.now = 0.0
        self.n = 0
        self.attempts: list[AttemptInfo] = []
        self.checkpoints: list[CheckpointInfo] = []
        self.ended: EndedInfo | None = None
        self.halted = False
        self.states: list[RunState] = []
        self.claims: dict[int, Place] = {}
        self.trace: list[str] = []
        self.moves: set[tuple[NodePhase, NodePhase]] = set()
        self.number = 0
        self.supervisor: Supervisor | None = None
        # the disk
        self.mark = 0
        self.notes: tuple[int, bool, dict[int, RankStatus]] = (0, False, {})
        self.left = False
        self.starts: set[int] = set()
        self.restart()

    # --- processes ----------------------------------------------------------------------------------------

    def restart(self) -> None:
        """The agent dies and another one comes."""
        self.machine = Machine(options(self.nodes))
        self.wires: dict[int, deque[ev.Event]] = {}
        self.results: list[ev.Event] = []
        self.preparations: list[Preparation] = []
        self.found: dict[int, Preparation] = {}
        self.table: int | None = None
        self.cancelled = False
        self.busy = 0
        if self.supervisor is not None:
            self.supervisor.peer, self.supervisor.heard = None, False
            self.supervisor.inbox.clear()
        self.read_log()

    def new_peer(self) -> int:
        self.number += 1
        self.wires[self.number] = deque()
        return self.number

    def hello(self) -> None:
        """The supervisor connects, says what stands, and so do its ranks."""
        s = self.supervisor
        assert s is not None
        s.peer, s.heard = self.new_peer(), False
        s.inbox.clear()
        self.say_hello(s)
        if s.at == "PREPARED":
            self.ports(s)
        for exit in s.exits:
            self.say(s, ev.RankExit(s.peer, exit.epoch, exit.rank, exit.code, exit.pid, exit.how, 0))
        if s.at == "ENDED":
            self.say(s, ev.EngineIdle(s.peer, s.epoch))
        for number, rank in s.ranks.items():
            if rank.peer not in self.wires:
                self.rank_hello(number, rank)

    def say_hello(self, s: Supervisor) -> None:
        self.say(s, ev.SupervisorHello(s.peer or 0, s.pid, s.epoch, len(s.ranks)))

    def rank_hello(self, number: int, rank: Rank) -> None:
        rank.peer = self.new_peer()
        self.wires[rank.peer].append(ev.RankHello(rank.peer, rank.epoch, number, 1, 0 if rank.slots is None else 3))

    def say(self, s: Supervisor, event: ev.Event) -> None:
        if s.peer is not None and s.peer in self.wires:
            self.wires[s.peer].append(event)

    def ports(self, s: Supervisor) -> None:
        self.say(s, ev.Ports(s.peer or 0, s.epoch, struct.pack("<2H", 7000 + (s.peer or 0), 7001)))

    def cut(self, peer: int) -> None:
        """A connection ends: what was under way is still heard."""
        self.wires[peer].append(ev.PeerGone(peer))
        s = self.supervisor
        if s is not None and s.peer == peer:
            s.peer, s.heard = None, False
            s.inbox.clear()

    def rank_ends(self, number: int, code: int) -> None:
        s = self.supervisor
        assert s is not None
        rank = s.ranks.pop(number)
        if rank.peer in self.wires:
            self.cut(rank.peer)
        exit = ev.RankExit(s.peer or 0, rank.epoch, number, code, 1, wire.ENDED_ITSELF, 0)
        s.exits.append(exit)
        self.say(s, exit)
        if not s.ranks:
            s.at = "ENDED"
            self.say(s, ev.EngineIdle(s.peer or 0, s.epoch))
            if s.pending is not None:
                self.prepare(s, s.pending)

    def supervisor_dies(self) -> None:
        s = self.supervisor
        assert s is not None
        for rank in s.ranks.values():
            if rank.peer in self.wires:
                self.cut(rank.peer)
        if s.peer is not None:
            self.cut(s.peer)
        self.supervisor = None

    def prepare(self, s: Supervisor, epoch: int) -> None:
        s.at, s.epoch, s.exits, s.pending = "PREPARED", epoch, [], None
        self.ports(s)

    def supervisor_hears(self) -> None:
        """``run/supervisor/talk.c``."""
        s = self.supervisor
        assert s is not None
        effect = s.inbox.popleft()
        if isinstance(effect, do.Start):
            epoch = effect.gang.epoch
            if s.stopping or (epoch == s.epoch and s.at in ("RUNNING", "ENDED")):
                return
            if s.at == "PREPARED" and epoch == s.epoch:
                assert not s.ranks, "A1: START while ranks run"
                assert epoch not in self.starts, "A2: started twice"
                self.starts.add(epoch)
                s.at = "RUNNING"
                for number in effect.gang.local:
                    s.ranks[number] = Rank(epoch, 0)
                    self.rank_hello(number, s.ranks[number])
            return
        assert isinstance(effect, do.Send)
        match effect.name:
            case "PREPARE" if not s.stopping:
                assert self.claims.get(effect.epoch) == HERE, "A6: the engine hears of a node that is not ours"
                if s.at != "NONE" and effect.epoch <= s.epoch:
                    if s.at == "PREPARED" and effect.epoch == s.epoch:
                        self.ports(s)
                elif s.ranks:
                    s.pending = effect.epoch
                    self.kill()
                else:
                    self.prepare(s, effect.epoch)
            case "KILL" | "STOP" | "END":
                if s.at == "PREPARED":
                    s.at = "ENDED"
                    self.say(s, ev.EngineIdle(s.peer or 0, s.epoch))
                elif effect.name != "STOP" or self.rng.random() < 0.7:
                    self.kill()
                if effect.name == "END":
                    self.supervisor_dies()

    def kill(self) -> None:
        assert self.supervisor is not None
        for number in list(self.supervisor.ranks):
            self.rank_ends(number, -9)

    # --- the log ------------------------------------------------------------------------------------------

    def state(self) -> RunState:
        unreadable = "a record is damaged" if self.halted else None
        return RunState(
            "run", self.n, tuple(self.attempts), tuple(self.checkpoints), ended=self.ended, unreadable=unreadable
        )

    def read_log(self) -> None:
        self.states.append(self.state())
        self.feed(ev.LogRead(self.states[-1]))

    def append_attempt(self, launch: str = LAUNCH) -> None:
        self.n += 1
        self.attempts.append(attempt_info(self.n, self.nodes, launch))
        self.ended = None

    # --- the agent ----------------------------------------------------------------------------------------

    def feed(self, event: ev.Event) -> None:
        events = deque([event])
        while events:
            event = events.popleft()
            self.trace.append(f"{self.now:7.2f} {_short(event)}")
            before = self.machine.attempt
            phase = before.phase if before is not None else None
            effects = self.machine.on(self.now, event)
            if before is not None and phase is not None and phase is not before.phase:
                self.moves.add((phase, before.phase))
            for effect in effects:
                self.trace.append(f"          {_short(effect)}")
                answer = self.do(effect)
                if answer is not None:
                    events.append(answer)
            self.look()

    def do(self, effect: do.Effect) -> ev.Event | None:
        """The actions (``actions.py``), on a disk and slots that are numbers."""
        s = self.supervisor
        match effect:
            case do.Send(peer=peer) | do.Start(peer=peer):
                if s is not None and s.peer == peer:
                    s.inbox.append(effect)
            case do.Drop(peer=peer):
                if peer in self.wires:
                    self.wires[peer].clear()
                    if s is not None and s.peer == peer:
                        s.peer, s.heard = None, False
            case do.Begin():
                self.cancelled = False
                self.results = [r for r in self.results if isinstance(r, ev.Provided) or self.rng.random() < 0.5]
            case do.Cancel():
                self.cancelled = True
            case do.Recall(gang=gang):
                if self.mark != gang.epoch:
                    return ev.Recalled(gang.epoch, False)
                epoch, over, ranks = self.notes
                self.table = self.new_table()
                return ev.Recalled(gang.epoch, True, over and epoch == gang.epoch, ranks if epoch == gang.epoch else {})
            case do.Claim(gang=gang):
                holder = self.claims.setdefault(gang.epoch, THERE if self.rng.random() < 0.05 else HERE)
                self.results.append(ev.Claimed(gang.epoch, holder))
            case do.Prepare(gang=gang):
                table = self.table if self.table is not None and self.rng.random() < 0.9 else self.new_table()
                assert all(p.table != table for p in self.preparations), "A3: two write into the same slots"
                self.preparations.append(Preparation(gang, table))
                self.look()
            case do.Use(gang=gang):
                found = self.found.pop(gang.epoch)
                assert not found.tainted, "A3: slots that ranks had while they were written"
                self.table = found.table
            case do.Meet(gang=gang, address=address):
                if self.rng.random() < 0.05:
                    self.results.append(ev.Failed(gang.epoch, ev.Work.MEET, 75, "late"))
                else:
                    self.results.append(ev.Met(gang.epoch, dict.fromkeys(range(self.nodes), address)))
            case do.Mark(gang=gang):
                if self.rng.random() < 0.02:
                    return ev.Failed(gang.epoch, ev.Work.MARK, 78, "disk full")
                assert effect.nodes[0][1][0] == 7000 + (self.machine.engine.peer or 0), "addresses of a time before"
                self.mark = gang.epoch
                return ev.Marked(gang.epoch)
            case do.Remember():
                self.notes = effect.epoch, effect.over, dict(effect.ranks)
            case do.GiveSlots(peer=peer, rank=number):
                rank = s.ranks.get(number) if s is not None else None
                if rank is not None and rank.peer == peer:
                    rank.slots = self.table
            case do.TakeSlots(rank=number):
                rank = s.ranks.get(number) if s is not None else None
                if rank is None or self.rng.random() < 0.05:
                    return ev.SlotsLost(effect.epoch, number, "torn")
                self.table = rank.slots
                return ev.SlotsTaken(effect.epoch, number, None)
            case do.Agree():
                self.results.append(ev.Agreed(effect.peer, effect.epoch, effect.rank, 0, effect.table))
            case do.AskDrained():
                return ev.Drained(not self.busy)
            case do.LookForSnapshots() | do.Upload():
                self.busy += 1
            case do.MarkDone():
                self.left = True
        return None

    def new_table(self) -> int:
        self.number += 1
        return self.number

    def look(self) -> None:
        """Which slots that are being written have ranks of which the agent knows?"""
        s = self.supervisor
        if s is None or not s.heard:
            return
        for preparation in (*self.preparations, *self.found.values()):
            preparation.tainted |= any(rank.slots == preparation.table for rank in s.ranks.values())

    # --- what may happen ----------------------------------------------------------------------------------

    def deliver(self, peer: int) -> None:
        event = self.wires[peer].popleft()
        if not self.wires[peer] and isinstance(event, ev.PeerGone):
            del self.wires[peer]
        s = self.supervisor
        if isinstance(event, ev.SupervisorHello) and s is not None and s.peer == peer:
            s.heard = True
        self.feed(event)

    def result(self) -> None:
        self.feed(self.results.pop(self.rng.randrange(len(self.results))))

    def prepared(self, fails: float = 0.05) -> None:
        preparation = self.preparations.pop(0)
        epoch = preparation.gang.epoch
        if self.rng.random() < fails:
            self.feed(ev.Failed(epoch, ev.Work.PREPARE, 76, "damaged"))
        else:
            self.found = {epoch: preparation}
            self.feed(ev.Provided(epoch, {}, self.rng.choice((-1, 4))))

    def time_passes(self) -> None:
        if self.machine.timers:
            self.now = max(self.now, min(self.machine.timers.values()))
            for timer in self.machine.due(self.now):
                self.feed(ev.Due(timer))

    def stale(self) -> None:
        """A message of another time: late, of an older epoch, or of nobody."""
        epoch, rank = self.rng.randint(0, self.n + 1), self.rng.randint(-1, 4)
        peer, engine, mine = self.rng.randint(0, self.number), self.machine.engine, self.machine.epoch
        choices: list[ev.Event] = [
            ev.EngineIdle(engine.peer or 0, self.rng.randint(1, max(1, engine.epoch - 1))),
            ev.EngineIdle(-1, engine.epoch),
            ev.Failed(mine, ev.Work.MEET, 75, "late"),
            ev.Ports(peer, max(0, mine - 1), b"\1\2\3\4"),
            ev.RankHello(self.new_peer(), max(0, mine - 1), rank, 5),
            ev.Ready(epoch, rank, 3, True),
            ev.RankSaid(self.rng.choice(("METRICS", "WORDS", "TRACE", "OUTPUT")), epoch, rank, b'{"step": 3}'),
            ev.Claimed(max(0, mine - 1), THERE),
            ev.Met(max(0, mine - 1), {n: ev.Address("h", [1, 2]) for n in range(self.nodes)}),
            ev.PartStored(max(0, mine - 1), 3),
            ev.Drained(not self.busy),
            ev.LogRead(self.rng.choice(self.states)),
            ev.SlotsSeen(epoch, {0: 3}),
        ]
        event = self.rng.choice(choices)
        if not isinstance(event, ev.EngineIdle) or event.epoch < engine.epoch or event.peer < 0:
            self.feed(event)

    def act(self) -> None:
        rng, s = self.rng, self.supervisor
        acts: list[tuple[float, Any]] = [(0.3, self.append_attempt), (1.0, self.read_log), (0.5, self.stale)]
        for peer in [peer for peer, waiting in self.wires.items() if waiting]:
            acts.append((4.0, lambda peer=peer: self.deliver(peer)))
        if self.results:
            acts.append((4.0, self.result))
        if self.preparations:
            acts.append((2.0, self.prepared))
        if self.busy:
            acts.append((0.1 if self.brief else 1.0, self.uploaded))
        if s is None:
            acts.append((2.0, self.supervisor_comes))
        else:
            acts.append((0.15, self.supervisor_dies))
            if s.peer is None:
                acts.append((0.1 if self.slow else 2.0, self.hello))
            else:
                acts.append((1.0 if self.torn else 0.2, lambda: self.cut(s.peer or 0)))
                acts.append((0.1, lambda: self.say_hello(s)))
            if s.inbox:
                acts.append((4.0, self.supervisor_hears))
            if s.ranks:
                number = rng.choice(list(s.ranks))
                acts.append((0.2, lambda: self.rank_ends(number, rng.choice((0, 1, -11, 85)))))
                acts.append((0.5, lambda: self.rank_says(number)))
        acts.append((0.8 if self.slow else 0.15, self.time_passes))
        acts.append((0.08, self.restart))
        acts.append((0.3 if self.brief else 0.03, lambda: self.feed(ev.Terminate())))
        acts.append((0.03, self.end_run))
        acts.append((0.2 if self.halted else 0.02, self.halt))
        acts.append((0.01, lambda: self.append_attempt("launch-2")))
        rng.choices([act for _, act in acts], [weight for weight, _ in acts])[0]()

    def uploaded(self) -> None:
        self.busy -= 1
        if self.rng.random() < 0.5:
            self.feed(ev.PartStored(self.machine.epoch, self.rng.randint(0, 9)))
        self.feed(ev.Drained(not self.busy))

    def supervisor_comes(self) -> None:
        self.number += 1
        self.supervisor = Supervisor(self.number)

    def rank_says(self, number: int) -> None:
        assert self.supervisor is not None
        rank = self.supervisor.ranks[number]
        if rank.peer in self.wires and rank.slots is not None:
            self.wires[rank.peer].append(ev.Ready(rank.epoch, number, self.rng.randint(1, 9), self.rng.random() < 0.3))
            self.wires[rank.peer].append(ev.Proposed(rank.peer, rank.epoch, number, b"table"))

    def halt(self) -> None:
        """A record that nobody can read, or its mending."""
        self.halted = not self.halted

    def end_run(self) -> None:
        if self.attempts:
            self.n += 1
            outcome = self.rng.choice(("succeeded", "cancelled"))
            self.ended = EndedInfo(self.n, self.attempts[-1].n, 0.0, outcome, "", 0, None)

    # --- rest ---------------------------------------------------------------------------------------------

    def settle(self) -> bool:
        """Everything that is under way happens, a supervisor is there, timers come due only when nothing else is left.

        Whether the machine came to rest where it may: with ranks that run, over, or gone.
        """
        self.halted = False
        for _ in range(2000):
            if self.machine.exit is not None:
                return True
            waiting = [peer for peer, queue in self.wires.items() if queue]
            s = self.supervisor
            if self.machine.state is None or self.machine.state.n < self.n or self.machine.state.unreadable:
                self.read_log()
            elif waiting:
                self.deliver(waiting[0])
            elif self.results:
                self.result()
            elif self.preparations:
                self.prepared(fails=0.0)
            elif self.busy:
                self.uploaded()
            elif s is None:
                self.supervisor_comes()
            elif s.peer is None:
                self.hello()
            elif s.inbox:
                self.supervisor_hears()
            elif self.machine.timers:
                self.time_passes()
            else:
                break
        attempt = self.machine.attempt
        if attempt is None:
            return not any(attempt.launch == LAUNCH for attempt in self.attempts)
        if attempt.epoch != self.attempts[-1].epoch:
            return False
        if attempt.phase is NodePhase.IDLE:
            return True
        s = self.supervisor
        return attempt.phase is NodePhase.RUN and s is not None and bool(s.ranks) and s.epoch == attempt.epoch


def _short(what: object) -> str:
    """For a trace that people read."""
    return _GANG.sub(r"gang=\1", str(what))[:160]
