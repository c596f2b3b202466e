"""Machines, pods, gangs and launches as a driver may see them: through the shipped status and the shipped diagnosis.

A pod is a node with one rank. Nothing here decides anything about a run; it does what agents and supervisors do.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from checkpoint.agent.status import NodeStatus, RankStatus
from checkpoint.log import AttemptInfo, RunState
from k8s.labels import AGENT, ENGINE
from k8s.views import Condition, ContainerView, JobView, PodView
from tests.support.simulated import model
from trainer.failures import Failure

if TYPE_CHECKING:
    from tests.support.simulated.world import World


@dataclass
class Machine:
    name: str
    up: bool = True
    sick: bool = False
    taken: bool = False
    """By others."""
    pod: Pod | None = None

    @property
    def free(self) -> bool:
        return self.up and not self.taken and self.pod is None


@dataclass(frozen=True)
class Strike:
    """What ended a gang's health: the truth that a cause is held against. ``lasting``: it comes again."""

    at: float
    epoch: int
    classes: tuple[Failure, ...]
    place: str = ""
    step: int = -1
    lasting: bool = False


class Gang:
    """The ranks of an attempt."""

    def __init__(self, world: World, attempt: AttemptInfo) -> None:
        self.world, self.epoch, self.ranks = world, attempt.epoch, attempt.ranks
        self.base, self.launch = attempt.step, attempt.launch
        self.checkpoint, self.slots = attempt.checkpoint, attempt.slots
        self.amendments = attempt.amendments
        self.ideal_s = model.STEP_S * model.RANKS / attempt.ranks
        self.step_s = self.ideal_s + model.SNAPSHOT_S / model.SNAPSHOT_STEPS
        self.since: float | None = None
        self.stood: float | None = None
        """Since when no step is done."""
        self.struck: Strike | None = None
        self.cut = False
        """Nobody reaches it, and it does not know."""
        self.ready: set[int] = set()
        self.state: RunState | None = None
        """The log as its agents know it."""

    @property
    def runs(self) -> bool:
        return self.since is not None and self.stood is None

    def step(self, t: float) -> int:
        """The last step done at that time."""
        if self.since is None or t <= self.since:
            return self.base
        end = t if self.stood is None else min(t, self.stood)
        return min(self.base + int((end - self.since) / self.step_s + 1e-9), self.world.steps)

    def time_of(self, step: int) -> float:
        assert self.since is not None
        return self.since + (step - self.base) * self.step_s

    def snapshots(self, t: float) -> list[tuple[int, int]]:
        newest = self.step(t) // model.SNAPSHOT_STEPS * model.SNAPSHOT_STEPS
        return [(s, self.epoch) for s in (newest, newest - model.SNAPSHOT_STEPS) if s > self.base]

    def stop(self) -> None:
        """No rank does a step any more."""
        if self.stood is None:
            self.stood = self.world.hub.now
            if self.since is not None:
                self.world.trained(self, self.step(self.stood))


@dataclass(frozen=True)
class Said:
    """What a node's agent says from some time on."""

    at: float
    epoch: int
    phase: str
    rank: RankStatus | None
    gang: Gang | None
    kept: tuple[tuple[int, int], ...]
    left: bool


