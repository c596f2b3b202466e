"""``hotstage evaluate``: a checkpoint's validation loss, a sample, and commands on it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import Any

import click

from flows.cli import terminal
from flows.cli.main import json_option, say, store_option


@click.command()
@click.argument("run")
@click.option("--step", type=click.IntRange(min=0), help="Step of the checkpoint (default: the newest).")
@click.option(
    "--only", multiple=True, metavar="NAME", help="Of what the spec asks for: validation, or an [[eval]]'s name."
)
@click.option("--with-parent", is_flag=True, hidden=True, help="Leave when standard input ends.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Of the engine (default: the run's).")
@store_option
@json_option
def evaluate(
    run: str,
    step: int | None,
    only: tuple[str, ...],
    with_parent: bool,
    threads: int,
    store: str | None,
    as_json: bool,
) -> int:
    """Evaluate a checkpoint of RUN, as its spec asks for: [validation] and each [[eval]].

    The same is done beside training, of every so many checkpoints; RUN may train on meanwhile. What is found is kept in
    the store: `hotstage runs show RUN`, and every tracker of RUN, has it. A command that fails says so and costs
    nothing else: exit 0.
    """
    from flows.cli.signals import stopped_by_signals
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.evaluate.evaluate import Evaluator, evaluation_lines
    from flows.show.lines import json_line

    opened = store_at(store)
    name = find_run(opened, run)
    stop = threading.Event()
    stopped_by_signals(stop, twice=True)
    if with_parent:
        threading.Thread(target=_until_alone, args=(stop,), name="parent", daemon=True).start()
    tell = (lambda _: None) if as_json else terminal.tell
    row = Evaluator(opened, name, step, stop=stop, say=tell, threads=threads).evaluate(only)
    lines = evaluation_lines(row)
    if not as_json:
        for line in lines.values():
            say(line)
        return 0
    failed = {n: r.why for n, r in row.commands.items() if r.why}
    told: dict[str, Any] = {
        "step": row.step,
        "epoch": row.epoch,
        "loss": row.loss,
        "windows": row.windows,
        "numbers": row.numbers(),
    }
    told |= {"sample": row.sample, "prompt": row.prompt, "ran": [n for n, r in row.commands.items() if not r.why]}
    say(json_line({**told, "failed": failed, "said": lines}))
    return 0


def _until_alone(stop: threading.Event) -> None:
    """Whoever started this holds the other end of standard input."""
    with contextlib.suppress(OSError, ValueError):  # it is none that can be read
        while os.read(sys.stdin.fileno(), 4096):
            pass
    stop.set()
