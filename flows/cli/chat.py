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
    from flows.data.sources.talk import Message
    from flows.show.talk import Text

NEW = "/new"


@click.command()
@click.argument("run")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=200, show_default=True, help="The most that an answer has."
)
@click.option("--plain", is_flag=True, help="Have it continue what you write as it stands, by no chat template.")
@sampling
@step_option
@store_option
def chat(
    run: str,
    tokens: int,
    plain: bool,
    temperature: float,
    top_k: int,
    seed: int,
    step: int | None,
    store: str | None,
) -> int:
    """Talk with RUN's newest checkpoint, which remembers as much as it takes at a time.

    \b
    The chat template of its data, or of the model that it began from, writes the talk; where there is none it
    continues what you write. An answer ends with the model's end token, after --tokens, or with Ctrl-C. A line `/new`
    begins anew; Ctrl-D leaves. Nothing is trained. Without a terminal each line of standard input is answered.
    """
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.talk import Text

    opened = store_at(store)
    name = find_run(opened, run)
    with Text(opened, name, step, temperature=temperature, top_k=top_k, seed=seed) as text:
        said: list[Message] | None = None if plain or text.form is None else []
        told = f"step {text.masters.step} of {name}: it sees the newest {text.context} tokens"
        _note(f"{told}; {NEW} begins anew, Ctrl-C stops an answer, Ctrl-D leaves")
        for line in _lines():
            if line.strip() == NEW:
                text.begin()
                if said is not None:
                    said.clear()
                continue
            _answer(text, line, tokens, said)
    return 0


def _answer(text: Text, line: str, tokens: int, said: list[Message] | None) -> None:
    """Add a person's line and print what the model adds to it, until its end or Ctrl-C. ``said``: the messages so far,
    where a chat template writes them."""
    forgotten = text.forgotten
    if said is None:
        text.say(line if not text.ids or text.ids[-1] in text.ends else f"\n{line}")
    else:
        said.append({"role": "user", "content": line})
        text.ask(said)
    count, pieces = 0, []
    with first_ctrl_c() as stopped:
        for piece in text.answer(tokens):
            count += 1
            pieces.append(piece)
            click.echo(piece, nl=False)
            sys.stdout.flush()
            if stopped:
                break
    say("")
    if said is not None:
        said.append({"role": "assistant", "content": "".join(pieces)})
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
