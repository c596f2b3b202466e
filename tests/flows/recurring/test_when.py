"""Cron lines, time zones, and the firings that a real Prefect server makes of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from flows.prefect_api import Client
from flows.recurring.deployments import Deployments, time_of
from flows.recurring.when import cron_of, firings, zone_of
from tests.flows.conftest import Api, of, registered
from tests.support.place import ROOT
from tests.support.wait import wait_for
from trainer.spec import load_spec


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("every day", "is no cron line"),
        ("0 2 * * 8", "is no cron line"),
        ("60 * * * *", "is no cron line"),
        ("@reboot", "is no cron line"),
        ("H 2 * * *", "is no cron line"),
        ("", "is no cron line"),
        ("*/5 * * * * *", "has 6 fields"),
        ("TZ=CET 0 2 * * *", r"an option of its own: --timezone CET --cron '0 2 \* \* \*'"),
        ("CRON_TZ=Europe/Berlin @daily", "--timezone Europe/Berlin --cron '@daily'"),
        ("'0 2 * * *'", "it has quotes inside"),
        ("@every 5m", "--interval SECONDS"),
        ("daily", "write @daily"),
        ("Mon *-*-* 02:00:00", "a calendar of systemd"),
        ("0 H(1-3) * * *", "H is Jenkins's"),
        ("\uff10 2 * * *", "beyond ASCII"),
        ("*/90 * * * *", "a step of 90 in minutes is never reached, there are 60: .*--interval SECONDS"),
        ("0 3,*/36 * * *", "a step of 36 in hours is never reached"),
        ("0 0 31 2 *", "never fires"),
        ("0 0 30 feb *", "never fires"),
        ("0 0 31 4,6,9,11 *", "never fires"),
    ],
)
def test_a_cron_line_that_is_none_or_never_fires(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cron_of(line, "UTC")


@pytest.mark.parametrize(
    "line",
    [
        "0 2 * * *",
        "@daily",
        "@hourly",
        "0 2 * * mon",
        "0 0 29 2 *",
        "0 0 * jan-mar *",
        "0 0 13 * 5",
        "*/60 */24 */31 */12 */7",
    ],
)
def test_cron_lines_that_are_taken(line: str) -> None:
    assert cron_of(line, "Europe/Berlin").timezone == "Europe/Berlin"
    assert cron_of(line, "UTC", day_or=False).day_or is False


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Europe/Berln", "Europe/Berlin"),
        ("Berlin", "Europe/Berlin"),
        ("new york", "America/New_York"),
        ("CEST", "Europe/Berlin"),
    ],
)
def test_a_zone_that_is_none_names_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        zone_of(name)
    assert zone_of(near if "/" in near else "UTC")
    assert zone_of(None) == "UTC"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("PST", "America/Los_Angeles.*: name the place"),
        ("ist", "Europe/Dublin|Asia/Kolkata"),
        ("UTC+5:30", "the clocks of Asia/Kolkata, .*: name the place"),
        ("+14:00", "Etc/GMT-14 is always"),
        ("-13", "no clock is so far from UTC"),
        ("Europe/berlin ", "near ones: Europe/Berlin$"),
    ],
)
def test_zones_as_clocks_and_calendars_say_them(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        zone_of(name)


@pytest.mark.parametrize(
    ("name", "zone"), [("UTC+1", "Etc/GMT-1"), ("gmt-05:00", r"Etc/GMT\+5"), ("+01:00", "Etc/GMT-1")]
)
def test_an_offset_is_told_the_zone_that_is_so_far_from_utc(name: str, zone: str) -> None:
    with pytest.raises(ValueError, match=f": {zone} is always"):
        zone_of(name)


WITHOUT = ("2027-03-28T00:30+00:00", "2027-03-28T01:30+00:00")
"""02:30 by Berlin's clocks in the night that goes from 02:00 to 03:00: it is 01:30 or 03:30, by the server's Python."""
NIGHTS = {
    *("2027-03-27T01:30+00:00", "2027-03-29T00:30+00:00"),  # before and after it
    # before, in and after the one that goes from 03:00 to 02:00: the first 02:30 of two
    *("2027-10-30T00:30+00:00", "2027-10-31T00:30+00:00", "2027-11-01T01:30+00:00"),
}


def test_the_nights_when_the_clocks_change_fire_once(prefect: Api) -> None:
    """As the server itself plans them: 02:30 that does not exist, and 02:30 that exists twice."""
    from flows.deployments import scheduled

    def planned() -> set[str]:
        """On those days, in UTC."""
        for month in ("03-26", "10-29"):
            first = f"2027-{month}T12:00:00+00:00"
            Deployments(client).plan_firings(made, 5, first, str(datetime.fromisoformat(first) + timedelta(days=5)))
        rows = of(prefect, "nights", "SCHEDULED")
        found = {time_of(row["expected_start_time"]).isoformat(timespec="minutes") for row in rows}
        return {at for at in found if at[:10] in {night[:10] for night in (*NIGHTS, *WITHOUT)}}

    spec = load_spec(ROOT / "examples" / "demo.toml", [])
    with Client.open(prefect.server.api, patience_s=60) as client:
        when = cron_of("30 2 * * *", "Europe/Berlin")
        made = registered(client, scheduled(spec, "file:///nowhere", "out", when, "nights"))
        # none is there for a moment that the server's own planner is at work on
        wait_for(lambda: len(planned()) > len(NIGHTS), "the firings to be planned", 60, 0.1)
        assert planned() in [{*NIGHTS, night} for night in WITHOUT]
        prefect.delete(f"deployments/{made}")


def test_firings_that_the_server_is_still_planning_are_asked_for_again() -> None:
    """Its own planner may hold the same ones: the answer then has fewer, for a moment."""
    asked = []

    class Planning:
        def plan_firings(self, deployment: UUID, count: int) -> list[datetime]:
            asked.append(deployment)
            day = datetime.now(UTC) + timedelta(days=1)
            return [day + timedelta(days=k) for k in range(min(len(asked), count))]

    found = firings(Planning(), uuid4())  # type: ignore[arg-type]
    assert (len(found), len(asked)) == (3, 3)
