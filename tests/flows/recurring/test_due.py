"""Which firings start: the rules F1 to F4, by times that the test gives."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from flows.recurring.due import OVERLAPS, DueFiring, FiringPolicy, Overlap, judge_firings, span

NOW = datetime(2026, 11, 27, 2, 30, tzinfo=UTC)


def firing(minutes: float, *, planned: bool = True, waits: bool = False) -> DueFiring:
    """One whose time was so many minutes ago."""
    return DueFiring(UUID(int=int(abs(minutes) * 60)), f"{minutes:g}", NOW - timedelta(minutes=minutes), planned, waits)


def names(firings: tuple[DueFiring, ...]) -> list[str]:
    return [f.name for f in firings]


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_one_that_is_due_starts(overlap: Overlap) -> None:
    judged = judge_firings([firing(0.1)], FiringPolicy(overlap), NOW)
    assert (names(judged.start), judged.skipped) == (["0.1"], ())


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_of_a_backlog_the_newest_starts(overlap: Overlap) -> None:
    judged = judge_firings([firing(m) for m in (30, 90, 60)], FiringPolicy(overlap), NOW)
    assert names(judged.start) == ["30"]
    assert [(f.name, why.split(":")[0]) for f, why in judged.skipped] == [("90", "missed"), ("60", "missed")]


def test_what_waits_its_turn_is_no_backlog() -> None:
    due = [firing(90, waits=True), firing(60, waits=True), firing(30)]
    assert names(judge_firings(due, FiringPolicy("queue"), NOW).start) == ["90", "60", "30"]
    assert names(judge_firings(due, FiringPolicy("cancel"), NOW).start) == ["30"]


def test_what_a_person_asked_for_starts_however_late() -> None:
    due = [firing(90, planned=False), firing(60), firing(30)]
    judged = judge_firings(due, FiringPolicy(late_s=60.0), NOW)
    assert names(judged.start) == ["90"]
    assert [why for _, why in judged.skipped] == [
        "late by 60 min, more than the 60 s that it may be",
        "late by 30 min, more than the 60 s that it may be",
    ]


@pytest.mark.parametrize(("minutes", "starts"), [(9.99, True), (10.0, True), (10.02, False)])
def test_how_late_one_may_be(minutes: float, starts: bool) -> None:
    assert bool(judge_firings([firing(minutes)], FiringPolicy(late_s=600.0), NOW).start) is starts
    assert judge_firings([firing(minutes)], FiringPolicy(), NOW).start


def test_a_page_of_them_that_has_newer_ones_behind_it_starts_none() -> None:
    judged = judge_firings([firing(90), firing(60)], FiringPolicy(), NOW, more=True)
    assert (names(judged.start), len(judged.skipped)) == ([], 2)


def test_a_clock_that_is_behind_the_server_s_is_not_late() -> None:
    assert judge_firings([firing(-3)], FiringPolicy(late_s=1.0), NOW).start


def test_spans_are_for_people() -> None:
    assert [span(s) for s in (0.4, 119, 121, 7100, 7300, 172_000, 400_000)] == [
        "0 s", "119 s", "2 min", "118 min", "2.0 h", "47.8 h", "4.6 days",
    ]  # fmt: skip
