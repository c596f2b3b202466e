"""What an upload sends: which snapshot, and its chunks, hashed where they lie, sent from there, checked to be whole."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from itertools import pairwise

from checkpoint import keys
from checkpoint.agent.slots import Seen, Slot, SlotChanged
from checkpoint.chunks import MAX_CHUNK_BYTES, Chunk, ChunkPlan, Digests, Piece, Segment, chunk_digests, digests_of_two
from checkpoint.errors import Damaged, NotFound, StoreError
from checkpoint.layout import RankLayout
from checkpoint.store import Info, Store

log = logging.getLogger(__name__)

WORKERS = 4
"""Threads of an agent that move chunks."""


def segments(layout: RankLayout) -> list[Segment]:
    """Where each tensor and kind that this rank stores, or its piece of it, lies in the data of its slots."""
    return [
        Segment(state.tensor, kind, state.first, state.elements, state.kind_offset(kind))
        for state in layout.states
        if state.saves
        for kind in range(state.kinds)
    ]


def agreed(store: Store, run: str, epoch: int, steps: Sequence[int]) -> int:
    """Of these steps, newest first, the one to begin: that which a node began last, else the newest. Says which."""
    key = keys.upload_key(run, epoch)
    chosen = steps[0]
    try:
        begun = -1
        if len(steps) > 1:
            with contextlib.suppress(NotFound, Damaged, ValueError):
                begun = int(store.get(key, max_bytes=32))
            chosen = begun if begun in steps else chosen
        if chosen != begun:
            store.put(key, str(chosen).encode())
    except StoreError as error:
        log.warning("the nodes cannot agree on a snapshot now: %s", error)
    return chosen


_SCRATCH = threading.local()


class _Wanted:
    """A chunk whose digests a worker waits for, and what came of that."""

    def __init__(self, plan: ChunkPlan, view: memoryview) -> None:
        self.plan, self.view = plan, view
        self.found: Digests | None = None
        self.failed: BaseException | None = None


class Hashing:
    """Digests for workers that want them at the same time: the one whose turn it is hashes its own chunk and another
    that waits, both in less time than one after the other. ``threads`` of them at once: where all workers hash, disk
    and network wait, and afterwards all wait for them.
    """

    def __init__(self, threads: int) -> None:
        self._idle = threads
        self._waiting: list[_Wanted] = []
        self._changed = threading.Condition()

    def digests(self, plan: ChunkPlan, view: memoryview) -> Digests:
        own = _Wanted(plan, view)
        with self._changed:
            self._waiting.append(own)
            self._changed.wait_for(lambda: own.found or own.failed or (self._idle and own in self._waiting))
            if own.found is None and own.failed is None:
                self._waiting.remove(own)
                chosen = [own, *self._waiting[:1]]
                del self._waiting[:1]
                self._idle -= 1
            else:
                chosen = []
        if chosen:
            self._hash(chosen)
        if own.found is None:
            assert own.failed is not None
            raise own.failed
        return own.found

    def _hash(self, chosen: Sequence[_Wanted]) -> None:
        try:
            _fill(chosen)
        finally:
            with self._changed:
                self._idle += 1
                self._changed.notify_all()


def _fill(chosen: Sequence[_Wanted]) -> None:
    """What comes of each. Where two at once fail each is hashed by itself: one of them may hold."""
    try:
        if len(chosen) == 1:
            found: Sequence[Digests] = [chunk_digests(chosen[0].plan, chosen[0].view)]
        else:
            found = digests_of_two([(wanted.plan, wanted.view) for wanted in chosen])
    except BaseException as error:  # its caller raises it
        if len(chosen) == 1:
            chosen[0].failed = error
        else:
            for wanted in chosen:
                _fill([wanted])
    else:
        for wanted, digests in zip(chosen, found, strict=True):
            wanted.found = digests


_HASHING = Hashing(max(1, min(WORKERS, len(os.sched_getaffinity(0))) // 2))


def together(plan: ChunkPlan, data: memoryview) -> memoryview:
    """A chunk's bytes: the slot's own where its segments lie side by side there, else copied into this thread's."""
    begin, end = plan.segments[0].source, plan.segments[-1].source + plan.segments[-1].bytes
    if end - begin == plan.bytes and all(a.source + a.bytes == b.source for a, b in pairwise(plan.segments)):
        return data[begin:end]
    scratch: bytearray | None = getattr(_SCRATCH, "bytes", None)
    if scratch is None or len(scratch) < plan.bytes:
        scratch = _SCRATCH.bytes = bytearray(max(plan.bytes, MAX_CHUNK_BYTES))
    view, at = memoryview(scratch)[: plan.bytes], 0
    for s in plan.segments:
        view[at : at + s.bytes] = data[s.source : s.source + s.bytes]
        at += s.bytes
    return view


def sent_before(
    store: Store, run: str, step: int, epoch: int, ranks: Iterable[int], incarnation: str
) -> dict[tuple[int, int], list[Info]]:
    """Chunks of this step that other agents of this node have sent, by rank and index: one request a rank."""
    found: dict[tuple[int, int], list[Info]] = {}
    for rank in ranks:
        for info in store.list(keys.run_key(run, keys.chunk_prefix(step, epoch, rank))):
            other, index = info.key.rsplit("-", 2)[1:]
            if other != incarnation and index.isdecimal():
                found.setdefault((rank, int(index)), []).append(info)
    log.info("chunks of step %d that an agent before this one has sent: %d", step, len(found))
    return found


def send(
    store: Store, run: str, name: str, slot: Slot, seen: Seen, plan: ChunkPlan, there: Sequence[Info]
) -> tuple[Chunk, tuple[Piece, ...]]:
    """Read, hash and create the chunk of this name, where it is not one of those that are there. Raises SlotChanged."""
    with slot.data() as data, together(plan, data) as view:
        pieces, digest = _HASHING.digests(plan, view)
        chunk = Chunk(name, view.nbytes, digest)
        slot.verify((segment.source, segment.source + segment.bytes) for segment in plan.segments)
        slot.check(seen)  # a refill while it was read shows here, before a digest of torn bytes goes up
        for info in there:
            if info.bytes == chunk.bytes and store.holds(info.key, view, sha256=chunk.sha256):
                return Chunk(info.key.removeprefix(keys.run_key(run, "")), chunk.bytes, chunk.sha256), pieces
        if not store.create(keys.run_key(run, name), view, sha256=chunk.sha256):
            raise SlotChanged(f"object {name} is there with other bytes")
    return chunk, pieces
