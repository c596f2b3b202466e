"""Kills at named points of the protocol, by the thousand: ``make chaos-checkpoint N=1000 SEED=1``.

A campaign is a row of worlds, each one run from its first record to its end. While a world trains, a point is drawn
(every name that has been seen is as likely as any other, however seldom it comes), and what shall strike when it comes
for the n-th time; or a process and an instant. After so many strikes a world is left alone, and must come to a good
end. Everything follows from the seed; what is found is printed with the seed of its world.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path

from checkpoint.agent import events as ev
from checkpoint.agent import groups
from checkpoint.amendments import Amendments
from checkpoint.errors import StoreError
from checkpoint.log import RunLog, RunState, StartPoint
from flows.drive.run import ruling_how
from tests.support.protocol.gate import KILLS, LOSSES, Fault, Gate
from tests.support.protocol.hub import Process, folds_every, quiet, swapped
from tests.support.protocol.state import OWNERS, RUN, how_of
from tests.support.protocol.world import World, dataset_there

STRIKES = 20
"""In one world."""
STEPS = 18
AT_ONCE = 12
"""Points that are armed."""
PATIENCE_S = 3.0
"""For one of them to come."""
END_S = 1500.0
"""For a run to end, once nothing strikes any more."""
ENGINE = ("rank", "supervisor", "machine", "frozen", "cut off")
SPOILS = 0.01
"""Share of looks at which bytes of a checkpoint change in the store."""
LEAVES = 0.005
"""Share of looks at which a gang is asked to leave."""
INSTANTS = 0.03
"""A second, that something is killed at no point at all."""


@dataclass
class Campaign:
    """What came of it."""

    seed: int
    worlds: int = 0
    struck: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Point, and how it was struck."""
    instants: int = 0
    """Kills between points."""
    found: dict[str, list[str]] = field(default_factory=lambda: {"lost": [], "unloadable": [], "silent": []})

    @property
    def points(self) -> int:
        return sum(self.struck.values())

    def line(self) -> str:
        lost, unloadable, silent = (len(self.found[kind]) for kind in ("lost", "unloadable", "silent"))
        return f"{self.points} points, {lost} lost, {unloadable} unloadable, {silent} silent"

    @property
    def good(self) -> bool:
        return not any(self.found.values())


class Striker:
    """Draws what strikes a world, one after the other; some points are armed at once, the first that comes is struck.

    Where none comes for a while a process is killed, so that they do: an attempt begins, a driver reads the log.
    """

    def __init__(self, world: World, rng: random.Random, names: list[str], most: int) -> None:
        self.world, self.rng, self.names = world, rng, names
        world.most = most
        self.done_at = 0.0 if most == 0 else None
        self.instants = 0
        self._struck, self._quiet = 0, 0.0
        world.hub.at(rng.random() * 2.0, None, self._next)

    def _next(self) -> None:
        world, rng = self.world, self.rng
        struck = len(world.struck)
        if struck >= world.most:
            world.armed.clear()
            self.done_at = world.hub.now
            return
        if struck > self._struck:
            self._struck, self._quiet = struck, world.hub.now
        while len(world.armed) < AT_ONCE:
            point = rng.choice(self.names)
            world.armed[point] = Fault(point, rng.choice((1, 1, 1, 2)), rng.choice(self._ways(point)))
        if rng.random() < SPOILS:
            world.spoil()
        if rng.random() < LEAVES:
            self._leave()
        if world.hub.now - self._quiet > PATIENCE_S or rng.random() < INSTANTS:
            self._quiet = world.hub.now
            self._instant()
            del world.armed[rng.choice(sorted(world.armed))]  # one that may never come
        world.hub.at(0.2 + rng.random(), None, self._next)

    @staticmethod
    def _ways(point: str) -> tuple[str, ...]:
        if point.startswith("engine"):
            return ENGINE
        ways = KILLS if point.split()[2] in ("create", "put", "delete") else KILLS[:2]
        return (*ways, *ways, *LOSSES, "frozen", "cut off")

    def _leave(self) -> None:
        """SIGTERM to a gang: its ranks save one step and go, its agents with them."""
        for host in list(self.world.hosts.values())[-1] if self.world.hosts else ():
            agent = host.agent
            if agent is not None and agent.alive:
                self.world.hub.at(0.0, agent, lambda agent=agent: agent.hear(ev.Terminate()))  # type: ignore[misc]

    def _instant(self) -> None:
        world = self.world
        hosts = [host for launch in list(world.hosts.values())[-1:] for host in launch]
        processes: list[Process] = [p for host in hosts for p in host.processes()]
        processes += [p for p in (*world.drivers, *world.others) if p.alive]
        if processes:
            self.instants += 1
            self.rng.choice(processes).kill()


