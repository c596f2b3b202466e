"""A run's beginning out of weights from elsewhere: they become a checkpoint that a run forks from.

A run's identity is its spec, and its log says where it began. So the weights (``weights.py``) become a run of their
own, ``<name>-import-…``, which trains nothing and holds one checkpoint: the weights at step 0, moments of zero. It
knows their digest, the model and the tokenizer, no corpus: whatever is trained on from them shares it. The run that
trains is its fork (``fork.py``): its log says where it began, and the parent's pin keeps the checkpoint. ADR 19 has the
reasons.

Memory: a chunk (64 MiB) and what it is made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from checkpoint import keys
from checkpoint.agent.commit import commit
from checkpoint.chunks import Chunk, Piece, Segment, Tensor, chunk_pieces, plan_chunks
from checkpoint.collect.pins import pinned
from checkpoint.log import RunLog, RunState, ended_body
from checkpoint.manifest import PARAM, PartManifest
from checkpoint.pages import write
from checkpoint.store import Store
from flows.data import load_tokenizer, prepare
from flows.data.alone import tokenizer_alone
from flows.data.prepare import telling
from flows.data.tokenizer import given_tokenizer
from flows.drive.fork import begin_at, check_beginning
from flows.drive.hf_beside import keep_beside
from flows.drive.run import (
    Prepared,
    as_begun,
    attempt_body,
    check_layouts,
    create_run,
    load_what,
    ready_store,
    run_names,
)
from flows.drive.their_tokenizer import check_tokenizer, tokenizer_of, with_tokenizer
from flows.drive.views import Restore
from flows.drive.weights import FolderWeights, RunWeights, Weights, folder_weights
from trainer.errors import SpecError
from trainer.models import family
from trainer.models.base import tensor_table
from trainer.plan import compile_plan
from trainer.spec import DataSpec, ModelSpec, RunSpec, run_id, what_digest, what_map
from trainer.spec_sections import TrainSpec

LONGEST = 4096
"""Tokens that a run which holds weights takes at a time, where its model takes more: it only answers."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Imported:
    """``parent``: the run that holds the weights; ``run``: the one that begins from them."""

    parent: str
    run: str
    digest: str
    """Of the weights."""


def import_run(store: Store, folder: Path, spec: RunSpec, *, say: Say = lambda _: None) -> Imported:
    """Make the run of ``spec`` begin from the folder's weights; once more it is found as it is.

    SpecError where the weights are not of the spec's model, or where the run has begun otherwise already; NoWeights
    where the files cannot be read.
    """
    if spec.model.init is not None:
        raise SpecError(
            f"model.init is {spec.model.init!r}: `hotstage train` takes those weights; leave one of them out"
        )
    weights = folder_weights(folder, spec.model)
    ready_store(store)
    dataset = prepare(spec.data, store, say=say, sequence=spec.train.sequence, vocab=spec.model.vocab)
    tokenizer = load_tokenizer(store, dataset)
    check_tokenizer(weights.place, weights.vocab, weights.tokenizer, tokenizer, dataset.vocab)
    resolved = as_begun(spec, dataset, store, say=say)
    what = what_digest(resolved, dataset)
    child = Prepared(run_id(resolved, dataset), resolved, dataset, what, compile_plan(resolved, dataset, what))
    check_layouts(child)
    check_beginning(store, child.run)
    parent = hold(store, weights, resolved.model, tokenizer, dataset.eot, spec.name, say=say)
    create_run(child, store, lambda: _fork(store, child.run, parent))
    return Imported(parent, child.run, weights.digest)


def import_folder(store: Store, folder: Path, spec: RunSpec, *, say: Say = lambda _: None) -> tuple[str, FolderWeights]:
    """Store the folder's weights with the spec's model and tokenizer, for whatever trains on from them; the run that
    holds them. SpecError, DatasetError and NoWeights as ``import_run`` and a tokenizer that is given have them."""
    with with_tokenizer(spec.data, None if spec.data.tokenizer else tokenizer_of(store, f"hf:{folder}")) as data:
        given = given_tokenizer(data)
    assert given is not None, "it is refused where there is none"
    weights = folder_weights(folder, spec.model)
    check_tokenizer(weights.place, weights.vocab, weights.tokenizer, given.tokenizer, given.vocab)
    ready_store(store)
    eot = None if given.end is None else given.tokenizer.token_to_id(given.end)
    return hold(store, weights, spec.model, given.tokenizer, eot, spec.name, say=say), weights


def begin(store: Store, child: Prepared, weights: Weights | None, *, say: Say = lambda _: None) -> str:
    """Make the identity of a run whose spec says ``init``, and the record by which its log begins; once more nothing.
    The run that it is a fork of.

    ``weights``: None where the spec names their digest alone; SpecError where no run of the store holds them then.
    """
    create_run(child, store)
    began = RunLog(store, child.run).fold(quick=True).parent
    if began is not None:
        return str(began["run"])
    tokenizer = load_tokenizer(store, child.dataset)
    parent = hold(store, weights, child.spec.model, tokenizer, child.dataset.eot, child.spec.name, say=say)
    _fork(store, child.run, parent)
    return parent


