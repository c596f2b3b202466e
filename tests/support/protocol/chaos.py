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
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.agent import groups
from tests.support.protocol.gate import KILLS, LOSSES, Fault
from tests.support.protocol.hub import folds_every, quiet, swapped
from tests.support.protocol.persons import ask, fork
from tests.support.protocol.place import Place, layouts_of
from tests.support.protocol.runs import dataset_there, patient, prepared_in, with_layout
from tests.support.protocol.world import World

STRIKES = 20
"""In one world."""
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
    """Draws what strikes a place, one after the other; some points are armed at once, the first that comes is struck.

    Where none comes for a while a process is killed, so that they do: an attempt begins, a driver reads the log.
    """

    def __init__(self, place: Place, rng: random.Random, names: list[str], most: int) -> None:
        self.place, self.rng, self.names = place, rng, names
        place.most = most
        self.done_at = 0.0 if most == 0 else None
        self.instants = 0
        self._struck, self._quiet = 0, 0.0
        place.hub.at(rng.random() * 2.0, None, self._next)

    def _next(self) -> None:
        place, rng = self.place, self.rng
        struck = len(place.struck)
        if struck >= place.most:
            place.armed.clear()
            self.done_at = place.hub.now
            return
        if struck > self._struck:
            self._struck, self._quiet = struck, place.hub.now
        while len(place.armed) < AT_ONCE:
            point = rng.choice(self.names)
            place.armed[point] = Fault(point, rng.choice((1, 1, 1, 2)), rng.choice(self._ways(point)))
        if rng.random() < SPOILS:
            rng.choice(place.worlds).spoil()
        if rng.random() < LEAVES:
            self._leave(rng.choice(place.worlds))
        if place.hub.now - self._quiet > PATIENCE_S or rng.random() < INSTANTS:
            self._quiet = place.hub.now
            self._instant()
            del place.armed[rng.choice(sorted(place.armed))]  # one that may never come
        place.hub.at(0.2 + rng.random(), None, self._next)

    @staticmethod
    def _ways(point: str) -> tuple[str, ...]:
        if point.startswith("engine"):
            return ENGINE
        ways = KILLS if point.split()[2] in ("create", "put", "delete") else KILLS[:2]
        return (*ways, *ways, *LOSSES, "frozen", "cut off")

    @staticmethod
    def _leave(world: World) -> None:
        """SIGTERM to a gang."""
        for host in list(world.hosts.values())[-1] if world.hosts else ():
            host.terminate()

    def _instant(self) -> None:
        processes = self.place.everybody
        if processes:
            self.instants += 1
            self.rng.choice(processes).kill()


def run_place(seed: int, names: list[str], work: Path, strikes: int = STRIKES) -> tuple[Place, Striker]:
    """One place from its beginning to its end; of some the log has many folds, and the gangs' parts join groups."""
    rng = random.Random(seed)
    with folds_every(rng.choice((256, 256, 8, 3))), swapped(groups, "GROUPED_ABOVE", rng.choice((1000, 1000, 1))):
        return _run_place(seed, names, work, strikes)


def _run_place(seed: int, names: list[str], work: Path, strikes: int) -> tuple[Place, Striker]:
    rng = random.Random(f"world {seed}")
    store, prepared = prepared_in(work)
    ways = {"on_explosion": rng.choice(("warn", "skip", "lower"))}
    layouts = layouts_of(with_layout(prepared, 1, checkpoint={"every": rng.choice((1, 2, 3))}, recovery=ways))
    first, drivers, twin = rng.randrange(len(layouts)), rng.choice((1, 1, 2)), rng.random() < 0.15
    place = Place(seed, work, store, collects=rng.random() < 0.5)
    world = World(place, layouts, first=first, drivers=drivers, twin=twin)
    place.worlds.append(world)
    striker = Striker(place, rng, names, strikes if names else 0)
    try:
        for wish in ("layout", "how", "numbers", "numbers"):
            if rng.random() < 0.3:
                ask(world, wish, 2.0 + rng.random() * 80.0)
        if rng.random() < 0.35:
            fork(world, 3.0 + rng.random() * 60.0)
        hub = place.hub
        hub.run(lambda: place.over or striker.done_at is not None, 100_000.0)
        hub.run(lambda: place.over, hub.now + END_S)
        for each in place.worlds:
            each.last_look()
    finally:
        place.close()
    return place, striker


def run(points: int, seed: int, work: Path, *, until_found: bool = False) -> Campaign:
    """So many points; ``until_found``: fewer, where something is found."""
    dataset_there(work)
    prepared_in(work)  # what is prepared in pools of threads is not in a row
    campaign, names = Campaign(seed), set[str]()
    with quiet(), patient():
        for clean in range(4):  # what there is to strike at all
            place, _ = run_place(seed * 1_000_000 + clean, [], work)
            names |= set(place.points)
            _take(campaign, place, seed * 1_000_000 + clean)
        number = 4
        while campaign.points < points and (campaign.good or not until_found):
            at = seed * 1_000_000 + number
            place, striker = run_place(at, sorted(names), work, min(STRIKES, points - campaign.points))
            names |= set(place.points)
            _take(campaign, place, at)
            campaign.struck.update((fault.point, fault.how) for fault in place.struck)
            campaign.instants += striker.instants
            number += 1
    return campaign


def _take(campaign: Campaign, place: Place, seed: int) -> None:
    campaign.worlds += len(place.worlds)
    for kind, why in place.found.items():
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
