"""One attempt's ranks on this node, and the agent's own options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.claims import Place
from checkpoint.layout import PlanLayout, RankLayout
from checkpoint.log import AttemptInfo

DEFAULTS: Mapping[str, Any] = {
    "checkpoint.bandwidth_mb_s": 0.0,
    "checkpoint.commit_s": 120.0,
    "checkpoint.deadline_s": 600.0,
    "data.cache_gib": 0.0,
    "launch.connect_s": 60.0,
    "launch.kernel_path": "auto",
    "launch.port_base": 0,
    "launch.stall_s": 120.0,
    "launch.stop_after": -1,  # no key of a spec: tests and the chaos harness set it
    "launch.target": "local",
    "launch.trace": False,
    "parallel.device": "auto",
    "parallel.threads": 0,
}
"""The spec's defaults, where a record's How lacks a key. The agent's image has no RunSpec: a test compares."""


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


@dataclass(frozen=True)
class Gang:
    """The ranks of one attempt on this node, as the log orders them."""

    attempt: AttemptInfo
    first: int
    count: int

    @classmethod
    def of(cls, attempt: AttemptInfo, node: int) -> Gang:
        count = attempt.ranks // attempt.nodes
        return cls(attempt, node * count, count)

    @property
    def epoch(self) -> int:
        return self.attempt.n

    @property
    def local(self) -> range:
        return range(self.first, self.first + self.count)

    @property
    def device(self) -> tuple[str, str]:
        """``parallel.device`` and ``launch.kernel_path``, which say together what the ranks run on."""
        return str(self.how("parallel", "device")), str(self.how("launch", "kernel_path"))

    def how(self, section: str, key: str) -> Any:
        """A value of the How half in the attempt record."""
        how = self.attempt.body.get("how")
        found = how.get(section) if isinstance(how, Mapping) else None
        value = found.get(key) if isinstance(found, Mapping) else None
        return DEFAULTS[f"{section}.{key}"] if value is None else value


class CannotStart(Exception):
    """This node cannot start the attempt: exit code for its ranks, and why."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code = code


def layouts(layout: PlanLayout, ranks: range) -> dict[int, RankLayout]:
    """The layout of each of these ranks."""
    return {rank: layout.rank(rank) for rank in ranks}
