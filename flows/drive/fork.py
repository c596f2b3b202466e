"""A new run from a checkpoint of another: its parent in its log, the parent's chunks pinned, none copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from checkpoint.amendments import NONE, Amendments
from checkpoint.collect.pins import pin
from checkpoint.log import CheckpointInfo, RunLog, RunState
from checkpoint.read import refuse_newer
from checkpoint.store import Store
from flows.data import load_dataset, load_tokenizer, prepare
from flows.drive.run import Prepared, check_layouts, create_run, load_what, run_name, spec_tree
from flows.drive.their_tokenizer import check_tokenizer, run_tokenizer, with_tokenizer
from flows.drive.views import some_steps
from trainer.dataset import DatasetRef
from trainer.errors import SpecError
from trainer.models import family
from trainer.models.base import tensor_table
from trainer.plan import compile_plan
from trainer.spec import ModelSpec, RunSpec, parse_spec, what_digest


@dataclass(frozen=True)
class Parent:
    """A run, its log, the checkpoint of it that a child begins from, and its What."""

    run: str
    state: RunState
    found: CheckpointInfo
    what: Mapping[str, Any]

    @property
    def whole(self) -> dict[str, Any]:
        """Its spec's plain values, with the How that was asked for last."""
        return spec_tree(self.what, self.run.rsplit("-", 1)[0][:32] + "-fork", self.state.asked_how or {})

    @property
    def schedule_start(self) -> int:
        """The step that its learning-rate schedule began at."""
        return int(self.what["train"]["schedule"].get("start", 0))


def fork_run(
    store: Store, parent: str, step: int | None, sets: Sequence[str], *, say: Callable[[str], None] = lambda _: None
) -> Prepared:
    """Create the child's identity and pin the parent's checkpoint.

    SpecError where step or model do not fit, or where the child began from another checkpoint before; PinRefused where
    the collector was first.

    The child's model must have the parent's tensors; what is trained (data, rate, steps, seed) may change.
    """
    state = RunLog(store, parent, writer="user").fold().of_this_version()
    found = state.at_step(step)
    if found is None:
        steps = sorted({c.step for c in state.restore_candidates()})
        where = "" if step is None else f" at step {step}"
        raise SpecError(f"{parent} has no usable checkpoint{where} on its line; it has {some_steps(steps) or 'none'}")
    begins = Parent(parent, state, found, load_what(store, parent))
    digest, whole = begins.what["data"]["digest"], begins.whole
    tree = {**whole, "train": _amended_end(whole["train"], state.amendments)}
    spec = parse_spec(tree, sets, origin=f"fork of {parent}")
    if spec.model.init != begins.what["model"].get("init"):
        raise SpecError(
            f"model.init {spec.model.init!r}: a fork begins from its parent's checkpoint; leave it out, or write a "
            "spec with it and train that"
        )
    if spec.data.source == f"dataset:{digest}":
        dataset = load_dataset(store, digest)
    else:
        dataset = dataset_of_child(store, begins, spec, say)
    if step is None:
        begins = replace(begins, found=_held(store, begins, run_name(spec.resolve(dataset), dataset)) or found)
    return begin_child(store, begins, spec, dataset)


def _held(store: Store, parent: Parent, child: str) -> CheckpointInfo | None:
    """What a fork of this name that was killed before its child began had pinned: it goes on from there, though the
    parent has newer ones by now. Another process may still be at it, so the pin is not moved.
    """
    held = parent.state.checkpoint(parent.state.pins.get(f"fork-{child}", 0))
    return held if held and parent.state.usable(held) and not RunLog(store, child).exists() else None


def dataset_of_child(
    store: Store, parent: Parent, spec: RunSpec, say: Callable[[str], None] = lambda _: None
) -> DatasetRef:
    """The spec's dataset by the parent's tokenizer: another one would give the model's rows other meanings."""
    theirs = run_tokenizer(store, parent.run)
    with with_tokenizer(spec.data, theirs) as data:
        dataset = prepare(data, store, say=say, sequence=spec.train.sequence, vocab=spec.model.vocab)
    rows = int(parent.what["model"]["vocab"])
    check_tokenizer(parent.run, rows, theirs.tokenizer, load_tokenizer(store, dataset), dataset.vocab)
    return dataset


def begin_child(
    store: Store, parent: Parent, spec: RunSpec, dataset: DatasetRef, *, suffix: str = "", schedule: str = ""
) -> Prepared:
    """The run of ``spec`` that begins from the parent's checkpoint; refusals as `fork_run` has them. ``suffix`` and
    ``schedule`` as in `prepare_run`.
    """
    state, found = parent.state, parent.found
    refuse_newer(store, parent.run, found)
    resolved, theirs = spec.resolve(dataset), parse_spec(parent.whole)
    _check_tensors(resolved.model, theirs.model)
    ours, other = (run.train.optimizer.name for run in (resolved, theirs))
    if ours != other:
        raise SpecError(
            f"train.optimizer.name {ours!r}: the parent's is {other!r}, whose moments mean something else; leave it as "
            f"it is, or start a new run with its weights (model.init = 'run:{parent.run}@{found.step}')"
        )
    if resolved.train.steps <= found.step:
        raise SpecError(
            f"the fork would end at step {resolved.train.steps}, but starts at step {found.step}; "
            f"--set train.steps={found.step + 100}"
        )
    if resolved.train.schedule.start > found.step:
        raise SpecError(
            f"train.schedule.start {resolved.train.schedule.start}: the fork begins at step {found.step}, before its "
            f"learning-rate schedule does; --set train.schedule.start={found.step}"
        )
    what = what_digest(resolved, dataset)
    run = run_name(resolved, dataset, suffix)
    forked = Prepared(run, resolved, dataset, what, compile_plan(resolved, dataset, what), schedule)
    check_layouts(forked)
    same_data = dataset.digest == parent.what["data"]["digest"]
    kept = _kept(state.amendments, resolved, theirs, same_data=same_data)
    log = RunLog(store, parent.run, writer="user")
    create_run(forked, store, lambda: begin_at(store, run, log, state, found, kept))
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
    begun = there.parent
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
        schedule = {**schedule, "decay": train["steps"] - schedule.get("start", 0)}
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
    same_curve = all(getattr(ours.schedule, key) == getattr(theirs.schedule, key) for key in ("kind", "start"))
    skip = amended.skip if same_data and same_order and same_batches else ()
    return Amendments(0, skip, amended.rate if same_rate and same_curve else ())


def _check_tensors(child: ModelSpec, parent: ModelSpec) -> None:
    """SpecError where the child's model has other tensors than the parent's checkpoint."""
    ours, theirs = ({t.name: t.shape for t in tensor_table(family(m.family), m)} for m in (child, parent))
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise SpecError(
                f"tensor {name} would be {ours.get(name)}, the parent's is {theirs.get(name)}: a fork trains its "
                "parent's tensors; leave model.… as it is, or start a new run"
            )
