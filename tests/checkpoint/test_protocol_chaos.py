"""Kills by the thousand at named points of the shipped protocol, in one process (tests/support/protocol)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.protocol import agent as agent_module
from tests.support.protocol import chaos, mistakes
from tests.support.protocol.gate import Gate


@pytest.mark.parametrize(
    ("points", "seed"), [(300, 1), pytest.param(10_000, 2, marks=pytest.mark.slow)]
)  # fmt: skip
def test_kills_at_named_points_lose_nothing(points: int, seed: int, tmp_path: Path) -> None:
    """No committed checkpoint that does not load, no record of one that is not whole, no step lost silently, no run
    that cannot go on.
    """
    campaign = chaos.run(points, seed, tmp_path)
    print(chaos.report(campaign))
    assert campaign.line() == f"{points} points, 0 lost, 0 unloadable, 0 silent", chaos.report(campaign)
    assert len(campaign.struck) > 150
    assert campaign.instants > points // 2


def test_a_seed_gives_one_campaign(tmp_path: Path) -> None:
    once, again = (chaos.run(20, 3, tmp_path) for _ in range(2))
    assert once == again


MISTAKES: dict[str, tuple[Callable[[], AbstractContextManager[None]], str]] = {
    "unclear is done": (lambda: mistakes.unclear_is_done(Gate), "silent unloadable"),
    "forgets what was saved since": (mistakes.forgets_what_was_saved_since, "lost"),
    "record before manifest": (mistakes.record_before_manifest, "unloadable"),
    "claims are not exclusive": (lambda: mistakes.claims_are_not_exclusive(agent_module), "silent"),
    "safe before the record": (mistakes.safe_before_the_record, "silent"),
    "slots are not held": (mistakes.slots_are_not_held, "silent"),
    "collects what is being saved": (mistakes.collects_what_is_being_saved, "unloadable"),
    "a line by records": (mistakes.a_line_by_records, "silent"),
    "forks without a pin": (mistakes.forks_without_a_pin, "unloadable"),
    "forks without amendments": (mistakes.forks_without_amendments, "silent"),
    "trains by older orders": (mistakes.trains_by_older_orders, "silent"),
    "keeps its own layout": (mistakes.keeps_its_own_layout, "silent"),
    "heals an older attempt": (mistakes.heals_an_older_attempt, "silent"),
}
SEEDS = {
    "a line by records": 9,
    "slots are not held": 3,
    "forks without a pin": 5,
    "forks without amendments": 3,
    "heals an older attempt": 9,
}
"""Campaigns that find them soon; the others: 8."""


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str, tmp_path: Path) -> None:
    """By this many strikes at the latest, and as what it is."""
    mistake, kinds = MISTAKES[name]
    with mistake():
        campaign = chaos.run(400, SEEDS.get(name, 8), tmp_path, until_found=True)
    assert any(campaign.found[kind] for kind in kinds.split()), chaos.report(campaign)
