"""Manifests of any size: objects of at most 4 MiB, every byte of them covered by a digest; commits in O(N) requests."""

from __future__ import annotations

import gc
import hashlib
import random
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from checkpoint import keys, pages
from checkpoint.agent.commit import LAST_S, Committer, commit
from checkpoint.agent.gather import Gathered
from checkpoint.agent.groups import NodeGroups, join_group
from checkpoint.chunks import MAX_CHUNK_BYTES, Chunk, Piece, Tensor
from checkpoint.digest import BLOCK_ELEMENTS, KINDS, blocks
from checkpoint.errors import Damaged
from checkpoint.log import RunLog, RunState
from checkpoint.manifest import PartManifest, checkpoint_body, merge
from checkpoint.read import StateReader, load_manifest
from checkpoint.store import MemoryStore
from checkpoint.store.base import Data, Info
from checkpoint.store.limits import deadline
from checkpoint.verify import verify_checkpoint
from tests.checkpoint.samples import TENSORS, WHAT, attempt_body, state_bytes, write_dataset, write_parts
from tests.support.wait import wait_for

RUN = "r-0a1b2c"
OWNERS = ((0, 3), (1, 2, 4))


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of 600 bytes: the samples' manifests have several."""
    monkeypatch.setattr(pages, "PAGE_BYTES", 600)


def begun(store: MemoryStore) -> tuple[RunLog, RunState]:
    log = RunLog(store, RUN, writer="test")
    return log, log.append("attempt", attempt_body(), log.fold())


def paged_parts(store: MemoryStore) -> list[tuple[str, bytes]]:
    """The samples' parts, in pages."""
    scratch = MemoryStore()
    parts = write_parts(scratch, RUN, state_bytes(1), OWNERS, step=7, epoch=1)
    for info in scratch.list(f"runs/{RUN}/chunks/"):
        store.create(info.key, scratch.get(info.key))
    for node, (name, data) in enumerate(parts):
        root, ours = pages.write(store, RUN, name, data, f"{node:05d}-i1")
        assert ours
        assert pages.is_list(root)
        assert pages.read(store, RUN, name, "a part") == data
    return parts


def test_what_fits_is_one_object_as_it_always_was() -> None:
    store = MemoryStore()
    ((name, data),) = write_parts(MemoryStore(), RUN, state_bytes(1), [range(5)], step=7, epoch=1)
    assert pages.write(store, RUN, name, data, "x") == (data, True)
    assert [(info.key, store.get(info.key)) for info in store.list("")] == [(keys.run_key(RUN, name), data)]
    assert pages.read(store, RUN, name, "it") == data
    assert pages.write(store, RUN, name, data, "x") == (data, True)  # once more is once
    assert pages.write(store, RUN, name, data + b"!", "y")[1] is False


@pytest.mark.usefixtures("small_pages")
def test_a_checkpoint_in_pages_is_committed_read_and_verified() -> None:
    store = MemoryStore()
    write_dataset(store)
    log, state = begun(store)
    parts = paged_parts(store)
    after = commit(log, 2, 7, 1, state)
    assert after is not None
    (info,) = after.checkpoints
    manifest = load_manifest(store, RUN, info)
    assert manifest == merge(parts)
    assert bytes(StateReader(store, manifest).read(TENSORS[2].name, 1)) == state_bytes(1)[2][1]
    assert verify_checkpoint(store, RUN, info, "full") == ()
    assert after == commit(log, 2, 7, 1, after)  # whoever commits it again finds it
    found = [i for i in store.list(f"runs/{RUN}/manifests/") if "/pages/" in i.key]
    assert len(found) > 6
    assert max(i.bytes for i in found) == 600


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("how", ["flip", "gone", "cut", "swapped"])
def test_damage_of_any_page_is_found(how: str) -> None:
    store = MemoryStore()
    write_dataset(store)
    log, state = begun(store)
    paged_parts(store)
    after = commit(log, 2, 7, 1, state)
    assert after is not None
    (info,) = after.checkpoints
    names = [i.key for i in store.list(f"runs/{RUN}/manifests/") if "/pages/" in i.key or i.key.endswith("manifest")]
    for number, key in enumerate(names):
        kept = store.get(key)
        store.delete(key)
        if how == "flip":
            store.create(key, kept[:-1] + bytes([kept[-1] ^ 1]))
        elif how == "cut":
            store.create(key, kept[:-1])
        elif how == "swapped":
            store.create(key, store.get(names[(number + 1) % len(names)]))
        assert verify_checkpoint(store, RUN, info, "quick"), key
        if "/all-" in key or key.endswith("manifest"):
            with pytest.raises(Damaged, match="manifest"):
                load_manifest(store, RUN, info)
        store.delete(key)
        store.create(key, kept)
    assert verify_checkpoint(store, RUN, info, "quick") == ()


