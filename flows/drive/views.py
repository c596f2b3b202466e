"""What the driver's mind is given and what it answers: plain frozen data, no logic beyond reading a field.

Given: the folded log (``LogView``, truth), the nodes (``NodeView``, hints that may be late or missing), the spec's
recovery half (``Policy``). Answered: one ``Decision``. Causes are typed: class, signal, code, rank, place, step; their
text is for people and nothing reads it back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, overload

from checkpoint.amendments import NONE, Amendments
from checkpoint.codec import short
from flows.drive.health import Symptom
from trainer.failures import FAILURES, Failure, of_code
from trainer.spec_layouts import layout_words


class Phase(Enum):
    """Where a run is, for people: derived anew each time, stored nowhere."""

    LAUNCHING = "launching"
    WAITING = "waiting"
    STARTING = "starting"
    TRAINING = "training"
    DRAINING = "draining"
    BACKOFF = "backoff"


# --- the nodes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankView:
    """One rank as its node's status tells it. ``code`` is an exit code of wire/exit.h; ``signal`` a signal's number;
    ``killed``: by its own supervisor after another rank's end, so never a cause; ``memory``: where the kernel killed it
    for memory, the bytes that its container may use (0: no limit); ``xid``: of what NVIDIA's driver said of its device.
    """

    rank: int
    pid: int | None = None
    code: int | None = None
    signal: int | None = None
    step: int = -1
    words: Mapping[str, Any] | None = None
    killed: bool = False
    memory: int | None = None
    xid: int | None = None

    @property
    def ended(self) -> bool:
        return self.code is not None or self.signal is not None


@dataclass(frozen=True)
class NodeView:
    """One node. ``alive``: True, False (known to be gone) or None (unknown: nobody answered).

    ``age_s`` counts since its heartbeat was due (a store that costs has fewer), by the observer's own monotonic clock;
    ``step_age_s`` since any of its ranks was due to have moved a step. ``slots`` are the (step, epoch) pairs held by
    all its ranks.
    """

    node: int
    alive: bool | None = None
    epoch: int = 0
    phase: str = "none"
    ranks: tuple[RankView, ...] = ()
    slots: frozenset[tuple[int, int]] = frozenset()
    age_s: float = 0.0
    step_age_s: float = 0.0
    error: str | None = None
    devices: str = ""
    """What its ranks run on, for people."""
    gpus: tuple[str, ...] = ()
    """Names of the CUDA devices that they use."""
    place: str = ""
    """The machine, by its cluster's name; empty on this one."""


# --- the log ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttemptView:
    """What the log says of an attempt: its epoch, its launch, where it restored from, why it was started.

    ``order``: the record of the order that it follows (0: none was given); ``how``: its layout, as recorded;
    ``pardon``: machines whose strikes were forgiven for it, because nothing else was to be had.
    """

    epoch: int
    launch: str
    nodes: int
    ranks: int
    plan: str
    restore_step: int
    restore_checkpoint: int | None
    restore_slots: tuple[int, int] | None
    slot_epochs: tuple[int, ...]
    cause: Mapping[str, Any] | None
    order: int = 0
    how: Mapping[str, Any] = field(default_factory=dict)
    pardon: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointView:
    """A valid checkpoint record: its number in the log, its step, its epoch."""

    n: int
    step: int
    epoch: int


@dataclass(frozen=True)
class Saves(Sequence[CheckpointView]):
    """Many checkpoints, as columns: what is asked of all of them is asked of numbers."""

    n: Sequence[int] = ()
    step: Sequence[int] = ()
    epoch: Sequence[int] = ()

    @classmethod
    def of(cls, views: Sequence[CheckpointView]) -> Saves:
        """Themselves where they are columns already."""
        if isinstance(views, Saves):
            return views
        return cls([c.n for c in views], [c.step for c in views], [c.epoch for c in views])

    def before(self, n: int) -> Saves:
        """Those of records before ``n``, where they are in order of record."""
        end = bisect_left(self.n, n)
        return Saves(self.n[:end], self.step[:end], self.epoch[:end])

    def __len__(self) -> int:
        return len(self.n)

    @overload
    def __getitem__(self, index: int) -> CheckpointView: ...

    @overload
    def __getitem__(self, index: slice) -> Saves: ...

    def __getitem__(self, index: int | slice) -> CheckpointView | Saves:
        if isinstance(index, slice):
            return Saves(self.n[index], self.step[index], self.epoch[index])
        return CheckpointView(self.n[index], self.step[index], self.epoch[index])


@dataclass(frozen=True)
class OrderView:
    """What a person asked: record number, the How, who asked. ``again``: to open a run that had ended, and to count its
    failures anew; ``anew``: from step 0, where no checkpoint can be used any more; ``start``: (checkpoint record or
    None, step) from which the run goes on; ``own``: the driver's, by the spec's policy.
    """

    n: int
    how: Mapping[str, Any]
    by: str = ""
    again: bool = False
    anew: bool = False
    start: tuple[int | None, int] | None = None
    own: bool = False


