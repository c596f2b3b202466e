"""``hotstage train`` and ``hotstage schedule``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli.main import EXIT_CODES, Number, complain, json_option, out_option, say, set_option, store_option
from flows.cli.signals import Signals, stopped_by_signals
from flows.cli.voice import Voice

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

    from flows.care import Care
    from flows.drive.events import Event, Outcome, Sink
    from flows.drive.run import Board, Prepared
    from flows.prefect_api import Client
    from flows.serve import Server


@click.command(epilog=EXIT_CODES)
@click.argument("spec", type=click.Path(dir_okay=False))
@set_option
@store_option
@out_option
@json_option
@click.option("--no-prefect", is_flag=True, help="Drive the run without Prefect; everything else is the same.")
def train(spec: str, sets: tuple[str, ...], store: str | None, out: str, as_json: bool, no_prefect: bool) -> int:
    """Train SPEC to its end; recover whatever fails on the way. Exits 0 only when the run succeeded.

    The same spec names the same run: a second `train` attaches to what runs, and ends with its outcome. Ctrl-C has the
    gang save one agreed step and leave; `hotstage runs resume RUN` (or the same command again) goes on from there. At a
    terminal, a second Ctrl-C within a second leaves the run to itself; the same command attaches to it again. On a
    cluster the first Ctrl-C does that: the gang trains on.
    """
    from flows.drive.begin import prepare_run
    from flows.drive.orders import Asked, place_order
    from flows.drive.train import store_at
    from trainer.spec import load_spec

    opened = store_at(store)
    run_spec = load_spec(spec, sets)

    def make(board: Board, tell: Callable[[str], None]) -> Prepared:
        return place_order(opened, prepare_run(run_spec, opened, say=tell, board=board), Asked("train"))

    return host(make, opened.url, Path(out), as_json, not no_prefect, name=run_spec.name)


def host(
    make: Callable[[], Prepared] | Callable[[Board, Callable[[str], None]], Prepared],
    store_url: str,
    out: Path,
    as_json: bool,
    use_prefect: bool,
    *,
    name: str = "",
) -> int:
    """Make a run ready and drive it from this terminal, on Prefect's page where one can be reached; the exit code.

    ``make`` gets the board that shows what it does and the voice to tell it, where ``name`` is given.
    """
    from dataclasses import asdict

    from trainer.failures import mend_of

    voice = Voice(as_json)
    signals = Signals(voice.warn)
    try:
        outcome = signals.run(lambda: _drive(make, store_url, out, voice, use_prefect, signals, name))
    finally:
        voice.quiet()
    if outcome.outcome == "gave_up":
        mend = mend_of(outcome.cls).replace("RUN", outcome.run)
        if as_json:
            complain(f"hotstage: run {outcome.run} gave up: {outcome.reason}", mend=mend, exit_code=outcome.exit_code)
        else:
            click.echo(f"hotstage: run {outcome.run} gave up: {outcome.reason}", err=True)
            if mend:
                click.echo(f"  what to do: {mend}", err=True)
            click.echo(f"  what its ranks said: hotstage logs {outcome.run}", err=True)
    elif outcome.outcome == "superseded":
        complain(f"hotstage: {outcome.reason}", exit_code=outcome.exit_code)
    elif outcome.outcome == "stopped" and not signals.detaches:
        voice.say(f"go on with: hotstage runs resume {outcome.run}")
    if as_json:
        voice.result(asdict(outcome))
    return outcome.exit_code


def _drive(
    make: Callable[..., Prepared],
    store_url: str,
    out: Path,
    voice: Voice,
    use_prefect: bool,
    signals: Signals,
    name: str,
) -> Outcome:
    """The work of a hosting command, in a thread of its own."""
    from flows.drive.train import store_at
    from flows.hosting import Hosted, Prefect
    from flows.page import Page
    from flows.show.lines import Lines

    store = store_at(store_url)
    prefect = Prefect(say=voice.warn)
    page = None
    if use_prefect:
        page = Page(prefect.connect, store, name=name, parameters={"store": store.url}, warn=voice.warn)
        page.shown = lambda url: voice.say(f"Prefect's page of this run: {url}" + prefect.while_it_runs)
    try:
        with Hosted(store, out, page, voice.warn, stop=signals.stop) as hosted:

            def tell(text: str) -> None:
                voice.say(text)
                if page is not None:
                    page.line(text)

            if name:
                prepared = make(hosted.board, tell)
            else:
                with hosted.board.task("compile-plan", "compile plan"):
                    prepared = make()
            tell(f"run {prepared.run} in {store_url}")
            if not signals.driving(detaches=prepared.spec.launch.target != "local"):
                raise click.Abort  # the command leaves
            sinks: list[Sink] = [Reach(signals), voice.sink(prepared)]
            if page is not None:
                sinks.append(Lines(page.line, prepared.spec.train.steps, every_s=10.0))
            return hosted.drive(prepared, *sinks)
    finally:
        prefect.close()


@dataclass
class Reach:
    """Tells the signals whether the gang trains on without this command: one that works elsewhere does."""

    signals: Signals

    def tell(self, event: Event) -> None:
        if event.kind == "phase" and event.facts.get("phase") in ("elsewhere", "here"):
            self.signals.detaches, self.signals.where = event.facts["phase"] == "elsewhere", "where it works"


@click.command()
@click.argument("spec", type=click.Path(dir_okay=False))
@click.option("--cron", help='When, e.g. "0 2 * * *".')
@click.option(
    "--interval", type=Number(min=1), metavar="SECONDS", help="Instead of --cron: seconds between two starts."
)
@click.option("--timezone", metavar="ZONE", help="Time zone of --cron, e.g. Europe/Berlin (default: UTC).")
@click.option(
    "--day-and", is_flag=True, help="A cron line with day and weekday fires where both fit (else where one does)."
)
@click.option("--name", help="Name of the deployment (default: the spec's).")
@set_option
@store_option
@out_option
def schedule(
    spec: str,
    cron: str | None,
    interval: float | None,
    timezone: str | None,
    day_and: bool,
    name: str | None,
    sets: tuple[str, ...],
    store: str | None,
    out: str,
) -> int:
    """Serve a Prefect deployment that starts a new run of SPEC each time it fires; a firing that overlaps is skipped.

    Runs in the foreground until Ctrl-C; runs that it started go on. Each run's name ends with its scheduled time.
    """
    from flows.care import Care
    from flows.drive.train import store_at
    from trainer.spec import load_spec

    firing = Firing(cron, interval, timezone, day_and)
    firing.check()
    run_spec = load_spec(spec, sets)
    opened, folder = store_at(store), Path(out).absolute()
    title = name or run_spec.name

    def make(when: Schedule, told: str) -> RunnerDeployment:
        from flows.flow import scheduled

        return scheduled(run_spec, opened.url, str(folder), when, title, told)

    return serve_fired(make, title, firing, logs=folder / "schedule", beside=Care(opened, folder, say))


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


def serve_fired(
    make: Callable[[Schedule, str], RunnerDeployment],
    title: str,
    firing: Firing,
    *,
    logs: Path | None = None,
    entrypoint: str | None = None,
    beside: Care | None = None,
) -> int:
    """Serve the deployment that ``make`` gives of a schedule and its words, until Ctrl-C; the exit code. ``beside``:
    begun once Prefect answers.
    """
    from datetime import timedelta

    from flows.prefect_api import PrefectSettingsError, Refused, configured, why_not
    from flows.serve import ENTRYPOINT, Server, cron_of, zone_of

    cron, interval = firing.cron, firing.interval
    firing.check()
    try:
        zone = zone_of(firing.timezone)
        when = cron_of(cron, zone, day_or=not firing.day_and) if cron is not None else None
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        found = configured()
        why = why_not(found) if found else "Prefect's settings name none (PREFECT_API_URL is not set)"
    except PrefectSettingsError as error:
        why = str(error)
    if why or found is None:
        complain(
            f"hotstage: schedule needs a Prefect server, but {why}; start one (`prefect server start`) and set "
            "PREFECT_API_URL or a profile (`prefect config set PREFECT_API_URL=…`)"
        )
        return 78
    from prefect.schedules import Interval

    plan = when if when is not None else Interval(timedelta(seconds=interval or 0), timezone=zone)
    told = f"cron {cron!r} in {zone}" if cron else f"every {interval:g} s"
    say(f"scheduled {title} ({told}) at {found.url}; Ctrl-C ends the schedule, not what runs")
    server = Server(lambda: make(plan, told), say, logs=logs, entrypoint=entrypoint or ENTRYPOINT)
    server.registered = lambda client, deployment: _tell_firings(client, deployment, zone)
    if beside is not None:
        beside.start()
    try:
        serve_until_signal(server)
    except Refused as error:
        complain(f"hotstage: Prefect at {found.url} ({found.source}) refuses: {error}")
        return 78
    sys.stdout.flush()
    return 0


def serve_until_signal(server: Server | None) -> None:
    """Serve (None: nothing) until Ctrl-C or SIGTERM; what was started goes on."""
    import threading

    stop = server.stop if server is not None else threading.Event()
    stopped_by_signals(stop)
    if server is None:
        stop.wait()
        return
    server.run()
    if server.children:
        say(f"{len(server.children)} run(s) go on")


def _tell_firings(client: Client, deployment: UUID, zone: str) -> None:
    """The next three firings, as the server reckons them, in the schedule's zone."""
    from zoneinfo import ZoneInfo

    from flows.serve import firings

    found = firings(client, deployment)
    for at in found:
        say(f"  fires {at.astimezone(ZoneInfo(zone)).strftime('%a %Y-%m-%d %H:%M:%S %z')} ({zone})")
    if len(found) < 3:
        say("  Prefect tells no more firings yet; its page shows them when it has planned them")
