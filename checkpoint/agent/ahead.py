"""Token shards fetched ahead of the ranks that read them, into a bounded cache (``data.cache_gib``).

The order of samples is arithmetic, so it is known which leaves of which shards this node's ranks read in which step.
A thread takes on step after step (``window.py``), has their leaves in the files (``cache.py``), and says up to which
step they are there; ranks say how far they have read, and wait for a step whose data is not there. Order of calls:

    prepare    `Ahead.of`, first (the data of the first step: an attempt starts with it), start
    ranks      DATA: read (each step)            -> leaves of the steps behind may go
    thread     brings the next steps' leaves     -> tell: DATA to the ranks
    agent      stop, when the attempt is over    (the files stay)

An agent that finds its attempt running takes nothing away before all ranks have said how far they were told
(``adopt``). What fails is tried again until the attempt is over, and told to the ranks, which wait for so long.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint.agent.background import behind
from checkpoint.agent.cache import Cache, CachedShard, check_folder, kept_leaves
from checkpoint.agent.fetch import DataRefused, part_manifest, room_words
from checkpoint.agent.gang import CannotStart, Gang
from checkpoint.agent.window import Window
from checkpoint.amendments import Amendments
from checkpoint.dataset import LEAF_BYTES, load_leaves
from checkpoint.errors import CheckpointError, Damaged, NotFound
from checkpoint.keys import shard_name
from checkpoint.layout import DataLayout, PlanLayout
from checkpoint.store import Store

log = logging.getLogger(__name__)

FOLDER = "data-cache"
"""Of the node's folder."""
_GROUP = 64
"""Leaves that are asked for together, at least: enough for all workers, few for a rank that waits."""
_MOST_SAMPLES = 1 << 18
"""Of the steps ahead, as far as is counted out; a sample costs some 20 us."""
_PAUSES_S = 0.5, 15.0


@dataclass(frozen=True)
class There:
    """Up to which step the data is there; ``code``, ``words``: what keeps the next one's away, where something does."""

    step: int
    code: int = 0
    words: str = ""


class AheadStopped(Exception):
    """The attempt is over."""


