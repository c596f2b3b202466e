"""``hotstage ckpt pin``, ``unpin`` and ``gc``: what stays in a store, and what goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from flows.cli.main import Number, complain, json_option, say, show, store_option

if TYPE_CHECKING:
    from checkpoint.collect.collector import Collected, Swept
    from checkpoint.collect.retention import Rules


@click.command("pin")
@click.argument("run")
@click.argument("name")
@click.option("--step", type=int, help="Step of the checkpoint (default: the newest).")
@store_option
def pin_checkpoint(run: str, name: str, step: int | None, store: str | None) -> int:
    """Keep a checkpoint of RUN, whatever its rules say, until `ckpt unpin RUN NAME`."""
    from checkpoint.collect.pins import pin
    from checkpoint.log import RunLog
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from flows.show.export import usable_at

    opened = store_at(store)
    found = find_run(opened, run)
    info = usable_at(opened, found, step)
    pin(RunLog(opened, found, writer="user"), info, name)
    say(f"{found}: the checkpoint of step {info.step} stays, pinned as {name}")
    return 0


@click.command("unpin")
@click.argument("run")
@click.argument("name")
@store_option
def unpin_checkpoint(run: str, name: str, store: str | None) -> int:
    """Take a pin away, also one that a killed command left (`ckpt ls RUN` shows them)."""
    from checkpoint.collect.pins import unpin
    from checkpoint.log import RunLog
    from flows.drive.run import find_run
    from flows.drive.train import store_at
    from trainer.errors import SpecError

    opened = store_at(store)
    found = find_run(opened, run)
    log = RunLog(opened, found, writer="user")
    state = log.fold().of_this_version()
    if name not in state.pins:
        there = ", ".join(sorted(state.pins)) or "none"
        raise SpecError(f"{found} has no pin {name!r}; its pins: {there}")
    unpin(log, name, state)
    say(f"{found}: the pin {name} is gone")
    return 0


@click.command("gc")
@click.argument("run", required=False)
@click.option("--dry-run", is_flag=True, help="Say what would go; write and delete nothing.")
@click.option("--last", type=click.IntRange(min=2), help="Instead of RUN's own rules: keep the newest so many.")
@click.option("--every-steps", type=click.IntRange(min=1), help="... and the first of every so many steps.")
@click.option("--every-s", type=Number(min=0), help="... and the first of every so many seconds.")
@click.option("--best", type=click.IntRange(min=1), help="... and so many of the least training loss.")
@click.option("--grace-s", type=Number(min=0), help="... objects go so long after they were given up (default: 3600).")
@store_option
@json_option
def collect_garbage(
    run: str | None,
    dry_run: bool,
    last: int | None,
    every_steps: int | None,
    every_s: float | None,
    best: int | None,
    grace_s: float | None,
    store: str | None,
    as_json: bool,
) -> int:
    """Give up the checkpoints that the rules of RUN (checkpoint.keep) do not keep, and delete what was given up before.

    Of all runs of the store where none is named. A pass may be killed at any moment, and run beside others. Without
    rules everything stays but what dead attempts left half written.
    """
    from checkpoint.collect.collector import Collected
    from flows.drive.collecting import collect_runs
    from flows.drive.run import find_run, run_names
    from flows.drive.train import store_at

    opened = store_at(store)
    asked = {"last": last, "every_steps": every_steps, "every_s": every_s, "best": best}
    names = list(run_names(opened)) if run is None else [find_run(opened, run)]
    code, told = 0, []
    passes = collect_runs(opened, names, rules=_rules(asked), dry_run=dry_run, grace_s=grace_s, probes=run is None)
    for done in passes:
        if not isinstance(done, Collected):
            complain(f"{done.run}: not collected: {done.error}", exit_code=done.error.exit_code)
            code = code or done.error.exit_code
        elif as_json:
            told.append(_as_map(done))
        else:
            for line in collected_lines(done):
                say(line)
        if isinstance(done, Collected) and done.refused:
            code = code or 76
    if as_json:
        show(told)
    elif not names:
        say(f"{opened.describe()} has no runs")
    return code


def _rules(asked: dict[str, Any]) -> Rules | None:
    from checkpoint.collect.retention import Rules

    given = {key: value for key, value in asked.items() if value is not None}
    return Rules(**given) if given else None


def collected_lines(done: Collected) -> list[str]:
    """A pass, for a person."""
    would = "would be " if done.dry_run else ""
    keeps = (
        f"keeps {len(done.kept)} checkpoint(s)" if done.rules else "keeps every checkpoint (checkpoint.keep is not set)"
    )
    lines = [f"{done.run}: {keeps}"]
    if done.rules:
        lines += [f"  {count:>6}  {why}" for why, count in sorted(Counter(done.kept.values()).items())]
    if done.refused:
        lines.append(f"  NOTHING IS GIVEN UP: {done.refused}")
    if done.given_up:
        steps = _some([f"{info.step}" for info in done.given_up])
        lines.append(f"  {would}given up: step {steps}; the objects go {done.grace_s:g} s later")
    if done.abandoned:
        steps = _some([str(step) for step, _ in done.abandoned])
        lines.append(f"  {would}given up: step {steps}, of which only a part was ever stored")
    for swept, what in ((done.deleted, f"{would}deleted"), (done.waiting, "waiting")):
        lines += _swept(swept, what)
    if done.unknowns:
        lines.append(f"  left alone, names that hotstage does not know: {_some(done.unknown, done.unknowns)}")
    if done.more:
        lines.append("  there is more than one pass deletes: run it again")
    return lines


def _swept(swept: Sequence[Swept], what: str) -> list[str]:
    lines = []
    for why in dict.fromkeys(s.why for s in swept):
        some = [s for s in swept if s.why == why]
        objects, size = sum(s.objects for s in some), sum(s.bytes for s in some)
        named = f" of step {_some([str(s.step) for s in some])}" if some[0].step >= 0 else f" of {len(some)} attempt(s)"
        wait = max(s.wait_s for s in some)
        left = f", the last in {wait:.0f} s" if 0 < wait < float("inf") else ""
        lines.append(f"  {what}: {objects} objects, {size / 1e6:.1f} MB{named} ({why}{left})")
    return lines


def _some(texts: Sequence[str], count: int | None = None) -> str:
    """The first few."""
    count = len(texts) if count is None else count
    return ", ".join(texts[:8]) + (f" and {count - 8} more" if count > 8 else "")


def _as_map(done: Collected) -> dict[str, Any]:
    def swept(some: Sequence[Swept]) -> list[dict[str, Any]]:
        return [
            {
                "step": s.step if s.step >= 0 else None,
                "epoch": s.epoch,
                "objects": s.objects,
                "bytes": s.bytes,
                "why": s.why,
                "wait_s": s.wait_s if s.wait_s < float("inf") else None,
            }
            for s in some
        ]

    return {
        "run": done.run,
        "dry_run": done.dry_run,
        "kept": [{"record": n, "why": why} for n, why in sorted(done.kept.items())],
        "given_up": [{"record": info.n, "step": info.step, "epoch": info.epoch} for info in done.given_up],
        "abandoned": [{"step": step, "epoch": epoch} for step, epoch in done.abandoned],
        "deleted": swept(done.deleted),
        "waiting": swept(done.waiting),
        "unknown": done.unknown,
        "unknowns": done.unknowns,
        "refused": done.refused,
        "more": done.more,
        "objects": done.objects,
        "bytes": done.bytes,
    }
