"""``hotstage ckpt pin``, ``unpin`` and ``gc``: what stays in a store, and what goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from flows.cli.main import Number, complain, json_option, say, show, step_option, store_option

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Schedule

    from checkpoint.collect.retention import Rules


@click.command("pin")
@click.argument("run")
@click.argument("name")
@step_option
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
    from checkpoint.keys import is_run
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
    if name.startswith("fork-") and is_run(name):
        child = RunLog(opened, name.removeprefix("fork-")).fold(quick=True)
        parent = child.parent
        if parent is not None and parent["run"] == found and not child.restore_candidates():
            say(
                f"{child.run} has saved nothing of its own: once that checkpoint is given up it cannot begin; "
                f"`hotstage ckpt pin {found} {name} --step {parent['step']}` keeps it"
            )
    return 0


@click.command("gc")
@click.argument("run", required=False)
@click.option("--dry-run", is_flag=True, help="Say what would go; write and delete nothing.")
@click.option("--last", type=click.IntRange(min=2), help="Instead of RUN's own rules: keep the newest so many.")
@click.option("--every-steps", type=click.IntRange(min=1), help="... and the first of every so many steps.")
@click.option("--every-s", type=Number(min=1), help="... and the first of every so many seconds.")
@click.option("--best", type=click.IntRange(min=1), help="... and so many of the least training loss.")
@click.option(
    "--grace-s", type=Number(min=0), help="Objects go so long after they were given up (default: RUN's own, or 3600)."
)
@click.option("--cron", help='Serve a Prefect deployment that does this each time it fires, e.g. "0 * * * *".')
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
    cron: str | None,
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
    from flows.show.collected import collected_lines, collected_map

    opened = store_at(store)
    asked = {"last": last, "every_steps": every_steps, "every_s": every_s, "best": best}
    if cron is not None:
        if grace_s is not None or dry_run or any(value is not None for value in asked.values()):
            raise click.UsageError("--cron collects by the rules of the runs: leave the other options out")
        return _serve(opened.url, find_run(opened, run) if run else "", cron)
    names = list(run_names(opened)) if run is None else [find_run(opened, run)]
    code, told = 0, []
    passes = collect_runs(opened, names, rules=_rules(asked), dry_run=dry_run, grace_s=grace_s, probes=run is None)
    for done in passes:
        if not isinstance(done, Collected):
            complain(f"{done.run}: not collected: {done.error}", exit_code=done.error.exit_code)
            code = code or done.error.exit_code
        elif as_json:
            told.append(collected_map(done))
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


def _serve(store_url: str, run: str, cron: str) -> int:
    from flows.cli.schedule import Firing, serve_fired
    from flows.serve import COLLECT

    def make(when: Schedule, told: str) -> RunnerDeployment:
        from flows.deployments import collecting

        return collecting(store_url, run, when, told)

    return serve_fired(make, "collect", Firing(cron), entrypoint=COLLECT)


def _rules(asked: dict[str, Any]) -> Rules | None:
    from checkpoint.collect.retention import Rules

    given = {key: value for key, value in asked.items() if value is not None}
    return Rules(**given) if given else None