class Pod:
    """A node of a launch."""

    def __init__(self, world: World, launch: Launch, index: int) -> None:
        self.world, self.launch, self.index = world, launch, index
        self.machine: Machine | None = None
        self.place, self.running, self.deleting, self.gone, self.cut = "", False, False, False, False
        self.disruption, self.ready = "", True
        self.code: int | None = None
        self.epoch, self.phase = 0, "idle"
        self.rank: RankStatus | None = None
        self.gang: Gang | None = None
        self.kept: list[tuple[int, int]] = []
        self.left = False
        self.born, self.silent_from = world.hub.now, 1e18
        self.back_at = 0.0
        """Since when it is reached again."""
        self.said: list[Said] = []

    @property
    def lives(self) -> bool:
        """Its processes do."""
        up = self.machine is not None and self.machine.up
        return self.running and up and not self.gone and self.code is None and not self.left

    @property
    def lost(self) -> bool:
        """It will not train (again)."""
        dead = self.machine is not None and not self.machine.up
        return dead or self.gone or self.deleting or self.cut or self.code is not None or self.left

    def note(self) -> None:
        rank = replace(self.rank) if self.rank is not None else None
        said = Said(self.world.hub.now, self.epoch, self.phase, rank, self.gang, tuple(self.kept), self.left)
        self.said.append(said)
        del self.said[:-6]
        self.world.changed()

    def status(self, t: float) -> bytes | None:
        """As it was written last at that time."""
        t = min(t, self.silent_from)
        at = bisect_right(self.said, t, key=lambda s: s.at) - 1
        if at < 0:
            return None
        s = self.said[at]
        ranks = {}
        kept = s.kept
        if s.rank is not None:
            rank = replace(s.rank)
            if s.gang is not None and not rank.gone and s.phase == "running":
                rank.step = s.gang.step(t)
                kept = (*s.gang.snapshots(t), *kept)[:2]
            ranks = {self.index: rank}
        status = NodeStatus(
            self.index, self.launch.name, f"i{self.born:.0f}", epoch=s.epoch, phase=s.phase, ranks=ranks, slots=kept,
            left=s.left, seq=int(t - self.born),
        )  # fmt: skip
        return status.pack()

    # --- what its agent and supervisor do -------------------------------------------------------------------

    def hear(self) -> None:
        """It reads the log."""
        state, now = self.world.state, self.world.hub.now
        if not self.lives or self.cut:
            return
        if now < self.world.store_away_until:
            self.world.after(self.world.store_away_until - now + 1.0, self.hear)
            return
        newest = state.newest_attempt
        if state.ended is not None or (newest is not None and newest.launch != self.launch.name):
            self.leave()
        elif newest is not None and newest.epoch > self.epoch:
            self.begin(newest)

    def leave(self) -> None:
        self.end_rank(signal=9, killed=True)
        self.left = True
        self.note()
        self.world.after(2.0, lambda: self.go(0))

    def go(self, code: int | None = None) -> None:
        """The pod's end."""
        if self.gone:
            return
        self.gone, self.code = True, code if self.code is None else self.code
        self.silent_from = min(self.silent_from, self.world.hub.now)
        if self.gang is not None:
            self.gang.stop()
        if self.machine is not None and self.machine.pod is self:
            self.machine.pod = None
        self.world.changed()
        self.world.place_soon()

    def begin(self, attempt: AttemptInfo) -> None:
        world = self.world
        if self.gang is not None:
            self.end_rank(signal=9, killed=True)
            self.kept = [*self.gang.snapshots(world.hub.now), *self.kept][:2]
        self.epoch, self.phase, self.rank, self.gang = attempt.epoch, "restoring", None, world.gangs[attempt.epoch]
        self.note()
        gang, rng = self.gang, world.hub.rng
        reads = attempt.slots is None and attempt.checkpoint is not None
        state_s = rng.uniform(*model.STORE_S) if reads else model.MEMORY_S
        self.world.after(state_s, lambda: self._forked(gang))
        self.world.after(state_s + rng.uniform(*model.START_S), lambda: self._ready(gang))

    def _forked(self, gang: Gang) -> None:
        if self.gang is gang and self.lives and self.rank is None:
            self.phase, self.rank = "starting", RankStatus(pid=1000 + self.index, step=gang.base)
            self.note()

    def _ready(self, gang: Gang) -> None:
        if self.gang is not gang or not self.lives or self.rank is None or self.rank.gone or gang.stood is not None:
            return
        held = gang.slots is None or (gang.slots["step"], gang.slots["epoch"]) in self.kept
        if self.world.refuses_to_start(gang, self, held):
            return
        gang.ready.add(self.index)
        if len(gang.ready) == gang.ranks:
            self.world.starts(gang)
        elif len(gang.ready) == 1:
            self.world.after(model.CONNECT_S, lambda: self.world.lonely(gang))

    def runs_now(self) -> None:
        self.phase = "running"
        self.note()

    def end_rank(self, **how: Any) -> None:
        """Of its rank; the peers see it soon."""
        rank, gang = self.rank, self.gang
        if rank is None or gang is None or rank.gone:
            return
        rank.step = gang.step(self.world.hub.now)
        for name, value in how.items():
            setattr(rank, name, value)
        self.phase = "ended"
        gang.stop()
        self.kept = [*gang.snapshots(self.world.hub.now), *self.kept][:2]
        self.note()
        for peer in self.launch.pods:
            if peer is not self and peer.gang is gang:
                words = f'{{"why": "a peer was lost", "peer": {self.index}}}'
                end = partial(peer.end_if, gang, code=75, words=words)
                self.world.after(self.world.hub.rng.uniform(*model.PEER_S), end)

    def end_if(self, gang: Gang, **how: Any) -> None:
        if self.gang is gang and self.lives:
            self.end_rank(**how)

    def told_to_go(self, disruption: str) -> None:
        """SIGTERM: the gang saves one step and leaves; the pod goes after its grace."""
        self.deleting = True
        self.disruption = disruption
        self.world.changed()
        if self.gang is not None and self.gang is self.world.gangs.get(self.epoch) and self.lives:
            gang = self.gang
            self.world.after(1.5, lambda: self.world.saves_and_leaves(gang))
        grace = model.GRACE_S
        self.world.after(grace, self.go)

    def view(self) -> PodView:
        conditions = {"Ready": Condition("True" if self.ready else "False")}
        if self.disruption:
            conditions["DisruptionTarget"] = Condition("True", self.disruption, "by the simulation")
        if self.machine is None:
            conditions["PodScheduled"] = Condition("False", "Unschedulable", "0/10 nodes are available")
        engine, phase = ContainerView(), "Pending"
        if self.code is not None:
            engine = ContainerView("terminated", exit_code=self.code)
            phase = "Succeeded" if self.code == 0 else "Failed"
        elif self.launch.broken_image and self.machine is not None and not self.running:
            engine = ContainerView("waiting", "ErrImageNeverPull", "Container image is not present")
        elif self.running:
            engine, phase = ContainerView("running"), "Running"
        return PodView(
            f"{self.launch.name}-{self.index}", f"uid{self.index}", self.launch.name, self.index, phase, self.place,
            deleting=self.deleting, created="t", conditions=conditions,
            containers={ENGINE: engine, AGENT: ContainerView("running" if self.running else "waiting")},
        )  # fmt: skip


class Launch:
    """A Job and its pods."""

    def __init__(self, world: World, name: str, nodes: int, avoid: tuple[str, ...]) -> None:
        self.name, self.nodes, self.avoid = name, nodes, avoid
        self.made = world.hub.now
        self.failed = self.broken_image = False
        self.deleted: float | None = None
        self.waits_since = world.hub.now
        """For places, without a pause."""
        self.pods = [Pod(world, self, index) for index in range(nodes)]

    def job(self) -> JobView:
        conditions = {"Failed": Condition("True", "PodFailurePolicy", "a pod failed")} if self.failed else {}
        return JobView(self.name, self.name, self.name, completions=self.nodes, created="t", conditions=conditions)
