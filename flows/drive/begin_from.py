"""A run's beginning out of files: weights in Hugging Face's form become a checkpoint that a run forks from.

A run's identity is its spec, and two runs of one name must not begin from different weights. So the files become a run
of their own, ``<name>-import-…``, which trains nothing and holds one checkpoint: the weights at step 0, moments of
zero. The run that trains is its fork (``fork.py``): its log says where it began, and the parent's pin keeps the
checkpoint. ADR 19 has the reasons.

Memory: a chunk (64 MiB) and what it is made from. Float32 comes back bit for bit by an export; BF16 and F16 are
widened, which loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from checkpoint import keys
from checkpoint.agent.commit import commit
from checkpoint.chunks import Chunk, Piece, Segment, Tensor, chunk_pieces, plan_chunks
from checkpoint.digest import KINDS
from checkpoint.log import RunLog, RunState, ended_body
from checkpoint.manifest import PARAM, PartManifest
from checkpoint.pages import write
from checkpoint.safetensors import FileTensor, NoWeights, digest_of, read_folder
from checkpoint.store import Store
from flows.data import prepare
from flows.drive.fork import check_beginning, fork_run
from flows.drive.run import Prepared, attempt_body, check_layouts, create_run, ready_store
from flows.drive.views import Restore
from trainer.errors import SpecError
from trainer.models import family
from trainer.models.base import HfTensor, hf_table, tensor_table
from trainer.models.hf_config import read_config
from trainer.plan import compile_plan
from trainer.spec import ModelSpec, RunSpec, run_id, what_digest
from trainer.wire import NUMERICS_VERSION

FLOATS = ("F32", "BF16", "F16")
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Constants that some files carry beside the weights."""
_ANY = ("vocab", "context", "init_std")
"""Of a model: what its tensors' shapes say, or what only matters where weights are drawn."""


@dataclass(frozen=True)
class Imported:
    """``parent``: the run that holds the weights; ``run``: the one that begins from them."""

    parent: str
    run: str
    digest: str
    """Of the files' tensors."""


def import_run(store: Store, folder: Path, spec: RunSpec, *, say: Callable[[str], None] = lambda _: None) -> Imported:
    """Make the run of ``spec`` begin from the folder's weights; once more it is found as it is.

    SpecError where the weights are not of the spec's model, or where the run has begun otherwise already; NoWeights
    where the files cannot be read.
    """
    files = read_folder(folder)
    _check_config(folder, spec.model)
    named = spec.model_copy(update={"name": f"{spec.name[:32]}-import"})
    ready_store(store)
    dataset = prepare(spec.data, store, say=say, sequence=spec.train.sequence)
    resolved = named.resolve(dataset)
    what = what_digest(resolved, dataset)
    prepared = Prepared(run_id(resolved, dataset), resolved, dataset, what, compile_plan(resolved, dataset, what))
    check_layouts(prepared)
    check_beginning(store, run_id(spec.resolve(dataset), dataset), prepared.run)  # before anything is written
    sources = _sources(files, resolved.model)
    digest = digest_of(files)
    say(f"{len(files)} tensors of {folder} are those of the model; writing them as step 0 of {prepared.run}")
    create_run(prepared, store)
    _save(store, prepared, sources, digest)
    forked = fork_run(store, prepared.run, 0, [f"name={spec.name}"])
    return Imported(prepared.run, forked.run, digest)


# --- the files' tensors as ours ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """One of our tensors as rows of the files'."""

    columns: int
    rows: Sequence[tuple[HfTensor, FileTensor]]

    def read(self, first: int, elements: int) -> Iterator[npt.NDArray[np.float32]]:
        """Its elements from ``first`` on, in order."""
        end = first + elements
        for entry, tensor in self.rows:
            begin, stop = entry.first * self.columns, (entry.first + entry.rows) * self.columns
            low, high = max(first, begin), min(end, stop)
            if low >= high:
                continue
            top, bottom = (low - begin) // self.columns, -(-(high - begin) // self.columns)
            block = _rows(entry, tensor, self.columns, top, bottom)
            skip = low - begin - top * self.columns
            yield block.reshape(-1)[skip : skip + high - low]


def _rows(entry: HfTensor, tensor: FileTensor, columns: int, top: int, bottom: int) -> npt.NDArray[np.float32]:
    """Rows ``top`` to ``bottom`` of an entry, as float32."""
    kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype]
    shape = (columns, entry.rows) if entry.transpose else (entry.rows, columns)
    try:
        whole = np.memmap(tensor.file, dtype=kind, mode="r", offset=tensor.offset, shape=shape)
    except (OSError, ValueError) as error:
        raise NoWeights(f"{tensor.file} cannot be read: {error}") from error
    some = np.ascontiguousarray((whole.T if entry.transpose else whole)[top:bottom])
    if tensor.dtype == "BF16":
        return (some.astype("<u4") << 16).view("<f4")
    return some.astype("<f4", copy=False)