def _person(world: World, ranks: int | None, after_s: float) -> None:
    """Somebody wants another layout; or, without one, that the run goes on from what was saved at some step, past
    batches, to another end. Also of a run that has ended.
    """
    process = Process(world.hub, "person", "a person")
    world.persons.append(process)
    log = RunLog(Gate(world, process), RUN, writer="order", clock=world.hub.clock, token=world.hub.token)

    def order(state: RunState) -> tuple[str, dict[str, object]] | None:
        if not state.attempts:
            return None
        how = dict(how_of(ranks) if ranks else ruling_how(state) or {})
        amended, start = state.amendments, state.start
        if ranks is None:
            amended, start = _wish(state, world.steps, world.hub.rng)
        order: dict[str, object] = {"kind": "order", "how": how, "by": "a test", "via": "a test"}
        if state.ended:
            order["again"] = True
        if amended:
            order["amendments"] = amended.to_map()
        if start is not None:
            order |= {"checkpoint": start.checkpoint, "step": start.step}
        return "intervention", order

    def work() -> None:
        while True:
            try:
                log.transact(order)
                process.kill()
                return
            except StoreError:
                world.hub.sleep(1.0)

    world.hub.at(after_s, None, lambda: world.hub.spawn(process, "order", work))


def _wish(state: RunState, steps: int, rng: random.Random) -> tuple[Amendments, StartPoint]:
    """As ``flows.drive.amend.amend`` allows it."""
    points = [StartPoint(c.n, c.step) for c in state.restore_candidates()]
    late = [p for p, q in permutations(points, 2) if p.step < q.step and (p.checkpoint or 0) > (q.checkpoint or 0)]
    start = rng.choice(late or [*points[:1], *points, StartPoint(None, 0)])  # what was committed late is seldom
    amended = state.amendments
    if rng.random() < 0.5:
        total = max(1, start.step, amended.total(steps) + rng.choice((-8, -1, 3)))
        amended = replace(amended, steps=0 if total == steps else total)
    if rng.random() < 0.5:
        first = amended.batch(start.step) + rng.randint(1, 3)
        amended = amended.skipping(first, first + rng.randrange(3))
    return amended, start


def run_world(seed: int, names: list[str], work: Path, strikes: int = STRIKES) -> tuple[World, Striker]:
    """One world from its beginning to its end; of some the log has many folds, and the gangs' parts join groups."""
    rng = random.Random(seed)
    with folds_every(rng.choice((256, 256, 8, 3))), swapped(groups, "GROUPED_ABOVE", rng.choice((1000, 1000, 1))):
        return _run_world(seed, names, work, strikes)


def _run_world(seed: int, names: list[str], work: Path, strikes: int) -> tuple[World, Striker]:
    rng = random.Random(f"world {seed}")
    ranks = rng.choice(tuple(OWNERS))
    world = World(
        seed, work, ranks=ranks, steps=STEPS, every=rng.choice((1, 2, 3)), drivers=rng.choice((1, 1, 2)),
        twin=rng.random() < 0.15, collects=rng.random() < 0.5,
    )  # fmt: skip
    striker = Striker(world, rng, names, strikes if names else 0)
    try:
        for other in (rng.choice([n for n in OWNERS if n != ranks]), None, None):
            if rng.random() < 0.3:
                _person(world, other, 2.0 + rng.random() * 80.0)
        world.hub.run(lambda: world.outcome is not None or striker.done_at is not None, 100_000.0)
        world.hub.run(lambda: world.outcome is not None, world.hub.now + END_S)
        world.last_look()
    finally:
        world.close()
    return world, striker


def run(points: int, seed: int, work: Path, *, until_found: bool = False) -> Campaign:
    """So many points; ``until_found``: fewer, where something is found."""
    dataset_there(work)
    campaign, names = Campaign(seed), set[str]()
    with quiet():
        for clean in range(4):  # what there is to strike at all
            world, _ = run_world(seed * 1_000_000 + clean, [], work)
            names |= set(world.points)
            _take(campaign, world, seed * 1_000_000 + clean)
        number = 4
        while campaign.points < points and (campaign.good or not until_found):
            at = seed * 1_000_000 + number
            world, striker = run_world(at, sorted(names), work, min(STRIKES, points - campaign.points))
            names |= set(world.points)
            _take(campaign, world, at)
            campaign.struck.update((fault.point, fault.how) for fault in world.struck)
            campaign.instants += striker.instants
            number += 1
    return campaign


def _take(campaign: Campaign, world: World, seed: int) -> None:
    campaign.worlds += 1
    for kind, why in world.found.items():
        campaign.found[kind] += [f"world {seed}: {text}" for text in dict.fromkeys(why)]


def report(campaign: Campaign) -> str:
    """For people; the last line is the one that others read."""
    by_way = Counter[str]()
    for (_, way), count in campaign.struck.items():
        by_way[way] += count
    ways = ", ".join(f"{count} {way}" for way, count in sorted(by_way.items()))
    names = len({point for point, _ in campaign.struck})
    lines = [
        f"seed {campaign.seed}: {campaign.worlds} worlds; {names} different points, {len(campaign.struck)} with the "
        f"way in which they were struck ({ways}); {campaign.instants} more kills at random instants"
    ]
    for kind, found in campaign.found.items():
        lines += [f"{kind}: {text}" for text in found[:20]]
    return "\n".join([*lines, campaign.line()])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos-checkpoint", description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = run(asked.points, asked.seed, Path(folder))
    print(report(campaign))
    return 0 if campaign.good else 1


if __name__ == "__main__":
    sys.exit(main())
