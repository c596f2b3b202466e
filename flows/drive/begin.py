"""From a spec to a run that is ready to be driven: its data, its weights where they are from elsewhere, its plan, its
identity in the store. Plain functions, no Prefect, no processes."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from checkpoint.errors import Damaged
from checkpoint.keys import INDEX, is_run, spec_key
from checkpoint.log import RunLog
from checkpoint.store import Store
from flows.data import load_tokenizer, prepare, validation_of
from flows.data.sources import open_source
from flows.drive.begin_from import begin
from flows.drive.evaluations import NO_DATA, own_data
from flows.drive.room import lacking_memory
from flows.drive.run import (
    Board,
    NoBoard,
    Prepared,
    as_begun,
    check_layouts,
    create_run,
    load_what,
    ready_store,
    run_name,
)
from flows.drive.their_tokenizer import check_tokenizer, tokenizer_of, with_tokenizer
from flows.drive.weights import weights_of
from flows.tracking.writers import check_trackers
from trainer.errors import DatasetError, PlanError, SpecError
from trainer.local_launch import ready_to_launch
from trainer.plan import compile_plan
from trainer.spec import DataSpec, RunSpec, what_digest, what_map
from trainer.spec_sections import ScheduleSpec

log = logging.getLogger(__name__)

_LOOKED_AT = 32
"""Runs of a name whose specs are compared with that of a new one: a request each."""
_GPUS = ("/dev/nvidiactl", "/dev/dxg")


def _check_room(prepared: Prepared) -> None:
    """PlanError where a new run of local processes takes more memory than this machine has free. Where there may be
    GPUs, and none are asked for, the node decides."""
    spec = prepared.spec
    if spec.launch.target != "local" or (spec.parallel.device == "auto" and any(map(os.path.exists, _GPUS))):
        return
    if lack := lacking_memory(prepared):
        raise PlanError(
            f"the plan needs {lack}; `hotstage plan` shows for what: take a smaller microbatch, --set "
            "parallel.recompute=layer, checkpoint.slots=2, a smaller model, or another machine"
        )


def _check_evaluations(prepared: Prepared, store: Store, say: Callable[[str], None]) -> None:
    """What evaluations read and start, before the first step: their first look would be at a checkpoint of hours later.
    DatasetError or SpecError where there is nothing to validate on; a word on a program that is not there."""
    for command in prepared.spec.eval:
        if shutil.which(command.command[0]) is None:
            say(
                f"[[eval]] {command.name}: there is no program {command.command[0]!r} in PATH here; install it where "
                "the run is driven, or its evaluations will fail (they cost the run nothing)"
            )
    wanted = prepared.spec.validation
    if not wanted.every:
        return
    if not wanted.source and validation_of(store, prepared.dataset) is None:
        raise SpecError(f"validation.every is {wanted.every}, and {NO_DATA}")
    if wanted.source and not wanted.source.startswith("dataset:"):
        try:
            open_source(own_data(wanted)).look()
        except DatasetError as error:
            raise DatasetError(f"validation.source: {error}") from error


def _tell_left(prepared: Prepared, store: Store, say: Callable[[str], None]) -> None:
    """A word on runs of the same spec but for the corpus, which have not ended, or for the number of steps: who comes
    back after a file has changed, or wants a run to go on, begins anew."""
    name, mine = prepared.spec.name, what_map(prepared.spec, prepared.dataset)
    for info in islice(store.list(f"{INDEX}{name}-"), _LOOKED_AT):
        run = info.key.removeprefix(INDEX)
        if run.rpartition("-")[0] != name or not is_run(run):
            continue
        try:
            theirs = load_what(store, run)
            data = _but_for_data(theirs) == _but_for_data(mine)
            if not data and _but_for_steps(theirs) != _but_for_steps(mine):
                continue
        except (SpecError, Damaged):  # it says so itself
            continue
        state, steps = RunLog(store, run).fold(quick=True), prepared.spec.train.steps
        saved = state.at_step(None)
        if saved is None or (state.ended is not None if data else steps <= saved.step):
            continue
        train, why = prepared.spec.train, f"has the same spec but for train.steps ({theirs['train']['steps']})"
        goes_on = f"resume {run} --steps {steps}"
        if data:
            why = "has not ended, its spec is the same and its data are others, so the corpus has changed"
            goes_on = f"resume {run}"
        elif train.schedule.kind == "cosine" and train.optimizer.min_lr == 0.0:  # its own curve ends at 0
            goes_on = f"fork {run} --set train.steps={steps}"
        say(
            f"run {prepared.run} is a new one: {run} (saved at step {saved.step}) {why}; "
            f"`hotstage runs {goes_on} --store {shlex.quote(store.url)}` goes on with it"
        )


def _but_for_data(what: Mapping[str, Any]) -> dict[str, Any]:
    """A What without what the data make of it."""
    return {**what, "model": {**what["model"], "vocab": 0}, "data": {**what["data"], "digest": ""}}


def _but_for_steps(what: Mapping[str, Any]) -> dict[str, Any]:
    return {**what, "train": {**what["train"], "steps": 0}}


@contextmanager
def data_of(spec: RunSpec, store: Store) -> Iterator[DataSpec]:
    """The spec's data. Where weights come from elsewhere and no tokenizer is named, theirs comes along."""
    init, alone = spec.model.init, spec.data.tokenizer is not None
    with with_tokenizer(spec.data, None if init is None or alone else tokenizer_of(store, init)) as data:
        yield data


