"""Weights from elsewhere as a model's tensors: a folder in Hugging Face's form, or a checkpoint of another run.

Owns what is looked at before they are taken: that names, shapes and numbers are those of the spec's model, that they
were made for its tokenizer, and the digest by which a run names them. Writes nothing; ``begin_from.py`` makes a run of
them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from checkpoint.chunks import shape_text
from checkpoint.export import INDEX, WEIGHTS
from checkpoint.log import CheckpointInfo, RunLog
from checkpoint.manifest import PARAM
from checkpoint.read import StateReader, load_manifest, refuse_newer
from checkpoint.safetensors import FileTensor, NoWeights, digest_of, read_folder
from checkpoint.store import Store
from flows.drive.hf_beside import Beside, beside_of, read_beside
from flows.drive.run import find_run, load_what
from flows.drive.their_tokenizer import dataset_tokenizer, folder_of_init, folder_tokenizer, tell_lacking
from flows.drive.views import some_steps
from trainer.errors import SpecError
from trainer.models import family
from trainer.models.base import HfTensor, hf_table, tensor_table
from trainer.models.hf_config import read_config
from trainer.spec import ModelSpec

F32 = npt.NDArray[np.float32]

FLOATS = {"F32": "<f4", "BF16": "<u2", "F16": "<f2"}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Constants that some files carry beside the weights."""
WRAPPERS = ("_orig_mod.", "module.")
"""What torch.compile and DistributedDataParallel put before the names of a model's tensors."""
_HEAD = "lm_head.weight"
_ANY = ("vocab", "context", "init_std", "init")
"""Of a model: what its tensors' shapes say, or what only matters where weights are drawn."""
_EFFECTIVE = {"kv_heads": "groups", "head_size": "size_of_head", "hidden": "size_of_hidden"}
"""Keys that may be unset, and what says their value then."""
_PIECE = 1 << 22
_SHOWN = 3


class Weights(Protocol):
    """A model's weights, wherever they lie; what they were made with."""

    @property
    def init(self) -> str:
        """``model.init`` as a run's What says it: a digest, no place."""

    @property
    def place(self) -> str:
        """For people."""

    @property
    def vocab(self) -> int:
        """Tokens that have a row in the embedding."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The one that they were made with, where it is known."""

    @property
    def beside(self) -> Beside:
        """What lies beside them for exports."""

    def read(self, tensor: str, first: int, elements: int) -> Iterator[F32]:
        """Elements of one of our tensors from ``first`` on, in order."""


def weights_of(store: Store, model: ModelSpec) -> Weights | None:
    """The weights that ``model.init`` names, looked through; None where it has their digest alone. SpecError, or
    NoWeights, where they cannot be the model's.

    Reads all bytes of a folder, for their digest.
    """
    kind, _, rest = (model.init or "").partition(":")
    if kind == "hf":
        return folder_weights(folder_of_init(rest), model)
    if kind == "run":
        run, _, step = rest.rpartition("@")
        return run_weights(store, run, int(step), model)
    return None


