"""Manifests: any layout's parts give one state; what does not add up is refused; hostile bytes end in Damaged."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint import codec, keys
from checkpoint.chunks import MAX_CHUNK_BYTES, Chunk, Segment, Tensor, plan_chunks
from checkpoint.digest import (
    BLOCK_BYTES,
    BLOCK_ELEMENTS,
    KINDS,
    leaf_digests,
    state_root,
    tree_root,
    wrong_block,
    wrong_block_of,
)
from checkpoint.errors import Damaged
from checkpoint.log import RunLog
from checkpoint.manifest import EXP_AVG, PARAM, Manifest, PartManifest, checkpoint_body, merge, state_digest
from checkpoint.read import StateReader, load_manifest
from checkpoint.store import Store
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import TENSORS, WHAT, attempt_body, digest, save, state_bytes, write_parts
from tests.support.mutations import survives

RUN = "demo-0a1b2c"
LAYOUTS = [
    [[0, 1, 2, 3, 4]],
    [[0, 1], [2, 3, 4]],
    [[4], [2, 3], [0, 1]],
    [[0], [1], [2], [3], [4]],
]


# --- the digest ----------------------------------------------------------------------------------------------


def test_the_tree_by_hand() -> None:
    def h(data: bytes) -> bytes:
        return hashlib.sha256(data).digest()

    a, b, c = bytes(BLOCK_BYTES), b"\1" * BLOCK_BYTES, b"\2" * 8
    leaves = [h(a), h(b), h(c)]
    assert leaf_digests(a + b + c) == leaves
    assert wrong_block(a + b + c, leaves) is None
    assert wrong_block(a + c + b, leaves) == BLOCK_BYTES
    assert wrong_block(a + b, leaves) == 2 * BLOCK_BYTES
    assert wrong_block(a + b + c, leaves[:2]) == 2 * BLOCK_BYTES
    pieces = [(2 * BLOCK_BYTES, leaves[:2]), (8, leaves[2:])]
    assert wrong_block_of(a + b + c, pieces) is None
    assert wrong_block_of(a + a + c, pieces) == (0, BLOCK_BYTES)
    assert wrong_block_of(a + b + b"\3" * 8, pieces) == (1, 0)
    assert wrong_block_of(a + b + c, [(2 * BLOCK_BYTES, leaves[:1]), pieces[1]]) == (0, BLOCK_BYTES)
    assert wrong_block_of(a + b + c, [pieces[0], (8, leaves[1:])]) == (1, 0)
    assert tree_root(leaves) == h(h(leaves[0] + leaves[1]) + leaves[2])
    assert tree_root(leaves[:1]) == leaves[0]
    five = [h(bytes([n])) for n in range(5)]
    pairs = [h(five[0] + five[1]), h(five[2] + five[3])]
    assert tree_root(five) == h(h(pairs[0] + pairs[1]) + five[4])
    root = h(
        b"hotstage state v1" + (7).to_bytes(8, "little") + (56).to_bytes(8, "little") + WHAT + leaves[0] + leaves[1]
    )
    assert state_root(7, 56, WHAT, leaves[:2]) == root


@pytest.mark.parametrize("owners", LAYOUTS, ids=lambda o: f"{len(o)} nodes")
def test_the_state_digest_knows_no_layout(owners: list[list[int]]) -> None:
    for limit in (1 << 20, 3 << 20, MAX_CHUNK_BYTES):
        parts = write_parts(MemoryStore(), RUN, state_bytes(1), owners, step=5, epoch=1, limit=limit)
        assert merge(parts).state_digest == digest(1, 5)


def test_the_state_digest_sees_every_part_of_the_state() -> None:
    manifest = merge(write_parts(MemoryStore(), RUN, state_bytes(1), LAYOUTS[0], step=5, epoch=1))
    seen = {state_digest(manifest)}
    for changed in (
        replace(manifest, step=6),
        replace(manifest, samples=41),
        replace(manifest, what=bytes(32)),
        *(
            replace(
                manifest,
                pieces=(*manifest.pieces[:n], replace(p, leaves=(bytes(32), *p.leaves[1:])), *manifest.pieces[n + 1 :]),
            )
            for n, p in enumerate(manifest.pieces)
        ),
    ):
        seen.add(state_digest(changed))
    assert len(seen) == 4 + len(manifest.pieces)
    assert state_digest(replace(manifest, epoch=9)) in seen  # where it was made does not matter


# --- chunks --------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 3 * BLOCK_ELEMENTS) | st.just(BLOCK_ELEMENTS), min_size=1, max_size=12),
    st.integers(BLOCK_BYTES, 5 * BLOCK_BYTES),
)
def test_chunks_keep_order_cut_on_borders_and_stay_small(sizes: list[int], limit: int) -> None:
    source, segments = 0, []
    for number, size in enumerate(sizes):
        segments.append(Segment(number, PARAM, 0, size, source))
        source += size * 4 + 64
    plans = plan_chunks(segments, limit)
    assert [p.index for p in plans] == list(range(len(plans)))
    assert all(0 < p.bytes <= limit for p in plans)
    flat = [s for p in plans for s in p.segments]
    assert all(s.first % BLOCK_ELEMENTS == 0 for s in flat)
    joined: dict[int, int] = {}
    for s in flat:
        assert s.first == joined.get(s.tensor, 0)
        assert s.source == segments[s.tensor].source + s.first * 4
        joined[s.tensor] = s.first + s.elements
    assert [joined[n] for n in range(len(sizes))] == sizes
    assert sorted(flat, key=lambda s: (s.tensor, s.first)) == flat


def test_segments_off_the_borders_are_refused() -> None:
    with pytest.raises(ValueError, match="block border"):
        plan_chunks([Segment(0, 0, 5, 10, 0)])
    with pytest.raises(ValueError, match="block border"):
        plan_chunks([Segment(0, 0, 0, 0, 0)])
    with pytest.raises(ValueError, match="smaller than one block"):
        plan_chunks([Segment(0, 0, 0, 1, 0)], limit=1000)


# --- merging and reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("owners", LAYOUTS, ids=lambda o: f"{len(o)} nodes")
def test_any_range_of_any_layout_reads_back(owners: list[list[int]], store: Store) -> None:
    state = state_bytes(2)
    manifest = merge(write_parts(store, RUN, state, owners, step=5, epoch=1))
    assert Manifest.parse(manifest.to_bytes()) == manifest
    reader = StateReader(store, manifest)
    rng = random.Random(4)
    for number, tensor in enumerate(TENSORS):
        assert manifest.number(tensor.name) == number
        for kind in range(len(KINDS)):
            assert reader.read(tensor.name, kind) == state[number][kind]
            assert tree_root(manifest.leaves(tensor.name, kind)) == tree_root(leaf_digests(state[number][kind]))
        for _ in range(4):
            first = rng.randrange(tensor.elements)
            count = rng.randrange(tensor.elements - first + 1)
            assert reader.read(tensor.name, EXP_AVG, first, count) == state[number][1][first * 4 : (first + count) * 4]
    with pytest.raises(ValueError, match="which has 7"):
        reader.read("b", PARAM, 5, 3)
    with pytest.raises(KeyError):
        reader.read("no such tensor")


def test_merging_gives_the_same_bytes_whoever_does_it() -> None:
    parts = write_parts(MemoryStore(), RUN, state_bytes(1), LAYOUTS[2], step=5, epoch=1)
    assert merge(reversed(parts)).to_bytes() == merge(parts).to_bytes()


def altered(part: tuple[str, bytes], **changes: Any) -> tuple[str, bytes]:
    return part[0], replace(PartManifest.parse(part[1]), **changes).to_bytes()


def test_parts_that_do_not_belong_together_are_refused() -> None:
    a, b = write_parts(MemoryStore(), RUN, state_bytes(1), LAYOUTS[1], step=5, epoch=1)
    for wrong, says in (
        ([], "without parts"),
        ([a], r"parts \[0\] of 2"),
        ([a, a], r"parts \[0, 0\] of 2"),
        ([a, altered(b, step=6)], "its step differs"),
        ([a, altered(b, epoch=2)], "its epoch differs"),
        ([a, altered(b, run="other")], "its run differs"),
        ([a, altered(b, samples=1)], "its samples differs"),
        ([a, altered(b, what=bytes(32))], "its what differs"),
        ([a, altered(b, tensors=(*TENSORS[:4], Tensor("other", (512, 512))))], "its tensors differs"),
        ([a, altered(b, meta={"dataset": "e" * 64})], "its dataset is"),
        ([a, (b[0], b[1][:-1])], r"not a sealed map|digest"),
    ):
        with pytest.raises(Damaged, match=says):
            merge(wrong)


def test_missing_and_doubled_elements_are_refused() -> None:
    [part] = write_parts(MemoryStore(), RUN, state_bytes(1), LAYOUTS[0], step=5, epoch=1)
    p = PartManifest.parse(part[1])
    last = p.pieces[-1]
    short = tuple(replace(c, bytes=c.bytes - last.bytes) if n == last.chunk else c for n, c in enumerate(p.chunks))
    with pytest.raises(Damaged, match="not covered"):
        merge([altered(part, pieces=p.pieces[:-1], chunks=short)])
    again = (*p.chunks, Chunk(keys.chunk_name(5, 1, 0, "i1", 99), last.bytes, bytes(32)))
    with pytest.raises(Damaged, match=r"comes twice|not covered"):
        merge([altered(part, pieces=(*p.pieces, replace(last, chunk=len(p.chunks), offset=0)), chunks=again)])


def test_pieces_that_do_not_fit_are_refused() -> None:
    [part] = write_parts(MemoryStore(), RUN, state_bytes(1), LAYOUTS[0], step=5, epoch=1)
    p = PartManifest.parse(part[1])
    first, rest = p.pieces[0], p.pieces[1:]
    for changed, says in (
        (replace(first, offset=4), "overlap or leave a gap"),
        (replace(first, tensor=77), "not there"),
        (replace(first, kind=3), "not there"),
        (replace(first, chunk=9999), "not there"),
        (replace(first, first=4), "block borders"),
        (replace(first, first=BLOCK_ELEMENTS * 40), "block borders"),
    ):
        with pytest.raises(Damaged, match=says):
            PartManifest.parse(altered(part, pieces=(changed, *rest))[1])
    for chunk, says in (
        (replace(p.chunks[0], name="../../etc/passwd"), "not a name under chunks/"),
        (replace(p.chunks[0], name="manifests/x"), "not a name under chunks/"),
        (replace(p.chunks[0], bytes=MAX_CHUNK_BYTES + 1), "is not a name"),
        (replace(p.chunks[0], bytes=p.chunks[0].bytes + 4), "its pieces"),
        (p.chunks[1], "named twice"),
    ):
        with pytest.raises(Damaged, match=says):
            PartManifest.parse(altered(part, chunks=(chunk, *p.chunks[1:]))[1])
    for tensors, says in (
        ((), "empty"),
        ((TENSORS[0],) * 5, "twice"),
        ((Tensor("x", (1 << 40, 1 << 40)), *TENSORS[1:]), "no size that can be"),
        ((Tensor("x", (0,)), *TENSORS[1:]), "no size that can be"),
        ((Tensor("", (5,)), *TENSORS[1:]), "needs a name"),
        ((Tensor("x", ()), *TENSORS[1:]), "needs a name"),
        ((replace(TENSORS[0], kinds=1), *TENSORS[1:]), "neither all kinds nor 2"),
        ((replace(TENSORS[0], kinds=2), *TENSORS[1:]), "names tensor 0, kind 2, chunk"),
    ):
        with pytest.raises(Damaged, match=says):
            PartManifest.parse(altered(part, tensors=tensors)[1])


def test_a_tensor_may_have_two_kinds() -> None:
    """As Muon's have; then the manifest is of version 2, and else of the first one."""
    [part] = write_parts(MemoryStore(), RUN, state_bytes(1), LAYOUTS[0], step=5, epoch=1)
    p = PartManifest.parse(part[1])
    whole = merge([part])
    assert codec.unseal(whole.to_bytes(), "x", max_bytes=1 << 20)["v"] == 1
    kept = [piece for piece in p.pieces if (piece.tensor, piece.kind) != (4, 2)]
    gone = len(p.pieces) - len(kept)
    assert (gone, p.pieces[-1].offset + p.pieces[-1].bytes) == (1, p.chunks[-1].bytes)
    shorter = replace(p.chunks[-1], bytes=p.chunks[-1].bytes - p.pieces[-1].bytes)
    tensors = (*TENSORS[:4], replace(TENSORS[4], kinds=2))
    less = merge([altered(part, tensors=tensors, pieces=tuple(kept), chunks=(*p.chunks[:-1], shorter))])
    assert codec.unseal(less.to_bytes(), "x", max_bytes=1 << 20)["v"] == 2
    again = Manifest.parse(less.to_bytes())
    assert again == less
    assert again.state_digest != whole.state_digest
    assert again.pieces_of(TENSORS[0].name, 2)
    with pytest.raises(Damaged, match=r"exp_avg_sq of tensor 'whole\.block' is not covered"):
        merge([altered(part, pieces=tuple(kept), chunks=(*p.chunks[:-1], shorter))])


