"""Tensors in pieces over replicas: what a rank's slot holds, stores and reads; the same state in any layout."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from checkpoint.agent.send import segments
from checkpoint.agent.slots import Slot, SlotChanged
from checkpoint.chunks import Chunk, Piece, Tensor, plan_chunks
from checkpoint.digest import BLOCK_ELEMENTS, KINDS, blocks
from checkpoint.layout import PlanLayout, PlanRefused, piece, read_plan
from checkpoint.manifest import Manifest
from checkpoint.read import StateReader, load_manifest
from checkpoint.restore import plan_reads
from checkpoint.store import MemoryStore
from checkpoint.verify import verify_checkpoint
from tests.support.agents import put_dataset, tensor_bytes, tiny_spec
from tests.support.layout_world import STEP, Way, World, layout_of, plan_of

SPEC = tiny_spec(model__width=320, model__layers=2, train__batch=16)
"""Tensors of one block and of two, some short of whole blocks."""


@pytest.fixture(scope="module")
def world() -> World:
    return World(MemoryStore(), SPEC)


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 8)]


def test_the_pieces_of_a_tensor_are_whole_blocks_and_all_of_it() -> None:
    for elements in (1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 5 * BLOCK_ELEMENTS - 3, 16 * BLOCK_ELEMENTS):
        for pieces in (2, 4, 8):
            found = [piece(elements, pieces, replica) for replica in range(pieces)]
            assert [first for first, _, _ in found] == [min(r * found[0][2], elements) for r in range(pieces)]
            assert sum(count for _, count, _ in found) == elements
            assert {room for *_, room in found} == {-(-blocks(elements) // pieces) * BLOCK_ELEMENTS}
    assert piece(7, 1, 3) == (0, 7, 7)  # whole in every replica
    assert piece(5 * BLOCK_ELEMENTS, 4, 3) == (5 * BLOCK_ELEMENTS, 0, 2 * BLOCK_ELEMENTS)  # 2, 2, 1 and none


@pytest.mark.parametrize(("stages", "replicas"), LAYOUTS)
def test_every_element_is_stored_by_exactly_one_rank(world: World, stages: int, replicas: int) -> None:
    layout = world.layout(stages, replicas)
    stored: Counter[tuple[int, int]] = Counter()
    for rank in range(layout.ranks):
        for s in segments(layout.rank(rank)):
            stored.update((s.tensor * 3 + s.kind, s.first // BLOCK_ELEMENTS + i) for i in range(blocks(s.elements)))
    assert set(stored.values()) == {1}
    assert len(stored) == 3 * sum(blocks(t.elements) for t in layout.tensors)
    assert layout.batch == SPEC.train.batch


@pytest.mark.parametrize(("stages", "replicas"), LAYOUTS)
def test_every_layout_stores_the_same_state(world: World, stages: int, replicas: int) -> None:
    """One state digest, a manifest that holds, and bytes that can be read in any range."""
    info = world.checkpoint(stages, replicas)
    assert info.state_digest == world.checkpoint(1, 1).state_digest
    assert verify_checkpoint(world.run.store, world.run.name, info, "full") == ()
    reader = StateReader(world.run.store, load_manifest(world.run.store, world.run.name, info))
    for name, elements in world.elements.items():
        first, count = elements // 3, elements - elements // 3 - 1
        whole = tensor_bytes(name, elements, 1, STEP)
        assert reader.read(name, 1, first, count) == whole[4 * first : 4 * (first + count)]


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("shift", [1, 3])
def test_any_layout_is_restored_into_any_other(world: World, source: tuple[int, int], shift: int) -> None:
    """What every rank finds in its slot is what it would have saved; where a piece ends its room is zero."""
    target = LAYOUTS[(LAYOUTS.index(source) + shift) % len(LAYOUTS)]
    assert world.wrong(source, target) == []


ALL = [(stages, replicas) for stages in (1, 2, 4, 8) for replicas in (1, 2, 4, 8)]
DRAWN = [((8, 8), (1, 1)), ((1, 8), (8, 1)), ((2, 1), (4, 8)), ((8, 2), (2, 4))]


@pytest.fixture(scope="module")
def deep() -> World:
    """Layers for eight stages; tensors of one block and of two."""
    return World(MemoryStore(), tiny_spec(model__width=264, model__layers=8, train__batch=16))


@pytest.mark.parametrize(
    "source", [*{s: s for s, _ in DRAWN}, *(pytest.param(way, marks=pytest.mark.slow, id=f"all-{way}") for way in ALL)]
)
def test_all_pairs_of_layouts(deep: World, source: Way, request: pytest.FixtureRequest) -> None:
    """A few pairs, drawn; and each of the 256 in `make nightly`."""
    everything = request.node.get_closest_marker("slow") is not None
    for target in ALL if everything else [t for s, t in DRAWN if s == source]:
        assert deep.wrong(source, target) == [], target


def test_a_slot_of_another_replica_is_not_taken_over(world: World) -> None:
    """The ranks of a position have slots of one size and plan, and different pieces in them."""
    layout = world.layout(1, 2)
    with contextlib.ExitStack() as made:
        slots = [Slot.create(layout.rank(rank), layout.digest, layout.what_digest) for rank in (0, 1)]
        for slot in slots:
            made.callback(slot.close)
        own = Slot.adopt(os.dup(slots[1].fd), layout.rank(1), layout.digest)
        assert own.close()
        with pytest.raises(SlotChanged, match="position 0 of replica 0 is of another plan, position or replica"):
            Slot.adopt(os.dup(slots[1].fd), layout.rank(0), layout.digest)


def test_a_plan_with_other_pieces_than_replicas_is_refused(world: World) -> None:
    four = plan_of(SPEC, world.dataset, 1, 4)
    torn = replace(four.positions[0], states=tuple(replace(s, pieces=2) for s in four.positions[0].states))
    with pytest.raises(PlanRefused, match="in 2 pieces; with 4 replicas"):
        read_plan(replace(four, positions=(torn,)).to_bytes())
    none = replace(four, config=replace(four.config, replicas=0))
    with pytest.raises(PlanRefused, match="has 0 replicas"):
        read_plan(none.to_bytes())
    small = replace(four.positions[0], slot_bytes=four.positions[0].slot_bytes // 8)
    with pytest.raises(PlanRefused, match="its state needs"):
        read_plan(replace(four, positions=(small,)).to_bytes())


# --- how much is read -------------------------------------------------------------------------------------

LARGE = tiny_spec(model__width=768, model__layers=12, model__heads=12, train__batch=16, train__microbatch=1)
LARGE_LAYOUTS = [(1, 1, 1), (1, 2, 2), (4, 1, 4), (2, 4, 8), (2, 4, 2), (4, 8, 4), (1, 8, 2)]
"""(stages, replicas, nodes)"""


def manifest_of(layout: PlanLayout) -> Manifest:
    """What a gang of this layout would have committed, but for the digests."""
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    for rank in range(layout.ranks):
        for plan in plan_chunks(segments(layout.rank(rank))):
            at = 0
            for s in plan.segments:
                leaves = (bytes(32),) * blocks(s.elements)
                pieces.append(Piece(s.tensor, s.kind, s.first, s.elements, len(chunks), at, leaves))
                at += s.bytes
            chunks.append(Chunk(f"chunks/{len(chunks)}", plan.bytes, bytes(32)))
    pieces.sort(key=lambda p: (p.tensor, p.kind, p.first))
    tensors = tuple(Tensor(t.name, t.shape) for t in layout.tensors)
    return Manifest("r", 1, 1, 1, layout.what_digest, tensors, tuple(chunks), tuple(pieces), (), {})


def kept_by(layout: PlanLayout, ranks: range) -> int:
    """Bytes of state that a node's ranks keep, what several keep once."""
    kept = {(s.tensor, s.first, s.elements) for rank in ranks for s in layout.rank(rank).states}
    return sum(len(KINDS) * 4 * elements for _, _, elements in kept)


