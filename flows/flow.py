"""The Prefect flows: `prepare`, `train`, `sweep` and `collect`, thin over plain functions. The run is in the log, not
in Prefect: a flow run that is killed loses nothing, and the next one attaches. `deployments.py` deploys them.

What the page shows of a run (task runs, log, artifacts) is written by `flows/page/`, the same for a flow that Prefect
runs and for one that a command hosts. Nothing secret is ever a parameter: a store's URL cannot hold credentials, and a
spec names a Kubernetes Secret at most.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed

from flows.care import Care
from flows.data import prepare
from flows.drive.begin import data_of, prepare_run
from flows.drive.collecting import NotCollected, collect_runs
from flows.drive.events import Outcome
from flows.drive.orders import Asked, place_order
from flows.drive.run import Board, Prepared, ask_run, load_run, run_names
from flows.drive.train import cancel, store_at
from flows.hosting import END_PATIENCE_S, Hosted, undisturbed
from flows.page import Page, end_message
from flows.prefect_api import SWEEP_FLOW, TRAIN_FLOW, Client
from flows.preparing import Mapped, task_runner
from flows.recurring.chain import LrSchedule, NothingNew, next_in_chain, unfinished
from flows.recurring.due import Overlap
from flows.recurring.sweep import sweep_words, table_lines
from flows.show.collected import collected_lines
from flows.show.lines import Lines
from flows.sweeping import hosted_sweep
from trainer.errors import SpecError
from trainer.spec import RunSpec, parse_spec

NO_RESULT: dict[str, Any] = {"persist_result": False, "result_storage": Path("prefect-results")}
"""Prefect keeps nothing that a flow gives: the run is in the log. That it names a storage all the same, which nothing
is written to, is for Prefect's engine: it opens the one that its settings or the server name for results before a flow
begins, and one that is not there, or whose library is not here, ended each flow run.
"""


class RunFailed(RuntimeError):
    """The run ended without success; the text says why and what to do."""


def flow_run_name() -> str:
    """The hotstage run's name where it is known; for a scheduled firing the spec's name and the scheduled time."""
    given = flow_run.parameters
    spec = given.get("spec")
    if spec is None:
        return str(given.get("run"))
    name = spec.name if isinstance(spec, RunSpec) else str(spec["name"])
    return f"{name}-{scheduled_suffix()}" if given.get("fresh") else name


@flow(name="prepare", **NO_RESULT)
def prepare_flow(spec: RunSpec, store: str = "", dask: str = "", again: bool = False) -> dict[str, Any]:
    """Prepare a spec's dataset, its pieces as mapped tasks; gives its description (``DatasetRef.to_map``).

    ``dask``: so many workers of a Dask cluster on this machine, or the address of one; empty: in this process.
    """
    url = store_at(store or None).url
    return prepare_pieces.with_options(task_runner=task_runner(dask))(spec, url, bool(dask), again)


@flow(name="prepare pieces", **NO_RESULT)
def prepare_pieces(spec: RunSpec, store: str, remote: bool, again: bool) -> dict[str, Any]:
    """What ``prepare`` does, in a flow of its own: a flow has one task runner."""
    say, opened = get_run_logger().info, store_at(store)
    with data_of(spec, opened) as data:
        runner, sequence, vocab = Mapped(remote), spec.train.sequence, spec.model.vocab
        return prepare(data, opened, say=say, again=again, runner=runner, sequence=sequence, vocab=vocab).to_map()


@flow(name=TRAIN_FLOW, flow_run_name=flow_run_name, log_prints=False, **NO_RESULT)
def train_flow(
    spec: RunSpec | None = None,
    store: str = "",
    run: str = "",
    sets: tuple[str, ...] = (),
    fresh: bool = False,
    out: str = "out",
    mode: Literal["fresh", "continue"] = "fresh",
    lr_schedule: LrSchedule = "extend",
    overlap: Overlap = "skip",
) -> Any:
    """Train a spec to its end, or go on with the run of that name, with ``sets`` (KEY=VALUE) either way. Completed
    only when the run succeeded; Failed with the reason when it gave up; Cancelled when it was cancelled or stopped.

    ``fresh``: each scheduled firing is a run of its own (its scheduled time joins the name). Which ``mode`` continue
    begins where the last one that succeeded ended, on the data as they are now, and ends at once where they are the
    same; ``lr_schedule`` is then extended or restarted. Where the run of an earlier firing has not ended, this firing
    goes on with that one instead, or cancels it (``overlap`` cancel).
    """
    spec = spec_to_train(spec, run, sets)
    opened = store_at(store or None)
    name = flow_run_name()
    ordered = flow_run.run_count <= 1  # a person's order; executed again it is nobody's
    order = Asked(f"flow run {flow_run.name}")
    page = Page(lambda: Client.connect(None), opened, name=name, flow_run=str(flow_run.id), warn=_printer(name))

    def say(text: str) -> None:
        page.line(text)
        _printer(name)(text)

    def begun(spec: RunSpec, board: Board) -> Prepared | NothingNew:
        if not fresh:
            return prepare_run(spec, opened, out=Path(out), say=say, board=board)
        schedule, suffix = str(deployment.name or ""), scheduled_suffix()
        older = unfinished(opened, spec.name, schedule)
        if older is not None and overlap == "cancel" and not older.endswith(suffix):
            cancel(opened, older, f"cancelled: the time of the next firing has come ({name})")
            say(f"cancelled run {older} of an earlier firing")
        elif older is not None:
            say(f"run {older} of an earlier firing has not ended: this firing goes on with it, instead of a new run")
            return load_run(opened, older)
        if mode == "continue":
            made = next_in_chain(opened, spec, schedule, suffix=suffix, lr_schedule=lr_schedule, say=say, board=board)
        else:
            made = prepare_run(spec, opened, suffix=suffix, schedule=schedule, out=Path(out), say=say, board=board)
        return place_order(opened, made, order) if isinstance(made, Prepared) and ordered else made

    def work() -> Outcome | NothingNew:
        with Hosted(opened, Path(out), page, say, patience_s=END_PATIENCE_S) as hosted:
            if spec is None:
                with hosted.board.task("compile-plan", "compile plan"):
                    prepared = ask_run(opened, run, list(sets)) if sets else load_run(opened, run)
                if sets and ordered:
                    prepared = place_order(opened, prepared, order)
            else:
                made = begun(spec, hosted.board)
                if isinstance(made, NothingNew):
                    say(str(made))
                    hosted.leave_in_peace()
                    return made
                prepared = made if fresh or not ordered else place_order(opened, made, order)
            return hosted.drive(prepared, Lines(say, prepared.spec.train.steps, every_s=10.0))

    return ended_as(undisturbed(work), opened.url)


@flow(name=SWEEP_FLOW, flow_run_name=flow_run_name, log_prints=False, **NO_RESULT)
def sweep_flow(
    spec: RunSpec,
    points: list[list[str]],
    at_once: int = 1,
    store: str = "",
    fresh: bool = False,
    out: str = "out",
) -> Any:
    """Train a run for each point (a list of KEY=VALUE settings of the spec), ``at_once`` of them; a table of results is
    an artifact of the flow run. Completed only when all of them succeeded.

    ``fresh``: each scheduled firing has runs of its own.
    """
    rows = hosted_sweep(
        spec,
        points,
        at_once,
        store_at(store or None),
        Path(out),
        flow_run=str(flow_run.id),
        name=flow_run_name(),
        suffix=scheduled_suffix() if fresh else "",
        say=_printer(flow_run_name()),
    )
    if all(row.state == "succeeded" for row in rows):
        return Completed(message=sweep_words(rows))
    if any(row.state == "cancelled" for row in rows):
        return Cancelled(message=sweep_words(rows))
    raise RunFailed("\n".join([sweep_words(rows), *table_lines(rows)]))


@flow(name="collect", **NO_RESULT)
def collect_flow(store: str = "", run: str = "", dry_run: bool = False) -> int:
    """A pass of the collector over a run, or over all of the store; gives the bytes that it deleted.

    For whoever serves this with an identity that may delete (docs/policies/collector.json). Failed where a run cannot
    be collected: the others are.
    """
    opened, say = store_at(store or None), get_run_logger().info
    size, wrong = 0, []
    for done in collect_runs(opened, [run] if run else list(run_names(opened)), dry_run=dry_run, probes=not run):
        for line in collected_lines(done):
            say(line)
        if isinstance(done, NotCollected) or done.refused:
            wrong.append(done.run)
        else:
            size += done.bytes
    if wrong:
        raise RunFailed(f"not collected: {', '.join(wrong)}; the flow run's log says why")
    return size


@flow(name="reconcile", **NO_RESULT)
def reconcile_flow(store: str = "", out: str = "out", seconds: float = 0.0) -> int:
    """Drive open runs whose drivers have died; gives how many were taken over. It looks for so many seconds (0: once),
    and ends when what it took over has ended.

    Local runs are driven on the machine on which they work: there this flow has to run.
    """
    return Care(store_at(store or None), Path(out), get_run_logger().info).run(seconds)


def spec_to_train(spec: RunSpec | None, run: str, sets: Sequence[str]) -> RunSpec | None:
    """The spec with its settings; None where the run of a name goes on. SpecError where what a person typed into
    Prefect's form says both, or neither.
    """
    if spec is None and not run:
        raise SpecError("neither spec nor run is given: type one of them")
    if spec is not None and run:
        raise SpecError(
            f"spec ({spec.name}) and run ({run}) are both given: `spec`: null goes on with that run, an empty run "
            "trains the spec"
        )
    return parse_spec(spec.model_dump(mode="json"), sets) if spec is not None and sets else spec


def _printer(name: str) -> Any:
    """Lines of this flow run for whoever watches the process that serves it."""

    def write(text: str) -> None:
        sys.stdout.write(f"{name}: {text}\n")
        sys.stdout.flush()

    return write


def ended_as(outcome: Outcome | NothingNew, store: str) -> dict[str, Any] | State[Any]:
    """The flow run's own end: a value or a word (Completed), a Cancelled state, or RunFailed."""
    if isinstance(outcome, NothingNew):
        return Completed(message=str(outcome))
    if outcome.outcome == "gave_up":
        raise RunFailed(end_message(outcome, store))
    if outcome.outcome in ("cancelled", "parked", "stopped", "superseded"):
        return Cancelled(message=end_message(outcome, store))
    return asdict(outcome)


def scheduled_suffix() -> str:
    """The flow run's scheduled time (UTC), as a run's name can hold it: 20260301t020000."""
    at: datetime | None = flow_run.scheduled_start_time
    return re.sub(r"[^0-9a-z]", "", at.strftime("%Y%m%dt%H%M%S")) if at else ""
