"""When a schedule fires: cron lines, time zones, and what the server makes of them."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

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
    shift = re.fullmatch(r"(?:UTC|GMT)?([+-])0?(\d{1,2})(?::?00)?", name, re.IGNORECASE)
    if shift and int(shift[2]) <= 12:  # of the database's names Etc/GMT-1 is an hour *ahead* of UTC
        fixed = f"Etc/GMT{'-' if shift[1] == '+' else '+'}{int(shift[2])}" if int(shift[2]) else "UTC"
        raise ValueError(
            f"{name!r} is no time zone of the IANA database: {fixed} is always so far from UTC (its sign counts the "
            "other way), a place such as Europe/Berlin follows its clocks"
        )
    folded = {zone.casefold(): zone for zone in known}
    near = difflib.get_close_matches(name.casefold().replace(" ", "_"), folded, n=3, cutoff=0.5)
    places = [zone for zone in sorted(known) if name.casefold().replace(" ", "_") in zone.casefold().split("/")]
    found = list(dict.fromkeys([*places[:3], *(folded[n] for n in near)]))[:3]
    hint = f"; near ones: {', '.join(found)}" if found else ""
    raise ValueError(f"{name!r} is no time zone of the IANA database, such as Europe/Berlin{hint}")


def cron_of(line: str, zone: str, day_or: bool = True) -> Any:
    """Prefect's schedule of a cron line that fires at some time. Raises ValueError that says what is wrong."""
    import importlib

    from prefect.client.schemas.schedules import CronSchedule
    from prefect.schedules import Cron

    fields = line.split()
    five = 'five fields (minute, hour, day, month, weekday), such as "0 2 * * *"'
    if len(fields) in (6, 7):
        raise ValueError(f"--cron {line!r} has {len(fields)} fields, seconds are not taken; {five}")
    try:
        CronSchedule(cron=line, timezone=zone)
    except ValueError as error:
        raise ValueError(f"--cron {line!r} is no cron line; {five}, or @hourly, @daily, @weekly, @monthly") from error
    try:
        reckoner: Any = importlib.import_module("prefect._vendor.croniter").croniter
        reckoner(line, datetime.now(UTC), day_or=day_or).get_next(datetime)
    except ValueError as error:
        raise ValueError(f"--cron {line!r} never fires: no such date comes") from error
    return Cron(line, timezone=zone, day_or=day_or)
