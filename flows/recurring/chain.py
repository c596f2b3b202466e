"""The runs of a schedule, as their store tells: which one still goes on, and what the next one begins from.

A scheduled run's name is its spec's, six digits of its What, and its firing's time; its object in the store's list of
runs names the schedule. So a schedule needs no memory of its own: whoever fires next, on whatever machine, finds the
same. ADR 23 says why a chain is of forks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from checkpoint.keys import INDEX
from checkpoint.log import CheckpointInfo, RunLog, RunState
from checkpoint.store import Store
from flows.drive.begin import prepare_run
from flows.drive.fork import Parent, begin_child, dataset_of_child
from flows.drive.run import Board, NoBoard, Prepared, index_entry, load_what, opened_again, ready_store
from trainer.errors import SpecError
from trainer.spec import RunSpec, parse_spec

LrSchedule = Literal["extend", "restart"]
_SCHEDULED = re.compile(r"(?P<spec>.+)-[0-9a-f]{6}-(?P<at>\d{8}t\d{6})")


@dataclass(frozen=True)
class NothingNew:
    """The data are those of the last run: there is nothing to continue with."""

    run: str
    step: int
    dataset: str

    def __str__(self) -> str:
        return (
            f"nothing new: the data are those of run {self.run} (dataset {self.dataset[:12]}), which ended at step "
            f"{self.step}; no run was started"
        )


def scheduled_runs(store: Store, spec_name: str, schedule: str) -> Iterator[str]:
    """The runs that firings of this schedule began, the newest first."""
    found = []
    for info in store.list(f"{INDEX}{spec_name}-"):
        name = info.key.removeprefix(INDEX)
        match = _SCHEDULED.fullmatch(name)
        if match is not None and match["spec"] == spec_name:
            found.append((match["at"], name))
    for _, name in sorted(found, reverse=True):
        whose = str(index_entry(store, name).get("schedule", ""))
        if whose in ("", schedule):  # older versions did not say whose it is
            yield name


def unfinished(store: Store, spec_name: str, schedule: str) -> str | None:
    """The newest of the schedule's runs that has begun, where it has not ended: its driver was killed, or works."""
    for run in scheduled_runs(store, spec_name, schedule):
        state = RunLog(store, run).fold(quick=True).of_this_version()
        if state.n == 0:
            continue  # its driver was killed before it began
        return run if state.ended is None or opened_again(state) else None
    return None


def last_succeeded(store: Store, spec_name: str, schedule: str) -> tuple[str, RunState, CheckpointInfo] | None:
    """The newest of the schedule's runs that succeeded and has a usable checkpoint, with its last one."""
    for run in scheduled_runs(store, spec_name, schedule):
        state = RunLog(store, run).fold(quick=True).of_this_version()
        if state.ended is None or state.ended.outcome != "succeeded":
            continue
        newest = state.at_step()
        if newest is not None:
            return run, state, newest
    return None


def next_in_chain(
    store: Store,
    spec: RunSpec,
    schedule: str,
    *,
    suffix: str,
    lr_schedule: LrSchedule = "extend",
    say: Callable[[str], None] = lambda _: None,
    board: Board | None = None,
) -> Prepared | NothingNew:
    """The run of this firing: a fork of the last one's last checkpoint that trains ``train.steps`` more, on the data as
    they are now; the first of a chain begins as any run does.

    The tokenizer is the first run's for all of them: another one would give the model's rows other meanings. SpecError
    where the spec cannot go on from what is there.
    """
    board = board or NoBoard()
    ready_store(store)
    last = last_succeeded(store, spec.name, schedule)
    if last is None:
        return prepare_run(spec, store, suffix=suffix, schedule=schedule, say=say, board=board)
    run, state, found = last
    parent = Parent(run, state, found, load_what(store, run))
    with board.task("prepare-data", "prepare data") as told:
        dataset = dataset_of_child(store, parent, spec, say)
        told(f"{dataset.tokens:,} tokens, dataset {dataset.digest[:12]}")
    if dataset.digest == parent.what["data"]["digest"]:
        return NothingNew(run, found.step, dataset.digest)
    with board.task("compile-plan", "compile plan") as told:
        child = lengthened(heir(spec, parent.what), found.step, parent.schedule_start, lr_schedule)
        prepared = begin_child(store, parent, child, dataset, suffix=suffix, schedule=schedule)
        told(f"from step {found.step} of {run} to step {child.train.steps}")
    say(f"continues run {run} from step {found.step} to step {child.train.steps}, on {dataset.tokens:,} tokens")
    return prepared


def heir(spec: RunSpec, what: Mapping[str, Any]) -> RunSpec:
    """The spec with what a child has of its parent's What: whose weights, how many tokens; how documents share a
    sequence, where the spec leaves it open (a chain that an older version began goes on as it began)."""
    model = {key: what["model"].get(key) for key in ("init", "vocab")}
    data = {"packing": spec.data.packing or what["data"]["packing"]}
    return spec.model_copy(
        update={"model": spec.model.model_copy(update=model), "data": spec.data.model_copy(update=data)}
    )


def lengthened(spec: RunSpec, step: int, start: int, lr_schedule: LrSchedule) -> RunSpec:
    """The spec of a run that begins at ``step`` and does ``train.steps`` of its own. ``start``: where the parent's
    learning-rate schedule began.

    extend: that schedule goes on, over all steps so far and these; restart: it begins here, warm-up and all.
    """
    tree = spec.model_dump(mode="json")
    train = tree["train"]
    train["steps"] += step
    train["schedule"]["start"] = start if lr_schedule == "extend" else step
    curve = spec.train.schedule
    if curve.kind == "cosine" and curve.decay and not spec.train.optimizer.min_lr:
        ends = train["schedule"]["start"] + curve.decay
        if ends <= step:
            raise SpecError(
                f"the learning rate of train.schedule is 0 from step {ends} on (decay {curve.decay}, min_lr 0), and "
                f"the run would begin at step {step}: leave decay out, so that the curve grows with the steps, set "
                "train.optimizer.min_lr, or take --lr-schedule restart"
            )
    return parse_spec(tree, origin="the next run")