@dataclass(frozen=True)
class LogView:
    """The folded log, as far as decisions need it. ``checkpoints``: in order of record; ``candidates``: restore points,
    best first (checkpoint.log); ``parent``: (run, record, step) of the checkpoint that a forked run begins from;
    ``ended_n``: the record that ended it; ``damaged``: checkpoint records that are marked so; ``orders``: oldest
    first; ``amendments``: as they stand (docs/adr/0015).
    """

    attempts: tuple[AttemptView, ...] = ()
    checkpoints: Sequence[CheckpointView] = ()
    candidates: Sequence[CheckpointView] = ()
    ended: str | None = None
    parent: tuple[str, int, int] | None = None
    ended_n: int = 0
    damaged: tuple[int, ...] = ()
    orders: tuple[OrderView, ...] = ()
    amendments: Amendments = NONE

    @property
    def order(self) -> OrderView | None:
        """The one that stands: the newest."""
        return self.orders[-1] if self.orders else None


@dataclass(frozen=True)
class RunLayout:
    """How many nodes and ranks a run is to have now, and the How that says so."""

    nodes: int
    ranks: int
    how: Mapping[str, Any]


@dataclass(frozen=True)
class Policy:
    """How to recover. Seconds; counts. ``steps`` is the run's last step; ``layouts``: as the run was asked for, then
    what the spec allows where there is no room for that, best first, and ``layout`` which of them the run has now;
    ``detaches``: the nodes outlive their driver (a cluster); ``device_hours``: after which it is parked (0: never).
    """

    steps: int
    launch: str
    nodes: int
    ranks: int
    stall_s: float = 60.0
    start_s: float = 120.0
    commit_s: float = 120.0
    drain_s: float = 2.0
    max_same_step: int = 2
    max_attempts_without_progress: int = 8
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    strikes: int = 2
    capacity_s: float = 300.0
    leaving_s: float = 5.0
    skips_diverged: bool = False
    on_explosion: str = "warn"
    max_skips: int = 3
    device_hours: float = 0.0
    layouts: tuple[RunLayout, ...] = ()
    layout: int = 0
    detaches: bool = False
    node_bytes: int = 0
    """What the ranks of the fullest node need by the plan, without their snapshot slots."""


# --- what a driver has seen -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """One look: what is true now, as far as anybody answered. All but ``now_s`` are hints (D2).

    ``nodes``: one view a node of the launch that the policy names, as far as any is known; ``lost``: why that launch
    cannot be made whole, ``waiting``: what it waits for, ``room``: how many of its nodes have their machine (0: nobody
    knows), all by its launcher; ``finishing``: the newest attempt's launch was asked to stop by another driver, and
    still saves; ``reached``: the launch is within this driver's reach; ``stop``: a person wants this driver to leave;
    ``now_s``: by the observer's own monotonic clock; ``exploded``: an explosion of the loss that lasts; ``hours``: that
    devices have worked for the run (hours.py), where there is a limit.
    """

    now_s: float
    nodes: tuple[NodeView, ...] = ()
    lost: Cause | None = None
    waiting: str = ""
    room: int = 0
    finishing: bool = False
    reached: bool = True
    stop: bool = False
    exploded: Symptom | None = None
    hours: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Since when a driver has seen a launch wait (its name), ranks leave on request (their epoch), the next attempt be
    held back (the epoch that failed), and since it has given a launch's room back (its name), by its own clock: all
    that `decide` takes from look to look. A driver begins with none, so a new one waits anew, and decides the same
    otherwise.
    """

    waiting: tuple[str, float] | None = None
    leaving: tuple[int, float] | None = None
    holding: tuple[int, float] | None = None
    given: tuple[str, float] | None = None


# --- causes and decisions -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cause:
    """Why an attempt ended: for people, and as the next attempt's ``cause`` in the log.

    ``saved``: the gang saved its state as it left.
    ``trouble``: what a node's agent reported beside it.
    """

    cls: Failure
    text: str
    mend: str = ""
    rank: int | None = None
    step: int = -1
    words: Mapping[str, Any] | None = field(default=None, compare=False)
    place: str = ""
    signal: int | None = None
    code: int | None = None
    saved: bool = False
    trouble: str = ""

    def said(self) -> str:
        """All of it in one line for people."""
        says_so = self.code is not None and of_code(self.code) is Failure.PREEMPTED  # that code's own text
        saved = "; state saved" if self.saved and not says_so else ""
        return self.text + saved + (f"; {self.trouble}" if self.trouble else "")

    def to_map(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "class": str(self.cls),
            "text": short(self.said(), 3000),
            "mend": short(self.mend, 1000),
            "step": self.step,
        }
        known = {"place": self.place, "rank": self.rank, "signal": self.signal, "code": self.code, "saved": self.saved}
        out.update({k: v for k, v in known.items() if v not in (None, "", False) or (k in ("rank", "code") and v == 0)})
        if self.words:
            out["words"] = {k: v for k, v in self.words.items() if isinstance(v, str | int | float)}
        return out


