"""The root of the command: options that all subcommands share, errors to exit codes, lazy loading of subcommands."""

from __future__ import annotations

import contextlib
import importlib
import json
import keyword
import logging
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from flows.cli import terminal
from flows.cli.shadow import shadow
from flows.proxies import pass_loopback_by

EXIT_CODES = """
\b
Exit codes of train, sweep (of its first run that failed), runs resume and demo:
   0  the run succeeded
   1  the run was cancelled
   2  wrong command line
  65  bad or missing training data
  70  internal error (a bug)
  75  a peer, a node or the store was lost, and the run could not recover
  76  no checkpoint can be used any more; a run does not begin again by itself
  78  refused: the spec, plan, store or launch, or an order that this command cannot follow; the message names
      the value, the limit and the mend
  85  stopped on request (Ctrl-C, SIGTERM); the same command, or `hotstage runs resume RUN`, goes on from what is saved
  86  stalled
  87  loss or gradient norm became not finite
  88  a machine computes or remembers wrongly, or its GPU failed, and no other machine is left
 129  the terminal was closed; a run that works goes on by itself (131: so with Ctrl-\\)
 130  left at once by a second Ctrl-C (143: SIGTERM); what runs goes on by itself
"""

_EPILOG = f"""{EXIT_CODES}
\b
The other commands: 0 done, else of the same table; `ckpt verify` 76 where something is damaged, `ckpt diff` 1 where
the two differ, `replay` 88 where a step computed again has another result.

\b
Where things are: --store, else HOTSTAGE_STORE, else the user's data folder. A store is a folder, file:///…
or s3://bucket/prefix?endpoint=…; credentials come from the usual places of AWS tools, never from the URL.
"""

_COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "flows.cli.demo",
        "The main job end to end on this machine: prepare, train, lose a rank, recover, export.",
    ),
    "init": ("flows.cli.spec", "Write a commented spec to start from."),
    "import": ("flows.cli.bring", "Take a model in Hugging Face's form: a spec, its weights, its tokenizer."),
    "schema": ("flows.cli.spec", "Print the JSON schema of a spec."),
    "plan": ("flows.cli.plan", "Show what a spec's plan says, and which layout a cluster wants."),
    "train": ("flows.cli.train", "Train a spec to its end; recover whatever fails on the way."),
    "sweep": ("flows.cli.sweep", "Train a run for each point of a grid or a list, and show a table of them."),
    "schedule": ("flows.cli.schedule", "Serve a Prefect deployment that trains each time it fires."),
    "schedules": ("flows.cli.schedules", "List, pause, resume and remove the schedules of a Prefect server."),
    "reconcile": ("flows.cli.reconcile", "Drive open runs whose drivers have died, again and again."),
    "data": ("flows.cli.data", "Prepare datasets."),
    "runs": ("flows.cli.runs", "List, show, watch, resume, order, cancel and fork runs."),
    "logs": ("flows.cli.runs", "What the ranks of a run printed, also when they are gone."),
    "ckpt": ("flows.cli.ckpt", "List, show, verify, digest, compare, export, import, pin and collect checkpoints."),
    "replay": ("flows.cli.replay", "Compute steps of a run again, and compare them with what it recorded."),
    "evaluate": ("flows.cli.evaluate", "Validation loss, a sample and your commands on a checkpoint of a run."),
    "generate": ("flows.cli.ckpt", "Continue a text with a run's newest checkpoint."),
    "chat": ("flows.cli.chat", "Talk with a run's newest checkpoint in the terminal."),
    "report": ("flows.cli.runs", "Write a run's report as one HTML page."),
    "doctor": ("flows.cli.doctor", "Say what this machine can train on: engine, GPUs, driver, libraries."),
    "k8s": ("flows.cli.k8s", "Render, make and look at the Kubernetes objects of a run; say what a cluster lacks."),
    "debug-dump": ("flows.cli.k8s", "Write all that explains a run into one file, without secrets."),
}


