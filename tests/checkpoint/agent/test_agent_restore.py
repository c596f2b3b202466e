"""Restore by itself: which bytes are read for which position, what is refused, and that layouts get the same state."""

from __future__ import annotations

import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint import keys, restore
from checkpoint.agent.commit import commit
from checkpoint.agent.gang import layouts
from checkpoint.agent.slots import SlotTable
from checkpoint.agent.upload import Source, Uploader
from checkpoint.chunks import Piece
from checkpoint.digest import BLOCK_BYTES, KINDS
from checkpoint.errors import Damaged, Halted
from checkpoint.layout import PlanLayout, PlanRefused, read_plan
from checkpoint.log import CheckpointInfo
from checkpoint.read import load_manifest
from checkpoint.restore import (
    GAP_BYTES,
    PART_BYTES,
    ChunkRead,
    OtherModel,
    Placement,
    checked_parts,
    plan_reads,
    restore_slots,
)
from checkpoint.store import MemoryStore
from checkpoint.store.base import Data
from tests.support.agents import Run, make_run, put_dataset, state_bytes, tiny_spec, wait_for


def table_of(layout: PlanLayout) -> SlotTable:
    table = SlotTable(layouts(layout, range(layout.ranks)), layout.digest, layout.what_digest, 2)
    for rank in table.layouts:
        table.create(rank)
    return table