@dataclass(frozen=True)
class Restore:
    """A restore point: the checkpoint record (None: from the start), and the slots where all nodes hold a step as new.

    ``parent``: (run, record) of the checkpoint that a forked run begins from, while it has none of its own.
    """

    checkpoint: int | None
    step: int
    slots: tuple[int, int] | None = None
    parent: tuple[str, int] | None = None

    @property
    def origin(self) -> str:
        """Where the state comes from, in a word."""
        if self.slots:
            return "memory"
        return "checkpoint" if self.checkpoint or self.parent else "start"

    def to_map(self) -> dict[str, Any]:
        slots = {"step": self.slots[0], "epoch": self.slots[1]} if self.slots else None
        parent = {"run": self.parent[0], "checkpoint": self.parent[1]} if self.parent else None
        return {"checkpoint": self.checkpoint, "step": self.step, "slots": slots, "parent": parent}


@dataclass(frozen=True)
class Fallback:
    """What the driver itself changed of the How. ``kind`` is ``capacity``: another of the spec's layouts, because there
    is no room for the one before.
    """

    kind: str
    layout: RunLayout
    was: RunLayout
    why: str

    def to_map(self) -> dict[str, Any]:
        stages, was = (layout.how["parallel"].get("stages", 1) for layout in (self.layout, self.was))
        words, before = layout_words(self.layout.how), layout_words(self.was.how)
        more = {"layout": words, "before": before, "nodes": self.layout.nodes, "ranks": self.layout.ranks}
        return {"kind": self.kind, "stages": stages, "was": was, "why": short(self.why, 500), **more}


@dataclass(frozen=True)
class StartAttempt:
    """Win an attempt record (the fence); the nodes' agents do the rest.

    ``renew``: with a new launch of nodes; ``same_plan``: by the plan of the attempt before, whatever this version would
    compile; ``layout``: another than the run has now; ``fallback`` and ``pardon`` are recorded in the attempt;
    ``gives_way``: its launch is not made yet, what the one before held is left to others for a while (D13).
    """

    restore: Restore
    slot_epochs: tuple[int, ...]
    reason: str
    cause: Cause | None = None
    delay_s: float = 0.0
    renew: bool = False
    same_plan: bool = False
    layout: RunLayout | None = None
    fallback: Fallback | None = None
    pardon: tuple[str, ...] = ()
    gives_way: bool = False


@dataclass(frozen=True)
class MarkDamaged:
    """Log that a checkpoint cannot be restored, so that nobody tries it again."""

    checkpoint: int
    why: str


@dataclass(frozen=True)
class End:
    """Win the ``ended`` record: outcome is succeeded, cancelled or gave_up."""

    outcome: str
    reason: str
    cause: Cause | None = None

    def said(self, run: str) -> str:
        """What the record says: the reason, and the cause's mend where it says more than its class does, which whoever
        tells of the end adds by himself.
        """
        if self.cause is None:
            return self.reason
        own = self.cause.mend if self.cause.mend != FAILURES[self.cause.cls].mend else ""
        return f"{self.cause.cls}: {self.reason}" + (f"; {own.replace('RUN', run)}" if own else "")


@dataclass(frozen=True)
class Watch:
    """Nothing to order: look again, and keep the launch up (idempotent) where ``ensure`` says so."""

    phase: Phase
    text: str = ""
    ensure: bool = True


@dataclass(frozen=True)
class AwaitStop:
    """What was asked to stop saves and leaves first: the next attempt's record would fence it. ``why``: where this
    driver asks it.
    """

    why: str = ""


@dataclass(frozen=True)
class Leave:
    """This driver leaves, as a person wants: the gang trains on (``detach``), or saves one agreed step and leaves."""

    detach: bool


@dataclass(frozen=True)
class Finished:
    """The log has an end; what runs will stop by itself."""

    outcome: str


@dataclass(frozen=True)
class OwnOrder:
    """Log an order of the driver's own (D10, D11): the run goes on from ``start``, by these amendments. ``via``: the
    key of the spec that asks for it.
    """

    start: tuple[int | None, int]
    amendments: Amendments
    cause: Cause
    via: str = "recovery.on_divergence"


Decision = StartAttempt | MarkDamaged | End | Watch | AwaitStop | Leave | Finished | OwnOrder


def some_steps(steps: Sequence[int]) -> str:
    """As many as a person reads.

    >>> some_steps([0, 10, 20]), some_steps(range(0, 200, 10))
    ('0, 10, 20', '0, 10, 20, …, 150, 160, 170, 180, 190')
    """
    shown = [str(s) for s in steps]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:3], "…", *shown[-5:]])