class LogLines(logging.Formatter):
    """A log record as one line, whatever its message holds: of words for a person; of JSON where the command was asked
    for JSON, and in a pod, whose output is collected.
    """

    def format(self, record: logging.LogRecord) -> str:
        if not terminal.speaks_json() and "KUBERNETES_SERVICE_HOST" not in os.environ:
            text = f"{record.levelname}: {record.getMessage()}"
            if record.exc_info:
                text += f"\n{self.formatException(record.exc_info)}"
            return "".join(c if c.isprintable() else " " for c in text)
        line = {"level": record.levelname, "logger": record.name, "event": record.getMessage()}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Lazy(click.Group):
    """Subcommands are imported when they are called: `hotstage --help` takes no time."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(_COMMANDS[name][0])
        command: click.Command = getattr(module, name.replace("-", "_") + "_" * keyword.iskeyword(name))
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if not terminal.speaks_json():  # click begins a line of its own behind the terminal's ^C
                raise
            raise click.Abort from None
        except BrokenPipeError as error:  # of another program: our own output ends as OutputLost
            raise RuntimeError("a program that this command talks with left in the middle") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]}, epilog=_EPILOG)
@click.option("-v", "--verbose", count=True, help="More of what happens inside; twice for everything.")
@click.version_option(package_name="hotstage")
def cli(verbose: int) -> None:
    """Train language models through pipelines that survive.

    \b
    Begin with:   hotstage demo
    Then:         hotstage init gpt2-demo > my.toml; hotstage plan my.toml; hotstage train my.toml
    And later:    hotstage runs ls; hotstage logs RUN -f; hotstage ckpt export RUN -o folder
    """
    levels = [logging.WARNING, logging.INFO, logging.DEBUG]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLines())
    logging.basicConfig(level=levels[min(verbose, 2)], handlers=[handler])
    pass_loopback_by(os.environ)
    _leave_out_key_log()


def _leave_out_key_log() -> None:
    """SSLKEYLOGFILE, which tools that look into TLS set: where its file cannot be written every client here, S3's,
    Prefect's and the cluster's, would fail as it is made, and blame a setting of its own.
    """
    name = os.environ.get("SSLKEYLOGFILE")
    try:
        if name:
            os.close(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600))
    except OSError as error:
        del os.environ["SSLKEYLOGFILE"]
        logging.getLogger(__name__).warning(
            "SSLKEYLOGFILE is %r, which cannot be written (%s): it is left out, as no connection by TLS would be made "
            "with it; unset it, or name a file that can be",
            name,
            error.strerror,
        )


class Number(click.FloatRange):
    """A float of a range; neither infinite nor "nan", which no range holds back."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class SpecFile(click.Path):
    """The file of a spec; a folder is told what makes one of a model that lies in it."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if os.path.isdir(value):
            self.fail(
                f"{value!r} is a folder, and a spec is a TOML file; of a model in it `hotstage import "
                f"{shlex.quote(str(value))}` writes one.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


step_option = click.option("--step", type=int, help="Step of the checkpoint (default: the newest).")


def _store_asked(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    _names_store[0] = value or ""
    return value


_names_store = [""]  # the store that this command was given: what it says to type next names it too
store_option = click.option(
    "--store",
    metavar="URL",
    callback=_store_asked,
    help="Folder, file:///… or s3://… (default: HOTSTAGE_STORE).",
)


def _json_asked(_context: click.Context, _parameter: click.Parameter, value: bool) -> bool:
    terminal.speak_json(value)
    return value


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_json_asked,
    help="JSON on stdout; what else is said, errors too (exit_code), as lines of JSON on stderr.",
)
set_option = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a value of the spec, e.g. train.seed=2. Repeatable.",
)


OUT = "out"


def with_store(store: str | None, out: str = OUT) -> str:
    """What a command that is printed for a person needs to find the same store, and the same folder of ``--out``."""
    folder = f" --out {shlex.quote(out)}" if out != OUT else ""
    return (f" --store {shlex.quote(store)}" if store else "") + folder


_NEXT = re.compile(
    r"\b(hotstage (?:train|logs|replay|evaluate|generate|chat|data prepare|(?:ckpt|runs) [a-z]+) )"
    r"(RUN|SPEC|[a-z0-9][a-z0-9-]*-[0-9a-f]{6,}(?:-[a-z0-9-]+)?)(?![\w@.-])(?![^`;\n]* --store )"
)
"""A command in a text of a package below, which knows neither ``--store`` nor, now and then, the run."""


def to_type(text: str, run: str = "") -> str:
    """A text whose commands can be typed as they stand: with this command's store, and with the run where one is known.

    >>> to_type("`hotstage runs resume RUN --set limits.device_hours=…` goes on", "small-0a1b2c")
    '`hotstage runs resume small-0a1b2c --set limits.device_hours=…` goes on'
    """

    def whole(match: re.Match[str]) -> str:
        name = run if run and match[2] == "RUN" else match[2]
        return match[1] + name + with_store(_names_store[0])

    return _NEXT.sub(whole, text) if "hotstage " in text else text


def of_spec(spec: str, sets: Sequence[str], store: str | None) -> str:
    """What names the same run behind a command that is printed for a person: its spec, and what that was given."""
    return shlex.quote(spec) + "".join(f" --set {shlex.quote(text)}" for text in sets) + with_store(store)


out_option = click.option(
    "--out", default=OUT, show_default=True, help="Folder for what a run writes outside the store."
)


def write_out(path: Path, text: str) -> None:
    """A file that the user named, whole or as it was; its folder is made where it is missing."""
    from trainer.errors import OutputError
    from trainer.wire.files import kept_where

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with kept_where(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise OutputError(path, error) from error


def say(text: str) -> None:
    """A line for the person in front of the terminal."""
    click.echo(text)
    sys.stdout.flush()


def complain(text: str, **more: Any) -> None:
    """An error, as a line on stderr: of JSON where the command was asked for JSON."""
    terminal.tell(to_type(text), event="error", **more)


def show(value: Any) -> None:
    """JSON on stdout. Numbers that it has no word for (NaN, infinities) are null."""
    from flows.show.lines import plain

    click.echo(json.dumps(plain(value), indent=1, allow_nan=False))


def keep_own_rights() -> None:
    """A umask that takes rights from its own user is meant for others: with 777 this process could read nothing of what
    it writes. What is asked of the group and of others holds.
    """
    os.umask(os.umask(0o077) & 0o077)


def main() -> None:
    """Entry point: the command with its exit code, whatever it writes to."""
    terminal.prepare_streams()
    keep_own_rights()
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_ENABLED", "false")  # hotstage says which server, or starts its own
    terminal.end(exit_code_of(None))


DAMAGE_MEND = (
    "; `hotstage ckpt verify RUN` names all that is damaged, `hotstage ckpt ls RUN` the checkpoints that --step may "
    "name instead; a dataset is made again by `hotstage data prepare SPEC --again`"
)


def _lack(error: BaseException) -> str | None:
    """What this machine, this process's limits or its paths did not give; None: it was something else."""
    if isinstance(error, MemoryError):
        return "this process gets no more memory: raise the limit (ulimit -v, that of the container), or free some"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return (
            "this process gets no more threads: raise the limit (ulimit -u, ulimit -v, the container's of processes), "
            "or end some"
        )
    return shadow(error)


