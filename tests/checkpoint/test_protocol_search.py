"""Every order of events of small worlds whose actors are the shipped code (tests/support/protocol/search.py): what must
hold does, and what the code would do with a mistake in it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from checkpoint.store.s3 import S3Store
from tests.support.protocol import mistakes, small
from tests.support.protocol.hub import folds_every
from tests.support.protocol.s3 import over_s3
from tests.support.protocol.search import Budget, Found, Small, search
from tests.support.protocol.tree import Line
from tests.support.protocol.worlds import (
    at_folds,
    claims,
    collected,
    collected_beside,
    collected_rollback,
    collected_takeover,
    collected_twice,
    commit_races,
    grouped,
    joined_races,
    layouts,
    over_wires,
    suspicion,
    takeover,
)

SLOW = pytest.mark.slow
FAILS, LOSSES, LATES, DEATHS = Budget(fails=1), Budget(losses=1), Budget(lates=1), Budget(deaths=1)

WORLDS: dict[str, Callable[[], Small]] = {
    "three ranks": lambda: commit_races(3),
    "no answer": lambda: commit_races(2, FAILS),
    "a lost answer": lambda: commit_races(2, LOSSES),
    "a late write": lambda: commit_races(2, LATES),
    "a death": lambda: commit_races(3, DEATHS),
    "two drivers": lambda: suspicion(2, 2),
    "two drivers and a lost answer": lambda: suspicion(1, 2, LOSSES),
    "two drivers and a late write": lambda: suspicion(1, 2, LATES),
    "two layouts": lambda: layouts(1, 2),
    "two hosts": claims,
    "zombies": lambda: takeover(1),
    "zombies and a lost answer": lambda: takeover(1, LOSSES),
    "zombies and a late write": lambda: takeover(1, LATES),
    "a collector": collected,
    "S3 and a lost answer": lambda: over_wires(over_s3, 1, 2, LOSSES),
    "S3 and a late write": lambda: over_wires(over_s3, 1, 1, LATES),
}
LONG: dict[str, Callable[[], Small]] = {
    "three ranks and a lost answer": lambda: commit_races(3, LOSSES),
    "three ranks and a late write": lambda: commit_races(3, LATES),
    "three ranks, two drivers": lambda: suspicion(3, 2),
    "two ranks, two drivers, a lost answer": lambda: suspicion(2, 2, LOSSES),
    "two ranks, two drivers, a late write": lambda: suspicion(2, 2, LATES),
    "two layouts and a lost answer": lambda: layouts(1, 2, LOSSES),
    "two layouts and a late write": lambda: layouts(1, 2, LATES),
    "two hosts and a lost answer": lambda: claims(LOSSES),
    "S3, two drivers and a late write": lambda: over_wires(over_s3, 1, 2, LATES),
    "S3, two ranks and a late write": lambda: over_wires(over_s3, 2, 1, LATES),
    "two ranks as zombies": lambda: takeover(2),
    "a collector beside a gang": collected_beside,
    "a collector beside a takeover": collected_takeover,
    "a collector beside a rollback": collected_rollback,
    "two collectors": collected_twice,
    "a lost answer and a late write": lambda: commit_races(2, Budget(losses=1, lates=1)),
    "zombies, a lost answer and a late write": lambda: takeover(1, Budget(losses=1, lates=1)),
    "three ranks in which two die": lambda: commit_races(3, Budget(deaths=2)),
}


def looked(world: Small) -> Found:
    found = search(world)
    print(found.line(), *found.way[-40:], sep="\n")
    return found


@pytest.mark.parametrize("name", [*WORLDS, *(pytest.param(name, marks=SLOW) for name in LONG)])
def test_in_no_order_of_events_anything_is_lost(name: str) -> None:
    found = looked({**WORLDS, **LONG}[name]())
    assert found.violation is None
    assert found.ends > 0


@pytest.mark.parametrize("name", ["a lost answer", "zombies", "a death of two"])
def test_orders_that_are_left_out_come_to_the_same_ends(name: str) -> None:
    world = {**WORLDS, "a death of two": lambda: commit_races(2, DEATHS)}[name]()
    some, all_ = search(world), search(world, reduced=False)
    print(some.line(), all_.line(), sep="\n")
    assert some.last == all_.last
    assert some.states < all_.states


JOINED: dict[str, Callable[[], Small]] = {
    "a lost answer": lambda: joined_races(2, LOSSES),
    "a death of two": lambda: joined_races(2, DEATHS),
    "a death of three": lambda: joined_races(3, DEATHS),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[SLOW] if "three" in n else []) for n in JOINED])
def test_nor_where_parts_join_a_group_first(name: str) -> None:
    with grouped():
        assert looked(JOINED[name]()).violation is None


FOLDS: dict[str, Callable[[], Small]] = {
    "a newcomer": lambda: at_folds(quick=False),
    "a quick newcomer": lambda: at_folds(quick=True),
    "a lost answer": lambda: at_folds(quick=False, budget=LOSSES),
    "a quick newcomer and a lost answer": lambda: at_folds(quick=True, budget=LOSSES),
    "a late write": lambda: at_folds(quick=False, budget=LATES),
    "two drivers": lambda: at_folds(quick=False, drivers=2),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[SLOW] if i > 1 else []) for i, n in enumerate(FOLDS)])
def test_nor_where_the_log_folds(name: str) -> None:
    with folds_every(2):
        assert looked(FOLDS[name]()).violation is None


Mistaken = tuple[Callable[[], AbstractContextManager[None]], Callable[[], Small], str]
MISTAKES: dict[str, Mistaken] = {
    "no fence": (mistakes.no_fence, lambda: suspicion(1, 1), "which attempt 2 has fenced"),
    "unclear is done": (lambda: mistakes.unclear_is_done(Line), lambda: suspicion(1, 2, LATES), "not in the log"),
    "unclear is done, by agents": (lambda: mistakes.unclear_is_done(Line), lambda: commit_races(2, FAILS), "is safe"),
    "no read-back: it was done": (
        lambda: mistakes.swapped(S3Store, "_made", lambda *_: True),
        lambda: over_wires(over_s3, 1, 1),
        "not in the log",
    ),
    "no read-back: it was another's": (
        lambda: mistakes.swapped(S3Store, "_made", lambda *_: False),
        lambda: over_wires(over_s3, 2, 0, LOSSES),
        "has saved nothing",
    ),
    "acts without winning": (mistakes.acts_without_winning, lambda: suspicion(1, 2), "not in the log"),
    "forgets what was saved": (mistakes.forgets_what_was_saved_since, lambda: takeover(1), "does not go on"),
    "record before manifest": (mistakes.record_before_manifest, lambda: commit_races(2), "does not load"),
    "claims are not exclusive": (lambda: mistakes.claims_are_not_exclusive(small), claims, "runs on two hosts"),
    "collects at once": (mistakes.collects_at_once, collected, "goes away"),
    "collects what is pinned": (mistakes.collects_what_is_pinned, collected, "goes away"),
    "collects what is being saved": (mistakes.collects_what_is_being_saved, collected_beside, "does not load"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str) -> None:
    mistake, world, why = MISTAKES[name]
    small_world = world()
    with mistake():
        found = looked(small_world)
    assert found.violation is not None
    assert why in found.violation


@pytest.mark.parametrize("half", [mistakes.no_fence_of_writers, mistakes.no_fence_of_readers])
def test_there_are_two_fences(half: Callable[[], AbstractContextManager[None]]) -> None:
    """Who writes halts, and who reads takes a fenced record for void: either is enough."""
    with half():
        assert looked(suspicion(1, 2)).violation is None