@dataclass(frozen=True)
class Needs:
    """Which leaves the readers of a node read in a step."""

    data: DataLayout
    replicas: Sequence[int]
    amended: Amendments
    cache: Cache

    def leaves(self, step: int) -> list[int]:
        batch, data = self.amended.batch(step), self.data
        found: set[int] = set()
        for replica in self.replicas:
            for place in data.places(batch, replica):
                found.update(self.cache.leaves(*data.place(data.order.sample(place))))
        return sorted(found)

    @property
    def samples(self) -> int:
        """Of a step."""
        return len(self.replicas) * len(self.data.places(1, 0))

    @property
    def two_steps(self) -> int:
        """Bytes of the leaves of two steps that follow one another, at most: each sample in leaves of its own, or all
        blocks of the windows that they may be of; in order, one stretch a step, replica and part.
        """
        data, order, leaf = self.data, self.data.order, self.cache.largest
        sample = (data.sequence + 1) * data.token_bytes
        apart = 2 * self.samples * (-(-sample // leaf) + 1)
        stretch = -(-len(data.places(1, 0)) * sample // leaf) + 2
        blocks = 0 if order.shuffled else 2 * len(self.replicas) * len(order.parts) * stretch
        for samples in order.parts if order.shuffled else ():
            block = min(order.block, samples)
            windows = -(-2 * order.batch // (order.window * block)) + 1
            blocks += windows * order.window * (-(-block * sample // leaf) + 1)
        return leaf * min(apart, blocks, self.cache.count)


class Ahead:
    """Of one attempt. ``make`` may fail, and is asked again then; ``first``: the step that begins, None where it began
    under an agent before this one; ``tell`` hears, in the thread, how far the data is there. ``readers``: ranks that
    say DATA.
    """

    def __init__(
        self,
        make: Callable[[], tuple[Needs, Window]],
        readers: Sequence[int],
        first: int | None,
        last: int,
        tell: Callable[[There], None],
        folder: Path,
    ) -> None:
        self.folder = folder
        self._make, self._next, self._last, self._tell = make, first, last, tell
        self._wakes = threading.Condition()
        self._reads: dict[int, int | None] = dict.fromkeys(readers, None if first is None else first - 1)
        self._told = 0
        self._stopped = False
        self._made: tuple[Needs, Window] | None = None
        self._counted: tuple[int, list[int]] = (0, [])
        self._pending: tuple[int, list[int]] | None = None
        """Up to which step leaves are being brought, and these."""
        self._thread = threading.Thread(target=self._run, name="data-ahead", daemon=True)
        self.there = There(0 if first is None else first - 1)

    # --- what others call ---------------------------------------------------------------------------------

    def first(self, go_on: Callable[[], None]) -> None:
        """The data of the first step is there when this returns. Raises CannotStart, CheckpointError, OSError."""
        needs, window = self._open()
        step = self._next
        if step is None or step > self._last:
            return
        if window.capacity < needs.two_steps:
            raise _too_small(needs, window)
        taken = window.take(step, self._leaves(needs, step))
        assert taken is not None
        needs.cache.drop(taken.drop)
        needs.cache.bring(taken.bring, go_on)
        self.there, self._next = There(step), step + 1

    def start(self) -> None:
        self._thread.start()

    def read(self, rank: int, step: int, told: int) -> None:
        """A rank has read this step's data, and was told that it is there up to that one."""
        with self._wakes:
            if rank in self._reads:
                self._reads[rank] = max(step, self._reads[rank] or 0)
                self._told = max(self._told, told)
                self._wakes.notify()

    def stop(self) -> None:
        """It is not needed any more; does not wait."""
        with self._wakes:
            self._stopped = True
            self._wakes.notify()

    def join(self) -> None:
        """After `stop`: nobody touches the files any more when this returns."""
        if self._thread.is_alive():
            self._thread.join()
        if self._made is not None:
            self._made[0].cache.close()

    @property
    def figures(self) -> tuple[int, int, int]:
        """Bytes from the store, requests for them, bytes that are held here."""
        if self._made is None:
            return 0, 0, 0
        needs, window = self._made
        return needs.cache.fetched_bytes, needs.cache.requests, window.bytes

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        behind()
        pause = _PAUSES_S[0]
        if self.there.step:
            self._tell(self.there)
        try:
            while True:
                try:
                    self._on()
                    pause = _PAUSES_S[0]
                except (CannotStart, CheckpointError, OSError) as error:
                    self._failed(error)
                    self._wait(lambda: False, pause)
                    pause = min(2 * pause, _PAUSES_S[1])
        except AheadStopped:
            fetched, requests, held = self.figures
            log.info("%d bytes of data came ahead, in %d requests; %d are held", fetched, requests, held)

    def _on(self) -> None:
        """The next steps' data, as many as there is room for; waits where there is none."""
        self._wait(lambda: None not in self._reads.values())
        needs, window = self._open()
        if self._next is None:
            self._adopt(needs, window)
        if self._pending is None:
            read = self._read
            window.passed(read)
            self._pending = self._group(needs, window)
            if self._pending is None:
                if self._next is not None and self._next <= self._last and read >= self.there.step:
                    raise _too_small(needs, window)  # nobody reads on, so nothing goes
                self._wait(lambda: self._read > read)
                return
        step, bring = self._pending
        needs.cache.bring(bring, self._go_on)
        self._pending, self.there = None, There(step)
        self._tell(self.there)

    @property
    def _read(self) -> int:
        """Up to which step all readers have read."""
        return min((read for read in self._reads.values() if read is not None), default=0)

    def _adopt(self, needs: Needs, window: Window) -> None:
        """What ranks were told is there stays, whatever the room."""
        first = max(1, self._read)
        bring: set[int] = set()
        for step in range(first, self._told + 1):
            taken = window.take(step, needs.leaves(step), over=True)
            assert taken is not None
            bring.update(taken.bring)
        needs.cache.drop(window.trim())
        self._next = max(first, self._told + 1)
        if bring:
            self._pending = self._told, sorted(bring)

    def _group(self, needs: Needs, window: Window) -> tuple[int, list[int]] | None:
        bring: list[int] = []
        step, begun = self._next or 1, self._next
        most = max(2, _MOST_SAMPLES // needs.samples)
        while step <= self._last and len(bring) < _GROUP and window.ahead < most:
            taken = window.take(step, self._leaves(needs, step))
            if taken is None:
                break
            needs.cache.drop(taken.drop)
            bring += taken.bring
            step += 1
        self._next = step
        return None if step == begun else (step - 1, bring)

    def _leaves(self, needs: Needs, step: int) -> list[int]:
        """Counted once, also where there is no room for them yet."""
        if self._counted[0] != step:
            self._counted = step, needs.leaves(step)
        return self._counted[1]

    def _open(self) -> tuple[Needs, Window]:
        if self._made is None:
            needs, window = self._make()
            if self._next is not None:  # else nothing goes before it is known what was promised
                needs.cache.drop(window.trim())
            self._made = needs, window
        return self._made

    def _go_on(self) -> None:
        if self._stopped:
            raise AheadStopped

    def _wait(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        with self._wakes:
            self._wakes.wait_for(lambda: self._stopped or ready(), timeout)
        self._go_on()

    def _failed(self, error: CannotStart | CheckpointError | OSError) -> None:
        code, words = 75, str(error)
        if isinstance(error, CannotStart):
            code = error.code
        elif isinstance(error, DataRefused):
            code = error.exit_code
        elif isinstance(error, OSError):
            code, words = 78, room_words(error, self.folder)
        if self._pending is not None and self._made is not None:
            cache, (step, leaves) = self._made[0].cache, self._pending
            shard = cache.shard_of(leaves[0])
            words = f"{shard.key} is awaited, for steps up to {step}: {words}"
        if words != self.there.words:
            log.warning("data that comes ahead is late: %s", words)
        self.there = There(self.there.step, code, words)
        self._tell(self.there)


def _too_small(needs: Needs, window: Window) -> CannotStart:
    has, most = (f"{count / (1 << 30):.3g} GiB" for count in (window.capacity, needs.two_steps))
    return CannotStart(
        78,
        f"data.cache_gib is {has}; two steps of this node ({needs.samples} samples each) may read up to {most}, in "
        f"pieces of {needs.cache.largest >> 10} KiB: raise it to that, better to some windows of the shuffle",
    )


def ahead_of(
    store: Store,
    layout: PlanLayout,
    gang: Gang,
    work: Path,
    first: int | None,
    tell: Callable[[There], None],
) -> Ahead | None:
    """For the readers of an attempt's gang on this node; None where its data is not cached, or nobody reads any.

    ``first``: the step that it begins with, None for one that an agent before began.
    """
    data, capacity = layout.data, int(float(gang.how("data", "cache_gib")) * (1 << 30))
    positions = len(layout.positions)
    replicas = data.replicas_of(gang.local, positions) if data is not None else ()
    if not capacity or data is None or not replicas:
        return None
    amended = gang.attempt.amendments
    last, after = amended.total(layout.steps), int(gang.how("launch", "stop_after"))
    readers = [rank for rank in gang.local if rank % positions in data.readers]

    def make() -> tuple[Needs, Window]:
        shards, sizes = _shards(store, data, work / FOLDER)
        cache = Cache(store, shards, sizes)
        found = list(cache.open())
        whole = sum(shard.row.bytes for shard in shards)
        check_folder(work / FOLDER, min(capacity, whole) - sum(map(cache.size, found)))
        log.info("data: up to %.3g of %.3g GiB are kept here", capacity / (1 << 30), whole / (1 << 30))
        return Needs(data, replicas, amended, cache), Window(capacity, cache.size, found)

    return Ahead(make, readers, first, min(last, after) if after >= 0 else last, tell, work)


def _shards(store: Store, data: DataLayout, folder: Path) -> tuple[list[CachedShard], list[int]]:
    """All shards of the plan, and by shard how large its leaves are."""
    found: list[CachedShard] = []
    sizes: list[int] = []
    for part in data.parts:
        home = folder / part.digest
        home.mkdir(parents=True, exist_ok=True)
        manifest = part_manifest(store, part, home / "manifest")
        found += [
            CachedShard(part.digest, n, row, manifest.vocab, manifest.token_bytes, home / shard_name(n))
            for n, row in enumerate(manifest.shards)
        ]
        sizes += [_leaf_bytes(store, found[-len(manifest.shards)])] * len(manifest.shards)
    return found, sizes


def _leaf_bytes(store: Store, shard: CachedShard) -> int:
    """As the dataset's first shard has it."""
    table = kept_leaves(shard.path)
    if table is None:
        with contextlib.suppress(NotFound, Damaged):
            table = load_leaves(store, shard.dataset, shard.number)
    return LEAF_BYTES if table is None else table.leaf_bytes