@pytest.mark.usefixtures("small_pages")
def test_a_list_of_pages_is_read_as_hostile() -> None:
    store = MemoryStore()
    (name, data), _ = paged_parts(store)
    key = keys.run_key(RUN, name)
    root, rng = store.get(key), random.Random(3)
    for _ in range(500):
        bad = bytearray(root)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        store.delete(key)
        store.create(key, bytes(bad))
        try:
            found = pages.read(store, RUN, name, "it")
            assert found == data or not pages.is_list(bytes(bad))
        except Damaged:
            continue


def test_an_older_versions_large_object_is_read() -> None:
    """One object of more than a page, as it was written before there were pages."""
    store, leaf = MemoryStore(), b"L" * 32
    log, state = begun(store)
    (part,) = synthetic(parts=1, parameters=20_000_000_000, leaf=leaf)
    manifest = merge([(keys.part_name(5, 1, 0), part.to_bytes())])
    data = manifest.to_bytes()
    assert 4 << 20 < len(data) < 64 << 20
    assert store.create(keys.run_key(RUN, keys.manifest_name(5, 1)), data)
    state = log.append("checkpoint", checkpoint_body(manifest, data), state, epoch=1)
    assert load_manifest(store, RUN, state.checkpoints[0]).state_digest == manifest.state_digest


