"""From a checkpoint in the store into slots, for any layout: a tensor, or a piece of one, goes to who keeps it now.

Only what the given ranks keep is read, in ranges as large as the chunks allow, several at a time: once a node, also
what several of its ranks keep (a whole tensor, in every replica). Every block is checked against its digest in the
manifest before a byte of it counts. Damaged names the object.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from checkpoint import keys
from checkpoint.chunks import Piece
from checkpoint.digest import BLOCK_BYTES, KINDS, wrong_block_of
from checkpoint.errors import CheckpointError, Damaged, NotFound
from checkpoint.layout import PlanLayout, RankLayout, StateSlot
from checkpoint.log import CheckpointInfo
from checkpoint.manifest import Manifest
from checkpoint.read import load_manifest
from checkpoint.store import Store

log = logging.getLogger(__name__)

GAP_BYTES = 1 << 20
"""Bytes of a chunk that are read and thrown away rather than asking twice: at most so many at once, and"""
WASTE = 32
"""of a read at most one in so many: what lies between is another rank's, who reads it too."""


PART_BYTES = 16 * BLOCK_BYTES
"""At most so much is checked at once, while what follows is on its way: as many blocks as are summed side by side."""


class OtherModel(CheckpointError):
    """The checkpoint is not one of what the plan trains."""

    exit_code = 78


class Target(Protocol):
    """A slot, as restore sees it (``agent/slots.py``)."""

    layout: RankLayout

    def begin_fill(self) -> memoryview: ...

    def filled(self, first: int, end: int) -> None: ...

    def finish_fill(self, step: int, epoch: int, pool: Executor) -> None: ...


@dataclass(frozen=True)
class Placement:
    """Whole blocks of a piece of the manifest and where their bytes go: (target, offset in its data) of each."""

    piece: Piece
    to: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChunkRead:
    """One read: bytes [first, first + length) of a chunk, and the pieces inside it."""

    chunk: int
    first: int
    length: int
    wanted: tuple[Placement, ...]


@dataclass(frozen=True)
class PieceCut:
    """Bytes [first, first + bytes) of a placement's piece: whole blocks of it."""

    placement: Placement
    first: int
    bytes: int


@dataclass(frozen=True)
class Part:
    """Of a read, bytes in a row that go to bytes in a row, and are checked at once: ``to`` is (target, offset in its
    data). Without one they are nobody's, and thrown away.
    """

    bytes: int
    to: tuple[int, int] | None
    cuts: tuple[PieceCut, ...]


def check_same_model(manifest: Manifest, plan: PlanLayout, what: str, *, same_what: bool = True) -> None:
    """OtherModel where the checkpoint has another What (a fork may: ``same_what=False``) or other tensors."""
    if same_what and manifest.what != plan.what_digest:
        raise OtherModel(
            f"{what} is of another run: its What is {manifest.what.hex()[:16]}, the plan's "
            f"{plan.what_digest.hex()[:16]}; restore from a checkpoint of this run"
        )
    theirs = {t.name: t for t in manifest.tensors}
    for tensor in plan.tensors:
        saved = theirs.get(tensor.name)
        shape = None if saved is None else saved.shape
        if saved is None or shape != tensor.shape:
            raise OtherModel(f"{what} has tensor {tensor.name} as {shape}, the plan as {tensor.shape}: another model")
        if saved.kinds != tensor.kinds:
            raise OtherModel(
                f"{what} has {saved.kinds - 1} moments of tensor {tensor.name}, the plan's optimizer takes "
                f"{tensor.kinds - 1}: another optimizer; begin with its weights alone (model.init = 'run:ID@STEP')"
            )


def plan_reads(manifest: Manifest, plan: PlanLayout, ranks: Sequence[RankLayout]) -> list[ChunkRead]:
    """What to read for these ranks (one target each, in order): pure, the largest reads first.

    Ranges of one chunk that lie next to each other, or nearly, become one read; what several ranks keep is read once.
    """
    kept: dict[tuple[int, int, int], list[tuple[int, StateSlot]]] = {}
    for target, rank in enumerate(ranks):
        for state in rank.states:
            if state.elements:
                kept.setdefault((state.tensor, state.first, state.elements), []).append((target, state))
    by_chunk: dict[int, list[Placement]] = {}
    for (tensor, first, elements), places in kept.items():
        for kind in range(plan.tensors[tensor].kinds):
            for whole in manifest.pieces_of(plan.tensors[tensor].name, kind, first, elements):
                piece = whole.cut(first, first + elements)
                to = tuple((target, state.kind_offset(kind) + 4 * (piece.first - first)) for target, state in places)
                by_chunk.setdefault(piece.chunk, []).append(Placement(piece, to))
    reads = [read for chunk, wanted in by_chunk.items() for read in _joined(chunk, wanted)]
    return sorted(reads, key=lambda read: -read.length)


