"""``hotstage replay``: steps of a run computed again, and compared with what it recorded."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from flows.cli import terminal
from flows.cli.main import json_option, out_option, say, show, store_option


@click.command()
@click.argument("run")
@click.option(
    "--from",
    "first",
    type=click.IntRange(min=0),
    metavar="STEP",
    help="Of the checkpoint to begin from (default: the last before --to).",
)
@click.option(
    "--to",
    "last",
    type=click.IntRange(min=1),
    metavar="STEP",
    help="The last one to compute (default: that of the newest checkpoint).",
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Another layout: parallel.…. Repeatable.")
@store_option
@out_option
@json_option
def replay(
    run: str,
    first: int | None,
    last: int | None,
    sets: tuple[str, ...],
    store: str | None,
    out: str,
    as_json: bool,
) -> int:
    """Compute steps of RUN again, from a checkpoint, and compare.

    Every loss and gradient norm that RUN's metrics hold, bit for bit, and the state digest where there is a checkpoint
    at --to. Without the two: from the newest checkpoint but one to the newest. In the layout that RUN had on one node
    of this machine, or another with --set parallel.…. RUN may train on meanwhile: nothing of it is touched but a pin,
    which goes at the end. Exits 88 where something differs, with the first step, and the ranks and nodes that computed
    it.
    """
    import threading

    from flows.cli.signals import stopped_by_signals
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.replay.replay import replay_run
    from flows.replay.words import replay_lines

    opened = store_at(store)
    name = find_run(opened, run)
    stop = threading.Event()
    stopped_by_signals(stop, twice=True)
    report = replay_run(
        opened,
        name,
        first,
        last,
        out=Path(out),
        sets=sets,
        stop=stop,
        tell=(lambda _: None) if as_json else terminal.tell,
    )
    if as_json:
        said = {"said": list(replay_lines(report)), "exit_code": report.exit_code}
        show({**asdict(report), **said})
    else:
        for line in replay_lines(report):
            say(line)
    return report.exit_code