def test_mutated_manifests_end_in_damaged() -> None:
    parts = write_parts(MemoryStore(), RUN, state_bytes(1), LAYOUTS[1], step=5, epoch=1)
    rng = random.Random(9)
    whole = codec.unseal(merge(parts).to_bytes(), "x", max_bytes=1 << 20)
    part = codec.unseal(parts[0][1], "x", max_bytes=1 << 20)

    def use(data: bytes) -> None:
        manifest = Manifest.parse(data)
        _ = manifest.state_digest, manifest.total_bytes
        for tensor in manifest.tensors:
            manifest.pieces_of(tensor.name, PARAM)

    for _ in range(3000):
        survives(use, whole, rng)
        survives(PartManifest.parse, part, rng)


def test_the_record_names_the_manifest_and_they_must_agree() -> None:
    store = MemoryStore()
    log = RunLog(store, RUN, writer="test")
    state = log.append("attempt", attempt_body(), log.fold())
    state, manifest = save(store, log, state, seed=1, step=5)
    info = state.checkpoints[0]
    assert load_manifest(store, RUN, info) == manifest
    assert info.body() == checkpoint_body(manifest, manifest.to_bytes())
    assert info.state_digest == digest(1, 5).hex()
    for wrong in (
        replace(info, step=6),
        replace(info, epoch=2),
        replace(info, data_position=1),
        replace(info, parts=2),
        replace(info, state_digest="0" * 64),
        replace(info, sha256="0" * 64),
        replace(info, bytes=info.bytes - 1),
        replace(info, bytes=info.bytes + 1),
        replace(info, manifest="manifests/gone"),
    ):
        with pytest.raises(Damaged):
            load_manifest(store, RUN, wrong)
