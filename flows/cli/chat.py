"""``hotstage chat``: talk with what a run has saved, in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from flows.cli.ckpt import sampling
from flows.cli.main import say, step_option, store_option
from flows.cli.signals import first_ctrl_c

if TYPE_CHECKING:
    from flows.show.talk import Text

NEW = "/new"


@click.command()
@click.argument("run")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=200, show_default=True, help="The most that an answer has."
)
@sampling
@step_option
@store_option
def chat(run: str, tokens: int, temperature: float, top_k: int, seed: int, step: int | None, store: str | None) -> int:
    """Talk with RUN's newest checkpoint: it continues what you write, and remembers as much as it takes at a time.

    \b
    An answer ends with the model's end token, after --tokens, or with Ctrl-C. A line `/new` begins anew; Ctrl-D leaves.
    Nothing is trained. Without a terminal each line of standard input is answered.
    """
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.talk import Text

    opened = store_at(store)
    name = find_run(opened, run)
    with Text(opened, name, step, temperature=temperature, top_k=top_k, seed=seed) as text:
        told = f"step {text.masters.step} of {name}: it sees the newest {text.context} tokens"
        _note(f"{told}; {NEW} begins anew, Ctrl-C stops an answer, Ctrl-D leaves")
        for line in _lines():
            if line.strip() == NEW:
                text.begin()
                continue
            _answer(text, line, tokens)
    return 0


def _answer(text: Text, line: str, tokens: int) -> None:
    """Add a person's line and print what the model adds to it, until its end or Ctrl-C."""
    forgotten = text.forgotten
    text.say(line if not text.ids or text.ids[-1] in text.ends else f"\n{line}")
    count = 0
    with first_ctrl_c() as stopped:
        for piece in text.answer(tokens):
            count += 1
            click.echo(piece, nl=False)
            sys.stdout.flush()
            if stopped:
                break
    say("")
    if stopped:
        _note("stopped")
    elif count == tokens:
        _note(f"after --tokens {tokens}")
    if text.forgotten and not forgotten:
        _note(f"the oldest {text.forgotten} tokens are forgotten from here on ({NEW} begins anew)")


def _lines() -> Iterator[str]:
    """What the person writes, line by line, until Ctrl-D; Ctrl-C gives the line up."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (`input` edits lines with it)
    while True:
        try:
            line = input("> ")
        except EOFError:
            say("")
            return
        except KeyboardInterrupt:
            say("")
            _note("Ctrl-D leaves")
            continue
        if line:
            yield line


def _note(text: str) -> None:
    """A word of the command's own, at a terminal."""
    if sys.stdin.isatty():
        click.echo(click.style(f"({text})", dim=True), err=True)
