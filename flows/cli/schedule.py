"""``hotstage schedule``: serve a deployment whose runs come again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli import terminal
from flows.cli.main import Number, SpecFile, complain, out_option, say, set_option, store_option
from flows.cli.signals import stopped_by_signals
from flows.cli.sweep import points_of, sweep_options

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

    from flows.care import Care
    from flows.prefect_api import Client, Configured
    from flows.recurring.due import FiringPolicy
    from flows.recurring.notify import Notice
    from flows.serve import Server


@click.command()
@click.argument("spec", type=SpecFile())
@click.option("--cron", help='When, e.g. "0 2 * * *".')
@click.option(
    "--interval", type=Number(min=1), metavar="SECONDS", help="Instead of --cron: seconds between two starts."
)
@click.option("--timezone", metavar="ZONE", help="Time zone of --cron, e.g. Europe/Berlin (default: UTC).")
@click.option(
    "--day-and", is_flag=True, help="A cron line with day and weekday fires where both fit (else where one does)."
)
@click.option(
    "--mode",
    type=click.Choice(["fresh", "continue", "sweep"]),
    default="fresh",
    show_default=True,
    help="What a firing does: a new run; the last run goes on, on the data as they are then; a sweep.",
)
@click.option(
    "--lr-schedule",
    type=click.Choice(["extend", "restart"]),
    help="With --mode continue: the learning-rate schedule grows with the steps (default), or begins again.",
)
@click.option(
    "--overlap",
    type=click.Choice(["skip", "queue", "cancel"]),
    default="skip",
    show_default=True,
    help="A firing whose time comes while an older run goes on: it is skipped, waits its turn, or cancels the older.",
)
@click.option(
    "--skip-late",
    type=Number(min=1),
    metavar="SECONDS",
    help="Skip a firing that could not start within so many seconds.",
)
@click.option("--name", help="Name of the deployment (default: the spec's).")
@click.option(
    "--pool",
    metavar="NAME",
    help="Put the schedule into this work pool of Prefect and leave: its workers start the runs (prefect.yaml).",
)
@click.option("--notify", metavar="TYPE/NAME", help="Block of Prefect's that is told: slack-webhook/team, webhook/ci.")
@click.option(
    "--notify-on",
    multiple=True,
    metavar="WHAT",
    help="failed, crashed, late, unserved, cancelled, completed. Repeatable.",
)
@sweep_options
@set_option
@store_option
@out_option
def schedule(
    spec: str,
    cron: str | None,
    interval: float | None,
    timezone: str | None,
    day_and: bool,
    mode: str,
    lr_schedule: str | None,
    overlap: str,
    skip_late: float | None,
    name: str | None,
    pool: str | None,
    notify: str | None,
    notify_on: tuple[str, ...],
    grid: tuple[str, ...],
    listed: str | None,
    at_once: int,
    sets: tuple[str, ...],
    store: str | None,
    out: str,
) -> int:
    """Serve a Prefect deployment that trains SPEC each time it fires.

    Runs in the foreground until Ctrl-C; runs that it started go on, firings that it had planned are taken away. Each
    run's name ends with its scheduled time.
    """
    from flows.care import Care
    from flows.drive.train import store_at
    from flows.recurring.due import OVERLAPS, FiringPolicy
    from flows.recurring.notify import USUAL, Notice
    from flows.recurring.sweep import pointed_specs
    from flows.serve import ENTRYPOINT, SWEEP
    from trainer.spec import load_spec

    firing = Firing(cron, interval, timezone, day_and)
    firing.check()
    if lr_schedule and mode != "continue":
        raise click.UsageError("--lr-schedule is for --mode continue")
    if pool and (overlap == "cancel" or skip_late):
        raise click.UsageError(
            "--overlap cancel and --skip-late are for a schedule that this command serves: without --pool"
        )
    if notify_on and not notify:
        raise click.UsageError("--notify-on needs --notify TYPE/NAME, the block that is told")
    notices = [Notice(notify, notify_on or USUAL)] if notify else []
    run_spec = load_spec(spec, sets)
    points = points_of(grid, listed, needed=mode == "sweep")
    if mode == "sweep":
        pointed_specs(run_spec, points)
    policy = OVERLAPS[OVERLAPS.index(overlap)]
    opened, folder = store_at(store), Path(out).absolute()
    url = opened.url
    title = name or run_spec.name

    def make(when: Schedule, told: str) -> RunnerDeployment:
        from flows.deployments import scheduled, sweeping

        if mode == "sweep":
            return sweeping(run_spec, points, at_once, url, str(folder), when, title, told, overlap=policy)
        return scheduled(
            run_spec,
            url,
            str(folder),
            when,
            title,
            told,
            mode=mode,
            lr_schedule=lr_schedule or "extend",
            overlap=policy,
        )

    return serve_fired(
        make,
        title,
        firing,
        logs=folder / "schedule",
        entrypoint=SWEEP if mode == "sweep" else ENTRYPOINT,
        policy=FiringPolicy(policy, skip_late),
        notices=notices,
        beside=Care(opened, folder, say),
        pool=pool,
    )


@dataclass(frozen=True)
class Firing:
    """When a deployment fires, as a person wrote it."""

    cron: str | None
    interval: float | None = None
    timezone: str | None = None
    day_and: bool = False

    def check(self) -> None:
        if (self.cron is None) == (self.interval is None):
            raise click.UsageError('give one of --cron "0 2 * * *" and --interval SECONDS')
        if self.cron is None and self.day_and:
            raise click.UsageError("--day-and needs --cron")


def prefect_for(command: str) -> Configured | None:
    """The Prefect server that ``command`` needs; None where there is none, and then it is told why."""
    from flows.prefect_api import PrefectSettingsError, configured, why_not

    try:
        found = configured()
        why = why_not(found) if found else "Prefect's settings name none (PREFECT_API_URL is not set)"
    except PrefectSettingsError as error:
        found, why = None, str(error)
    if not why:
        return found
    complain(
        f"hotstage: {command} needs a Prefect server, but {why}; start one (`prefect server start`) and set "
        "PREFECT_API_URL or a profile (`prefect config set PREFECT_API_URL=…`)"
    )
    return None


def serve_fired(
    make: Callable[[Schedule, str], RunnerDeployment],
    title: str,
    firing: Firing,
    *,
    logs: Path | None = None,
    entrypoint: str | None = None,
    policy: FiringPolicy | None = None,
    notices: list[Notice] | None = None,
    beside: Care | None = None,
    pool: str | None = None,
) -> int:
    """Serve the deployment that ``make`` gives of a schedule and its words, until Ctrl-C; the exit code. ``beside``:
    begun once Prefect answers. ``pool``: leave it to the workers of this pool.
    """
    from datetime import timedelta

    from flows.prefect_api import Gone, Refused
    from flows.recurring.due import FiringPolicy
    from flows.recurring.when import cron_of, zone_of
    from flows.serve import ENTRYPOINT, Server

    cron, interval = firing.cron, firing.interval
    firing.check()
    try:
        zone = zone_of(firing.timezone)
        when = cron_of(cron, zone, day_or=not firing.day_and) if cron is not None else None
        for notice in notices or ():
            notice.check()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found = prefect_for("schedule")
    if found is None:
        return 78
    from prefect.schedules import Interval

    plan = when if when is not None else Interval(timedelta(seconds=interval or 0), timezone=zone)
    told = f"cron {cron!r} in {zone}" if cron else f"every {interval:g} s"
    ends = f"the workers of pool {pool} start its runs" if pool else "Ctrl-C ends the schedule, not what runs"
    server = Server(
        lambda: make(plan, told),
        say,
        logs=logs,
        entrypoint=entrypoint or ENTRYPOINT,
        policy=policy or FiringPolicy(),
    )

    def registered(client: Client, deployment: UUID) -> None:
        say(f"scheduled {title} ({told}) at {found.shown}; {ends}")
        _registered(client, deployment, title, zone, notices or [])

    server.registered = registered
    try:
        if pool:
            server.hand_over(pool)
            return 0
        if beside is not None:
            beside.start()
        serve_until_signal(server)
    except Refused as error:
        complain(f"hotstage: Prefect at {found.shown} ({found.source}) refuses: {error}")
        return 78
    except Gone as error:
        complain(f"hotstage: Prefect at {found.shown} ({found.source}) is away: {error}")
        return 78
    sys.stdout.flush()
    return 0


def serve_until_signal(server: Server | None) -> None:
    """Serve (None: nothing) until Ctrl-C or SIGTERM; what was started goes on."""
    import threading

    stop = server.stop if server is not None else threading.Event()
    stopped_by_signals(stop)
    terminal.go_on()
    if server is None:
        stop.wait()
        return
    server.run()
    if server.children:
        say(f"{len(server.children)} run(s) go on")


def _registered(client: Client, deployment: UUID, title: str, zone: str, notices: list[Notice]) -> None:
    """Make what belongs to the deployment, and tell its next three firings, as the server reckons them."""
    from zoneinfo import ZoneInfo

    from flows.recurring.deployments import Deployments
    from flows.recurring.notify import make_automations
    from flows.recurring.when import firings

    served = Deployments(client)
    made = make_automations(client, deployment, title, notices)
    if made:
        say(f"  {made} automation(s) tell {', '.join(notice.block for notice in notices)}")
    if served.read(deployment)["paused"]:
        say(f"  it is paused: nothing fires before `hotstage schedules resume {title}`")
        return
    found = firings(served, deployment)
    for at in found:
        say(f"  fires {at.astimezone(ZoneInfo(zone)).strftime('%a %Y-%m-%d %H:%M:%S %z')} ({zone})")
    if len(found) < 3:
        say("  Prefect tells no more firings yet; its page shows them when it has planned them")
