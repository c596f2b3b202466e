"""The shipped driver through weeks of seeded faults of every class (tests/support/simulated)."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.support.simulated import campaign
from tests.support.simulated.faults import CLASSES, Faults
from tests.support.simulated.mistakes import MISTAKES, unwatched_time_counts
from tests.support.simulated.world import World

QUICK = (
    "silence is failure",
    "unknown is gone",
    "old words count",
    "no epoch fence",
    "once is enough",
    "sick machines are used again",
)


@pytest.mark.parametrize(
    ("hours", "seed"), [(80, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)]
)  # fmt: skip
def test_weeks_of_faults(hours: float, seed: int, tmp_path: Path) -> None:
    """No healthy gang killed, no orphan, no duplicate, every give-up with a true reason, goodput at least 97 %."""
    found = campaign.run(hours, seed, tmp_path)
    said = campaign.report(found)
    print(said)
    assert not any(found.found.values()), said
    assert found.account.goodput >= campaign.LEAST_GOODPUT, said
    assert said.splitlines()[-1].endswith("%, healthy killed 0, wrong give-ups 0"), said
    assert set(found.struck) == set(map(str, CLASSES)), said
    assert set(found.outcomes) == {"succeeded"}, said


def test_a_seed_gives_one_campaign(tmp_path: Path) -> None:
    once, again = (campaign.run(6, 3, tmp_path, hours_a_run=3.0) for _ in range(2))
    assert (once.account, once.struck, once.attempts) == (again.account, again.struck, again.attempts)


@pytest.mark.parametrize("believed", [False, True])
def test_a_clock_that_jumps_ends_no_gang(believed: bool, tmp_path: Path) -> None:
    """By up to a day, between two looks in which no step was done: a machine that was suspended with all on it."""
    store, prepared = campaign.specs(tmp_path, 2.0)[0]
    with unwatched_time_counts() if believed else nullcontext():
        world = World(5, store, prepared, two=False)
        faults = Faults(world, random.Random(5))
        faults.strikes = False
        for minute in range(10, 110, 2):
            world.after(60.0 * minute, lambda: faults.disturb("clock ahead", world.drivers[0]))
        world.hub.run(lambda: bool(world.outcome) or bool(world.found["killed"]), 6 * 3600)
    assert bool(world.found["killed"]) == believed, world.found
    assert believed or world.outcome == "succeeded"


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MISTAKES])
def test_a_mistake_is_found(name: str, tmp_path: Path) -> None:
    """By this many hours at the latest, and as what it is."""
    mistake, kinds = MISTAKES[name]
    with mistake():
        found = campaign.run(400, 3, tmp_path, until_found=True)
    assert any(found.found[kind] for kind in kinds.split()), campaign.report(found)
