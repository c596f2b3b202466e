"""What the machine hears (``machine.py``): plain data, each event with the epoch of the attempt that it is about.

``peer`` is the number of a connection (``link.py``). Results of work that the machine asked for are events too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from checkpoint.agent.devices import ON_CPU, Devices
from checkpoint.agent.status import RankStatus
from checkpoint.claims import Place
from checkpoint.log import RunState


class Address(NamedTuple):
    """A node's host, the port of each of its ranks, and what they run on."""

    host: str
    ports: Sequence[int]
    devices: Devices = ON_CPU


class Timer(Enum):
    """What the machine may wait for besides a message; the values are for people."""

    KILL = "a supervisor reaps ranks that were killed"
    LOST = "a supervisor that went away comes back"
    ADOPT = "a supervisor finds a restarted agent"
    ENDS = "a supervisor without ranks says how they ended"
    LAST_RANKS = "ranks leave after their last commit"
    END = "uploads end after the run"
    TERMINATE = "ranks save and leave on request"


class Work(Enum):
    """What may fail before an attempt has begun."""

    PREPARE = "prepare"
    MEET = "meet"
    MARK = "mark"


# --- the log, and the agent itself ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LogRead:
    """A state of the log, from the watcher or from a commit of our own."""

    state: RunState


@dataclass(frozen=True, slots=True)
class Due:
    timer: Timer


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM, SIGINT."""


@dataclass(frozen=True, slots=True)
class PeerGone:
    """A connection ended."""

    peer: int


# --- the supervisor -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SupervisorHello:
    """``live`` ranks of attempt ``epoch`` are its. ``rival``: another supervisor that lives has the node."""

    peer: int
    pid: int
    epoch: int
    live: int
    rival: bool = False


@dataclass(frozen=True, slots=True)
class Ports:
    peer: int
    epoch: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class RankExit:
    """``code``: of the exit, or minus the signal; ``how``: ``wire.ENDED_*``; ``memory``: limit of one killed for it."""

    peer: int
    epoch: int
    rank: int
    code: int
    pid: int
    how: int
    memory: int


@dataclass(frozen=True, slots=True)
class EngineRefused:
    """The supervisor cannot prepare or start the attempt."""

    peer: int
    epoch: int
    code: int
    words: str


@dataclass(frozen=True, slots=True)
class EngineIdle:
    """All ranks of the attempt are reaped."""

    peer: int
    epoch: int


# --- ranks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankHello:
    """``handed``: how many descriptors of slots came with it."""

    peer: int
    epoch: int
    rank: int
    pid: int
    handed: int = 0


@dataclass(frozen=True, slots=True)
class Ready:
    epoch: int
    rank: int
    step: int
    final: bool


@dataclass(frozen=True, slots=True)
class RankSaid:
    """For people: METRICS, WORDS, TRACE or OUTPUT (``kind``)."""

    kind: str
    epoch: int
    rank: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Proposed:
    """A table of algorithms that a rank would go by; it waits for the run's."""

    peer: int
    epoch: int
    rank: int
    table: bytes


@dataclass(frozen=True, slots=True)
class DataRead:
    """Up to which step a rank has read its data, and up to which one it was told that it is there (``ahead.py``)."""

    peer: int
    epoch: int
    rank: int
    step: int
    told: int


# --- results of what the machine asked for --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recalled:
    """What an agent before this one left of the attempt: nothing where it was not started here.

    ``refusal``: why it cannot be taken over, an exit code and words.
    """

    epoch: int
    started: bool
    over: bool = False
    ranks: Mapping[int, RankStatus] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None
    devices: Devices = ON_CPU
    """What they run on; without names."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """The place that has this node of the attempt (A6)."""

    epoch: int
    holder: Place


@dataclass(frozen=True, slots=True)
class Provided:
    """Plan, data, slots and restore point are there (``gang.Provisions``; this is what the machine needs of it)."""

    epoch: int
    restore: Mapping[int, int] = field(default_factory=dict)
    start_step: int = -1
    from_slot: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class DataThere:
    """Up to which step the data of the node's ranks is there; ``code``, ``words``: what keeps the next one's away."""

    epoch: int
    step: int
    code: int
    words: str


@dataclass(frozen=True, slots=True)
class KernelSaid:
    """What NVIDIA's driver wrote of the device of a rank that ended (``kernel_log.py``)."""

    epoch: int
    rank: int
    xid: int
    line: str


@dataclass(frozen=True, slots=True)
class Met:
    """Where every node's ranks listen."""

    epoch: int
    nodes: Mapping[int, Address]


@dataclass(frozen=True, slots=True)
class Marked:
    """The attempt file is written (A2)."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Failed:
    """Work for an attempt failed: exit code for its ranks, and why."""

    epoch: int
    work: Work
    code: int
    words: str


@dataclass(frozen=True, slots=True)
class Agreed:
    """The run's algorithms, for the rank that proposed some: ``code`` 0 and a table; or an exit code, and why."""

    peer: int
    epoch: int
    rank: int
    code: int
    table: bytes


@dataclass(frozen=True, slots=True)
class SlotsTaken:
    """A rank handed its slots back; ``final``: the step of its last snapshot, where it has taken that."""

    epoch: int
    rank: int
    final: int | None


@dataclass(frozen=True, slots=True)
class SlotsLost:
    """The slots that a rank handed back are not the plan's."""

    epoch: int
    rank: int
    why: str


@dataclass(frozen=True, slots=True)
class SlotsSeen:
    """A look into the slots: rank -> step of the last snapshot that it will take of this attempt."""

    epoch: int
    finals: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class NoMemory:
    """The memory of the slots is not there."""

    epoch: int
    why: str


@dataclass(frozen=True, slots=True)
class PartStored:
    """This node's part of a checkpoint is in the store."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Drained:
    """Whether nothing is being uploaded or committed any more."""

    idle: bool


Event = (
    LogRead
    | Due
    | Terminate
    | PeerGone
    | SupervisorHello
    | Ports
    | KernelSaid
    | RankExit
    | EngineRefused
    | EngineIdle
    | RankHello
    | Ready
    | RankSaid
    | Proposed
    | DataRead
    | DataThere
    | Recalled
    | Claimed
    | Provided
    | Met
    | Marked
    | Failed
    | Agreed
    | SlotsTaken
    | SlotsLost
    | SlotsSeen
    | NoMemory
    | PartStored
    | Drained
)
