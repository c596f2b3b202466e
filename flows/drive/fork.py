"""A new run from a checkpoint of another: its parent in its log, the parent's chunks pinned, none copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from checkpoint.amendments import NONE, Amendments
from checkpoint.collect.pins import pin
from checkpoint.log import CheckpointInfo, RunLog, RunState
from checkpoint.read import refuse_newer
from checkpoint.store import Store
from flows.data import load_dataset, load_tokenizer, prepare
from flows.drive.line import parent_of
from flows.drive.run import Prepared, check_layouts, create_run, load_what, spec_tree
from flows.drive.their_tokenizer import check_tokenizer, dataset_tokenizer, with_tokenizer
from flows.drive.views import some_steps
from trainer.errors import SpecError
from trainer.models import family
from trainer.models.base import tensor_table
from trainer.plan import compile_plan
from trainer.spec import ModelSpec, RunSpec, parse_spec, run_id, what_digest


def fork_run(store: Store, parent: str, step: int | None, sets: Sequence[str]) -> Prepared:
    """Create the child's identity and pin the parent's checkpoint.

    SpecError where step or model do not fit, or where the child began from another checkpoint before; PinRefused where
    the collector was first.

    The child's model must have the parent's tensors; what is trained (data, rate, steps, seed) may change.
    """
    log = RunLog(store, parent, writer="user")
    state = log.fold().of_this_version()
    found = state.at_step(step)
    if found is None:
        steps = sorted({c.step for c in state.restore_candidates()})
        raise SpecError(f"{parent} has no usable checkpoint at step {step}; it has {some_steps(steps) or 'none'}")
    refuse_newer(store, parent, found)
    what = load_what(store, parent)
    digest = what["data"]["digest"]
    whole = spec_tree(what, parent.rsplit("-", 1)[0][:32] + "-fork", state.asked_how or {})
    tree = {**whole, "train": _amended_end(whole["train"], state.amendments)}
    spec = parse_spec(tree, sets, origin=f"fork of {parent}")
    if spec.model.init != what["model"].get("init"):
        raise SpecError(
            f"model.init {spec.model.init!r}: a fork begins from its parent's checkpoint; leave it out, or write a "
            "spec with it and train that"
        )
    if spec.data.source == f"dataset:{digest}":
        dataset = load_dataset(store, digest)
    else:
        theirs = dataset_tokenizer(store, digest)
        with with_tokenizer(spec.data, theirs) as data:
            dataset = prepare(data, store, sequence=spec.train.sequence, vocab=spec.model.vocab)
        rows = int(what["model"]["vocab"])
        check_tokenizer(parent, rows, theirs.tokenizer, load_tokenizer(store, dataset), dataset.vocab)
    resolved = spec.resolve(dataset)
    _check_tensors(resolved.model, parse_spec(tree).model)
    if resolved.train.steps <= found.step:
        raise SpecError(
            f"the fork would end at step {resolved.train.steps}, but starts at step {found.step}; "
            f"--set train.steps={found.step + 100}"
        )
    child_what = what_digest(resolved, dataset)
    run = run_id(resolved, dataset)
    plan = compile_plan(resolved, dataset, child_what)
    forked = Prepared(run, resolved, dataset, child_what, plan)
    check_layouts(forked)
    create_run(forked, store)
    kept = _kept(state.amendments, resolved, parse_spec(whole), same_data=dataset.digest == digest)
    begin_at(store, run, log, state, found, kept)
    return forked


def begin_at(
    store: Store, run: str, log: RunLog, state: RunState, found: CheckpointInfo, kept: Amendments = NONE
) -> None:
    """Pin the parent's checkpoint and make it the beginning of the run's log. ``kept``: of the parent's amendments.

    SpecError where the run has begun otherwise; PinRefused where the collector was first.
    """
    check_beginning(store, run, log.run, found.n)
    pin(log, found, f"fork-{run}", state)
    body = {
        "kind": "parent",
        "run": log.run,
        "checkpoint": found.n,
        "step": found.step,
        "state_digest": found.state_digest,
    }
    if kept:
        body["amendments"] = kept.to_map()
    RunLog(store, run, writer="user").transact(lambda s: None if s.n else ("intervention", body))


def check_beginning(store: Store, run: str, parent: str | None = None, checkpoint: int | None = None) -> None:
    """SpecError where the run has begun already, but not from a parent (that parent, that checkpoint of it)."""
    there = RunLog(store, run).fold(quick=True)
    begun = parent_of(there)
    if there.n and begun is None:
        raise SpecError(
            f"run {run} is there already, and began from its own initial weights; give this one another name "
            "(--set name=…)"
        )
    others = (parent not in (None, begun["run"]), checkpoint not in (None, begun["checkpoint"])) if begun else ()
    if begun is not None and any(others):
        raise SpecError(
            f"run {run} is there already, a fork of step {begun['step']} of {begun['run']}; give this one another name "
            "(--set name=…)"
        )


def _amended_end(train: Mapping[str, Any], amended: Amendments) -> dict[str, Any]:
    """A parent that was ordered to another end has a child with that end, on the curve that the parent had."""
    schedule = train["schedule"]
    if amended.steps and schedule["kind"] == "cosine" and not schedule["decay"]:
        schedule = {**schedule, "decay": train["steps"]}
    return {**train, "steps": amended.total(train["steps"]), "schedule": schedule}


def _kept(amended: Amendments, child: RunSpec, parent: RunSpec, *, same_data: bool) -> Amendments:
    """What of a parent's amendments holds for its child: skips where the batches are the same, rates where the schedule
    is.
    """
    ours, theirs = child.train, parent.train
    order = ("shuffled", "block", "window", "packing")
    same_order = all(getattr(child.data, key) == getattr(parent.data, key) for key in order)
    same_batches = (ours.seed, ours.batch, ours.sequence) == (theirs.seed, theirs.batch, theirs.sequence)
    same_rate = (ours.optimizer.lr, ours.optimizer.min_lr) == (theirs.optimizer.lr, theirs.optimizer.min_lr)
    skip = amended.skip if same_data and same_order and same_batches else ()
    return Amendments(0, skip, amended.rate if same_rate and ours.schedule.kind == theirs.schedule.kind else ())


def _check_tensors(child: ModelSpec, parent: ModelSpec) -> None:
    """SpecError where the child's model has other tensors than the parent's checkpoint."""
    ours, theirs = ({t.name: t.shape for t in tensor_table(family(m.family), m)} for m in (child, parent))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise SpecError(
                f"tensor {name} would be {ours.get(name)}, the parent's is {theirs.get(name)}: a fork trains its "
                "parent's tensors; leave model.… as it is, or start a new run"
            )
