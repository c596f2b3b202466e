"""``hotstage runs``, ``logs`` and ``report``: what a store knows of its runs."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.cli.main import (
    EXIT_CODES,
    Number,
    json_option,
    out_option,
    say,
    set_option,
    show,
    store_option,
    with_store,
    write_out,
)
from flows.cli.watch import watch

if TYPE_CHECKING:
    from flows.drive.amend import Wish

CHECKPOINTS_SHOWN = 20


@click.group()
def runs() -> None:
    """List, show, watch, resume, order, cancel and fork runs."""


class Batches(click.ParamType[tuple[int, int]]):
    """Numbers of batches: 121-140, or one."""

    name = "FIRST-LAST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        found = re.fullmatch(r"\s*(\d{1,15})\s*(?:-\s*(\d{1,15})\s*)?", str(value))
        if found is None:
            self.fail(f"{value!r} is no range of batches; write it as 121-140, or 121 for one.", param, ctx)
        return int(found[1]), int(found[2] or found[1])


_AMENDS: tuple[Callable[..., Any], ...] = (
    click.option(
        "--skip",
        "skip",
        type=Batches(),
        multiple=True,
        metavar="FIRST-LAST",
        help="Batches to pass over: batch N is what step N reads where nothing is skipped. Repeatable.",
    ),
    click.option(
        "--rollback-to", type=click.IntRange(min=0), metavar="STEP", help="Go on from this older checkpoint (0: start)."
    ),
    click.option("--lr-scale", type=Number(min=0), metavar="FACTOR", help="Of the scheduled rate, above 0, at most 1."),
    click.option(
        "--from-step",
        type=click.IntRange(min=1),
        metavar="STEP",
        help="First step of --lr-scale (default: where the run goes on).",
    ),
    click.option("--steps", type=click.IntRange(min=1), metavar="N", help="End after N steps in all."),
)


def amend_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a command may ask of a run's numbers."""
    for option in reversed(_AMENDS):
        command = option(command)
    return command


def _wish(
    skip: tuple[tuple[int, int], ...],
    rollback_to: int | None,
    lr_scale: float | None,
    from_step: int | None,
    steps: int | None,
) -> Wish:
    from flows.drive.amend import Wish

    return Wish(rollback_to, skip, lr_scale, from_step, steps)


STATES = ("planned", "open", "succeeded", "gave up", "cancelled", "parked", "unreadable", "gone")