# --- a folder -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderWeights:
    """A folder's weights. Float32 comes back bit for bit by an export; BF16 and F16 are widened: nothing is lost."""

    folder: Path
    digest: str
    """SHA-256 over the model's tensors in Hugging Face's names, as float32: the same whatever type, names and files
    they have."""
    vocab: int
    bytes: int
    dtypes: tuple[str, ...]
    sources: Mapping[str, _Source]

    @property
    def init(self) -> str:
        return f"weights:{self.digest}"

    @property
    def place(self) -> str:
        return str(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        found = folder_tokenizer(self.folder)
        if found is not None:
            tell_lacking(self.folder, found.tokenizer)
        return found.tokenizer if found else None

    @property
    def beside(self) -> Beside:
        return read_beside(self.folder)

    def read(self, tensor: str, first: int, elements: int) -> Iterator[F32]:
        yield from self.sources[tensor].read(first, elements)


def folder_weights(folder: Path, model: ModelSpec) -> FolderWeights:
    """The folder's weights as those of the model. SpecError where they are another model's, or hold numbers that are
    not finite; NoWeights where the files cannot be read."""
    files = read_folder(folder)
    model = _with_vocab(files, model)
    _check_config(folder, model)
    rows = _rows_of(files, folder, model)
    total, size = hashlib.sha256(), 0
    for entry, tensor in sorted(rows, key=lambda row: row[0].name):
        total.update(json.dumps([entry.name, "F32", list(tensor.shape)]).encode())
        for at, block in _pieces(tensor):
            _finite(entry.name, at, block, tensor.file)
            total.update(block.data.cast("B"))
        size += 4 * tensor.elements
    return FolderWeights(
        folder, total.hexdigest(), model.vocab, size, tuple(sorted({t.dtype for _, t in rows})), _sources(rows, model)
    )


@dataclass(frozen=True)
class _Source:
    """One of our tensors as rows of the files'."""

    columns: int
    rows: Sequence[tuple[HfTensor, FileTensor]]

    def read(self, first: int, elements: int) -> Iterator[F32]:
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


def _rows(entry: HfTensor, tensor: FileTensor, columns: int, top: int, bottom: int) -> F32:
    """Rows ``top`` to ``bottom`` of an entry, as float32."""
    shape = (columns, entry.rows) if entry.transpose else (entry.rows, columns)
    try:
        whole = np.memmap(tensor.file, dtype=FLOATS[tensor.dtype], mode="r", offset=tensor.offset, shape=shape)
    except (OSError, ValueError) as error:
        raise NoWeights(f"{tensor.file} cannot be read: {error}") from error
    return _wide(np.ascontiguousarray((whole.T if entry.transpose else whole)[top:bottom]), tensor.dtype)


def _pieces(tensor: FileTensor) -> Iterator[tuple[int, F32]]:
    """A tensor's elements as they lie in the file, as float32, each piece with the number of its first."""
    kind = np.dtype(FLOATS[tensor.dtype])
    for first in range(0, tensor.elements, _PIECE):
        count = min(_PIECE, tensor.elements - first)
        try:
            block = np.fromfile(tensor.file, kind, count, offset=tensor.offset + first * kind.itemsize)
        except OSError as error:
            raise NoWeights(f"{tensor.file} cannot be read: {error.strerror or error}") from error
        if len(block) != count:
            raise NoWeights(f"{tensor.file} became shorter while it was read")
        yield first, _wide(block, tensor.dtype)


def _wide(block: npt.NDArray[Any], dtype: str) -> F32:
    if dtype == "BF16":
        return (block.astype("<u4") << 16).view("<f4")
    return block.astype("<f4", copy=False)


def _finite(name: str, first: int, block: F32, place: object) -> None:
    bad = np.flatnonzero(~np.isfinite(block))
    if len(bad):
        raise SpecError(
            f"{name} in {place} holds {block[bad[0]]} at element {first + int(bad[0])}: what is not finite is no "
            "weight to begin from; take another copy, or the checkpoint before"
        )


def _with_vocab(files: Mapping[str, FileTensor], model: ModelSpec) -> ModelSpec:
    """The model; where its vocabulary is open, with the rows that the files' embedding has."""
    if model.vocab:
        return model
    one = model.model_copy(update={"vocab": 1})
    table = hf_table(family(model.family), one)
    embedding = _named(files, [entry.name for entry in table]).get(table[0].name)
    return model.model_copy(update={"vocab": embedding.shape[0]}) if embedding is not None and embedding.shape else one


def _rows_of(files: Mapping[str, FileTensor], folder: Path, model: ModelSpec) -> list[tuple[HfTensor, FileTensor]]:
    """The model's tensors in the files, in the table's order. SpecError where one is missing, too much, or of another
    shape or type."""
    table = hf_table(family(model.family), model)
    named = _named(files, [entry.name for entry in table])
    wrong = []
    for entry in table:
        tensor = named.get(entry.name)
        if tensor is None:
            wrong.append(f"{entry.name} is missing")
        elif tensor.shape != tuple(entry.shape):
            wrong.append(f"{entry.name} is {shape_text(tensor.shape)}, the spec's model has {shape_text(entry.shape)}")
    known = {entry.name for entry in table}
    others = [n for n in sorted(named) if n not in known and not n.endswith(BUFFERS)]
    if model.tied and _HEAD in others:
        others.remove(_HEAD)
        if not _is_embedding(named[_HEAD], table, named):
            wrong.append(f"{_HEAD} is not {table[0].name}, and the spec's model is tied: set model.tied = false")
    wrong += [f"{n} ({shape_text(named[n].shape)}) is not of the spec's model" for n in others]
    if wrong:
        more = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
        mend = (
            _mend_of(wrong, table, named, folder)
            if _says(folder, model)
            else "`hotstage import FOLDER` writes a spec with the folder's own model"
        )
        raise SpecError(f"the weights are not those of the spec's model: {'; '.join(wrong[:_SHOWN])}{more}; {mend}")
    other = [entry.name for entry in table if named[entry.name].dtype not in FLOATS]
    if other:
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        kind = named[other[0]].dtype
        mend = (
            'write them in one of these (transformers: from_pretrained(DIR, dtype="float32").save_pretrained(OTHER))'
            if kind == "F64"
            else "these are quantised, take the model as it was before"
        )
        raise SpecError(f"{other[0]}{more} in {folder} is of type {kind}; {', '.join(FLOATS)} are taken: {mend}")
    return [(entry, named[entry.name]) for entry in table]


def _mend_of(wrong: Sequence[str], table: Sequence[HfTensor], named: Mapping[str, FileTensor], folder: Path) -> str:
    """Where the folder's own config.json does not describe its weights."""
    if wrong == ["lm_head.weight is missing"]:
        made = read_config(folder).get("architectures") or ()
        if any(re.fullmatch(r"\w+(?<!LMHead)Model", str(name)) for name in made):
            return f"config.json's architectures is {made}, which has no head: take one for text (…ForCausalLM)"
        return (
            'a head that is the embedding is not stored: if this model\'s is, write "tie_word_embeddings": true in its '
            "config.json; else fetch the folder again"
        )
    if len(wrong) == 1 and "the spec's model is tied" in wrong[0]:
        return (
            'transformers leaves that head out: write "tie_word_embeddings": false in config.json if it is meant, else '
            "take it out of the file"
        )
    embedding = named.get(table[0].name)
    heads = ("lm_head.weight", table[0].name)
    if (
        embedding is not None
        and embedding.elements
        and embedding.shape[1:] == tuple(table[0].shape[1:])
        and all(text.startswith(tuple(f"{name} is {shape_text(embedding.shape)}" for name in heads)) for text in wrong)
    ):
        return (
            f'config.json says "vocab_size": {table[0].shape[0]}: if tokens were added or rows left out, write '
            f"{embedding.shape[0]} there; else fetch the folder again"
        )
    if (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        return f"{WEIGHTS} was read, as transformers does: remove it if the files of {INDEX} beside it are meant"
    return _mend_of_names(table, named) or (
        "the folder's config.json says of the model what the spec says, so the weights are another model's, or not "
        "all there: fetch the folder again"
    )


def _mend_of_names(table: Sequence[HfTensor], named: Mapping[str, FileTensor]) -> str | None:
    """The mend that names and shapes of the files' tensors show, beside those that the model has."""
    wanted = {entry.name: entry for entry in table}
    there = [(wanted[name], tensor) for name, tensor in named.items() if name in wanted]
    if any(not tensor.elements for _, tensor in there):
        return (
            "tensors of no elements stand for those that DeepSpeed's ZeRO-3 had on other ranks: its zero_to_fp32.py "
            "writes them whole"
        )
    shaped = [(entry, tensor.shape) for entry, tensor in there if tensor.shape != tuple(entry.shape)]
    if shaped and all(entry.transpose and shape == tuple(entry.shape)[::-1] for entry, shape in shaped):
        return (
            "they are turned over, [out, in]; Hugging Face's GPT-2 has [in, out]: transpose every matrix of the layers"
        )
    missing, others = [name for name in wanted if name not in named], [n for n in named if n not in wanted]
    before = next((o.removesuffix(name) for name in missing for o in others if o.endswith(f".{name}")), None)
    if before is not None:
        if before.startswith("base_model.") or any(".lora_" in name for name in others):
            return f"names begin with {before!r}: an adapter is beside them, merge it (peft's merge_and_unload)"
        return f"names begin with {before!r}: write them without it (save_pretrained of the model inside)"
    numbers = [{int(n) for name in names for n in re.findall(r"\.(\d+)\.", name)} for names in (wanted, named)]
    if numbers[0] != numbers[1] and not shaped:
        return (
            f"config.json says {len(numbers[0])} layers, the files have {len(numbers[1])}: write that number there, or "
            "fetch the folder again"
        )
    if others and not missing and not shaped:
        return "with it the model computes something else, which this version does not: take a model without"
    return None


def _says(folder: Path, model: ModelSpec) -> bool:
    """Whether the folder's config.json is of the model to its vocabulary and context; of the rest it is by now."""
    if not (folder / "config.json").is_file():
        return False
    theirs = family(model.family).from_hf_config(read_config(folder))
    return (theirs.vocab, theirs.context) == (model.vocab, model.context)


def _sources(rows: Sequence[tuple[HfTensor, FileTensor]], model: ModelSpec) -> dict[str, _Source]:
    """Of each of our tensors where its rows lie."""
    found: dict[str, list[tuple[HfTensor, FileTensor]]] = {}
    for row in sorted(rows, key=lambda row: (row[0].tensor, row[0].first)):
        found.setdefault(row[0].tensor, []).append(row)
    shapes = {t.name: t.shape for t in tensor_table(family(model.family), model)}
    return {name: _Source(int(np.prod(shapes[name][1:], dtype=np.int64)), own) for name, own in found.items()}


def _named(files: Mapping[str, FileTensor], wanted: Sequence[str]) -> dict[str, FileTensor]:
    """The files' tensors by the names that are wanted: some leave the first word out (``transformer.``, ``model.``),
    others have a wrapper's before all of them; who stores a tensor with two names once may have left out the first one,
    the embedding, for the head of a tied model."""
    while wrapper := next((w for w in WRAPPERS if files and all(name.startswith(w) for name in files)), None):
        files = {name.removeprefix(wrapper): tensor for name, tensor in files.items()}
    named = dict(files)
    if not any(name in files for name in wanted if "." in name and not name.startswith("lm_head.")):
        longer = {name.partition(".")[2]: name for name in wanted}
        named = {longer.get(name, name): tensor for name, tensor in files.items()}
    if _HEAD in named and _HEAD not in wanted and wanted[0] not in named:
        named[wanted[0]] = named.pop(_HEAD)
    return named


def _is_embedding(head: FileTensor, table: Sequence[HfTensor], named: Mapping[str, FileTensor]) -> bool:
    """Whether the head that a tied model's files carry has the bytes of the token embedding."""
    own = named.get(table[0].name)
    if own is None or (own.shape, own.dtype) != (head.shape, head.dtype):
        return False
    return digest_of({"": head}) == digest_of({"": own})


def _check_config(folder: Path, model: ModelSpec) -> None:
    """SpecError where the folder's config.json says of the model what no tensor's shape would show."""
    if not (folder / "config.json").is_file():
        return
    config = read_config(folder)
    kind = family(model.family)
    theirs = kind.from_hf_config(config)
    _same_model(theirs, model, f"{folder}/config.json is of another model")


def _same_model(theirs: ModelSpec, ours: ModelSpec, text: str) -> None:
    """SpecError where a key that a config.json would show, but for `_ANY`, has another value."""
    kind = family(ours.family)
    plain = kind.to_hf_config(ours)
    differ = []
    for key in (key for key in ModelSpec.model_fields if key not in (*_ANY, "family")):
        if kind.to_hf_config(ours.model_copy(update={key: getattr(theirs, key)})) != plain:
            name = _EFFECTIVE.get(key, key)
            differ.append((f"model.{key}", getattr(theirs, name), getattr(ours, name)))
    if differ:
        told = "; ".join(f"{key} is {there} there and {here} by the spec" for key, there, here in differ)
        raise SpecError(f"{text}: {told}; set {', '.join(f'{key} = {_toml(there)}' for key, there, _ in differ)}")


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- a run --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunWeights:
    """The weights of a checkpoint of another run; its moments and its step are left behind."""

    store: Store
    run: str
    info: CheckpointInfo
    model: ModelSpec
    dataset: str

    @property
    def init(self) -> str:
        return f"state:{self.info.state_digest}"

    @property
    def place(self) -> str:
        return f"step {self.info.step} of {self.run}"

    @property
    def vocab(self) -> int:
        return self.model.vocab

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return dataset_tokenizer(self.store, self.dataset).tokenizer

    @property
    def beside(self) -> Beside:
        return beside_of(self.store, self.run)

    @cached_property
    def _reader(self) -> StateReader:
        return StateReader(self.store, load_manifest(self.store, self.run, self.info))

    def read(self, tensor: str, first: int, elements: int) -> Iterator[F32]:
        for at, data in self._reader.stream(tensor, PARAM, first, elements):
            block = np.frombuffer(data, "<f4")
            _finite(tensor, at, block, self.place)
            yield block


def run_weights(store: Store, name: str, step: int, model: ModelSpec) -> RunWeights:
    """The weights of that checkpoint as those of the model. SpecError where there is none, or of another model."""
    run = find_run(store, name)
    state = RunLog(store, run).fold(quick=True).of_this_version()
    info = state.at_step(step)
    if info is None:
        have = some_steps(sorted({c.step for c in state.restore_candidates()})) or "none"
        raise SpecError(f"model.init 'run:{name}@{step}': {run} has no usable checkpoint at step {step}; it has {have}")
    refuse_newer(store, run, info)
    what = load_what(store, run)
    theirs = ModelSpec.model_validate(what["model"])
    if theirs.family != model.family:
        raise SpecError(f"model.init: {run} is a {theirs.family}, the spec's model a {model.family}; set model.family")
    model = model if model.vocab else model.model_copy(update={"vocab": theirs.vocab})
    _same_model(theirs, model, f"{run} trains another model")
    ours, whole = ({t.name: t.shape for t in tensor_table(family(m.family), m)} for m in (model, theirs))
    for tensor in sorted({*ours, *whole}):
        if ours.get(tensor) != whole.get(tensor):
            raise SpecError(
                f"tensor {tensor} of {run} is {shape_text(whole.get(tensor, ()))}, the spec's model has "
                f"{shape_text(ours.get(tensor, ()))}; set model.… as it is there"
            )
    return RunWeights(store, run, info, theirs, what["data"]["digest"])
