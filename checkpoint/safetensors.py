"""Reading safetensors that others wrote: one file, or several with their index, in a folder. Hostile until shown right.

Only what the files say of themselves is looked at here: names, types, shapes, and where the bytes lie. What they mean
is the caller's (``flows/drive/begin_from.py``). The format: ``export.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.errors import StoreRefused
from checkpoint.export import DTYPES, INDEX, MAX_HEADER_BYTES, WEIGHTS
from checkpoint.export_to import ADAPTER

MAX_TENSORS = 1 << 20
MAX_ADAPTER_BYTES = 1 << 20
SIZES = DTYPES | {"BOOL": 1, "I8": 1, "I16": 2, "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
"""Bytes of an element of every type whose elements are whole bytes: what a type is good for is the caller's."""


class NoWeights(StoreRefused):
    """The folder's files are not safetensors that can be read; the text names the file and what is wrong."""

    exit_code = 65


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a file: its little-endian elements from byte ``offset`` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_folder(folder: Path) -> dict[str, FileTensor]:
    """Every tensor of the folder's model.safetensors, or of the files that its index names. NoWeights for anything
    else."""
    single, index = folder / WEIGHTS, folder / INDEX
    if (single.is_file() or index.is_file()) and (beside := _adapter(folder)):
        raise NoWeights(
            f"{folder} holds an adapter beside a model ({beside}), and its weights are without it: merge the two "
            "(peft's merge_and_unload, then save_pretrained into another folder), or move the adapter's files away"
        )
    if single.is_file():
        return read_file(single)
    if not index.is_file():
        raise NoWeights(f"{folder} has neither {WEIGHTS} nor {INDEX}: {instead(folder)}")
    where = _json(_read(index, MAX_HEADER_BYTES), index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
        raise NoWeights(f"{index}: 'weight_map' must name the file of each tensor")
    found: dict[str, FileTensor] = {}
    for name in sorted(set(where.values())):
        if name != os.path.basename(name) or name.startswith("."):
            raise NoWeights(f"{index}: {name[:80]!r} is no file of this folder")
        if not os.path.isfile(folder / name):  # also what no file's name can be
            raise NoWeights(f"{index} names {name[:80]}, which is {gone(folder / name)}: fetch it again")
        for tensor in read_file(folder / name).values():
            if where.get(tensor.name) == name:
                found[tensor.name] = tensor
    missing = sorted(where.keys() - found.keys())
    if missing:
        raise NoWeights(
            f"{index}: {missing[0][:80]!r} is not in {where[missing[0]]}, which it names: fetch the folder again, or "
            "take that line out if it is not stored (the head of a model whose head is its embedding)"
        )
    return found


def gone(path: Path) -> str:
    """Where a file is not, which is missing."""
    return f"a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else "not in its folder"


def _adapter(folder: Path) -> str | None:
    """The file by which a folder holds an adapter, and what it says of it; None where it holds none."""
    try:
        found = sorted(entry.name for entry in folder.iterdir() if ADAPTER.fullmatch(entry.name))
    except OSError:  # its files may be read all the same
        found = [name for name in ("adapter_config.json",) if (folder / name).is_file()]
    if not found:
        return None
    config, said = folder / "adapter_config.json", None
    if config.is_file():
        with contextlib.suppress(NoWeights, ValueError, RecursionError):
            said = json.loads(_read(config, MAX_ADAPTER_BYTES))
    told = [said.get(key) for key in ("peft_type", "base_model_name_or_path")] if isinstance(said, dict) else []
    kind, base = (str(value)[:80] if value else "" for value in told or ("", ""))
    return found[0] + (f": {kind or 'made'} for {base!r}" if base else "")


def instead(folder: Path) -> str:
    """What a folder that is no model's has in place of its files, and the mend."""
    try:
        there = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if adapter := _adapter(folder):
        return f"{adapter} is an adapter, not a model; merge it into its model first (peft's merge_and_unload)"
    for name in there:
        if name.endswith((".safetensors", ".json")) and not (folder / name).exists():
            return f"{name} is {gone(folder / name)}; download it again"
        if name in (WEIGHTS, INDEX):
            return f"{name} is no file; download it again"
    for what, ending, mend in _OTHERS:
        for name in there:
            if re.fullmatch(ending, name):
                return f"{name} is {what}; {mend}"
    below = [f.parent for pattern in ("*/config.json", "snapshots/*/config.json") for f in sorted(folder.glob(pattern))]
    if below:
        more = f" (or of {len(below) - 1} more)" if len(below) > 1 else ""
        return f"a model lies below it: give the folder {shlex.quote(str(below[-1]))}{more}"
    if not there or "config.json" in there:
        return f"it {'has a config.json alone' if there else 'is empty'}; download the model again"
    return "name the folder that an export or a download made"


_SAVED = "transformers' from_pretrained(DIR).save_pretrained(OTHER) writes safetensors of it"
_PICKLE = "a pickle, which is not opened, because it can hold any program"
_OTHERS = (
    ("one of several files, whose index is missing", r"model-\d+-of-\d+\.safetensors", f"copy {INDEX} beside it too"),
    ("of a model in its maker's form", r"params\.json|consolidated.*\.safetensors", "take it in Hugging Face's form"),
    ("of an image model (diffusers)", r"model_index\.json", "give the folder of a language model"),
    ("of a sharded checkpoint of DeepSpeed", r"zero_to_fp32\.py|global_step\d+", "run its zero_to_fp32.py with "
     "--safe_serialization"),
    ("of a sharded checkpoint of torch", r".*\.distcp|pytorch_model_fsdp_\d+", "accelerate merge-weights makes "
     f"{WEIGHTS} of it"),
    (_PICKLE, r".*\.(bin|pt|pth|ckpt)", _SAVED),
    ("of llama.cpp", r".*\.gguf", "take the model's safetensors"),
    ("of ONNX", r".*\.onnx", "take the model's safetensors"),
    ("of TensorFlow or Flax", r".*\.(h5|msgpack)", _SAVED),
    ("weights under a name of their own", r".*\.safetensors", f"name it {WEIGHTS}"),
)  # fmt: skip
_MAGIC = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file: `git lfs pull` in its folder fetches that"),
    (b"PK\3\4", f"a zip archive, such as torch.save's: {_PICKLE}; {_SAVED}"),
    (b"\x80\x02", f"{_PICKLE}; {_SAVED}"),
    (b"GGUF", "of llama.cpp, whatever its name; take the model's safetensors"),
)