def _sources(files: Mapping[str, FileTensor], model: ModelSpec) -> dict[str, _Source]:
    """Of each of our tensors where its rows lie. SpecError where a tensor is missing, too much or of another shape."""
    table = hf_table(family(model.family), model)
    named = _named(files, [entry.name for entry in table])
    wrong = []
    for entry in table:
        tensor = named.get(entry.name)
        if tensor is None:
            wrong.append(f"{entry.name} is missing")
        elif tensor.shape != tuple(entry.shape):
            wrong.append(f"{entry.name} is {_shape(tensor.shape)}, the spec's model has {_shape(entry.shape)}")
        elif tensor.dtype not in FLOATS:
            wrong.append(f"{entry.name} is of type {tensor.dtype}; {', '.join(FLOATS)} are taken")
    known = {entry.name for entry in table}
    others = [n for n in sorted(named) if n not in known and not n.endswith(BUFFERS)]
    if model.tied and "lm_head.weight" in others and _is_embedding(named["lm_head.weight"], table, named):
        others.remove("lm_head.weight")
    wrong += [f"{n} is not of the spec's model" for n in others]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise SpecError(
            f"the weights are not those of the spec's model: {'; '.join(wrong[:3])}{more}. hotstage init "
            "--from FOLDER writes a spec with a folder's model"
        )
    rows: dict[str, list[tuple[HfTensor, FileTensor]]] = {}
    for entry in sorted(table, key=lambda e: (e.tensor, e.first)):
        rows.setdefault(entry.tensor, []).append((entry, named[entry.name]))
    shapes = {t.name: t.shape for t in tensor_table(family(model.family), model)}
    return {name: _Source(int(np.prod(shapes[name][1:], dtype=np.int64)), own) for name, own in rows.items()}


def _named(files: Mapping[str, FileTensor], wanted: Sequence[str]) -> dict[str, FileTensor]:
    """The files' tensors by the names that are wanted: some leave the first word out (``transformer.``, ``model.``)."""
    if any(name in files for name in wanted if "." in name and not name.startswith("lm_head.")):
        return dict(files)
    longer = {name.partition(".")[2]: name for name in wanted}
    return {longer.get(name, name): tensor for name, tensor in files.items()}


def _is_embedding(head: FileTensor, table: Sequence[HfTensor], named: Mapping[str, FileTensor]) -> bool:
    """Whether the head that a tied model's files carry has the bytes of the token embedding."""
    first = table[0]
    own = named.get(first.name)
    if own is None or (own.shape, own.dtype) != (head.shape, head.dtype):
        return False
    return digest_of({"": head}) == digest_of({"": own})


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _check_config(folder: Path, model: ModelSpec) -> None:
    """SpecError where the folder's config.json says of the model what no tensor's shape would show."""
    if not (folder / "config.json").is_file():
        return
    config = read_config(folder)
    kind = family(model.family)
    theirs = kind.from_hf_config(config).model_copy(update={key: getattr(model, key) for key in _ANY})
    there, here = kind.to_hf_config(theirs), kind.to_hf_config(model)
    differ = [f"{key} is {there.get(key)} there and {here.get(key)} by the spec"
              for key in sorted({*there, *here}) if there.get(key) != here.get(key)]  # fmt: skip
    if differ:
        raise SpecError(f"{folder}/config.json is of another model: {'; '.join(differ)}; set model.… as it is there")


# --- the checkpoint ---------------------------------------------------------------------------------------


def _save(store: Store, prepared: Prepared, sources: Mapping[str, _Source], digest: str) -> RunState:
    """Step 0 of the import's run: as an agent saves it, but out of files. What is there of the same files stays."""
    log = RunLog(store, prepared.run, writer="import")
    state = log.fold().of_this_version()
    why = f"weights imported, digest {digest}"
    if state.attempts and state.attempts[0].reason != why:
        raise SpecError(
            f"run {prepared.run} holds other weights than these: give this import another name (--set name=…)"
        )
    if not state.attempts:
        body = attempt_body(prepared, f"{prepared.run}-l1", Restore(None, 0).to_map(), reason=why, cause=None)
        state = log.append("attempt", body, state)
    if state.at_step(0) is None:
        _write(store, prepared, sources, state.epoch)
        done = commit(log, 1, 0, state.epoch, state)
        assert done is not None, "its one part was just written"
        state = done
    if state.ended is None:
        state = log.append("ended", ended_body(state, "succeeded", why), state)
    return state


def _write(store: Store, prepared: Prepared, sources: Mapping[str, _Source], epoch: int) -> None:
    """Chunks and the one part manifest."""
    model = prepared.spec.model
    tensors = [Tensor(t.name, t.shape) for t in tensor_table(family(model.family), model)]
    segments = [
        Segment(number, kind, 0, tensor.elements, 0)
        for number, tensor in enumerate(tensors)
        for kind in range(len(KINDS))
    ]
    saved: list[tuple[Chunk, Sequence[Piece]]] = []
    for plan in plan_chunks(segments):
        data, at = bytearray(plan.bytes), 0
        for segment in plan.segments:
            if segment.kind == PARAM:
                begin = at
                for block in sources[tensors[segment.tensor].name].read(segment.first, segment.elements):
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
        meta={"plan": prepared.plan.digest, "dataset": prepared.dataset.digest, "numerics": str(NUMERICS_VERSION)},
    )
    write(store, prepared.run, keys.part_name(0, epoch, 0), part.to_bytes(), "import")
