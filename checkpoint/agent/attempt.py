"""One attempt as this node goes through it: its phase, and what is known of its ranks. Plain data.

    RECALL    was it started before this agent?      -> ADOPT, else KILL or PREPARE
    ADOPT     it was: its engine is waited for       -> RUN, or IDLE where the engine is lost
    KILL      ranks of an older attempt must go      -> PREPARE on the supervisor's IDLE, or once it is lost
    PREPARE   plan, data, slots, restore point       -> PORTS
    PORTS     the supervisor binds ports             -> PEERS
    PEERS     all nodes' addresses, attempt file     -> RUN; PORTS again where the supervisor was lost
    RUN       ranks run                              -> IDLE when all are gone
    IDLE      over, or never begun here

Another phase leads to KILL where a supervisor comes that has older ranks, and each to IDLE where the attempt cannot go
on here. ``MOVES`` is that table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from checkpoint.agent.devices import ON_CPU, Devices
from checkpoint.agent.events import Provided, RankExit
from checkpoint.agent.gang import Gang
from checkpoint.agent.status import RankStatus
from trainer import wire


class NodePhase(Enum):
    RECALL = "recall"
    ADOPT = "adopt"
    KILL = "kill"
    PREPARE = "prepare"
    PORTS = "ports"
    PEERS = "peers"
    RUN = "run"
    IDLE = "idle"


MOVES: Mapping[NodePhase, frozenset[NodePhase]] = {
    NodePhase.RECALL: frozenset({NodePhase.ADOPT, NodePhase.KILL, NodePhase.PREPARE, NodePhase.IDLE}),
    NodePhase.ADOPT: frozenset({NodePhase.RUN, NodePhase.IDLE}),
    NodePhase.KILL: frozenset({NodePhase.PREPARE, NodePhase.IDLE}),
    NodePhase.PREPARE: frozenset({NodePhase.PORTS, NodePhase.KILL, NodePhase.IDLE}),
    NodePhase.PORTS: frozenset({NodePhase.PEERS, NodePhase.KILL, NodePhase.IDLE}),
    NodePhase.PEERS: frozenset({NodePhase.RUN, NodePhase.PORTS, NodePhase.KILL, NodePhase.IDLE}),
    NodePhase.RUN: frozenset({NodePhase.IDLE}),
    NodePhase.IDLE: frozenset(),
}
STARTED = frozenset({NodePhase.RUN, NodePhase.ADOPT})
"""Its ranks run, as far as is known."""
BEFORE_START = frozenset({NodePhase.PREPARE, NodePhase.PORTS, NodePhase.PEERS})
"""No rank runs on this node."""

_SHOWN: Mapping[NodePhase, str] = {
    NodePhase.RECALL: "restoring",
    NodePhase.ADOPT: "running",
    NodePhase.KILL: "restoring",
    NodePhase.PREPARE: "restoring",
    NodePhase.PORTS: "starting",
    NodePhase.PEERS: "starting",
    NodePhase.RUN: "running",
    NodePhase.IDLE: "idle",
}


@dataclass
class NodeAttempt:
    """The newest attempt of this launch, on this node."""

    gang: Gang
    phase: NodePhase = NodePhase.RECALL
    held: bool = False
    """The claim of this node is ours (A6)."""
    found: Provided | None = None
    used: bool = False
    """What was found is in its place."""
    spoiled: bool = False
    """What is being prepared will not hold: ranks turned out to run that may write into the same slots (A3)."""
    ports: tuple[int, ...] = ()
    """Of this node, as the supervisor said them last."""
    asked: int | None = None
    """The supervisor that was asked for them."""
    began_s: float = 0.0
    """When its ranks were started, by the machine's clock; those of an agent before: when this one found them."""
    devices: Devices = ON_CPU
    """What the ranks of this node run on."""
    adopted: bool = False
    ranks: dict[int, RankStatus] = field(default_factory=dict)
    peers: dict[int, int] = field(default_factory=dict)
    """Rank -> its connection."""
    taken: set[int] = field(default_factory=set)
    """Ranks of an adopted attempt that have handed their slots back."""
    bare: set[int] = field(default_factory=set)
    """Ranks of an adopted attempt that have none to hand back."""
    finals: dict[int, int] = field(default_factory=dict)
    """Rank -> step of the last snapshot that it takes."""
    data: tuple[int, int, str] = 0, 0, ""
    """Of data that comes ahead: up to which step it is there, and what keeps the next one's away."""
    read: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """Rank -> the step whose data it read last, up to which one it was told, and with which code."""

    def __post_init__(self) -> None:
        self.ranks = {rank: RankStatus(step=self.gang.attempt.step) for rank in self.gang.local}

    @property
    def epoch(self) -> int:
        return self.gang.epoch

    @property
    def shown(self) -> str:
        """The phase as the node's status says it."""
        here = len(self.peers) == self.gang.count or any(status.step for status in self.ranks.values())
        return "starting" if self.phase is NodePhase.RUN and not here else _SHOWN[self.phase]

    def enter(self, phase: NodePhase) -> None:
        if phase not in MOVES[self.phase]:
            raise AssertionError(f"attempt {self.epoch} goes from {self.phase.name} to {phase.name}")
        self.phase = phase

    def has_slots(self, rank: int) -> bool:
        """Whether this agent holds the rank's slots."""
        return not self.adopted or rank in self.taken

    def restore(self, rank: int) -> int:
        """The index of the slot that the rank begins from, or -1."""
        return self.found.restore.get(rank, -1) if self.found is not None else -1

    def has_read(self, rank: int, step: int, told: int) -> None:
        """How far it says that it has read, and was told."""
        self.read[rank] = step, told, self.read.get(rank, (0, 0, 0))[2]

    def tell_data(self) -> list[tuple[int, int]]:
        """Ranks, with their connections, that have to hear of the data: they may soon wait for what they do not know to
        be there. From here on they have.
        """
        found, (step, code, _) = [], self.data
        for rank, (read, told, said) in self.read.items():
            if rank in self.peers and ((step > told and told <= read + 1) or code != said):
                found.append((rank, self.peers[rank]))
                self.read[rank] = read, max(told, step), code
        return found

    # --- what ranks say -----------------------------------------------------------------------------------

    def stepped(self, rank: int, metrics: bytes) -> None:
        """A line of metrics."""
        try:
            step = json.loads(metrics).get("step")
        except (ValueError, AttributeError):
            return
        if isinstance(step, int) and rank in self.ranks:
            self.ranks[rank].step = step

    def snapshot(self, rank: int, step: int, final: bool) -> None:
        """A snapshot is ready."""
        status = self.ranks.get(rank)
        if status is not None:
            status.step, status.final = max(status.step, step), status.final or final
            if final:
                self.finals[rank] = step

    def ended(self, exit: RankExit) -> bool:
        """How a rank ended; whether it is one of ours."""
        status = self.ranks.get(exit.rank)
        if status is None:
            return False
        status.pid = exit.pid or status.pid
        status.killed = exit.how == wire.ENDED_BY_SUPERVISOR
        if exit.how == wire.ENDED_BY_OOM:
            status.memory = exit.memory
        if exit.code >= 0:
            status.code = exit.code
        else:
            status.signal = -exit.code
        return True

    def gone(self, code: int, words: str) -> None:
        """Ranks whose end nobody said have ended with this code."""
        for status in self.ranks.values():
            if not status.gone:
                status.code, status.words = code, status.words or words
