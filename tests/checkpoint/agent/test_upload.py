"""How snapshots go up: within one deadline, on where another agent stopped, without copies, and through an outage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from checkpoint import keys
from checkpoint.agent import send, upload
from checkpoint.agent.commit import commit
from checkpoint.agent.gang import layouts
from checkpoint.agent.slots import SlotTable
from checkpoint.agent.upload import Source, Uploader
from checkpoint.chunks import MAX_CHUNK_BYTES, ChunkPlan, Segment
from checkpoint.errors import StoreUnavailable
from checkpoint.layout import PlanLayout
from checkpoint.log import RunLog
from checkpoint.store import Info, MemoryStore
from checkpoint.store.base import Data
from checkpoint.verify import verify_checkpoint
from tests.support.agents import make_run_in, state_bytes, tiny_spec

SPEC = tiny_spec(model__width=320, model__layers=2, parallel__stages=2)


class Counted(MemoryStore):
    """Says which chunks were sent, and fails those that it is told to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.looked: list[str] = []
        self.left: int | None = None  # so many chunks pass, then none
        self.away = lambda: False
        self.stale = False  # a listing shows nothing of this run

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        if self.away():
            raise StoreUnavailable(f"creating {key!r}: nobody answers")
        if "/chunks/" in key:
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    raise StoreUnavailable(f"creating {key!r}: nobody answers")
            self.sent.append(key)
        return super().create(key, data, sha256=sha256)

    def holds(self, key: str, data: Data, *, sha256: bytes) -> bool:
        self.looked.append(key)
        return super().holds(key, data, sha256=sha256)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        return iter(()) if self.stale else super().list(prefix, start_after)


class Node:
    """One node of two ranks with real slots, and its uploader in a simulated time, driven by hand."""

    def __init__(self, store: Counted) -> None:
        self.store = store
        self.run, self.plan = make_run_in(store, SPEC)
        self.layout: PlanLayout = self.run.layouts[self.plan]
        self.epoch = self.run.attempt(SPEC, self.plan)
        ranks = layouts(self.layout, range(self.layout.ranks))
        self.table = SlotTable(ranks, self.layout.digest, self.layout.what_digest, 2)
        for rank in ranks:
            self.table.create(rank)
        self.pool = ThreadPoolExecutor(2)
        self.now = 0.0
        self.stored: list[tuple[int, float]] = []
        self.errors: list[str] = []

    def fill(self, step: int, index: int = 0) -> None:
        for rank, slots in self.table.slots.items():
            with slots[index].begin_fill() as view:
                view[:] = state_bytes(self.layout, rank, step)
            slots[index].finish_fill(step, self.epoch, self.pool)

    def rest(self, seconds: float) -> None:
        self.now += seconds

    def uploader(self, incarnation: str) -> Uploader:
        return Uploader(
            self.store, self.run.name, 0, 1, incarnation, pool=self.pool, post=lambda call: call(),
            on_part=lambda step, _: self.stored.append((step, self.now)), on_idle=lambda: None,
            on_error=lambda text: self.errors.append(text or "all is well"),
            clock=lambda: self.now, rest=self.rest,
        )  # fmt: skip

    def source(self, *, deadline_s: float = 600.0, resumed: bool = False) -> Source:
        return Source(self.epoch, self.layout, self.table, deadline_s, resumed=resumed)

    def committed(self, step: int) -> bool:
        """Whether the step is a checkpoint that holds, down to its bytes."""
        state = commit(self.run.log, 1, step, self.epoch, self.run.fold())
        info = state.find(step, self.epoch) if state is not None else None
        return info is not None and verify_checkpoint(self.store, self.run.name, info, "full") == ()


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node(Counted())
    yield made
    made.pool.shutdown()
    assert made.table.close()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of little state."""
    monkeypatch.setattr(upload, "plan_chunks", lambda segments: real_plan(segments, 1 << 20))


def real_plan(segments: list[Segment], limit: int) -> tuple[ChunkPlan, ...]:
    from checkpoint.chunks import plan_chunks

    return plan_chunks(segments, limit)


@pytest.mark.usefixtures("small_chunks")
def test_an_agent_goes_on_where_another_one_stopped(node: Node) -> None:
    node.fill(2)
    node.store.left = 5
    first = node.uploader("a0")
    first.begin(node.source(deadline_s=1.0))
    first.pump()
    assert not node.stored
    assert len(node.store.sent) == 5
    node.store.left = None
    second = node.uploader("b0")
    second.begin(node.source(resumed=True))
    second.pump()
    assert [step for step, _ in node.stored] == [2]
    names = [key.rsplit("/", 1)[1].split("-") for key in node.store.sent]
    assert len({(rank, index) for rank, _, index in names}) == len(names)  # nothing twice
    assert node.committed(2)


@pytest.mark.usefixtures("small_chunks")
def test_what_another_agent_left_counts_only_with_these_bytes(node: Node) -> None:
    """Chunks of the same name and size with other bytes (of memory that was torn, of a rank that computed wrongly)."""
    node.fill(2)
    probe = node.uploader("p0")
    probe.begin(node.source())
    probe.pump()
    for key in list(node.store.sent):
        data = bytearray(node.store.get(key))
        data[-1] ^= 1
        node.store.delete(key)
        assert node.store.create(key.replace("-p0-", "-old0-"), data)
    node.store.delete(keys.run_key(node.run.name, keys.part_name(2, node.epoch, 0)))
    before = len(node.store.sent)
    again = node.uploader("b0")
    again.begin(node.source(resumed=True))
    again.pump()
    assert len(node.store.looked) == before // 2
    assert sum("-b0-" in key for key in node.store.sent) == before // 2
    assert node.committed(2)


def test_nothing_is_looked_for_where_no_agent_was_before(node: Node) -> None:
    node.fill(2)
    uploader = node.uploader("a0")
    uploader.begin(node.source())
    uploader.pump()
    assert not node.store.looked
    assert node.committed(2)


@pytest.mark.usefixtures("small_chunks")
def test_a_stale_listing_costs_time_and_nothing_else(node: Node) -> None:
    """The log is read by name; a chunk that no listing shows is sent again, parts are waited for until they show."""
    node.store.stale = True
    node.fill(2)
    node.store.left = 3
    first = node.uploader("a0")
    first.begin(node.source(deadline_s=1.0))
    first.pump()
    node.store.left = None
    second = node.uploader("b0")
    second.begin(node.source(resumed=True))
    second.pump()
    assert [step for step, _ in node.stored] == [2]
    assert node.run.fold().epoch == RunLog(node.store, node.run.name, writer="other").fold().epoch == node.epoch
    unseen = commit(node.run.log, 1, 2, node.epoch, node.run.fold())
    node.store.stale = False
    assert node.committed(2)
    assert unseen is None or unseen.find(2, node.epoch) is not None


def test_half_an_hour_without_the_store(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots of that time are given up one by one, each at its deadline; the newest of the end goes up, and nothing
    of the others was kept."""
    monkeypatch.setattr(upload, "_BACKOFF_S", (100.0,))
    node.store.away = lambda: node.now < 1850.0
    uploader = node.uploader("a0")
    uploader.begin(node.source(deadline_s=600.0))
    for number, step in enumerate(range(2, 12, 2)):
        node.fill(step, number % 2)
        uploader.wake()
        uploader.pump()
    assert node.now == 1900.0
    assert [step for step, _ in node.stored] == [8, 10]  # 2, 4 and 6 were given up after 600 s each
    assert node.errors[-1] == "all is well"
    assert "cannot be stored" in node.errors[0]
    assert node.committed(10)
    assert not node.committed(6)


