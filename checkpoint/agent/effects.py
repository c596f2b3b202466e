"""What the machine wants done (``machine.py``): plain data, run by the loop (``service.py``) in order.

An effect with an answer says which event that is. Answers marked *at once* come before any other event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint.agent.events import Address
from checkpoint.agent.gang import Gang
from checkpoint.agent.status import RankStatus
from checkpoint.amendments import NONE, Amendments
from checkpoint.log import RunState

# --- the engine -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """A message (``wire/agent.h``) to a peer; one that is gone does not get it."""

    peer: int
    name: str
    epoch: int = 0
    rank: int = -1
    a: int = 0
    payload: bytes = b""
    b: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """START to the supervisor: from here on ranks of this attempt run."""

    peer: int
    gang: Gang


@dataclass(frozen=True, slots=True)
class GiveSlots:
    """SLOTS to a rank; ``restore``: the index that it begins from, or -1."""

    peer: int
    epoch: int
    rank: int
    restore: int


@dataclass(frozen=True, slots=True)
class TakeSlots:
    """Take over the descriptors that came with the HELLO. SlotsTaken or SlotsLost, at once."""

    epoch: int
    rank: int


@dataclass(frozen=True, slots=True)
class Drop:
    """End a connection."""

    peer: int


# --- an attempt -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """A newer attempt: all work for the one before is void, hints go under the new one's epoch."""

    gang: Gang


@dataclass(frozen=True, slots=True)
class Recall:
    """Was it started before this agent? Recalled, at once."""

    gang: Gang


@dataclass(frozen=True, slots=True)
class Claim:
    """Claimed."""

    gang: Gang


@dataclass(frozen=True, slots=True)
class Prepare:
    """Provided, or Failed; writes into the slots (A3). ``state``: of the log, where the restore point is."""

    gang: Gang
    state: RunState


@dataclass(frozen=True, slots=True)
class Use:
    """What was provided is this attempt's from here on: its slots are the node's."""

    gang: Gang


@dataclass(frozen=True, slots=True)
class Meet:
    """Met, or Failed."""

    gang: Gang
    address: Address


@dataclass(frozen=True, slots=True)
class Mark:
    """Write the attempt file. Marked or Failed, at once."""

    gang: Gang
    nodes: Mapping[int, Address]


@dataclass(frozen=True, slots=True)
class AskKernel:
    """Look what the driver wrote of these devices since then (seconds of the monotonic clock). KernelSaid, at once."""

    epoch: int
    rank: int
    since_s: float
    buses: Sequence[str]


@dataclass(frozen=True, slots=True)
class Remember:
    """Notes for the agent after this one."""

    epoch: int
    over: bool
    ranks: Mapping[int, RankStatus]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits any more for the preparation or the meeting of the attempt; for its claim still, to speak (A6)."""


# --- the store ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Upload:
    """From here on this attempt's snapshots go up, and are committed. PartStored for each; Drained at each end.

    ``point``, ``stored``, ``amended``: as in ``upload.Source``. ``bytes_per_s``: at most; 0: no cap.
    """

    epoch: int
    deadline_s: float
    point: tuple[int, int] | None
    stored: int | None
    amended: Amendments = NONE
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class LookForSnapshots:
    """One may be ready to go up."""


@dataclass(frozen=True, slots=True)
class Commit:
    """This node's part of the step is there: commit when the others' are."""

    epoch: int
    step: int
    state: RunState


@dataclass(frozen=True, slots=True)
class Agree:
    """Keep what a rank proposes, where the run has no algorithm for a product yet. Agreed."""

    peer: int
    epoch: int
    rank: int
    table: bytes


@dataclass(frozen=True, slots=True)
class HasRead:
    """A rank has read its data up to this step, and was told of it up to that one. DataThere, as more of it comes."""

    epoch: int
    rank: int
    step: int
    told: int


@dataclass(frozen=True, slots=True)
class AskDrained:
    """Drained, at once."""


@dataclass(frozen=True, slots=True)
class Publish:
    """A rank's METRICS, TRACE or OUTPUT, for people."""

    kind: str
    rank: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class MarkDone:
    """This node has left for good: its launcher does not start it again."""

    why: str


Effect = (
    Send
    | Start
    | GiveSlots
    | TakeSlots
    | Drop
    | Begin
    | Recall
    | Claim
    | Prepare
    | Use
    | Meet
    | Mark
    | AskKernel
    | Remember
    | Cancel
    | Upload
    | LookForSnapshots
    | Commit
    | Agree
    | HasRead
    | AskDrained
    | Publish
    | MarkDone
)