@pytest.fixture(scope="module")
def large() -> dict[tuple[int, int, int], tuple[PlanLayout, Manifest]]:
    dataset = put_dataset(MemoryStore())
    made: dict[tuple[int, int, int], tuple[PlanLayout, Manifest]] = {}
    for layout in LARGE_LAYOUTS:
        plan = layout_of(LARGE, dataset, *layout[:2])
        made[layout] = plan, manifest_of(plan)
    return made


def pairs() -> Iterator[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    for source in LARGE_LAYOUTS:
        for target in LARGE_LAYOUTS:
            yield source, target


def test_a_gang_reads_each_byte_once(large: dict[tuple[int, int, int], tuple[PlanLayout, Manifest]]) -> None:
    """From every layout into every other: each node at most 1.05 times what its ranks keep; so the gang at most 1.05
    times the state, but for large tensors that every replica keeps whole."""
    for source, target in pairs():
        _, manifest = large[source]
        layout, nodes = large[target][0], target[2]
        each, read = layout.ranks // nodes, 0
        large_ones = {(o.tensor, o.pieces) for p in layout.positions for o in p.owned if o.elements > BLOCK_ELEMENTS}
        for node in range(nodes):
            ranks = range(node * each, (node + 1) * each)
            reads = plan_reads(manifest, layout, [layout.rank(rank) for rank in ranks])
            own = sum(r.length for r in reads)
            assert own <= 1.05 * kept_by(layout, ranks), (source, target, node)
            read += own
        if all(pieces == layout.replicas for _, pieces in large_ones):
            assert read <= 1.05 * manifest.total_bytes, (source, target, read / manifest.total_bytes)