def test_a_checkpoint_has_one_deadline(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit has what the upload left of it."""
    monkeypatch.setattr(upload, "_BACKOFF_S", (50.0,))
    node.store.away = lambda: node.now < 550.0
    node.fill(2)
    uploader = node.uploader("a0")
    uploader.begin(node.source(deadline_s=600.0))
    assert uploader.deadline(node.epoch, 2) is None
    uploader.pump()
    assert [step for step, _ in node.stored] == [2]
    assert node.now >= 550.0
    assert uploader.deadline(node.epoch, 2) == 600.0


def test_the_next_attempt_may_begin_at_the_last_request_of_this_one(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is no bug of the uploader's."""
    node.fill(2)
    uploader = node.uploader("a0")
    after = replace(node.source(), epoch=node.epoch + 1)
    uploader._on_part = lambda step, epoch: uploader.begin(after)
    uploader.begin(node.source())
    uploader.pump()
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_an_attempt_that_is_over_leaves_nothing_to_wait_for(node: Node) -> None:
    uploader = node.uploader("a0")
    uploader.begin(node.source())
    assert not uploader.idle
    uploader.cancel()
    assert uploader.idle


def test_memory_is_the_slots_or_one_buffer_a_thread() -> None:
    state = memoryview(bytearray(range(256)) * 64)
    whole = ChunkPlan(0, (Segment(0, 0, 0, 100, 1024), Segment(1, 0, 0, 50, 1424)))
    with send.together(whole, state) as view:
        assert view == state[1024:1624]
        state[1024] = 7
        assert view[0] == 7  # the slot itself
    parts = ChunkPlan(0, (Segment(0, 0, 0, 100, 8192), Segment(1, 0, 0, 50, 1024)))
    with send.together(parts, state) as view:
        first = hashlib.sha256(view).digest()
        assert view == bytes(state[8192:8592]) + bytes(state[1024:1224])
        owner = view.obj
    with send.together(parts, state) as view:
        assert view.obj is owner
        assert hashlib.sha256(view).digest() == first
        assert len(view.obj) == MAX_CHUNK_BYTES