def _refuse_others(path: Path, head: bytes) -> None:
    """NoWeights where a file that begins so is of another kind, whatever its name."""
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise NoWeights(f"{path} is {what}")
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        raise NoWeights(f"{path} is a page of HTML or XML, such as a login or an error: fetch the file itself again")


def read_file(path: Path) -> dict[str, FileTensor]:
    """The tensors of one file, none of which overlap or leave it."""
    head = _read(path, 64)
    size = path.stat().st_size
    if not size:
        raise NoWeights(f"{path} is empty: fetch it again")
    _refuse_others(path, head)
    head = head[:8]
    length = int.from_bytes(head, "little")
    if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise NoWeights(f"{path} is not safetensors, or was cut short: its header would have {length} of {size} bytes")
    table = _json(_read(path, 8 + length)[8:], path)
    begin, found = 8 + length, {}
    if len(table) > MAX_TENSORS:
        raise NoWeights(f"{path} has {len(table)} tensors, at most {MAX_TENSORS} are read")
    for name, row in table.items():
        if name != "__metadata__":
            found[name] = _tensor(path, name, row, begin, size)
    end = begin
    for tensor in sorted(found.values(), key=lambda t: (t.offset, t.elements)):
        if tensor.offset != end:
            how = "overlaps another one" if tensor.offset < end else f"lies {tensor.offset - end} bytes behind the last"
            raise NoWeights(f"{path}: tensor {tensor.name[:80]!r} {how}: it is damaged, fetch it again")
        end = tensor.offset + tensor.elements * SIZES[tensor.dtype]
    if found and end < size:
        raise NoWeights(f"{path} has {size - end} bytes behind its last tensor: it is damaged, fetch it again")
    return found


def _tensor(path: Path, name: str, row: Any, begin: int, size: int) -> FileTensor:
    what = f"{path}: tensor {name[:80]!r}"
    if not isinstance(row, Mapping):
        raise NoWeights(f"{what} is not described")
    dtype, shape, place = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise NoWeights(f"{what} is of type {str(dtype)[:20]!r}; {', '.join(SIZES)} are read: take another copy")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(d) is int and 0 <= d < 1 << 48 for d in shape):
        raise NoWeights(f"{what} has no shape that can be")
    if not isinstance(place, list) or len(place) != 2 or not all(type(x) is int and x >= 0 for x in place):
        raise NoWeights(f"{what} has no place in the file")
    if place[1] - place[0] == math.prod(shape) * SIZES[dtype] and begin + place[1] > size:
        raise NoWeights(f"{what} ends at byte {begin + place[1]}, the file at {size}: it was cut short, fetch it again")
    if place[1] - place[0] != math.prod(shape) * SIZES[dtype]:
        raise NoWeights(f"{what}: bytes {place[0]} to {place[1]} of {size - begin} do not hold {shape} of {dtype}")
    return FileTensor(name, dtype, tuple(shape), path, begin + place[0])


def digest_of(tensors: Mapping[str, FileTensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of names: the same whatever files they lie in."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(json.dumps([name, tensor.dtype, list(tensor.shape)]).encode())
        left = tensor.elements * SIZES[tensor.dtype]
        try:
            with open(tensor.file, "rb") as file:
                file.seek(tensor.offset)
                while left:
                    data = file.read(min(left, 1 << 20))
                    if not data:
                        raise NoWeights(f"{tensor.file} became shorter while it was read")
                    total.update(data)
                    left -= len(data)
        except OSError as error:
            raise NoWeights(f"{tensor.file} cannot be read: {error.strerror or error}") from error
    return total.hexdigest()


def _read(path: Path, count: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise NoWeights(f"{path} cannot be read: {error.strerror or error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON map none of whose keys comes twice: readers differ in which they take. ValueError for another."""
    value: dict[str, Any] = {}
    for key, held in pairs:
        if key in value:
            raise ValueError(f"{key[:60]!r} is in it twice")
        value[key] = held
    return value


def _json(data: bytes, path: Path) -> dict[str, Any]:
    _refuse_others(path, data[:64])
    try:
        value = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise NoWeights(f"{path}: what should be its table is no JSON ({str(error)[:90]})") from error
    if not isinstance(value, dict):
        raise NoWeights(f"{path}: what should be its table is no map")
    return value