def synthetic(parts: int, parameters: int, leaf: bytes) -> Iterator[PartManifest]:
    """Parts of nodes of one rank each, in chunks as an agent cuts them, every leaf the same. A tensor is cut over up
    to ten ranks, so that the table is shorter than the gang.
    """
    share = min(parts, 10)
    own = -(-parameters // parts // BLOCK_ELEMENTS) * BLOCK_ELEMENTS
    tensors = [Tensor(f"h.{n}.mlp.experts.weight", (share, own)) for n in range(-(-parts // share))]
    per_chunk = MAX_CHUNK_BYTES // 4 // BLOCK_ELEMENTS * BLOCK_ELEMENTS
    for rank in range(parts):
        saved: list[tuple[Chunk, list[Piece]]] = []
        base = rank % share * own
        for kind in range(len(KINDS)):
            for first in range(0, own, per_chunk):
                elements = min(per_chunk, own - first)
                name = keys.chunk_name(5, 1, rank, "0123456789abcdef", len(saved))
                chunk = Chunk(name, elements * 4, hashlib.sha256(name.encode()).digest())
                piece = Piece(rank // share, kind, base + first, elements, 0, 0, (leaf,) * blocks(elements))
                saved.append((chunk, [piece]))
        yield PartManifest.build(
            run=RUN, step=5, epoch=1, samples=40, what=WHAT, part=rank, parts=parts, tensors=tensors, saved=saved
        )


class Sizes(MemoryStore):
    """The size of the largest object."""

    largest = 0

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        self.largest = max(self.largest, memoryview(data).nbytes)
        return super().create(key, data, sha256=sha256)


class Passing(Sizes):
    """Forgets the pages of merged manifests: what stays in memory is what the committer holds."""

    pages = 0

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        if "/pages/all-" not in key:
            return super().create(key, data, sha256=sha256)
        self.largest = max(self.largest, memoryview(data).nbytes)
        self.pages += memoryview(data).nbytes
        return True


@pytest.mark.parametrize(
    ("ranks", "parameters"),
    [
        pytest.param(1000, 20_000_000_000, marks=pytest.mark.slow),
        pytest.param(1000, 1_000_000_000_000, marks=pytest.mark.slow),  # one object of 64 MiB held about a sixth
        pytest.param(8, 1_000_000_000_000, marks=pytest.mark.slow),  # parts in pages, too
        (2400, 12_000_000_000),
        pytest.param(16000, 1_000_000_000_000, marks=pytest.mark.slow),
    ],
)
def test_a_thousand_ranks_commit(ranks: int, parameters: int) -> None:
    """Above a thousand through groups. The committer holds the leaves once and a page; the time is told."""
    store = Passing()
    log, state = begun(store)
    groups = NodeGroups.of(ranks, nodes := -(-ranks // 8) if ranks > 1000 else ranks)
    joined = 0.0
    parts = iter(synthetic(nodes, parameters, b"L" * 32))
    for group in range(-(-nodes // groups.size)):
        for node in groups.members(group):
            part = next(parts)
            pages.write(store, RUN, keys.part_name(5, 1, node), part.to_bytes(), f"{node:05d}-0123456789abcdef")
        if groups.size > 1:
            began = time.perf_counter()
            assert join_group(store, RUN, groups, 5, 1, group, Gathered())
            joined = max(joined, time.perf_counter() - began)
            for node in groups.members(group):  # so that this test needs less memory; nobody reads them any more
                store.delete(keys.run_key(RUN, keys.part_name(5, 1, node)))
    gc.collect()
    tracemalloc.start()
    began = time.perf_counter()
    after = commit(log, groups, 5, 1, state)
    took, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after is not None
    (info,) = after.checkpoints
    assert info.parts == groups.count
    assert store.largest <= 4 << 20
    leaves = parameters * len(KINDS) // BLOCK_ELEMENTS * 32
    assert store.pages > leaves
    said = f"{parameters:.0e} parameters, {nodes} nodes: {store.pages / 1e6:.0f} MB of manifest in {took:.1f} s, "
    print(f"{said}{peak / 1e6:.0f} MB of memory at most; a group in {joined:.1f} s at most")
    assert groups.size == 1 or peak < 2 * store.pages + (24 << 20), said


class Reads(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.looks = 0

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        self.looks += prefix.endswith("/parts/")
        return super().list(prefix, start_after)

    def get(self, key: str, **more: Any) -> bytes:
        if "/parts/" in key:
            self.parts.append(key)
        return super().get(key, **more)


class Agents:
    """The commit threads of a gang's nodes, each with a log of its own; all hear of a record as watchers would."""

    def __init__(self, store: MemoryStore, nodes: int, deadline_s: float = 60.0) -> None:
        self.states: list[RunState] = []
        self.errors: list[str | None] = []
        self.committers: list[Committer] = []
        for node in range(nodes):
            committer = Committer(
                RunLog(store, RUN, writer=f"agent-{node}"),
                node,
                nodes,
                post=lambda call: call(),
                on_commit=self._on_commit,
                on_idle=lambda: None,
                on_error=self.errors.append,
                poll_s=0.01,
            )
            committer.begin(1, nodes, deadline_s)
            self.committers.append(committer)

    def _on_commit(self, found: RunState, step: int) -> None:
        self.states.append(found)
        for committer in self.committers:
            committer.state(found)

    def __enter__(self) -> Agents:
        return self

    def __exit__(self, *_: object) -> None:
        for committer in self.committers:
            committer.close()

    def add(self, step: int, state: RunState) -> None:
        for committer in self.committers:
            committer.add(step, state)

    def idle(self) -> bool:
        return all(committer.idle for committer in self.committers)


def test_of_many_agents_one_reads_the_parts_and_each_once() -> None:
    nodes, store = 8, Reads()
    log, state = begun(store)
    owners = [(0,), (1,), (2,), (3,), (4,), (), (), ()]
    (late, data), *others = write_parts(MemoryStore(), RUN, state_bytes(1), owners, step=16, epoch=1)
    with Agents(store, nodes) as agents:
        for name, own in others:
            store.create(keys.run_key(RUN, name), own)
        agents.add(16, state)
        wait_for(lambda: store.looks >= 3, "a few looks for the part that is missing")
        store.create(keys.run_key(RUN, late), data)
        wait_for(lambda: agents.states, "the commit")
        wait_for(agents.idle, "everybody to hear of it")
    assert log.fold().find(16, 1) is not None
    assert sorted(store.parts) == sorted(keys.run_key(RUN, name) for name in (late, *(name for name, _ in others)))


@pytest.mark.parametrize(("times", "commits"), [(1, True), (2, True), (1000, False)])
def test_a_part_that_was_read_wrong_is_read_again(times: int, commits: bool) -> None:
    """A sick read costs nothing; a sick part costs this checkpoint, and is said."""
    wrong = [0]

    class Sick(MemoryStore):
        def get(self, key: str, **more: Any) -> bytes:
            data = super().get(key, **more)
            if "/parts/00001" in key and wrong[0] < times:
                wrong[0] += 1
                return data[:-1] + bytes([data[-1] ^ 1])
            return data

    store = Sick()
    log, state = begun(store)
    write_parts(store, RUN, state_bytes(1), OWNERS, step=8, epoch=1)
    with Agents(store, 2) as agents:
        agents.committers[0].add(8, state)  # it has the turn
        wait_for(agents.idle, "it to be done with it")
    assert (log.fold().find(8, 1) is not None) == commits
    assert any("00001" in (text or "") for text in agents.errors)
    assert (agents.errors[-1] is None) == commits


def test_what_a_commit_asks_ends_soon_after_the_checkpoints_deadline() -> None:
    ends: list[float] = []

    class Asked(MemoryStore):
        def get(self, key: str, **more: Any) -> bytes:
            if "/parts/" in key:
                ends.append(deadline() - time.monotonic())
            return super().get(key, **more)

    for deadline_s, least, most in ((600.0, 500.0, 600.0), (0.0, LAST_S - 20, LAST_S)):
        store = Asked()
        _, state = begun(store)
        write_parts(store, RUN, state_bytes(1), OWNERS, step=8, epoch=1)
        with Agents(store, 2, deadline_s) as agents:
            agents.committers[0].add(8, state)
            wait_for(agents.idle, "it to be committed")
        assert all(least < left <= most for left in ends), (deadline_s, ends)
        assert ends
        ends.clear()


def test_a_part_that_does_not_come_is_said() -> None:
    store = MemoryStore()
    log, state = begun(store)
    (only, data), _ = write_parts(MemoryStore(), RUN, state_bytes(1), OWNERS, step=8, epoch=1)
    store.create(keys.run_key(RUN, only), data)
    with Agents(store, 2, deadline_s=0.05) as agents:
        agents.committers[0].add(8, state)
        wait_for(agents.idle, "it to be given up")
    assert agents.errors[-1] == "the commit of step 8 is given up: not every node's part came in time"
    assert log.fold().checkpoints == ()