def exit_code_of(arguments: list[str] | None) -> int:
    """Run the command: exceptions of the packages become a message and an exit code."""
    terminal.speak_json(False)
    _names_store[0] = ""
    from checkpoint.errors import CheckpointError, Damaged
    from trainer.errors import TrainerError

    try:
        code = cli.main(arguments, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        if _asked_for_json(error, sys.argv[1:] if arguments is None else arguments):
            terminal.speak_json(True)
            complain(f"hotstage: {error.format_message()}", exit_code=error.exit_code)
            return error.exit_code
        with contextlib.suppress(terminal.OutputLost):
            error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        terminal.tell("interrupted", event="error", exit_code=130)
        return 130
    except terminal.OutputLost as error:
        return terminal.lost(error)
    except (TrainerError, CheckpointError) as error:
        mend = DAMAGE_MEND if isinstance(error, Damaged) and "hotstage " not in str(error) else ""
        complain(f"hotstage: {error}{mend}", exit_code=error.exit_code)
        return error.exit_code
    except Exception as error:
        if (lack := _lack(error)) is not None:
            complain(f"hotstage: {lack}", exit_code=78)
            return 78
        terminal.tell(traceback.format_exc().rstrip(), event="trace")
        bug = "internal error: this is a bug of hotstage; nothing in the store is lost by it"
        complain(f"hotstage: {bug}", exit_code=70)
        return 70


def _asked_for_json(error: click.ClickException, arguments: Sequence[str]) -> bool:
    """Whether JSON was asked for of a command that has it, also where its words end before that was read."""
    context = getattr(error, "ctx", None)
    knows = context is None or any(option.name == "as_json" for option in context.command.params)  # None: not read yet
    return terminal.speaks_json() or (knows and "--json" in arguments)
