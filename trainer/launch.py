"""The seam between the driver and a place where nodes run: what a launch is, and what a launcher does and says.

A node is one checkpoint agent and one supervisor with its ranks. A launcher starts what is missing and kills what it
recorded; it never decides. ``local_launch.py`` runs nodes as processes of this machine, ``k8s/launcher.py`` as pods.
Who calls, in order:

    driver   ensure(launch)       starts every node that does not run, adopts what runs; again after a loss: a dead
                                  agent is started anew (the supervisor reconnects), so is a dead supervisor
    driver   observe(launch_id)   any time: what runs, without touching it
    driver   stop(launch_id)      a launch that is over or superseded. The orderly end is the log's ``ended`` record,
                                  on which the nodes leave by themselves
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from trainer.failures import Failure

if TYPE_CHECKING:
    from trainer.plan import Plan
    from trainer.spec import RunSpec


@dataclass(frozen=True)
class Launch:
    """Nodes to run: everything that a launcher must know, nothing that the log says already."""

    run: str
    launch_id: str
    nodes: int
    store_url: str
    work_root: Path
    """Of this machine: everything that the run writes outside the store goes below it (usually ``out``)."""
    how: Mapping[str, Any] = field(default_factory=dict)
    """The How half of the spec."""
    spec: RunSpec | None = None
    plan: Plan | None = None
    """Resolved spec and its plan, for launchers that render more than processes."""
    avoid: tuple[str, ...] = ()
    """Places (machines by their cluster's name) that this launch must not use."""


@dataclass(frozen=True)
class Finding:
    """What a launcher found wrong: for people, and for the driver's choice of what to do. ``code``: the
    exit code that ``text`` tells of, where it is one's.
    """

    cls: Failure
    text: str
    mend: str = ""
    node: int | None = None
    place: str = ""
    code: int | None = None


@dataclass(frozen=True)
class LaunchedNode:
    """A node as the launcher sees it; a pid is None where the process is gone or out of sight.

    ``alive``: True while its ranks may run, False when they are known to be gone, None where nobody can say (a node
    that waits for its place has no ranks yet: None). ``place``: the machine, by its cluster's name.
    """

    node: int
    agent_pid: int | None
    supervisor_pid: int | None
    done: str | None
    """Why the node left for good: ``ended``, ``fenced``, ``stopped`` …; None while it should be running."""
    words: str
    """The last lines of what is gone, for a diagnosis."""
    alive: bool | None = None
    place: str = ""


@dataclass(frozen=True)
class LaunchView:
    """A launch as the launcher sees it.

    ``unknown`` (the API does not answer) is never failure; ``waiting`` (for capacity, for images) neither, ``detail``
    says for what. ``lost``: it cannot be made whole in place, ``loss`` says why; the next attempt takes a new launch.
    ``elsewhere``: it works where this launcher cannot reach it, ``note`` says where; nothing of it is started or
    stopped from here. ``note``: what a person should be told once, of a launch that was found in another place.
    """

    launch_id: str
    state: Literal["absent", "waiting", "running", "partial", "gone", "lost", "done", "unknown", "elsewhere"]
    nodes: tuple[LaunchedNode, ...] = ()
    detail: str = ""
    loss: Finding | None = None
    note: str = ""


def nothing() -> None:
    """What a launcher calls where nobody wants to know."""


class Launcher(Protocol):
    """What the driver needs of a place where nodes run. Errors are LaunchError: LaunchUnknown where it does not answer
    now, LaunchRefused where it says no. ``observe`` never raises for a place that does not answer.
    """

    detaches: bool
    """Whether a driver that is stopped leaves the nodes running (a cluster), or has them save and leave."""

    def ensure(self, launch: Launch) -> None:
        """Start what does not run, adopt what does. Idempotent."""

    def observe(self, launch_id: str) -> LaunchView:
        """What runs now."""

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        """End the launch: ask, wait at most ``grace_s`` for snapshots to be saved, then kill. Idempotent.

        ``asked`` is called once it was asked, before anything is waited for: from then on it ends without this process.
        """


@runtime_checkable
class Watching(Protocol):
    """A launcher that watches in threads of its own."""

    def close(self) -> None:
        """End them; what runs goes on. The launcher may be used again."""
