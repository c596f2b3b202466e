"""From a snapshot in the slots to chunks in the store and this node's part manifest.

Snapshots that the gang has marked go up (``checkpoint.persist_every``), and the one that an attempt started from; the
others are for a start from memory. One upload at a time, in a thread of its own; the next one takes the newest such
snapshot that is ready by then, so a slow store costs checkpoints, never steps. A snapshot is held while it is read: the
ranks have other slots, and where they have none the gang leaves its save out (``wire/slot.h``). What it needs beside
the slots is at most one chunk (64 MiB) a worker, however long the store is away (``send.py``).

A checkpoint has one deadline, from when its upload begins to its commit: requests, retries and pauses end by then. An
upload that fails is tried again until then; when a newer snapshot is ready meanwhile, that one goes instead. An agent
that takes over from another one goes on where that one stopped: a chunk that is there with the bytes that the slots
hold is not sent again. A final snapshot (done, or preempted) is never given up for another: nothing newer can come.

Several nodes must pick the same step, or no checkpoint is ever whole. All ranks snapshot at the same steps, and a node
that begins one says so (a hint, ``live/<epoch>/upload/last``): where it has a choice it takes the one that was begun
last, if that is among them, else its newest. One request a node, and another one to choose, however many nodes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from checkpoint import keys, pages
from checkpoint.agent.send import agreed, segments, send, sent_before
from checkpoint.agent.slots import Seen, Slot, SlotChanged, SlotTable
from checkpoint.amendments import NONE, Amendments
from checkpoint.chunks import Chunk, ChunkPlan, Piece, Tensor, plan_chunks
from checkpoint.errors import Damaged, StoreError
from checkpoint.layout import PlanLayout
from checkpoint.manifest import PartManifest
from checkpoint.pages import TooLarge
from checkpoint.store import Info, Store
from checkpoint.store.limits import deadline, until

log = logging.getLogger(__name__)

_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_VOIDS = 4  # uploads of one step that found its slots changed: by then it is their memory


@dataclass(frozen=True)
class Source:
    """The attempt whose snapshots go up.

    ``point``: a snapshot of an older epoch that this attempt started from, to be stored as its own. ``stored``: the
    step of the checkpoint from which its slots were filled, which the store has already. ``amended``: what says how far
    in the order of samples a step has got. ``resumed``: what another agent, which had begun here, sent may be there.
    """

    epoch: int
    layout: PlanLayout
    table: SlotTable
    deadline_s: float
    point: tuple[int, int] | None = None
    stored: int | None = None
    amended: Amendments = NONE
    resumed: bool = False


class Abandoned(Exception):
    """This upload is not wanted any more."""


class Uploader:
    """The upload thread; all callbacks are posted to the agent's loop. ``rest`` (does what it waits for, in seconds):
    without a thread where it is given; then whoever made this calls ``pump``.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        node: int,
        nodes: int,
        incarnation: str,
        *,
        pool: Executor,
        post: Callable[[Callable[[], None]], None],
        on_part: Callable[[int, int], None],
        on_idle: Callable[[], None],
        on_error: Callable[[str | None], None],
        clock: Callable[[], float] = time.monotonic,
        rest: Callable[[float], None] | None = None,
    ) -> None:
        self._store, self._run, self._node, self._nodes, self._incarnation = store, run, node, nodes, incarnation
        self._clock, self._rest = clock, rest
        self._pool, self._post = pool, post
        self._on_part, self._on_idle, self._on_error = on_part, on_idle, on_error
        self._wake = threading.Condition()
        self._source: Source | None = None
        self._done: dict[int, set[int]] = defaultdict(set)  # epoch -> steps whose part is in the store, or was given up
        self._voids: dict[int, int] = {}  # step -> how often its slots changed under an upload
        self._deadlines: dict[tuple[int, int], float] = {}  # (epoch, step) -> of its checkpoint
        self._again = False
        self._busy = False
        self._closing = False
        self._failing = False
        self.stored_bytes, self.stored_parts, self.given_up = 0, 0, 0  # for people, since this began
        self._plans: dict[tuple[bytes, int], tuple[ChunkPlan, ...]] = {}
        self._thread = threading.Thread(target=self._main, name="upload", daemon=True) if rest is None else None
        if self._thread is not None:
            self._thread.start()

    # --- called by the agent's loop -----------------------------------------------------------------------

    def begin(self, source: Source) -> None:
        """From here on, snapshots of this attempt."""
        with self._wake:
            self._source = source
            # an upload of the attempt before may be at its last request yet, and say how it went
            self._done = defaultdict(set, {source.epoch: self._done[source.epoch]})
            self._voids = {}
            self._again = True
            self._wake.notify_all()

    def cancel(self) -> None:
        """The attempt is fenced: what is being uploaded for it is void."""
        with self._wake:
            self._source = None
            self._wake.notify_all()

    def wake(self) -> None:
        """A snapshot may be ready."""
        with self._wake:
            self._again = True
            self._wake.notify_all()

    def deadline(self, epoch: int, step: int) -> float | None:
        """Of the checkpoint of this step, where this one has begun to upload it."""
        return self._deadlines.get((epoch, step))

    @property
    def idle(self) -> bool:
        """Nothing is being uploaded, and nothing waits to be."""
        with self._wake:
            return not self._busy and not (self._again and self._source is not None)

    def close(self) -> None:
        with self._wake:
            self._closing, self._source = True, None
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=5)

    # --- the thread ---------------------------------------------------------------------------------------

    def _main(self) -> None:
        while True:
            with self._wake:
                while not self._closing and not self._due():
                    self._wake.wait()
                if self._closing:
                    return
            self.pump()

    def _due(self) -> bool:
        """Called under the lock."""
        if self._source is None:
            self._again = False
        return self._again

    def pump(self) -> None:
        """One round, where there is something to look for: every snapshot that is ready and wanted."""
        with self._wake:
            if not self._due() or (source := self._source) is None:
                return
            self._again, self._busy = False, True
        try:
            while self._upload_one(source):
                pass
        except Abandoned:
            log.info("the upload for attempt %d is given up: the attempt is over", source.epoch)
        except TooLarge as error:
            log.error("%s", error)
            if self._wanted(source):
                self._post(partial(self._on_error, str(error)))
        except Exception:
            # A bug here must neither end training nor pass unseen: it is said, and the next snapshot is tried.
            log.exception("the uploader failed")
            if self._wanted(source):
                self._post(lambda: self._on_error("the uploader failed; see the agent's log"))
        with self._wake:
            self._busy = False
        self._post(self._on_idle)

    def _pause(self, source: Source, seconds: float) -> None:
        """Until then, or until this source is not wanted any more."""
        if self._rest is not None:
            return self._rest(seconds)
        with self._wake:
            self._wake.wait_for(lambda: self._source is not source, seconds)

    def _wanted(self, source: Source) -> bool:
        with self._wake:
            return self._source is source

    def _ready(self, source: Source) -> list[tuple[tuple[int, int], dict[int, Seen]]]:
        """What could go up, newest first, as ((step, epoch in the slot), slots by rank)."""
        done = self._done[source.epoch]
        found = [
            (point, by_rank)
            for point, by_rank in source.table.held_by_all().items()
            if (point[1] == source.epoch or point == source.point)
            and point[0] not in done
            and (point[0] != source.stored or any(seen.final for seen in by_rank.values()))
            and (point == source.point or any(seen.persist or seen.final for seen in by_rank.values()))
            and not any(seen.claim for seen in by_rank.values())
        ]
        return sorted(found, key=lambda item: item[0], reverse=True)

    def _upload_one(self, source: Source) -> bool:
        """Upload one snapshot, if there is one. True: look again."""
        if not self._wanted(source):
            return False
        ready = self._ready(source)
        if not ready:
            return False
        (step, _), by_rank = ready[0] if self._nodes == 1 else self._agreed(source, ready)
        held: list[tuple[Slot, Seen]] = []
        try:
            for rank, seen in by_rank.items():
                slot = source.table.slots[rank][seen.index]
                slot.hold(seen)
                held.append((slot, seen))
        except SlotChanged as error:
            for slot, _ in held:
                slot.release()
            self._void(source, step, error)
            return True
        try:
            complete = self._persist(source, step, by_rank)
        except SlotChanged as error:
            self._void(source, step, error)
            return True
        finally:
            for slot, _ in held:
                slot.release()
        # what is older is not worth its bytes any more: a newer checkpoint of this attempt is in the store
        if complete:
            self._done[source.epoch].update(p[0] for p, _ in ready if p[0] <= step)
        return True

    def _void(self, source: Source, step: int, error: SlotChanged) -> None:
        """A slot was refilled: the newest snapshot is taken. Where it is the same step again and again nobody refills
        it, its memory does not hold: pauses, then an end of it.
        """
        times = self._voids[step] = self._voids.get(step, 0) + 1
        log.log(logging.INFO if times == 1 else logging.WARNING, "the upload of step %d is void: %s", step, error)
        if times > _VOIDS:
            self._voids.pop(step)
            self._done[source.epoch].add(step)
            self._failing = True
            self.given_up += 1
            text = (
                f"the snapshot of step {step} is damaged in memory ({error}; {times} times): it is not stored, the "
                "next one will be; check this machine's memory"
            )
            log.error("%s", text)
            self._post(lambda: self._on_error(text))
        elif times > 1:
            self._pause(source, _BACKOFF_S[times - 2])

    def _agreed(
        self, source: Source, ready: Sequence[tuple[tuple[int, int], dict[int, Seen]]]
    ) -> tuple[tuple[int, int], dict[int, Seen]]:
        step = agreed(self._store, self._run, source.epoch, [step for (step, _), _ in ready])
        return next(item for item in ready if item[0][0] == step)

    def _persist(self, source: Source, step: int, by_rank: dict[int, Seen]) -> bool:
        """True once the part is in the store; False where a newer snapshot takes its place, or the deadline passed."""
        end = self._clock() + source.deadline_s
        self._deadlines = {key: at for key, at in self._deadlines.items() if key[0] == source.epoch}
        self._deadlines[source.epoch, step] = end
        final = any(seen.final for seen in by_rank.values())
        saved: dict[tuple[int, int], tuple[Chunk, tuple[Piece, ...]]] = {}
        there: dict[tuple[int, int], list[Info]] | None = None if source.resumed else {}
        attempt = 0
        while True:
            try:
                with until(time.monotonic() + end - self._clock()):
                    if there is None:
                        there = sent_before(self._store, self._run, step, source.epoch, by_rank, self._incarnation)
                    self._put_part(source, step, by_rank, saved, there)
            except StoreError as error:
                self._failing = True
                text = f"the checkpoint of step {step} cannot be stored: {error}"
                log.warning("%s", text)
                self._post(lambda said=text: self._on_error(said))  # type: ignore[misc]
                if self._clock() >= end:
                    log.error("the upload of step %d is given up after %.0f s", step, source.deadline_s)
                    self.given_up += 1
                    self._done[source.epoch].add(step)
                    return False
            else:
                if self._failing:
                    self._failing = False
                    self._post(lambda: self._on_error(None))
                self.stored_parts += 1
                log.info("this node's part of step %d is in the store", step)
                self._post(lambda: self._on_part(step, source.epoch))
                return True
            pause = _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
            attempt += 1
            self._pause(source, pause)
            if not self._wanted(source):
                raise Abandoned
            ready = self._ready(source)
            if not final and ready and ready[0][0][0] > step:
                log.info("a newer snapshot takes the place of step %d", step)
                return False

    def _put_part(
        self,
        source: Source,
        step: int,
        by_rank: dict[int, Seen],
        saved: dict[tuple[int, int], tuple[Chunk, tuple[Piece, ...]]],
        there: Mapping[tuple[int, int], Sequence[Info]],
    ) -> None:
        """All chunks that are not saved yet, then the part manifest."""
        work = [(rank, plan) for rank in by_rank for plan in self._chunk_plans(source, rank)]
        put = partial(self._put_chunk, source, step, deadline())
        futures = [
            (rank, plan, self._pool.submit(put, rank, by_rank[rank], plan, there.get((rank, plan.index), ())))
            for rank, plan in work
            if (rank, plan.index) not in saved
        ]
        failure: BaseException | None = None
        for rank, plan, future in futures:
            if failure is not None and future.cancel():
                continue
            error = future.exception()
            if error is None:
                saved[rank, plan.index] = future.result()
                self.stored_bytes += plan.bytes
            else:
                failure = failure or error
        if failure is not None:
            raise failure
        for rank, seen in by_rank.items():
            source.table.slots[rank][seen.index].check(seen)
        layout = source.layout
        part = PartManifest.build(
            run=self._run,
            step=step,
            epoch=source.epoch,
            samples=source.amended.batch(step) * layout.batch,
            what=layout.what_digest,
            part=self._node,
            parts=self._nodes,
            tensors=[Tensor(t.name, t.shape, t.kinds) for t in layout.tensors],
            saved=[saved[rank, plan.index] for rank, plan in work],
            meta={
                "plan": layout.digest.hex(),
                "dataset": layout.dataset_digest.hex(),
                "numerics": str(layout.numerics),
            },
        )
        name = keys.part_name(step, source.epoch, self._node)
        label = f"{self._node:05d}-{self._incarnation}"
        try:
            # not ours: another incarnation of this agent was faster; its part names its own chunks of the same state
            pages.write(self._store, self._run, name, part.to_bytes(), label)
        except Damaged as error:
            raise SlotChanged(str(error)) from error  # what was read of the slots before was something else

    def _chunk_plans(self, source: Source, rank: int) -> tuple[ChunkPlan, ...]:
        key = source.layout.digest, rank
        if key not in self._plans:
            self._plans = {k: v for k, v in self._plans.items() if k[0] == source.layout.digest}
            self._plans[key] = plan_chunks(segments(source.table.layouts[rank]))
        return self._plans[key]

    def _put_chunk(
        self, source: Source, step: int, until_s: float, rank: int, seen: Seen, plan: ChunkPlan, there: Sequence[Info]
    ) -> tuple[Chunk, tuple[Piece, ...]]:
        """In a worker."""
        if not self._wanted(source):
            raise Abandoned
        name = keys.chunk_name(step, source.epoch, rank, self._incarnation, plan.index)
        with until(until_s):
            return send(self._store, self._run, name, source.table.slots[rank][seen.index], seen, plan, there)
