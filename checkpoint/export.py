"""From a checkpoint to files that other libraries open: safetensors with whatever texts belong beside them.

The caller says which tensors, under which names and in which shapes (a model family's mapping, trainer/models); this
module streams them, a few megabytes at a time, so that memory does not grow with the model.

safetensors: u64le length of the header, the header (JSON: name -> dtype, shape, data_offsets; padded with spaces to a
multiple of 8), then the tensors' little-endian bytes in the header's order without gaps.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from checkpoint.errors import StoreRefused, StoreUnavailable
from checkpoint.manifest import PARAM, Manifest
from checkpoint.read import StateReader
from checkpoint.store.base import Store
from trainer.wire.files import kept

DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class Read(Protocol):
    """Reads verified float32 master weights: ``elements`` of tensor ``name`` from ``first`` on (all that follow)."""

    def __call__(self, name: str, first: int = 0, elements: int | None = None) -> bytearray: ...


Buffer = bytes | bytearray | memoryview
"""What a tensor's function yields: contiguous little-endian bytes (a C-ordered NumPy array's ``.data.cast("B")``)."""


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


def export_safetensors(
    store: Store,
    manifest: Manifest,
    tensors: Sequence[ExportTensor],
    folder: Path,
    *,
    texts: Mapping[str, str | bytes],
    metadata: Mapping[str, str] | None = None,
    name: str = "model.safetensors",
) -> Path:
    """Write ``folder/name`` and the ``texts`` beside it (``{"config.json": ..., "tokenizer.json": ...}``); its path.

    Files appear whole or not at all, the weights last. Damaged where the checkpoint's bytes are not what was saved,
    StoreUnavailable where the disk is full, StoreRefused where the folder cannot be written.
    """
    reader = StateReader(store, manifest)

    def read(name: str, first: int = 0, elements: int | None = None) -> bytearray:
        rest = manifest.tensor(name).elements - first
        return reader.read(name, PARAM, first, rest if elements is None else min(elements, rest))

    said = {"format": "pt", "hotstage_run": manifest.run, "hotstage_step": str(manifest.step),
            "hotstage_state_digest": manifest.state_digest.hex(), **(metadata or {})}  # fmt: skip

    def weights() -> Iterator[Buffer]:
        yield safetensors_header(tensors, said)
        for tensor in tensors:
            count = 0
            for piece in tensor.data(read):
                count += memoryview(piece).nbytes
                yield piece
            if count != tensor.bytes:
                raise ValueError(
                    f"tensor {tensor.name!r} came with {count} bytes, its shape and dtype need {tensor.bytes}"
                )

    for file, text in texts.items():
        if "/" in file or file.startswith("."):
            raise ValueError(f"file name {file!r} does not stand in the folder itself")
        write_pieces(folder / file, [text.encode() if isinstance(text, str) else text])
    return write_pieces(folder / name, weights())


def write_pieces(path: Path, pieces: Iterable[Buffer]) -> Path:
    """Write the pieces to a temporary file, fsync it, move it to its name; nothing stays where it fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with kept(path, durable=True) as file:
            for piece in pieces:
                file.write(piece)
    except OSError as error:
        text = f"writing {path}: {error.strerror or error}; nothing was left half written"
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError | IsADirectoryError):
            raise StoreRefused(f"{text}: choose a folder that can be written with -o") from error
        raise StoreUnavailable(f"{text}: free space, or choose another folder with -o") from error
    return path