def _fork(store: Store, run: str, parent: str) -> None:
    """The record by which the run's log begins: step 0 of its parent."""
    log = RunLog(store, parent, writer="user")
    state = log.fold()
    found = state.at_step(0)
    if found is None:
        raise SpecError(
            f"{parent}, which holds the weights, has no usable checkpoint: `hotstage ckpt verify {parent}` says what "
            "is damaged; in another store (--store) they are stored anew"
        )
    begin_at(store, run, log, state, found)


def hold(
    store: Store,
    weights: Weights | None,
    model: ModelSpec,
    tokenizer: Tokenizer,
    eot: int | None,
    name: str,
    *,
    say: Say = lambda _: None,
) -> str:
    """The run that holds the weights as its step 0: made as ``<name>-import-…``, or found as it is, whatever its name.

    ``weights``: None where ``model`` says their digest alone.
    """
    sequence = min(model.context, LONGEST)
    dataset = tokenizer_alone(store, tokenizer, eot, sequence)
    if weights is not None:
        model = model.model_copy(update={"init": weights.init, "vocab": weights.vocab})
    spec = RunSpec(
        name=f"{name[:32].rstrip('-')}-import",
        model=model,
        data=DataSpec(source=f"dataset:{dataset.digest}", packing="across"),  # it trains nothing; its name is of old
        train=TrainSpec(steps=1, batch=1, microbatch=1, sequence=sequence),
    ).resolve(dataset)
    what = what_digest(spec, dataset)
    run = _same(store, f"-import-{what.hex()[:6]}", what_map(spec, dataset)) or run_id(spec, dataset)
    prepared = Prepared(run, spec, dataset, what, compile_plan(spec, dataset, what))
    if weights is not None:
        create_run(prepared, store)
        keep_beside(store, run, weights.beside)
        _save(store, prepared, weights, say)
    elif RunLog(store, run).fold(quick=True).at_step(0) is None:
        raise SpecError(
            f"model.init {model.init!r}: no run of {store.describe()} holds these weights; say where they are: hf:DIR "
            "or run:ID@STEP"
        )
    return run


def _same(store: Store, ending: str, what: Mapping[str, Any]) -> str | None:
    """A run of the store whose name ends so and whose What is this one."""
    return next((n for n in run_names(store) if n.endswith(ending) and load_what(store, n) == what), None)


# --- the checkpoint ---------------------------------------------------------------------------------------


def _save(store: Store, prepared: Prepared, weights: Weights, say: Say) -> RunState:
    """Step 0 of the weights' run: as an agent saves it, but out of files. What is there stays."""
    log = RunLog(store, prepared.run, writer="import")
    why = f"weights imported, {weights.init.replace(':', ' digest ')}"
    body = attempt_body(prepared, f"{prepared.run}-l1", Restore(None, 0).to_map(), reason=why, cause=None)
    state = log.transact(lambda s: None if s.of_this_version().attempts else ("attempt", body))
    if state.at_step(0) is None:
        say(f"weights: writing those of {weights.place} as step 0 of {prepared.run}")
        with _kept(weights):
            _write(store, prepared, weights, state.epoch, say)
        done = commit(log, 1, 0, state.epoch, state)
        assert done is not None, "its one part was just written"
        state = done
    return log.transact(lambda s: None if s.ended else ("ended", ended_body(s, "succeeded", why)), state)


def _kept(weights: Weights) -> AbstractContextManager[object]:
    """The weights are not collected meanwhile."""
    if isinstance(weights, RunWeights):
        return pinned(weights.store, weights.run, weights.info, "import")
    return nullcontext()


def _write(store: Store, prepared: Prepared, weights: Weights, epoch: int, say: Say) -> None:
    """Chunks and the one part manifest."""
    model = prepared.spec.model
    table, optimizer = tensor_table(family(model.family), model), prepared.spec.train.optimizer
    tensors = [Tensor(t.name, t.shape, optimizer.kinds(t)) for t in table]
    segments = [
        Segment(number, kind, 0, tensor.elements, 0)
        for number, tensor in enumerate(tensors)
        for kind in range(tensor.kinds)
    ]
    saved: list[tuple[Chunk, Sequence[Piece]]] = []
    plans = plan_chunks(segments)
    with telling(say, lambda: f"weights: {len(saved)} of {len(plans)} chunks are stored"):
        for plan in plans:
            data, at = bytearray(plan.bytes), 0
            for segment in plan.segments:
                if segment.kind == PARAM:
                    begin = at
                    for block in weights.read(tensors[segment.tensor].name, segment.first, segment.elements):
                        data[begin : begin + block.nbytes] = np.ascontiguousarray(block).data.cast("B")
                        begin += block.nbytes
                at += segment.bytes
            chunk = Chunk.of(keys.chunk_name(0, epoch, 0, "import", plan.index), data)
            store.create(keys.run_key(prepared.run, chunk.name), data, sha256=chunk.sha256)
            saved.append((chunk, chunk_pieces(plan, data)))
    part = PartManifest.build(
        run=prepared.run,
        step=0,
        epoch=epoch,
        samples=0,
        what=prepared.what,
        part=0,
        parts=1,
        tensors=tensors,
        saved=saved,
        meta={
            "plan": prepared.plan.digest,
            "dataset": prepared.dataset.digest,
            "numerics": str(prepared.plan.config.numerics_version),
        },
    )
    write(store, prepared.run, keys.part_name(0, epoch, 0), part.to_bytes(), "import")