def save(run: Run, layout: PlanLayout, step: int, epoch: int) -> SlotTable:
    """Fill slot 0 of every position and upload it as node 0 of 1; the table, for the caller to close."""
    table, parts = table_of(layout), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        for rank, slots in table.slots.items():
            with slots[0].begin_fill() as view:
                view[:] = state_bytes(layout, rank, step)
            slots[0].finish_fill(step, epoch, pool)
        uploader = Uploader(
            run.store,
            run.name,
            0,
            1,
            "a0",
            pool=pool,
            post=lambda call: call(),
            on_part=lambda *_: parts.set(),
            on_idle=lambda: None,
            on_error=lambda _: None,
        )
        uploader.begin(Source(epoch, layout, table, 20.0))
        assert parts.wait(60)
        wait_for(lambda: uploader.idle, "the upload to end")
        uploader.close()
    return table


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Run, PlanLayout, CheckpointInfo]:
    """A checkpoint of step 6 of two positions, committed."""
    spec = tiny_spec(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    layout = run.layouts[plan]
    epoch = run.attempt(spec, plan)
    assert save(run, layout, 6, epoch).close()
    state = commit(run.log, 1, 6, epoch, run.fold())
    assert state is not None
    return run, layout, state.checkpoints[-1]


def restored(run: Run, layout: PlanLayout, info: CheckpointInfo) -> SlotTable:
    table = table_of(layout)
    with ThreadPoolExecutor(2) as pool:
        restore_slots(run.store, run.name, info, layout, {r: s[0] for r, s in table.slots.items()}, epoch=9, pool=pool)
    return table


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_any_layout_gets_the_same_state(saved: tuple[Run, PlanLayout, CheckpointInfo], stages: int) -> None:
    run, _, info = saved
    layout = run.layouts[run.add_plan(tiny_spec(parallel__stages=stages), put_dataset(run.store))]
    table = restored(run, layout, info)
    for rank, slots in table.slots.items():
        with slots[0].data() as view:
            assert view == state_bytes(layout, rank, 6)
        seen = slots[0].look(0)
        assert (seen.ready, seen.step, seen.epoch) == (True, 6, 9)
        slots[0].hold(seen)  # its header holds
        slots[0].release()
    assert table.close()


def test_reads_are_joined_and_only_what_is_owned_is_read(saved: tuple[Run, PlanLayout, CheckpointInfo]) -> None:
    run, layout, info = saved
    manifest = load_manifest(run.store, run.name, info)
    whole = plan_reads(manifest, layout, [layout.rank(0), layout.rank(1)])
    assert len(whole) == len(manifest.chunks)  # small tensors next to each other: one read a chunk
    assert sum(read.length for read in whole) == manifest.total_bytes
    half = plan_reads(manifest, layout, [layout.rank(0)])
    wanted = sum(w.piece.bytes for read in half for w in read.wanted)
    assert wanted == sum(3 * 4 * s.elements for s in layout.rank(0).states)
    assert all(read.length <= sum(w.piece.bytes for w in read.wanted) + GAP_BYTES * len(read.wanted) for read in half)


@pytest.mark.parametrize("part_bytes", [PART_BYTES, 2 * BLOCK_BYTES])
def test_parts_are_what_is_read_and_lie_in_a_row(
    saved: tuple[Run, PlanLayout, CheckpointInfo], monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(restore, "PART_BYTES", part_bytes)
    run, layout, info = saved
    manifest = load_manifest(run.store, run.name, info)
    small = [read for ranks in ([0, 1], [0]) for read in plan_reads(manifest, layout, [layout.rank(r) for r in ranks])]
    assert all(len([part for part in checked_parts(read) if part.to]) <= 2 for read in small)
    for read in [*small, drawn_read(random.Random(part_bytes))]:
        at, seen = read.first, list[tuple[Placement, int, int]]()
        for part in checked_parts(read):
            assert 0 < part.bytes == (sum(cut.bytes for cut in part.cuts) or part.bytes)
            assert not part.cuts or part.bytes <= part_bytes
            own = 0
            for cut in part.cuts:
                target, offset = cut.placement.to[0]
                assert part.to == (target, offset + cut.first - own)
                assert cut.first % BLOCK_BYTES == 0
                assert cut.bytes % BLOCK_BYTES == 0 or cut.first + cut.bytes == cut.placement.piece.bytes
                assert cut.placement.piece.offset + cut.first == at + own
                seen.append((cut.placement, cut.first, cut.bytes))
                own += cut.bytes
            at += part.bytes
        assert at == read.first + read.length
        for placement in read.wanted:
            mine = [(first, size) for other, first, size in seen if other is placement]
            assert [first for first, _ in mine] == [sum(size for _, size in mine[:n]) for n in range(len(mine))]
            assert sum(size for _, size in mine) == placement.piece.bytes


def drawn_read(rng: random.Random) -> ChunkRead:
    """Pieces of up to five blocks, with gaps, now and then beside what is before them in a target."""
    wanted, offset, to = list[Placement](), 40, (0, 0)
    for number in range(60):
        offset += 4 * rng.choice((0, 0, 0, 9))
        elements = rng.choice((1, 700, BLOCK_BYTES // 4, rng.randrange(1, 5 * BLOCK_BYTES // 4)))
        to = to if rng.random() < 0.8 else (rng.randrange(2), to[1] + 64)
        wanted.append(Placement(Piece(number, 0, 0, elements, 0, offset, ()), (to,)))
        offset, to = offset + 4 * elements, (to[0], to[1] + 4 * elements)
    first = wanted[0].piece.offset
    return ChunkRead(0, first, offset - first, tuple(wanted))


def _flip(run: Run, key: str, at: int) -> None:
    path = run.store.local_path(key)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["chunk", "manifest", "cut", "gone"])
def test_damage_is_named_and_leaves_no_slot_ready(saved: tuple[Run, PlanLayout, CheckpointInfo], what: str) -> None:
    run, layout, info = saved
    manifest = load_manifest(run.store, run.name, info)
    key = keys.run_key(run.name, info.manifest if what == "manifest" else manifest.chunks[1].name)
    path = run.store.local_path(key)
    assert path is not None
    match what:
        case "cut":
            path.write_bytes(path.read_bytes()[:-1])
        case "gone":
            path.unlink()
        case _:
            _flip(run, key, path.stat().st_size // 3)
    table = table_of(layout)
    with ThreadPoolExecutor(2) as pool, pytest.raises(Damaged, match=key.split("/", 2)[2]):
        restore_slots(run.store, run.name, info, layout, {r: s[0] for r, s in table.slots.items()}, epoch=9, pool=pool)
    assert not any(seen.ready for rank in table.slots for seen in table.look(rank))
    assert table.close()


def test_a_bit_of_any_piece_is_found(saved: tuple[Run, PlanLayout, CheckpointInfo]) -> None:
    """Whatever pieces it is checked together with; the error names the tensor."""
    run, layout, info = saved
    manifest, table, rng = load_manifest(run.store, run.name, info), table_of(layout), random.Random(5)
    slots = {rank: slots[0] for rank, slots in table.slots.items()}
    pieces = [piece for t in manifest.tensors for kind in range(3) for piece in manifest.pieces_of(t.name, kind)]
    for piece in rng.sample(pieces, 16):
        at = piece.offset + rng.choice((0, rng.randrange(piece.bytes), piece.bytes - 1))
        key = keys.run_key(run.name, manifest.chunks[piece.chunk].name)
        _flip(run, key, at)
        named = f"{KINDS[piece.kind]} of tensor {manifest.tensors[piece.tensor].name},"
        with ThreadPoolExecutor(1) as pool, pytest.raises(Damaged, match=re.escape(named)):
            restore_slots(run.store, run.name, info, layout, slots, epoch=9, pool=pool)
        _flip(run, key, at)
    assert table.close()


def test_a_restore_that_nobody_waits_for_ends_early(saved: tuple[Run, PlanLayout, CheckpointInfo]) -> None:
    """The next preparation waits until this one writes into the slots no more."""
    run, layout, info = saved
    table, asked = table_of(layout), 0

    def go_on() -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise InterruptedError

    slots = {rank: slots[0] for rank, slots in table.slots.items()}
    with ThreadPoolExecutor(1) as pool, pytest.raises(InterruptedError):
        restore_slots(run.store, run.name, info, layout, slots, epoch=9, pool=pool, go_on=go_on)
    assert not any(seen.ready for rank in table.slots for seen in table.look(rank))
    assert table.close()


def test_another_model_is_refused(saved: tuple[Run, PlanLayout, CheckpointInfo], tmp_path: Path) -> None:
    run, _, info = saved
    other = tiny_spec(model__width=64)
    layout = run.layouts[run.add_plan(other, put_dataset(run.store))]
    with pytest.raises(OtherModel, match="another run"):
        restored(run, layout, info)
    with pytest.raises(OtherModel, match="another model"):
        restored(run, replace(layout, what_digest=load_manifest(run.store, run.name, info).what), info)


def test_a_commit_of_a_fenced_attempt_is_halted(tmp_path: Path) -> None:
    spec = tiny_spec()
    run, plan = make_run(tmp_path, spec)
    old = run.attempt(spec, plan)
    before = run.fold()
    assert save(run, run.layouts[plan], 6, old).close()
    run.attempt(spec, plan)
    with pytest.raises(Halted):
        commit(run.log, 1, 6, old, before)  # with the state of the log from before, as a zombie would have it
    assert not run.fold().checkpoints


def test_a_plan_file_is_read_as_hostile(tmp_path: Path) -> None:
    run, plan = make_run(tmp_path, tiny_spec())
    data = run.store.get(keys.plan_key(run.name, plan))
    assert read_plan(data, digest=bytes.fromhex(plan)).digest.hex() == plan
    with pytest.raises(PlanRefused, match="fewer than its header"):
        read_plan(data[:100])
    with pytest.raises(PlanRefused, match="cut or appended"):
        read_plan(data[:-1])
    with pytest.raises(PlanRefused, match="digest"):
        read_plan(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PlanRefused, match="the attempt names"):
        read_plan(data, digest=b"\0" * 32)
    with pytest.raises(PlanRefused, match="version"):
        read_plan(data[:8] + b"\xff" + data[9:])


def test_nodes_agree_on_a_snapshot_in_two_requests_each(tmp_path: Path) -> None:
    """Whoever comes later takes what was begun, where it holds that; however many nodes there are."""
    spec = tiny_spec(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    layout = run.layouts[plan]
    asked: list[str] = []

    class Counted(MemoryStore):
        def get(self, key: str, **more: Any) -> bytes:
            asked.append(f"get {key}")
            return super().get(key, **more)

        def put(self, key: str, data: Data) -> None:
            asked.append(f"put {key}")
            super().put(key, data)

    store, table = Counted(), table_of(layout)
    source = Source(5, layout, table, 20.0)
    chosen = []
    with ThreadPoolExecutor(1) as pool:
        for node, held in enumerate([(6, 4), (8, 6, 4), (8, 6), (8,), (8, 6)]):
            uploader = Uploader(
                store, run.name, node, 1000, "a0", pool=pool, post=lambda call: call(), on_part=lambda *_: None,
                on_idle=lambda: None, on_error=lambda _: None,
            )  # fmt: skip
            asked.clear()
            (step, _), _ = uploader._agreed(source, [((step, 5), {}) for step in held])
            uploader.close()
            chosen.append(step)
            assert len(asked) <= 2, asked
    assert chosen == [6, 6, 6, 8, 8]
    table.close()
