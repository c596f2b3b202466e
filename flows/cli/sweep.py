"""``hotstage sweep``: the runs of a grid or a list now, from this terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.cli.main import EXIT_CODES, SpecFile, json_option, out_option, say, set_option, show, store_option
from flows.cli.signals import Signals

if TYPE_CHECKING:
    from flows.recurring.sweep import SweepRow

_SWEEPS: tuple[Callable[..., Any], ...] = (
    click.option(
        "--grid",
        multiple=True,
        metavar="KEY=V,V,…",
        help="Values of a key of the spec; of several keys every combination. Repeatable.",
    ),
    click.option(
        "--list",
        "listed",
        type=click.Path(dir_okay=False),
        metavar="FILE",
        help="Instead: a line of KEY=VALUE … a point.",
    ),
    click.option(
        "--at-once", type=click.IntRange(1, 64), default=1, show_default=True, help="Runs of the sweep side by side."
    ),
)


def sweep_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What says a sweep's points."""
    for option in reversed(_SWEEPS):
        command = option(command)
    return command


def points_of(grid: tuple[str, ...], listed: str | None, *, needed: bool) -> list[tuple[str, ...]]:
    """The points that a command names."""
    from flows.recurring.sweep import grid_points, listed_points

    if grid and listed:
        raise click.UsageError("give one of --grid and --list")
    if (grid or listed) and not needed:
        raise click.UsageError("--grid and --list are for --mode sweep")
    if needed and not grid and not listed:
        raise click.UsageError("a sweep needs --grid KEY=VALUE,VALUE or --list FILE")
    return listed_points(Path(listed)) if listed else grid_points(grid) if grid else []


@click.command(epilog=EXIT_CODES)
@click.argument("spec", type=SpecFile())
@sweep_options
@set_option
@store_option
@out_option
@json_option
@click.option("--no-prefect", is_flag=True, help="Drive the runs without Prefect; everything else is the same.")
def sweep(
    spec: str,
    grid: tuple[str, ...],
    listed: str | None,
    at_once: int,
    sets: tuple[str, ...],
    store: str | None,
    out: str,
    as_json: bool,
    no_prefect: bool,
) -> int:
    """Train a run of SPEC for each point of a grid or a list, and show a table of how they went.

    A point that fails does not hold up the others; the exit code is 0 only where all succeeded. The same command again
    finds its runs and goes on with those that have not ended.
    """
    from dataclasses import asdict

    from flows.drive.train import store_at
    from flows.hosting import PREFECT_PATIENCE_S, Prefect
    from flows.recurring.sweep import sweep_words, table_lines
    from flows.sweeping import drive_sweep
    from trainer.spec import load_spec

    points = points_of(grid, listed, needed=True)
    run_spec, opened = load_spec(spec, sets), store_at(store)
    tell: Callable[[str], None] = (lambda _: None) if as_json else say
    signals = Signals(tell, sweep=True)
    prefect = Prefect(say=tell)

    def work() -> list[SweepRow]:
        signals.driving(detaches=False)
        try:
            return drive_sweep(
                run_spec, points, at_once, opened, Path(out), connect=None if no_prefect else prefect.connect, say=tell,
                stop=signals.stop, drives=signals.drives, patience_s=PREFECT_PATIENCE_S,
            )  # fmt: skip
        finally:
            prefect.close()

    rows: Sequence[SweepRow] = signals.run(work)
    if as_json:
        show([asdict(row) | {"values": row.values} for row in rows])
    else:
        say("")
        for line in (*table_lines(rows), "", sweep_words(rows)):
            say(line)
    return next((row.exit_code for row in rows if row.exit_code), 0)
