"""When a schedule fires: cron lines, time zones, and what the server makes of them."""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from flows.recurring.deployments import Deployments


def firings(served: Deployments, deployment: UUID, count: int = 3) -> list[datetime]:
    """When the deployment fires next, as the server itself reckons: it is asked to plan these firings now.

    Fewer than ``count`` where it has not told them in some seconds: its own planner may be at work on the same ones.
    """
    for pause_s in (0.1, 0.3, 1.0, 3.0, 0.0):
        planned = served.plan_firings(deployment, count)
        now = datetime.now(UTC)
        found = sorted(at for at in planned if at >= now)[:count]
        if len(found) == count or not pause_s:
            break
        time.sleep(pause_s)
    return found


def zone_of(name: str | None) -> str:
    """The name of a time zone of the IANA database, or UTC. Raises ValueError that names near ones."""
    import difflib
    from zoneinfo import available_timezones

    if not name:
        return "UTC"
    known = available_timezones()
    if name in known:
        return name
    none = f"{name!r} is no time zone of the IANA database"
    shift = re.fullmatch(r"(?:UTC|GMT)?([+-])0?(\d{1,2})(?::?([0-5]\d))?", name.strip(), re.IGNORECASE)
    if shift:
        offset = timedelta(hours=int(shift[2]), minutes=int(shift[3] or 0)) * (1 if shift[1] == "+" else -1)
        raise ValueError(f"{none}: {_of_offset(offset, known)}")
    short = _of_short_name(name.strip().upper(), known)
    if short:
        raise ValueError(f"{none}, but what clocks say in {', '.join(short)}: name the place")
    folded = {zone.casefold(): zone for zone in known}
    wanted = name.strip().casefold().replace(" ", "_")
    near = [wanted] if wanted in folded else difflib.get_close_matches(wanted, folded, n=3, cutoff=0.5)
    places = [zone for zone in sorted(known) if wanted in zone.casefold().split("/") and wanted not in near]
    found = list(dict.fromkeys([*places[:3], *(folded[n] for n in near)]))[:3]
    hint = f"; near ones: {', '.join(found)}" if found else ""
    raise ValueError(f"{none}, such as Europe/Berlin{hint}")


_FIRST = ("Europe/Berlin", "Europe/London", "Europe/Moscow", "America/New_York", "America/Chicago", "America/Denver",
          "America/Los_Angeles", "Asia/Kolkata", "Asia/Shanghai", "Asia/Tokyo", "Australia/Sydney")  # fmt: skip
_CITIES = ("Europe/", "America/", "Asia/", "Australia/", "Africa/", "Pacific/", "Atlantic/", "Indian/")


def _of_offset(offset: timedelta, known: Collection[str]) -> str:
    """Which zones are always, or now, so far from UTC."""
    hours = offset / timedelta(hours=1)
    fixed = "UTC" if not hours else f"Etc/GMT{-hours:+.0f}"  # of the database's names Etc/GMT-1 is an hour *ahead*
    if hours == int(hours) and fixed in known:
        return (
            f"{fixed} is always so far from UTC (its sign counts the other way), a place such as Europe/Berlin follows "
            "its clocks"
        )
    now = datetime.now(UTC)
    there = [zone for zone in _cities(known) if now.astimezone(ZoneInfo(zone)).utcoffset() == offset]
    if there:
        return f"so far from UTC are now the clocks of {', '.join(there[:3])}: name the place"
    return "no clock is so far from UTC; name a place such as Europe/Berlin"


def _of_short_name(name: str, known: Collection[str]) -> list[str]:
    """Places whose clocks call their time so, in winter or in summer; of each part of the world the first."""
    year = datetime.now(UTC).year
    days = [datetime(year, month, 1, tzinfo=UTC) for month in (1, 7)]
    there = [z for z in _cities(known) if name in {day.astimezone(ZoneInfo(z)).tzname() for day in days}]
    return list({zone.partition("/")[0]: zone for zone in reversed(there)}.values())[::-1][:3]


def _cities(known: Collection[str]) -> list[str]:
    """Zones that are named after places, those that most people mean first."""
    every = [zone for part in _CITIES for zone in sorted(known) if zone.startswith(part)]
    return list(dict.fromkeys([*(zone for zone in _FIRST if zone in known), *every]))


_FIELDS = (("minutes", 60), ("hours", 24), ("days", 31), ("months", 12), ("weekdays", 7))


def cron_of(line: str, zone: str, day_or: bool = True) -> Any:
    """Prefect's schedule of a cron line that fires at some time. Raises ValueError that says what is wrong."""
    import importlib

    from prefect.client.schemas.schedules import CronSchedule
    from prefect.schedules import Cron

    if (hint := _other_form(line)) is not None:
        raise ValueError(f"--cron {line!r} is no cron line: {hint}")
    fields = line.split()
    line = " ".join(fields)
    five = 'five fields (minute, hour, day, month, weekday), such as "0 2 * * *"'
    if len(fields) in (6, 7):
        raise ValueError(f"--cron {line!r} has {len(fields)} fields, seconds, years and commands are not taken; {five}")
    try:
        CronSchedule(cron=line, timezone=zone)
    except ValueError as error:
        raise ValueError(f"--cron {line!r} is no cron line; {five}, or @hourly, @daily, @weekly, @monthly") from error
    for field, (what, size) in zip(fields, _FIELDS, strict=False):
        for step in re.findall(r"\*/(\d+)", field):
            if int(step) > size:  # one of 60 minutes is an hour, as it is meant
                raise ValueError(
                    f"--cron {line!r}: a step of {step} in {what} is never reached, there are {size}: it fires once in "
                    f"all of them; write that {what.removesuffix('s')}, or take --interval SECONDS"
                )
    try:
        reckoner: Any = importlib.import_module("prefect._vendor.croniter").croniter
        reckoner(line, datetime.now(UTC), day_or=day_or).get_next(datetime)
    except ValueError as error:
        raise ValueError(f"--cron {line!r} never fires: no such date comes") from error
    return Cron(line, timezone=zone, day_or=day_or)


def _other_form(line: str) -> str | None:
    """What a line of another program's form should be here; None where it is none of those that are known."""
    text = line.strip()
    if zoned := re.match(r"(?:CRON_)?TZ=(\S+)\s+(.+)", text):
        return f"the time zone is an option of its own: --timezone {zoned[1]} --cron '{zoned[2]}'"
    if text[:1] in "'\"" and text[:1]:
        return f"it has quotes inside; write --cron '{text.strip(chr(39) + chr(34))}'"
    if text.startswith("@every"):
        return "every so often is --interval SECONDS"
    if text in ("hourly", "daily", "weekly", "monthly", "yearly"):
        return f"write @{text}"
    if re.match(r"(\w{3} )?[*\d]+-[*\d]+-[*\d]+ ", text):
        return "it is a calendar of systemd; write minute, hour, day, month and weekday, such as '0 2 * * *'"
    if re.match(r"H\b|.* H[\s/(]", text):
        return "H is Jenkins's; write the minute or hour"
    if not text.isascii():
        return "it holds letters or digits beyond ASCII; write it with plain ones"
    return None