def _check_schedule(schedule: ScheduleSpec) -> None:
    """Of a run that begins at step 0."""
    if schedule.start:
        raise SpecError(
            f"train.schedule.start {schedule.start}: this run begins at step 0, with its learning-rate "
            "schedule; leave it out (a fork of another run's checkpoint may have one that begins later)"
        )
    if schedule.kind == "constant" and schedule.decay:
        log.warning(
            'train.schedule.decay %d is not looked at: a schedule of kind "constant" never falls; take kind = "wsd", '
            "or leave it out",
            schedule.decay,
        )


def prepare_run(
    spec: RunSpec,
    store: Store,
    *,
    suffix: str = "",
    schedule: str = "",
    out: Path | None = None,
    say: Callable[[str], None] = log.info,
    board: Board | None = None,
) -> Prepared:
    """Make the dataset (or find it), resolve the spec, compile the plan, and create the run's identity in the store.

    Where ``model.init`` says so the run begins from weights that lie elsewhere: they are looked through before anything
    is written, and stored before the run can be driven. ``suffix`` joins the run's name (a schedule gives its time),
    ``schedule`` names the one that it is a firing of. ``out``: where it will be driven; whether local nodes can work
    there is seen before all else. Idempotent: the same spec finds the same run.
    """
    from k8s.render import check_fabric

    board = board or NoBoard()
    check_fabric(spec)
    check_trackers(spec.track)
    _check_schedule(spec.train.schedule)
    if out is not None and spec.launch.target == "local":
        ready_to_launch(out)
    ready_store(store)
    asked, weights = spec, None
    if spec.model.init is not None:
        with board.task("look-at-weights", "look at the weights") as told:
            say(f"weights: looking through {spec.model.init}")
            weights = weights_of(store, spec.model)
            if weights is not None:
                known = {"init": weights.init, "vocab": spec.model.vocab or weights.vocab}
                spec = spec.model_copy(update={"model": spec.model.model_copy(update=known)})
            told(str(spec.model.init))
    with board.task("prepare-data", "prepare data") as told:
        with data_of(asked, store) as data:
            dataset = prepare(data, store, say=say, sequence=spec.train.sequence, vocab=asked.model.vocab)
        told(f"{dataset.size_words}, dataset {dataset.digest[:12]}")
    if weights is not None:
        tokenizer = load_tokenizer(store, dataset)
        check_tokenizer(weights.place, weights.vocab, weights.tokenizer, tokenizer, dataset.vocab)
    with board.task("compile-plan", "compile plan") as told:
        resolved = as_begun(spec, dataset, store, suffix, say)
        what = what_digest(resolved, dataset)
        run = run_name(resolved, dataset, suffix)
        plan = compile_plan(resolved, dataset, what)
        prepared = Prepared(run, resolved, dataset, what, plan, schedule)
        check_layouts(prepared)
        if store.head(spec_key(run)) is None:
            _check_room(prepared)
            _check_evaluations(prepared, store, say)
            if not suffix:
                _tell_left(prepared, store, say)
        if resolved.model.init is None:
            create_run(prepared, store)
        told(f"{prepared.ranks} rank(s) on {prepared.nodes} node(s), plan {plan.digest[:12]}")
    if resolved.model.init is not None:
        with board.task("store-weights", "store the weights") as told:
            parent = begin(store, prepared, weights, say=say)
            say(f"weights: the run begins from step 0 of {parent}")
            told(f"step 0 of {parent}")
    return prepared
