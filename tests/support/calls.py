"""Commands called in the tests' own process, through click."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from click.testing import CliRunner

from flows.cli import terminal
from flows.cli.main import exit_code_of
from flows.cli.signals import heard


@contextmanager
def signals_kept() -> Iterator[None]:
    """A command that trains has its process ignore Ctrl-C once it is through."""
    handlers = {number: signal.getsignal(number) for number in (*heard(), signal.SIGTSTP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


def outcome(arguments: list[str]) -> tuple[int, str, str]:
    """The exit code of a command in this process, its output, and what it said on stderr."""
    with signals_kept(), CliRunner().isolation() as (out, err, _):
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(errors=terminal.register())
        code = exit_code_of(arguments)
    return code, out.getvalue().decode(errors="replace"), err.getvalue().decode(errors="replace")


def called(arguments: list[str]) -> tuple[int, str]:
    """The exit code, and all that it said."""
    code, out, err = outcome(arguments)
    return code, out + err
