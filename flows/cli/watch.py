"""``hotstage runs watch``: runs as they go, from any machine that can read their store."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from flows.cli.main import Number, json_option, say, store_option

if TYPE_CHECKING:
    from flows.show.watching import RunRow, WatchedRuns

LIVE_S, LINES_S = 2.0, 10.0


@click.command()
@click.argument("run", required=False)
@click.option("--all", "every_run", is_flag=True, help="All runs of the store that are open; until Ctrl-C.")
@click.option("--once", is_flag=True, help="One look, then leave.")
@click.option(
    "--every",
    type=Number(min=0.2),
    metavar="SECONDS",
    help=f"Between two looks (default: {LIVE_S:g} at a terminal, else {LINES_S:g}).",
)
@store_option
@json_option
def watch(run: str | None, every_run: bool, once: bool, every: float | None, store: str | None, as_json: bool) -> int:
    """Watch RUN, or --all: where it is, its loss, its rate, what is saved, what evaluations gave.

    From the store alone: nothing here drives or touches a run. A live table at a terminal, else a line each time that a
    run has come further; it ends with RUN.
    """
    from flows.cli.signals import stopped_by_signals
    from flows.drive.run import find_run, run_names
    from flows.drive.train import store_at
    from flows.show.watching import WatchedRuns

    if bool(run) == every_run:
        raise click.UsageError("give a RUN, or --all")
    opened = store_at(store)
    names: Callable[[], Iterable[str]]
    if run is not None:
        name = find_run(opened, run)
        names = lambda: [name]  # noqa: E731
    else:
        names = lambda: list(run_names(opened))  # noqa: E731
    stop = threading.Event()
    stopped_by_signals(stop, twice=True)
    board = WatchedRuns(opened, names, only_open=every_run)
    if once:
        stop.set()
    _watch(board, stop, every, as_json, leaves=run is not None, where=opened.describe())
    return 0


def _watch(
    board: WatchedRuns, stop: threading.Event, every: float | None, as_json: bool, *, leaves: bool, where: str
) -> None:
    from flows.show.live_view import wanted

    if not as_json and wanted(sys.stdout) and not stop.is_set():
        _live(board, stop, every or LIVE_S, leaves)
        return
    told: dict[str, tuple[object, ...]] = {}
    while True:
        rows = board.look()
        for row in rows:
            news = (row.step, row.state, row.saved_step, row.scores)
            if told.get(row.run) != news:
                told[row.run] = news
                _tell(row, as_json)
        if not rows and not told and not as_json:
            say(f"no run is open in {where}")
        if (leaves and rows and all(row.ended for row in rows)) or stop.wait(every or LINES_S):
            return


def _tell(row: RunRow, as_json: bool) -> None:
    from flows.show.lines import json_line
    from flows.show.watching import row_line

    say(json_line({**asdict(row), "scores": dict(row.scores)}) if as_json else row_line(row))


def _live(board: WatchedRuns, stop: threading.Event, every: float, leaves: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    from flows.show.watching import rows_table

    console = Console(highlight=False)
    rows = board.look()
    with Live(rows_table(rows, console.width), console=console, auto_refresh=False) as view:
        while not (leaves and all(row.ended for row in rows)) and not stop.wait(every):
            rows = board.look()
            view.update(rows_table(rows, console.width), refresh=True)