def _joined(chunk: int, wanted: Sequence[Placement]) -> Iterator[ChunkRead]:
    """The ranges of one chunk as few reads."""
    held: list[Placement] = []
    first = end = waste = 0
    for w in sorted(wanted, key=lambda w: w.piece.offset):
        gap = w.piece.offset - end
        if held and (gap < 0 or gap > GAP_BYTES or (waste + gap) * WASTE > end - first - waste):
            yield ChunkRead(chunk, first, end - first, tuple(held))
            held = []
        if not held:
            first, waste, gap = w.piece.offset, 0, 0
        held.append(w)
        waste += gap
        end = w.piece.offset + w.piece.bytes
    yield ChunkRead(chunk, first, end - first, tuple(held))


def checked_parts(read: ChunkRead) -> Iterator[Part]:
    """A read as few parts of at most PART_BYTES: pure, in order, without gaps."""
    held: list[PieceCut] = []
    to, size, end = (0, 0), 0, read.first
    for placement in read.wanted:
        piece, (target, offset) = placement.piece, placement.to[0]
        gap, first = piece.offset - end, 0
        while first < piece.bytes:
            room = (PART_BYTES - size) // BLOCK_BYTES * BLOCK_BYTES
            take = piece.bytes - first if piece.bytes - first <= PART_BYTES - size else room
            if held and (gap or not take or (target, offset + first) != (to[0], to[1] + size)):
                yield Part(size, to, tuple(held))
                held, size = [], 0
                continue
            if gap:
                yield Part(gap, None, ())
                gap = 0
            if not held:
                to = (target, offset + first)
            held.append(PieceCut(placement, first, take))
            first, size = first + take, size + take
        end = piece.offset + piece.bytes
    yield Part(size, to, tuple(held))


def restore_slots(
    store: Store,
    run: str,
    info: CheckpointInfo,
    plan: PlanLayout,
    slots: Mapping[int, Target],
    *,
    epoch: int,
    pool: Executor,
    same_what: bool = True,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Fill one slot of each rank from the checkpoint that the record names; ``epoch`` is that of the attempt to come.

    ``go_on`` is asked between reads: what it raises ends the restore. Raises that, Damaged (which names the object),
    OtherModel, StoreError; the slots are then not READY.
    """
    manifest = load_manifest(store, run, info)
    check_same_model(manifest, plan, f"the checkpoint of step {info.step} (log record {info.n})", same_what=same_what)
    targets = list(slots.values())
    reads = plan_reads(manifest, plan, [slot.layout for slot in targets])
    views = [slot.begin_fill() for slot in targets]
    try:
        futures = [pool.submit(_read, store, manifest, read, targets, views) for read in reads]
        try:
            for future in futures:
                go_on()
                future.result()
        finally:
            for future in futures:
                future.cancel()
            for future in futures:
                if not future.cancelled():
                    future.exception()  # nobody writes into the slots any more
    except BaseException as error:
        _let_go(error)
        raise
    finally:
        for view in views:
            view.release()
    for slot in targets:
        slot.finish_fill(info.step, epoch, pool)
    size = sum(read.length for read in reads)
    log.info("restored step %d: %d bytes in %d reads", info.step, size, len(reads), extra={"epoch": epoch})


def _let_go(error: BaseException | None) -> None:
    """What the frames of an error hold of the slots: they could not be closed as long as somebody has the error."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _read(
    store: Store, manifest: Manifest, read: ChunkRead, targets: Sequence[Target], views: Sequence[memoryview]
) -> None:
    """One read, straight to where it is wanted, and checked meanwhile; what several ranks keep is copied from the first
    one's.
    """
    chunk = manifest.chunks[read.chunk]
    key = keys.run_key(manifest.run, chunk.name)
    parts = list(checked_parts(read))
    places = [
        memoryview(bytearray(part.bytes))
        if part.to is None
        else views[part.to[0]][part.to[1] : part.to[1] + part.bytes]
        for part in parts
    ]

    def check(number: int) -> None:
        own, cuts = places[number], parts[number].cuts
        wrong = wrong_block_of(own, [(cut.bytes, _leaves(cut)) for cut in cuts]) if cuts else None
        if wrong is not None:
            cut, at = cuts[wrong[0]], wrong[1]
            piece = cut.placement.piece
            raise Damaged(
                f"chunk {key}: {KINDS[piece.kind]} of tensor {manifest.tensors[piece.tensor].name}, elements from "
                f"{piece.first + (cut.first + at) // 4} on, is not what was saved"
            )
        at = 0
        for cut in cuts:
            for target, offset in cut.placement.to[1:]:
                views[target][offset + cut.first : offset + cut.first + cut.bytes] = own[at : at + cut.bytes]
            at += cut.bytes

    try:
        store.read_into(key, places, first=read.first, filled=check)
    except NotFound as error:
        raise Damaged(f"chunk {key}: the manifest of step {manifest.step} names it, but it is gone") from error
    finally:
        for place in places:  # an error's frames keep the functions that have them, and so the slots
            place.release()
    for wanted in read.wanted:  # only now: what was read again after a fault was not there for good
        for target, offset in wanted.to:
            targets[target].filled(offset, offset + wanted.piece.bytes)


def _leaves(cut: PieceCut) -> Sequence[bytes]:
    leaf = cut.first // BLOCK_BYTES
    return cut.placement.piece.leaves[leaf : leaf + -(-cut.bytes // BLOCK_BYTES)]
