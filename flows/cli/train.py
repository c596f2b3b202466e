"""``hotstage train`` and ``hotstage schedule``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.cli.main import EXIT_CODES, Number, json_option, out_option, say, set_option, show, store_option
from flows.cli.signals import Signals

if TYPE_CHECKING:
    from flows.loop import Event, Outcome
    from flows.run import Prepared


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
    from flows.api import store_at
    from flows.orders import Asked, place
    from flows.run import prepare_run
    from trainer.spec import load_spec

    opened = store_at(store)
    run_spec = load_spec(spec, sets)
    tell = (lambda _: None) if as_json else say

    def make() -> Prepared:
        return place(opened, prepare_run(run_spec, opened, say=tell), Asked("train"))

    return host(make, opened.url, Path(out), as_json, not no_prefect)


def host(make: Callable[[], Prepared], store_url: str, out: Path, as_json: bool, use_prefect: bool) -> int:
    """Make a run ready and drive it from this terminal, inside the Prefect flow where one answers; the exit code."""
    from dataclasses import asdict

    from flows.driver import mend_of

    signals = Signals()
    outcome = signals.run(lambda: _drive(make, store_url, out, as_json, use_prefect, signals))
    if as_json:
        show(asdict(outcome))
    elif outcome.outcome == "stopped" and not signals.detaches:
        say(f"go on with: hotstage runs resume {outcome.run}")
    if outcome.outcome == "superseded":
        click.echo(f"hotstage: {outcome.reason}", err=True)
    if outcome.outcome == "gave_up":
        click.echo(f"hotstage: run {outcome.run} gave up: {outcome.reason}", err=True)
        mend = mend_of(outcome.cls)
        if mend:
            click.echo(f"  what to do: {mend.replace('RUN', outcome.run)}", err=True)
        click.echo(f"  what its ranks said: hotstage logs {outcome.run}", err=True)
    return outcome.exit_code


def _drive(
    make: Callable[[], Prepared],
    store_url: str,
    out: Path,
    as_json: bool,
    use_prefect: bool,
    signals: Signals,
) -> Outcome:
    """The work of a hosting command, in a thread of its own."""
    from flows.api import make_driver, store_at
    from flows.peak import measured_peak
    from flows.sink import Lines, Many
    from trainer.plan import flops_per_token

    prepared = make()
    if not as_json:
        say(f"run {prepared.run} in {store_url}")
    lines = Lines(
        (lambda text: click.echo(text, err=True)) if as_json else say,
        prepared.spec.train.steps,
        flops_per_token=flops_per_token(prepared.spec.model, prepared.spec.train.sequence),
        peak_flops=0.0 if as_json else measured_peak(),
    )
    through_prefect = use_prefect and prefect_answers(lines.say)
    if not signals.driving(detaches=prepared.spec.launch.target != "local"):
        raise click.Abort  # the command leaves
    sink = Many([Reach(signals), lines])
    if through_prefect:
        from flows.hosting import run_flow

        outcome = run_flow(prepared, store_url, out, sink, signals.stop, lines.say)
        if outcome is not None:
            return outcome
    driver = make_driver(prepared, store_at(store_url), sink=sink, out=out, stop=signals.stop)
    return driver.run()


@dataclass
class Reach:
    """Tells the signals whether the gang trains on without this command: one that works elsewhere does."""

    signals: Signals

    def tell(self, event: Event) -> None:
        if event.kind == "phase" and event.facts.get("phase") in ("elsewhere", "here"):
            self.signals.detaches, self.signals.where = event.facts["phase"] == "elsewhere", "where it works"


def prefect_answers(tell: Any) -> bool:
    """Whether to run inside a flow: PREFECT_API_URL answers, or is unset (Prefect then uses a server of its own)."""
    from flows.prefect_api import answers

    url = os.environ.get("PREFECT_API_URL")
    if url and not answers(url):
        tell(f"Prefect does not answer at {url}: going on without it (the log in the store has everything)")
        return False
    return True


@click.command()
@click.argument("spec", type=click.Path(dir_okay=False))
@click.option("--cron", help='When, e.g. "0 2 * * *".')
@click.option("--interval", type=Number(min=1), metavar="SECONDS", help="Instead of --cron: every so many seconds.")
@click.option("--name", help="Name of the deployment (else the spec's).")
@set_option
@store_option
@out_option
def schedule(
    spec: str,
    cron: str | None,
    interval: float | None,
    name: str | None,
    sets: tuple[str, ...],
    store: str | None,
    out: str,
) -> int:
    """Serve a Prefect deployment that starts a new run of SPEC each time it fires; a firing that overlaps is skipped.

    Runs in the foreground until Ctrl-C; runs that it started go on. Each run's name ends with its scheduled time.
    """
    import asyncio
    import contextlib

    from flows.api import store_at
    from flows.prefect_api import answers
    from trainer.spec import load_spec

    if (cron is None) == (interval is None):
        raise click.UsageError('give one of --cron "0 2 * * *" and --interval SECONDS')
    run_spec = load_spec(spec, sets)
    if cron is not None:
        _check_cron(cron)
    url = os.environ.get("PREFECT_API_URL")
    if not url or not answers(url):
        found = f"nothing answers at PREFECT_API_URL={url}" if url else "PREFECT_API_URL is not set"
        click.echo(
            f"hotstage: schedule needs a Prefect server, but {found}; start one (`prefect server start`) and set it",
            err=True,
        )
        return 78
    from prefect.exceptions import TerminationSignal

    from flows.flow import serve_schedule

    work = serve_schedule(
        run_spec, store_at(store).url, str(Path(out).absolute()), cron=cron, interval=interval, name=name
    )
    when = f"cron {cron!r}" if cron else f"every {interval:g} s"
    say(f"scheduled {name or run_spec.name} ({when}) at {url}; Ctrl-C ends the schedule, not what runs")
    with contextlib.suppress(KeyboardInterrupt, TerminationSignal):
        asyncio.run(work)
    sys.stdout.flush()
    return 0


def _check_cron(cron: str) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    try:
        CronSchedule(cron=cron)
    except ValueError as error:
        raise click.UsageError(f'--cron {cron!r} is no cron line; five fields, such as "0 2 * * *"') from error