class Since(click.ParamType[float]):
    """A moment: a date, or so long ago. Seconds since 1970."""

    name = "WHEN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from datetime import datetime

        ago = re.fullmatch(r"\s*(\d{1,6})\s*([smhdw])\s*", str(value))
        if ago is not None:
            return time.time() - int(ago[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}[ago[2]]
        try:
            return datetime.fromisoformat(str(value).strip()).timestamp()  # of this machine's zone where none is said
        except (ValueError, OverflowError, OSError):
            self.fail(f"{value!r} is no moment; write a date such as 2026-11-01, or so long ago: 7d, 12h.", param, ctx)


@runs.command("ls")
@click.option("--owner", metavar="NAME", help="Those that NAME answers for (user, or user@host).")
@click.option("--since", type=Since(), metavar="WHEN", help="Those that began since then: 7d, 12h, 2026-11-01.")
@click.option("--state", type=click.Choice(STATES), help="Those that stand so.")
@store_option
@json_option
def list_runs(owner: str | None, since: float | None, state: str | None, store: str | None, as_json: bool) -> int:
    """Every run of the store: where it stands, who answers for it, and what it used.

    Device hours are ranks times hours, from an attempt's record to its newest step; of these the lost ones are start-up
    after a failure and steps that were done twice.
    """
    from flows.drive.run import run_names
    from flows.drive.train import store_at
    from flows.show.facts import summaries

    def asked_for(row: Mapping[str, Any]) -> bool:
        theirs = owner is None or owner in (row["owner"], row["owner"].partition("@")[0])
        return theirs and (since is None or (row["began"] or 0.0) >= since) and (state is None or row["state"] == state)

    opened = store_at(store)
    every = summaries(opened, list(run_names(opened)))
    rows = [row for row in every if asked_for(row)]
    if as_json:
        show(rows)
        return 0
    if not rows:
        say(f"none of the {len(every)} runs in {opened.describe()}" if every else f"no runs in {opened.describe()}")
        return 0
    width = max(36, *(len(row["run"]) for row in rows))
    queued = any(row["queue"] or row["priority"] for row in rows)
    say(
        f"{'run':<{width}} {'state':<9} {'saved step':>10} {'of':>8} {'attempts':>8} {'hours':>9} {'lost':>7}  owner"
        + ("  queue, priority" if queued else "")
    )
    for row in rows:
        place = ", ".join(filter(None, (row["queue"], row["priority"])))
        say(
            f"{row['run']:<{width}} {row['state']:<9} {row['saved_step']:>10} {row['steps']:>8} {row['attempts']:>8} "
            f"{row['device_hours']:>9.2f} {row['lost_hours']:>7.2f}  {row['owner'] or '-'}"
            + (f"  {place}" if place else "")
        )
    return 0


@runs.command("show")
@click.argument("run")
@store_option
@json_option
def show_run(run: str, store: str | None, as_json: bool) -> int:
    """One run's orders, attempts, checkpoints and end.

    Of each order who gave it, of each attempt why it began. Exits 76 where a record of its log cannot be read: what is
    shown ends before that.
    """
    from checkpoint.errors import Damaged
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.facts import details

    opened = store_at(store)
    told = details(opened, find_run(opened, run))
    code = Damaged.exit_code if told["unreadable"] else 0
    if as_json:
        show(told)
        return code
    say(f"{told['run']}: {told['state']}, step {told['saved_step']} of {told['steps']} saved")
    if told["reason"]:
        say(f"  {told['reason']}")
    if parent := told["parent"]:
        say(f"  it begins from step {parent['step']} of {parent['run']}")
    for part in told["mixed"]:
        say(
            f"  of dataset {part['dataset'][:12]}: {part['samples']:,} samples read, {part['passes']:.2f} passes; now "
            f"{part['weight']} in {part['of']}"
        )
    for order in told["orders"]:
        say(f"  order {order['record']:>5}  by {order['by']} ({order['via']}): {order['text']}")
    replays = told["replays"]
    if replays["steps"]:
        say(f"  {replays['steps']} step(s) computed again: " + ("DIFFERENT" if replays["differ"] else "the same"))
    for found in replays["differ"]:
        lines = str(found.get("said", "")).splitlines()  # of a hint: whatever it holds, it is shown as text
        say("\n".join("    " + "".join(c if c.isprintable() else " " for c in line) for line in lines))
    for row in told["evaluations"]:
        own = {name: value for name, value in row.items() if value and name not in ("step", "failed")}
        numbers = "  ".join(f"{name} {value}" for name, value in own.items())
        said = "  ".join(filter(None, (numbers, f"failed: {row['failed']}" if row.get("failed") else "")))
        say(f"  evaluated at step {row['step']:>6}  " + "".join(c if c.isprintable() else " " for c in said))
    layout = ""
    for attempt in told["attempts_list"]:
        why = attempt["reason"] + (f": {attempt['cause']}" if attempt["cause"] else "")
        say(f"  attempt {attempt['attempt']:>3}  from step {attempt['step']:>6}  {attempt['from']:<10}  {why}")
        if attempt["layout"] != layout:
            layout = attempt["layout"]
            say(f"{'':>14}{layout}" + (", because of no room for more" if attempt["fallback"] else ""))
    _say_checkpoints(told["run"], told["checkpoints"], store)
    return code


def _say_checkpoints(run: str, checkpoints: list[dict[str, Any]], store: str | None) -> None:
    """The newest of those that are kept; of the others how many."""
    kept = [c for c in checkpoints if not c["given_up"]]
    if len(kept) > CHECKPOINTS_SHOWN:
        more = f"hotstage ckpt ls {run}{with_store(store)}"
        say(f"  {len(kept) - CHECKPOINTS_SHOWN:,} older: {more}")
    for checkpoint in kept[-CHECKPOINTS_SHOWN:]:
        flag = "" if checkpoint["usable"] else "  (not usable)"
        flag += "  (left: the run went on from an earlier step)" if checkpoint["left"] else ""
        say(
            f"  checkpoint at step {checkpoint['step']:>6}  attempt {checkpoint['attempt']:>3}  "
            f"{checkpoint['state_digest']}{flag}"
        )
    if gone := len(checkpoints) - len(kept):
        say(f"  and {gone} checkpoint(s) that its rules gave up")


runs.add_command(watch)


@runs.command(epilog=EXIT_CODES)
@click.argument("run")
@set_option
@amend_options
@store_option
@out_option
@json_option
@click.option("--no-prefect", is_flag=True, help="Drive the run without Prefect.")
@click.option("--begin-anew", is_flag=True, help="Begin again at step 0 where no checkpoint can be used any more.")
def resume(
    run: str,
    sets: tuple[str, ...],
    store: str | None,
    out: str,
    as_json: bool,
    no_prefect: bool,
    begin_anew: bool,
    **amends: Any,
) -> int:
    """Go on with RUN from its newest state, also where it had ended without success.

    With another layout where --set parallel.… or launch.… says so, or other numbers (--skip, --rollback-to, --lr-scale,
    --steps): that is an order, and whatever else drives RUN follows it. Failures before this command do not count any
    more.
    """
    from flows.cli.train import host
    from flows.drive.orders import Asked, place_order
    from flows.drive.run import Board, Prepared, ask_run, find_run
    from flows.drive.train import store_at

    opened = store_at(store)
    name = find_run(opened, run)
    asked = Asked("runs resume", again=True, anew=begin_anew, wish=_wish(**amends))

    def make(_board: Board, _tell: Callable[[str], None]) -> Prepared:
        return place_order(opened, ask_run(opened, name, sets), asked)

    return host(make, store, Path(out), as_json, not no_prefect)


@runs.command()
@click.argument("run")
@set_option
@amend_options
@store_option
@json_option
def order(run: str, sets: tuple[str, ...], store: str | None, as_json: bool, **amends: Any) -> int:
    """Order RUN to go on otherwise, and leave: whatever drives it follows.

    What is trained stays as it was written at RUN's birth, but for batches to skip, a lower rate and another end; its
    layout and how often it saves change with --set. An order that changes numbers begins at a checkpoint, the newest or
    the one of --rollback-to, and RUN goes on from there. It opens a run that had ended.
    """
    from checkpoint.log import RunLog
    from flows.drive.orders import Asked, describe, place_order
    from flows.drive.run import ask_run, find_run, opened_again
    from flows.drive.train import store_at

    wish = _wish(**amends)
    if not wish and not sets:
        raise click.UsageError("say what to order: --set, --skip, --rollback-to, --lr-scale or --steps")
    opened = store_at(store)
    name = find_run(opened, run)
    before = RunLog(opened, name).fold(quick=True).n
    place_order(opened, ask_run(opened, name, sets), Asked("runs order", again=True, wish=wish))
    state = RunLog(opened, name).fold()
    told = [o for o in describe(state) if o["record"] > before and o["via"] == "runs order"]
    if as_json:
        show(told[-1] if told else None)
    elif told:
        say(f"{name}: {told[-1]['text']} (log record {told[-1]['record']})")
        say(f"whatever drives {name} follows; where nothing does: hotstage runs resume {name}{with_store(store)}")
    elif state.ended and state.ended.outcome == "succeeded" and not opened_again(state):
        say(f"{name} has succeeded, and nothing is left to do: --steps N or --rollback-to STEP orders more")
    else:
        say(f"{name}: nothing to order, it is so already")
    return 0


@runs.command()
@click.argument("run")
@store_option
def cancel(run: str, store: str | None) -> int:
    """End RUN; its checkpoints stay.

    Its processes leave within seconds. `hotstage runs resume RUN` opens it again.
    """
    from flows.drive.run import find_run
    from flows.drive.train import cancel as end
    from flows.drive.train import store_at

    opened = store_at(store)
    name = find_run(opened, run)
    say(f"{name}: cancelled" if end(opened, name) else f"{name}: had already ended")
    return 0


@runs.command()
@click.argument("run")
@click.option("--step", type=int, help="Step of the checkpoint to start from (default: the newest).")
@set_option
@store_option
@out_option
@json_option
@click.option("--no-prefect", is_flag=True, help="Drive the run without Prefect.")
def fork(
    run: str, step: int | None, sets: tuple[str, ...], store: str | None, out: str, as_json: bool, no_prefect: bool
) -> int:
    """Start another run from a checkpoint of RUN.

    With --set changes to what is trained; nothing is copied.
    """
    from flows.cli.train import host
    from flows.drive.fork import fork_run
    from flows.drive.orders import Asked, place_order
    from flows.drive.run import Board, Prepared, find_run
    from flows.drive.train import store_at

    opened = store_at(store)
    name = find_run(opened, run)

    def make(_board: Board, tell: Callable[[str], None]) -> Prepared:
        return place_order(opened, fork_run(opened, name, step, sets, say=tell), Asked("runs fork"))

    return host(make, store, Path(out), as_json, not no_prefect)


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Follow: go on printing new output.")
@click.option("--rank", type=click.IntRange(min=0), default=0, show_default=True, help="Whose output.")
@click.option("--attempt", type=click.IntRange(min=1), help="Number of the attempt (default: the newest).")
@click.option("--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines.")
@store_option
def logs(run: str, follow: bool, rank: int, attempt: int | None, tail: int | None, store: str | None) -> int:
    """What a rank of RUN printed: the last 4 MiB are kept, also when its processes and its node are gone."""
    from checkpoint.log import RunLog
    from flows.drive.live import OutputFollower
    from flows.drive.run import find_run
    from flows.drive.train import store_at

    opened = store_at(store)
    name = find_run(opened, run)
    state = RunLog(opened, name).fold()
    if attempt is not None and attempt > len(state.attempts):
        raise click.UsageError(f"{name} has {len(state.attempts)} attempt(s); there is no attempt {attempt}")
    while follow and not state.attempts:
        time.sleep(0.25)
        state = RunLog(opened, name).fold(state)
    if not state.attempts:
        click.echo(f"{name} has no attempt yet: nothing was printed", err=True)
        return 0
    number = attempt or len(state.attempts)
    epoch, ranks = state.attempts[number - 1].epoch, state.attempts[number - 1].ranks
    if rank >= ranks:
        raise click.UsageError(f"attempt {number} of {name} has ranks 0 to {ranks - 1}, not {rank}")
    follower = OutputFollower(opened, name, epoch, rank)
    data = follower.poll()
    if tail is not None:
        data = b"".join(data.splitlines(keepends=True)[-tail:]) if tail > 0 else b""
    if not data and not follow:
        click.echo(f"rank {rank} of attempt {number} has no output in the store", err=True)
    sys.stdout.buffer.write(data)
    sys.stdout.flush()
    while follow:
        state = RunLog(opened, name).fold(state)
        if attempt is None and state.epoch != follower.epoch:
            click.echo(f"--- attempt {len(state.attempts)}", err=True)
            follower = OutputFollower(opened, name, state.epoch, rank)
        fresh = follower.poll()
        sys.stdout.buffer.write(fresh)
        sys.stdout.flush()
        if state.ended and not fresh:
            return 0
        time.sleep(0.25)
    return 0


@click.command()
@click.argument("run")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="The page to write.")
@store_option
@json_option
def report(run: str, output: str, store: str | None, as_json: bool) -> int:
    """Write RUN's report as one self-contained HTML page."""
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.facts import report_facts
    from flows.show.report import render

    opened = store_at(store)
    facts = report_facts(opened, find_run(opened, run))
    write_out(Path(output), render(facts))
    if as_json:
        told: dict[str, Any] = asdict(facts)
        show({k: v for k, v in told.items() if not k.endswith("_svg")})
    else:
        say(f"written: {output}")
    return 0
