"""``hotstage train``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli.main import (
    EXIT_CODES,
    SpecFile,
    complain,
    json_option,
    out_option,
    set_option,
    store_option,
    to_type,
    with_store,
)
from flows.cli.signals import Signals
from flows.cli.voice import Voice

if TYPE_CHECKING:
    from checkpoint.store import Store
    from flows.drive.events import Outcome, Sink
    from flows.drive.run import Board, Prepared


@click.command(epilog=EXIT_CODES)
@click.argument("spec", type=SpecFile())
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
        return place_order(opened, prepare_run(run_spec, opened, out=Path(out), say=tell, board=board), Asked("train"))

    return host(make, store, Path(out), as_json, not no_prefect, name=run_spec.name)


def host(
    make: Callable[[Board, Callable[[str], None]], Prepared],
    store: str | None,
    out: Path,
    as_json: bool,
    use_prefect: bool,
    *,
    name: str = "",
) -> int:
    """Make a run ready and drive it from this terminal, on Prefect's page where one can be reached; the exit code.

    ``make`` gets the board that shows what it does, and the voice to tell it. ``name``: of a run that is not there yet.
    """
    from dataclasses import asdict

    from flows.drive.train import store_at
    from trainer.failures import mend_of

    voice = Voice(as_json)
    signals = Signals(voice.warn)
    try:
        outcome = signals.run(lambda: _drive(make, store_at(store), out, voice, use_prefect, signals, name))
    finally:
        voice.quiet()
    if outcome.outcome == "gave_up":
        mend = to_type(mend_of(outcome.cls), outcome.run)
        if as_json:
            complain(f"hotstage: run {outcome.run} gave up: {outcome.reason}", mend=mend, exit_code=outcome.exit_code)
        else:
            click.echo(f"hotstage: run {outcome.run} gave up: {outcome.reason}", err=True)
            if mend:
                click.echo(f"  what to do: {mend}", err=True)
            click.echo(f"  what its ranks said: hotstage logs {outcome.run}{with_store(store)}", err=True)
    elif outcome.outcome == "superseded":
        complain(f"hotstage: {outcome.reason}", exit_code=outcome.exit_code)
    elif outcome.outcome == "stopped" and not signals.detaches:
        voice.say(f"go on with: hotstage runs resume {outcome.run}{with_store(store, str(out))}")
    if as_json:
        voice.result(asdict(outcome))
    return outcome.exit_code


def _drive(
    make: Callable[[Board, Callable[[str], None]], Prepared],
    store: Store,
    out: Path,
    voice: Voice,
    use_prefect: bool,
    signals: Signals,
    name: str,
) -> Outcome:
    """The work of a hosting command, in a thread of its own."""
    from flows.hosting import Hosted, Prefect
    from flows.page import Page
    from flows.show.lines import Lines

    prefect = Prefect(say=voice.warn)
    page = None
    if use_prefect:
        page = Page(prefect.connect, store, name=name, parameters={"store": store.url}, warn=voice.warn)
        page.keeps = lambda: prefect.own is None
        page.shown = lambda url: voice.say(f"Prefect's page of this run: {url}" + prefect.while_it_runs)
    try:
        with Hosted(store, out, page, voice.warn, stop=signals.stop) as hosted:

            def tell(text: str) -> None:
                voice.say(text)
                if page is not None:
                    page.line(text)

            with nullcontext() if name else hosted.board.task("compile-plan", "compile plan"):
                prepared = make(hosted.board, tell)
            tell(f"run {prepared.run} in {store.url}")
            with signals.drives(prepared.run) as reach:
                if not signals.driving(detaches=prepared.spec.launch.target != "local"):
                    raise click.Abort  # the command leaves
                sinks: list[Sink] = [reach, voice.sink(prepared)]
                if page is not None:
                    sinks.append(Lines(page.line, prepared.spec.train.steps, every_s=10.0))
                return hosted.drive(prepared, *sinks)
    finally:
        prefect.close()
