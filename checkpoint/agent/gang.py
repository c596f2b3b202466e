"""What a node knows of one attempt: the gang's part here, what was prepared for it, and the agent's own options."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.agent.link import Peer
from checkpoint.agent.slots import SlotTable
from checkpoint.agent.status import RankStatus
from checkpoint.claims import Place
from checkpoint.layout import PlanLayout, PositionLayout
from checkpoint.log import AttemptInfo

DEFAULTS: Mapping[str, Any] = {
    "checkpoint.commit_s": 120.0,
    "checkpoint.deadline_s": 600.0,
    "launch.connect_s": 60.0,
    "launch.kernel_path": "auto",
    "launch.port_base": 0,
    "launch.stall_s": 120.0,
    "launch.stop_after": -1,  # no key of a spec: tests and the chaos harness set it
    "launch.trace": False,
}
"""The spec's defaults, where a record's How lacks a key. The agent's image has no trainer/spec.py: a test compares."""


@dataclass(frozen=True)
class Options:
    """The command line (``__main__.py``)."""

    run: str
    launch: str
    node: int
    nodes: int
    socket: Path
    work: Path
    key: bytes
    place: Place
    """This node's: where it works, by which its claims are known."""
    host: str
    bind: str
    port_base: int  # this node's ranks listen from here on; 0: as launch.port_base says
    log_poll_s: float


@dataclass
class Gang:
    """One attempt, as this node runs it.

    ``phase``: kill (older ranks must go), prepare, ports, peers, run, adopt, idle (over, or never begun here).
    """

    attempt: AttemptInfo
    first: int
    count: int
    phase: str = "prepare"
    layout: PlanLayout | None = None
    plan_path: Path | None = None
    data_dir: Path | None = None
    table: SlotTable | None = None
    restore: dict[int, int] = field(default_factory=dict)
    """Rank -> index of the slot to restore from; empty on a fresh start."""
    start_step: int = -1
    held: bool = False
    """The claim of this node is ours (A6): until then nobody hears of it and no rank is started."""
    preparing: bool = False
    found: Prepared | None = None
    """What the preparer found while ranks of an older attempt still had to go."""
    from_slot: tuple[int, int] | None = None
    """(step, epoch) of slots that this attempt started from: uploaded as its own checkpoint where not durable yet."""
    ranks: dict[int, RankStatus] = field(default_factory=dict)
    peers: dict[int, Peer] = field(default_factory=dict)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def epoch(self) -> int:
        return self.attempt.n

    @property
    def local(self) -> range:
        return range(self.first, self.first + self.count)

    def how(self, section: str, key: str) -> Any:
        """A value of the How half in the attempt record."""
        how = self.attempt.body.get("how")
        found = how.get(section) if isinstance(how, Mapping) else None
        value = found.get(key) if isinstance(found, Mapping) else None
        return DEFAULTS[f"{section}.{key}"] if value is None else value


@dataclass(frozen=True)
class Prepared:
    """What the preparer found out."""

    layout: PlanLayout
    plan_path: Path
    data_dir: Path
    table: SlotTable
    restore: dict[int, int]
    start_step: int
    from_slot: tuple[int, int] | None


class CannotStart(Exception):
    """This node cannot start the attempt: exit code for its ranks, and why."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


def positions(layout: PlanLayout, ranks: range) -> dict[int, PositionLayout]:
    """The layout of each of these ranks."""
    return {rank: layout.positions[rank % len(layout.positions)] for rank in ranks}
