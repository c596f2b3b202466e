"""Reading a checkpoint's state out of a store: any range of any tensor, checked block by block.

Restore, export and verify read through this. Nothing that a digest does not cover leaves it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from checkpoint import codec, keys, pages
from checkpoint.chunks import Piece
from checkpoint.digest import BLOCK_ELEMENTS, blocks, wrong_block
from checkpoint.errors import Damaged, NotFound, StoreRefused
from checkpoint.log import CheckpointInfo
from checkpoint.manifest import PARAM, VERSION, Manifest
from checkpoint.store.base import Store

logger = logging.getLogger(__name__)


def load_manifest(store: Store, run: str, info: CheckpointInfo) -> Manifest:
    """The manifest that a checkpoint record names; Damaged where it does not agree in size, digest and content,
    StoreRefused where it is whole and another run's.
    """
    what = f"manifest {info.manifest} of run {run}"
    try:
        data = pages.read(store, run, info.manifest, what, size=info.bytes, sha256=info.sha256)
    except NotFound as error:
        raise Damaged(f"{what}: log record {info.n} names it, but it is gone") from error
    manifest = Manifest.parse(data, what)
    _check_name(manifest.run, run, what)
    said = (manifest.run, manifest.step, manifest.epoch, manifest.samples, len(manifest.sources))
    if said != (run, info.step, info.epoch, info.data_position, info.parts):
        raise Damaged(f"{what}: says (run, step, epoch, samples, parts) {said}, log record {info.n} says otherwise")
    if manifest.state_digest.hex() != info.state_digest:
        raise Damaged(
            f"{what}: gives the state digest {manifest.state_digest.hex()}, record {info.n} says {info.state_digest}"
        )
    return manifest


def refuse_newer(store: Store, run: str, info: CheckpointInfo) -> None:
    """OtherVersion where a newer hotstage wrote the manifest that a checkpoint record names, StoreRefused where it is
    another run's: one request.

    For before anything is written that would go on from it. What is damaged or gone passes: whoever restores sees it,
    and so whoever reads the pages of a large one.
    """
    what = f"manifest {info.manifest} of run {run}"
    try:
        root = store.get(keys.run_key(run, info.manifest), max_bytes=pages.ONE_OBJECT_BYTES)
        if not pages.check_list(root, what):
            fields = codec.Fields(codec.unseal(root, what, max_bytes=len(root)), what)
            fields.version(VERSION)
            _check_name(fields.text("run", 200), run, what)
    except (Damaged, NotFound):
        pass


def _check_name(said: str, run: str, what: str) -> None:
    """StoreRefused where a run was renamed by hand: nothing is damaged, and renamed back it is there again."""
    if said != run and keys.is_run(said):
        raise StoreRefused(
            f"{what}: it is whole, and of run {said}: what lies under runs/{run}/ was renamed or copied, and a run "
            f"keeps its name; rename it back (runs/{said}/ and index/{said}), or fork {said} under another name"
        )


class StateReader:
    """Ranges of a checkpoint's tensors, verified. Holds no data; safe to use from several threads."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self._store = store
        self.manifest = manifest

    def stream(
        self, name: str, kind: int = PARAM, first: int = 0, elements: int | None = None
    ) -> Iterator[tuple[int, memoryview]]:
        """(first element, float32 bytes) of what covers [first, first + elements), in order, cut to it; 64 MiB at most.

        Damaged where a chunk is gone, short, or holds other bytes than its blocks' digests say.
        """
        tensor = self.manifest.tensor(name)
        end = tensor.elements if elements is None else first + elements
        if not 0 <= first <= end <= tensor.elements:
            raise ValueError(f"elements {first} to {end} of tensor {name!r}, which has {tensor.elements}")
        for piece in self.manifest.pieces_of(name, kind, first, end - first):
            low = max(first, piece.first) // BLOCK_ELEMENTS * BLOCK_ELEMENTS
            high = min(piece.first + piece.elements, -(-end // BLOCK_ELEMENTS) * BLOCK_ELEMENTS)
            data = memoryview(self._blocks(name, piece, low, high))
            begin, stop = max(first, low), min(end, high)
            yield begin, data[(begin - low) * 4 : (stop - low) * 4]

    def read(self, name: str, kind: int = PARAM, first: int = 0, elements: int | None = None) -> bytearray:
        """The float32 bytes of a range of a tensor and kind (all of it by default)."""
        count = self.manifest.tensor(name).elements - first if elements is None else elements
        data = bytearray(max(count, 0) * 4)
        self.read_into(memoryview(data), name, kind, first, elements)
        return data

    def read_into(
        self, out: memoryview, name: str, kind: int = PARAM, first: int = 0, elements: int | None = None
    ) -> None:
        """As ``read``, into memory of exactly the range's size (a slot)."""
        for begin, data in self.stream(name, kind, first, elements):
            out[(begin - first) * 4 : (begin - first) * 4 + len(data)] = data

    def _blocks(self, name: str, piece: Piece, low: int, high: int) -> bytes:
        chunk = self.manifest.chunks[piece.chunk]
        key = keys.run_key(self.manifest.run, chunk.name)
        size = (high - low) * 4
        try:
            data = self._store.get(key, first=piece.offset + (low - piece.first) * 4, length=size)
        except NotFound as error:
            raise Damaged(f"chunk {key}: the manifest of step {self.manifest.step} names it, but it is gone") from error
        first = (low - piece.first) // BLOCK_ELEMENTS
        at = wrong_block(data, piece.leaves[first : first + blocks(high - low)])
        if at is not None:
            raise Damaged(f"chunk {key}: elements from {low + at // 4} on of tensor {name!r} are not what was saved")
        return data
