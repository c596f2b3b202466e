"""Serving a Prefect deployment of a flow, `train` or `collect`, from this process: runs that are due are started, each
as a process.

Prefect's own runner ends after three seconds without its server, and ends the flows that it started. This one waits:
  S1. A server that does not answer is unknown, never a reason to end a run or the serving; it is asked again.
  S2. A run that was started is its own process in a session of its own; it outlives the serving.
  S3. Nothing starts before its time; the server decides overlap when a run is proposed to become Pending.
  S4. A server that has lost its database is given the deployment again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.prefect_api import Client, Gone, Lost, Refused

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

log = logging.getLogger(__name__)

EVERY_S = 1.0
KNOWN_EVERY_S = 20.0
ENTRYPOINT = "flows.flow.train_flow"
COLLECT = "flows.flow.collect_flow"


@dataclass
class Server:
    """``make`` gives the deployment to register; ``say`` hears what a person should know.

    ``registered`` hears each time that the deployment was given to the server, with its id. ``logs``: the folder of a
    file for what each run's process says, so that nothing of this terminal is held by what outlives it; None: here.
    ``entrypoint``: the deployment's flow.
    """

    make: Callable[[], RunnerDeployment]
    say: Callable[[str], None]
    registered: Callable[[Client, UUID], None] = lambda _client, _deployment: None
    stop: threading.Event = field(default_factory=threading.Event)
    logs: Path | None = None
    entrypoint: str = ENTRYPOINT
    every_s: float = EVERY_S
    children: dict[UUID, subprocess.Popen[bytes]] = field(default_factory=dict)
    _deployment: UUID | None = None
    _client: Client | None = None
    _known_at: float = -1e9
    _away: bool = False
    _ended: dict[UUID, int] = field(default_factory=dict)

    def run(self) -> None:
        """Serve until ``stop`` is set. Raises Refused where Prefect refuses before the deployment was registered."""
        while not self.stop.is_set():
            try:
                self._round()
                if self._away:
                    self._away = False
                    self.say("Prefect is back")
            except Refused as error:
                if self._deployment is None:
                    raise
                self._told_away(error)
            except Gone as error:
                self._known_at = -1e9
                self._told_away(error)
            self.stop.wait(self.every_s)

    def _told_away(self, error: Exception) -> None:
        if not self._away:
            self._away = True
            self.say(f"Prefect is away ({error}): waiting for it; runs that were started go on")

    def _round(self) -> None:
        if self._client is None:
            self._client = Client.connect(None)
        client = self._client
        self._ensure_known(client)
        self._reap(client)
        assert self._deployment is not None
        for due in sorted(client.due(self._deployment), key=lambda run: str(run.expected_start_time)):
            if due.id not in self.children and client.take(due.id):
                self._start(due.id, str(due.name))

    def _ensure_known(self, client: Client) -> None:
        if self._deployment is not None:
            if time.monotonic() - self._known_at < KNOWN_EVERY_S:
                return
            if client.has_deployment(self._deployment):
                self._known_at = time.monotonic()
                return
            self.say("Prefect has lost the deployment: it is registered again")
        client.check()
        self._deployment = client.register(self.make())
        self._known_at = time.monotonic()
        self.registered(client, self._deployment)

    def _start(self, flow_run: UUID, name: str) -> None:
        env = {**os.environ, "PREFECT__FLOW_RUN_ID": str(flow_run), "PREFECT_LOGGING_LEVEL": "WARNING"}
        with contextlib.ExitStack() as stack:
            out, where = None, ""
            if self.logs is not None:
                self.logs.mkdir(parents=True, exist_ok=True)
                path = self.logs / f"{flow_run}.log"
                out, where = stack.enter_context(open(path, "ab")), f"; its lines: {path}"
            self.children[flow_run] = subprocess.Popen(
                [sys.executable, "-m", "prefect.flow_engine", self.entrypoint],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.say(f"started {name}{where}")

    def _reap(self, client: Client) -> None:
        """Where a run's process ended and Prefect was not told how, it is told that it crashed."""
        for flow_run, child in list(self.children.items()):
            code = child.poll()
            if code is not None:
                self._ended[flow_run] = code
                del self.children[flow_run]
        for flow_run, code in list(self._ended.items()):
            try:
                if client.state_of(str(flow_run)) in ("PENDING", "RUNNING"):
                    how = f"signal {-code}" if code < 0 else f"code {code}"
                    client.set_state(
                        str(flow_run),
                        "CRASHED",
                        "Crashed",
                        f"its process ended ({how}); a gang that was running goes on: hotstage runs resume",
                    )
            except Lost:
                log.info("Prefect does not know flow run %s any more", flow_run)
            del self._ended[flow_run]


def firings(client: Client, deployment: UUID, count: int = 3) -> list[datetime]:
    """When the deployment fires next, as the server itself reckons: it is asked to plan these firings now.

    Fewer than ``count`` where it has not told them in some seconds: its own planner may be at work on the same ones.
    """
    for pause_s in (0.1, 0.3, 1.0, 3.0, 0.0):
        planned = client.plan_firings(deployment, count)
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
