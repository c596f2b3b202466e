"""From a checkpoint to files that other libraries open: safetensors with whatever texts belong beside them.

The caller says which tensors, under which names and in which shapes (a model family's mapping, trainer/models), and
where to (``export_to.py``: a folder, a bucket); this module streams them, a few megabytes at a time, so that memory
does not grow with the model. What is larger than a shard is cut into several files between tensors, with the index that
transformers reads: ``model-00001-of-00003.safetensors`` and so on, ``model.safetensors.index.json``.

safetensors: u64le length of the header, the header (JSON: name -> dtype, shape, data_offsets; padded with spaces to a
multiple of 8), then the tensors' little-endian bytes in the header's order without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from checkpoint.export_to import RUN_MARK, Buffer, Destination
from checkpoint.manifest import PARAM, Manifest
from checkpoint.read import StateReader
from checkpoint.store.base import Store

DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SHARD_BYTES = 5_000_000_000
"""What one file holds at most, as transformers cuts them; a tensor that is larger has a file of its own."""
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


class Read(Protocol):
    """Reads verified float32 master weights: ``elements`` of tensor ``name`` from ``first`` on (all that follow)."""

    def __call__(self, name: str, first: int = 0, elements: int | None = None) -> bytearray: ...


@dataclass(frozen=True, slots=True)
class ExportTensor:
    """A tensor of the file: its bytes come from ``data(read)``, in pieces of any size, together shape x dtype."""

    name: str
    shape: Sequence[int]
    data: Callable[[Read], Iterable[Buffer]]
    dtype: str = "F32"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]


def whole(name: str, piece_elements: int = 1 << 20) -> Callable[[Read], Iterator[Buffer]]:
    """The function of a tensor that is exported as it is: its master weights in float32.

    >>> ExportTensor("transformer.wte.weight", (512, 64), whole("wte"))  # doctest: +ELLIPSIS
    ExportTensor(...)
    """

    def data(read: Read) -> Iterator[Buffer]:
        first = 0
        while piece := read(name, first, None if piece_elements == 0 else piece_elements):
            yield piece
            first += len(piece) // 4

    return data


def safetensors_header(tensors: Sequence[ExportTensor], metadata: Mapping[str, str]) -> bytes:
    """The file's bytes up to the first tensor."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for tensor in tensors:
        if tensor.name in table:
            raise ValueError(f"tensor {tensor.name!r} is exported twice")
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.bytes],
        }
        at += tensor.bytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a safetensors header of {len(text)} bytes; the format's limit is {MAX_HEADER_BYTES}")
    return struct.pack("<Q", len(text)) + text


def shards(tensors: Sequence[ExportTensor], limit: int = SHARD_BYTES) -> list[tuple[str, list[ExportTensor]]]:
    """The files that the tensors go into, in order: names, and what each holds."""
    held: list[list[ExportTensor]] = []
    room = 0
    for tensor in tensors:
        if not held or tensor.bytes > room:
            held.append([])
            room = limit
        held[-1].append(tensor)
        room -= tensor.bytes
    if len(held) <= 1:
        return [(WEIGHTS, list(tensors))]
    stem, dot, kind = WEIGHTS.partition(".")
    return [(f"{stem}-{n:05d}-of-{len(held):05d}{dot}{kind}", some) for n, some in enumerate(held, 1)]


def export_safetensors(
    store: Store,
    manifest: Manifest,
    tensors: Sequence[ExportTensor],
    target: Destination,
    *,
    texts: Mapping[str, str | bytes],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write the ``texts`` (``{"config.json": ..., "tokenizer.json": ...}``) and the weights beside them; where the
    weights begin (of several files: their index).

    Files appear whole or not at all, the weights after the texts, their index last; in a folder all at once, so that
    an older export is replaced whole or stays. Damaged where the checkpoint's
    bytes are not what was saved, StoreUnavailable where the disk is full, StoreRefused where the target cannot be
    written or holds another model's weights.
    """
    reader = StateReader(store, manifest)

    def read(name: str, first: int = 0, elements: int | None = None) -> bytearray:
        rest = manifest.tensor(name).elements - first
        return reader.read(name, PARAM, first, rest if elements is None else min(elements, rest))

    files = shards(tensors, shard_bytes)
    state = manifest.state_digest.hex()
    said = {"format": "pt", RUN_MARK: manifest.run, "hotstage_step": str(manifest.step),
            "hotstage_state_digest": state, **(metadata or {})}  # fmt: skip
    index = {
        "metadata": {"total_size": sum(tensor.bytes for tensor in tensors)},
        "weight_map": {tensor.name: file for file, some in files for tensor in some},
    }
    names = [file for file, _ in files] + ([INDEX] if len(files) > 1 else [])
    target.begin([*texts, *names], WEIGHTS.partition(".")[0])
    where = ""
    try:
        for file, text in texts.items():
            if "/" in file or file.startswith("."):
                raise ValueError(f"file name {file!r} does not stand in the folder itself")
            data = text.encode() if isinstance(text, str) else text
            target.write(file, [data], len(data), state)
        for file, some in files:
            header = safetensors_header(some, said)
            size = len(header) + sum(tensor.bytes for tensor in some)
            where = target.write(file, _pieces(header, some, read), size, state)
        if len(files) > 1:
            data = (json.dumps(index, indent=2) + "\n").encode()
            where = target.write(INDEX, [data], len(data), state)
        target.finish()
    except BaseException:
        target.undo()
        raise
    return where


def _pieces(header: bytes, tensors: Sequence[ExportTensor], read: Read) -> Iterator[Buffer]:
    yield header
    for tensor in tensors:
        count = 0
        for piece in tensor.data(read):
            count += memoryview(piece).nbytes
            yield piece
        if count != tensor.bytes:
            raise ValueError(f"tensor {tensor.name!r} came with {count} bytes, its shape and dtype need {tensor.bytes}")
