"""From a spec to a run that is ready to be driven: its data, its weights where they are from elsewhere, its plan, its
identity in the store. Plain functions, no Prefect, no processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from checkpoint.keys import spec_key
from checkpoint.store import Store
from flows.data import load_tokenizer, prepare
from flows.drive.begin_from import begin
from flows.drive.room import lacking_memory
from flows.drive.run import (
    Board,
    NoBoard,
    Prepared,
    as_begun,
    check_layouts,
    create_run,
    ready_store,
    run_name,
)
from flows.drive.their_tokenizer import check_tokenizer, tokenizer_of, with_tokenizer
from flows.drive.weights import weights_of
from flows.tracking.writers import check_trackers
from trainer.errors import PlanError, SpecError
from trainer.plan import compile_plan
from trainer.spec import DataSpec, RunSpec, what_digest

log = logging.getLogger(__name__)

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


@contextmanager
def data_of(spec: RunSpec, store: Store) -> Iterator[DataSpec]:
    """The spec's data. Where weights come from elsewhere and no tokenizer is named, theirs comes along."""
    init, alone = spec.model.init, spec.data.tokenizer is not None
    with with_tokenizer(spec.data, None if init is None or alone else tokenizer_of(store, init)) as data:
        yield data


def prepare_run(
    spec: RunSpec,
    store: Store,
    *,
    suffix: str = "",
    schedule: str = "",
    say: Callable[[str], None] = log.info,
    board: Board | None = None,
) -> Prepared:
    """Make the dataset (or find it), resolve the spec, compile the plan, and create the run's identity in the store.

    Where ``model.init`` says so the run begins from weights that lie elsewhere: they are looked through before anything
    is written, and stored before the run can be driven. ``suffix`` joins the run's name (a schedule gives its time),
    ``schedule`` names the one that it is a firing of. Idempotent: the same spec finds the same run.
    """
    from k8s.render import check_fabric

    board = board or NoBoard()
    check_fabric(spec)
    check_trackers(spec.track)
    if spec.train.schedule.start:
        raise SpecError(
            f"train.schedule.start {spec.train.schedule.start}: this run begins at step 0, with its learning-rate "
            "schedule; leave it out (a fork of another run's checkpoint may have one that begins later)"
        )
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
        if resolved.model.init is None:
            create_run(prepared, store)
        told(f"{prepared.ranks} rank(s) on {prepared.nodes} node(s), plan {plan.digest[:12]}")
    if resolved.model.init is not None:
        with board.task("store-weights", "store the weights") as told:
            parent = begin(store, prepared, weights, say=say)
            say(f"weights: the run begins from step 0 of {parent}")
            told(f"step 0 of {parent}")
    return prepared
