"""Snapshot slots: the rank's side (C) against the agent's (Python), on the same shared memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoint.agent.slots import Slot, SlotChanged
from checkpoint.layout import Owned, PositionLayout, RankLayout, StateSlot, round_up
from k8s.images.static import compiler
from tests.engine.engine_build import SOURCES
from tests.engine.native import build_program, ended
from trainer import wire

PLAN, WHAT = b"p" * 32, b"w" * 32
ELEMENTS = (1, 1_500_000, 7, 333_333)  # several chunks, borders inside tensors, padding between


def layout_of(
    elements: tuple[int, ...] = ELEMENTS, position: int = 2, replica: int = 0, pieces: tuple[int, ...] = ()
) -> RankLayout:
    """``pieces``: of each tensor; none: all are whole."""
    owned, at = [], 0
    for number, count in enumerate(elements):
        one = PositionLayout(position, 0, 0, (Owned(number, at, count, pieces[number] if pieces else 1),)).of(replica)
        owned.append(one.states[0])
        at = one.states[0].kind_offset(3)
    layout = RankLayout(position, 0, at, tuple(owned), replica)
    return replace(layout, slot_bytes=round_up(layout.data_offset + at, 4096))


def words_of(state: StateSlot) -> str:
    """A tensor as snapshot_drive takes it; of the last piece's replica, where it is in pieces."""
    if state.room == state.elements and not state.first:
        return str(state.elements)
    return f"{state.first + state.elements}/{state.first // state.room + 1}"


class Rank:
    """A running snapshot_drive."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.first = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self._line()


@contextmanager
def rank(
    slots: list[Slot],
    *,
    epoch: int = 5,
    threads: int = 2,
    plan: bytes = PLAN,
    position: str = "2",
    apart: bool = False,
) -> Iterator[Rank]:
    layout = slots[0].layout
    fds = [slot.fd for slot in slots]
    command = [str(build_program("snapshot_drive")), position, plan.hex(), WHAT.hex(), str(epoch), str(threads)]
    command += [str(layout.slot_bytes), ",".join(map(words_of, layout.states)), *map(str, fds)]
    env = os.environ | ({"SNAPSHOT_APART": "1"} if apart else {})
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=fds, env=env)
    with ended(process):
        yield Rank(process)


@contextmanager
def slots_of(count: int, layout: RankLayout | None = None) -> Iterator[list[Slot]]:
    slots = [Slot.create(layout or layout_of(), PLAN, WHAT) for _ in range(count)]
    try:
        yield slots
    finally:
        for slot in slots:
            slot.close()


def copy_of(slot: Slot) -> bytes:
    with slot.data() as view:
        return bytes(view)


def expected(seed: int, layout: RankLayout) -> bytes:
    """What `set SEED` of snapshot_drive looks like in a slot."""
    data = bytearray(layout.data_bytes)
    for number, state in enumerate(layout.states):
        for kind in range(3):
            i = np.arange(state.room, dtype=np.uint32)
            base = (seed * 2654435761 + number * 40503 + kind * 977) & 0xFFFFFFFF
            values = ((np.uint32(base) + i * np.uint32(31)) % np.uint32(1000003)).astype(np.float32)
            at = state.kind_offset(kind)
            data[at : at + 4 * state.room] = values.tobytes()
    return bytes(data)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_agent_reads_what_the_rank_saved(threads: int) -> None:
    with slots_of(2) as slots:
        with rank(slots, threads=threads) as r:
            assert r.first == "ok 2"
            r.ask("set 17")
            assert r.ask("fill 40 1") == "ok 0"
        seen = slots[0].look(0)
        assert (seen.ready, seen.step, seen.epoch, seen.final, seen.generation) == (True, 40, 5, True, 1)
        slots[0].hold(seen)  # verifies the header's checksum
        assert copy_of(slots[0]) == expected(17, slots[0].layout)
        slots[0].check(seen)
        slots[0].release()
        with rank(slots, epoch=6) as again:  # another process, the same memory
            assert again.ask("restore 0 40") == "ok 0"
            assert again.ask("check 17") == "ok 0"


def test_the_rank_restores_what_the_agent_filled() -> None:
    with slots_of(1) as slots, ThreadPoolExecutor(2) as pool:
        with slots[0].begin_fill() as data:
            data[:] = expected(3, slots[0].layout)
        slots[0].finish_fill(9, 4, pool)
        with rank(slots) as r:
            assert r.ask("restore 0 9") == "ok 0"
            assert r.ask("check 3") == "ok 0"


@pytest.mark.parametrize("filler", ["rank", "agent"])
@pytest.mark.parametrize("where", ["first", "second", "last", "sums", "header"])
def test_a_flipped_bit_is_found(filler: str, where: str) -> None:
    with slots_of(1) as slots, ThreadPoolExecutor(2) as pool:
        slot = slots[0]
        save(slots, filler, pool)
        data_at = slot.layout.data_offset
        at = {"first": data_at, "second": data_at + wire.SLOT_CHUNK + 5, "last": data_at + slot.layout.data_bytes - 1}
        at |= {"sums": wire.SLOT_HEADER_BYTES + 3, "header": wire.SlotHeader.epoch.offset}
        flip(slot, 8 * at[where] + 2)
        with rank(slots) as r:
            answer = r.ask("restore 0 8")
        chunk = {"first": 0, "second": 1, "last": slot.layout.chunks - 1}
        reason = f"chunk {chunk[where]} of slot 0" if where in chunk else "the header of slot 0 is damaged"
        assert answer.startswith("RESTORE ")
        assert reason in answer
        with pytest.raises(SlotChanged):
            read_as_agent(slot)


@pytest.mark.parametrize("filler", ["rank", "agent"])
def test_every_flipped_bit_of_a_slot_is_found_by_the_rank_and_by_the_agent(filler: str) -> None:
    """Of its header, its checksums and its data, paddings between tensors too. `hold` and `claim` say nothing of what a
    slot holds: whoever sets one of them lets go of it again.
    """
    layout = layout_of((5, 17))
    with slots_of(1, layout) as slots, ThreadPoolExecutor(2) as pool:
        slot = slots[0]
        save(slots, filler, pool)
        with rank(slots) as r:
            assert r.ask("restore 0 8") == "ok 0"
            read_as_agent(slot)
            header, words = wire.SlotHeader, (wire.SlotHeader.hold, wire.SlotHeader.claim)
            places = [
                *(at for at in range(ctypes.sizeof(header)) if all(at - w.offset not in range(w.size) for w in words)),
                *range(wire.SLOT_HEADER_BYTES, wire.SLOT_HEADER_BYTES + 8 * layout.chunks),
                *range(layout.data_offset, layout.data_offset + layout.data_bytes),
            ]
            unseen = []
            for bit in (8 * at + bit for at in places for bit in range(8)):
                flip(slot, bit)
                if not r.ask("restore 0 8").startswith("RESTORE "):
                    unseen.append(f"the rank: byte {bit // 8}, bit {bit % 8}")
                try:
                    read_as_agent(slot)
                    unseen.append(f"the agent: byte {bit // 8}, bit {bit % 8}")
                except SlotChanged:
                    pass
                flip(slot, bit)
            assert not unseen
            assert r.ask("restore 0 8") == "ok 0"
        assert len(places) == 160 - 8 + 8 + layout.data_bytes


def save(slots: list[Slot], filler: str, pool: ThreadPoolExecutor) -> None:
    """A snapshot of step 8 in the first slot."""
    if filler == "rank":
        with rank(slots) as r:
            r.ask("set 1")
            assert r.ask("fill 8 0") == "ok 0"
    else:
        with slots[0].begin_fill() as data:
            data[:] = expected(1, slots[0].layout)
        slots[0].finish_fill(8, 4, pool)


def flip(slot: Slot, bit: int) -> None:
    byte = os.pread(slot.fd, 1, bit // 8)[0]
    os.pwrite(slot.fd, bytes([byte ^ 1 << bit % 8]), bit // 8)


def read_as_agent(slot: Slot) -> None:
    """What an upload does with a slot."""
    seen = slot.look(0)
    if not seen.ready:
        raise SlotChanged("not ready")
    slot.hold(seen)
    try:
        slot.verify([(0, slot.layout.data_bytes)])
        slot.check(seen)
    finally:
        slot.release()


def test_what_does_not_belong_is_not_restored() -> None:
    with slots_of(2) as slots:
        with rank(slots) as r:
            assert r.ask("restore 0 8") == "RESTORE slot 0 is not ready (state 0)"
            assert r.ask("restore 5 8") == "RESTORE no slot 5 to restore from: 2 came"
            assert r.ask("fill 8 0") == "ok 0"
            assert r.ask("restore 0 9") == "RESTORE slot 0 is of step 8, the attempt starts after step 9"
        with rank(slots, plan=b"q" * 32) as r:
            assert r.ask("restore 0 8") == "RESTORE slot 0 is of another layout, position or replica"
        with rank(slots, position="3") as r:
            assert r.first.startswith("CONFIG slot 0 is of position 2 of replica 0, not 3 of 0")
        with rank(slots, position="2.1") as r:
            assert r.first.startswith("CONFIG slot 0 is of position 2 of replica 0, not 2 of 1")


def test_of_a_tensor_in_pieces_a_slot_holds_one() -> None:
    """600,000 elements are three blocks: of two replicas the second one keeps the last block, in a room for two."""
    layout = layout_of((7, 600_000, 5), replica=1, pieces=(1, 2, 1))
    assert [(s.first, s.elements, s.room) for s in layout.states] == [(0, 7, 7), (524288, 75712, 524288), (0, 5, 5)]
    with slots_of(2, layout) as slots, rank(slots, position="2.1") as r:
        r.ask("set 17")
        assert r.ask("fill 40 1") == "ok 0"
        slots[0].hold(slots[0].look(0))
        assert copy_of(slots[0]) == expected(17, layout)
        slots[0].release()
        r.ask("set 18")
        assert (r.ask("restore 0 40"), r.ask("check 17")) == ("ok 0", "ok 0")


def test_a_slot_that_is_held_and_the_newest_are_never_written() -> None:
    with slots_of(3) as slots, rank(slots) as r:
        assert [r.ask(f"fill {step} 0") for step in (1, 2, 3)] == ["ok 0", "ok 1", "ok 2"]
        assert r.ask("fill 4 0") == "ok 0"  # the oldest
        slots[1].hold(slots[1].look(1))
        assert r.ask("fill 5 0") == "ok 2"  # 1 is held, 0 is the newest
        slots[0].hold(slots[0].look(0))
        assert r.ask("claim") == "ok 0"
        assert r.ask("fill 6 0") == "AGAIN none of the 3 snapshot slots is free: the agent still reads them"
        assert [slot.look(0).step for slot in slots] == [4, 2, 5]
        slots[1].release()
        assert r.ask("claim") == "ok 1"
        assert r.ask("fill 6 0") == "ok 1"
        with pytest.raises(SlotChanged):
            slots[2].hold(slots[1].look(2))


def test_what_a_rank_has_claimed_the_agent_does_not_take_and_stays_whole_until_it_is_filled() -> None:
    with slots_of(2) as slots, rank(slots) as r:
        r.ask("set 1")
        assert [r.ask(f"fill {step} 0") for step in (10, 20)] == ["ok 0", "ok 1"]
        assert (r.ask("claim"), r.ask("claim")) == ("ok 1", "ok 1")
        seen = slots[0].look(0)
        assert (seen.ready, seen.step, seen.claim) == (True, 10, True)
        with pytest.raises(SlotChanged):
            slots[0].hold(seen)
        assert not slots[0].held
        r.ask("unclaim")  # the gang does not save
        slots[0].hold(slots[0].look(0))
        assert copy_of(slots[0]) == expected(1, slots[0].layout)
        assert r.ask("claim") == "ok 0"
        slots[0].release()
        assert (r.ask("claim"), r.ask("fill 30 0")) == ("ok 1", "ok 0")
        assert not slots[0].look(0).claim
        assert r.ask("claim") == "ok 1"
        r.process.kill()
        r.process.wait()
        assert slots[1].look(1).claim  # it died with it
        with rank(slots, epoch=6) as again:
            assert again.first == "ok 2"
            assert not slots[1].look(1).claim


@pytest.mark.parametrize(("word", "marks"), [(0, (False, False)), (1, (True, True)), (2, (False, True))])
def test_a_snapshot_says_whether_it_goes_to_the_store(word: int, marks: tuple[bool, bool]) -> None:
    with slots_of(1) as slots, rank(slots) as r:
        assert r.ask(f"fill 8 {word}") == "ok 0"
        seen = slots[0].look(0)
        assert (seen.final, seen.persist) == marks


def test_the_restored_slot_is_kept_until_a_newer_one_is_whole() -> None:
    with slots_of(2) as slots:
        with rank(slots) as r:
            r.ask("set 1")
            r.ask("fill 10 0")
            r.ask("fill 20 0")
        with rank(slots, epoch=9) as r:  # rolled back behind the newest
            assert r.ask("restore 0 10") == "ok 0"
            assert r.ask("fill 11 0") == "ok 1"
            assert r.ask("step 0") == "ok 10"


def test_a_slot_left_half_filled_is_empty_again() -> None:
    with slots_of(2) as slots:
        with rank(slots) as r:
            assert r.ask("fill 10 0") == "ok 0"
            assert r.ask("fill 20 0") == "ok 1"
        os.pwrite(slots[1].fd, bytes([wire.SLOT_FILLING]), wire.SlotHeader.state.offset)
        with rank(slots, epoch=6) as r:
            assert (r.ask("step 0"), r.ask("step 1")) == ("ok 10", "ok -1")
            assert r.ask("restore 0 10") == "ok 0"
            assert r.ask("fill 11 0") == "ok 1"


def test_slots_of_the_wrong_size_or_unsealed_are_refused() -> None:
    with slots_of(1, layout_of((5,))) as small, slots_of(1) as right:
        with rank([Wider(small[0], right[0].layout)]) as r:
            assert "this position's snapshot needs" in r.first
        fd = os.memfd_create("loose", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, right[0].layout.slot_bytes)
            with rank([Wider(right[0], right[0].layout, fd)]) as r:
                assert "not a memfd sealed against shrinking" in r.first
        finally:
            os.close(fd)


class Wider(Slot):
    """A slot's descriptor under another layout: what a confused agent would hand over."""

    def __init__(self, slot: Slot, layout: RankLayout, fd: int | None = None) -> None:
        self.fd = slot.fd if fd is None else fd
        self.layout = layout


def test_on_arm64_a_fence_parts_generation_and_data(tmp_path: Path) -> None:
    """I4 of snapshot.h, which x86-64 keeps by itself and no test on it can break: the full fence is in the code."""
    made = tmp_path / "fill.o"
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", f"-I{SOURCES}", "-c", str(SOURCES / "snapshot" / "fill.c")]
    subprocess.run([compiler("aarch64-linux-musl") / "cc", *flags, "-o", made], check=True)
    code = made.read_bytes()
    fences = [at for at in range(0, len(code) - 3, 4) if code[at : at + 4] == bytes.fromhex("bf3b03d5")]  # dmb ish
    assert fences


def test_a_device_copies_while_the_rank_goes_on() -> None:
    """READY, and word of it, come when the copies are done; until then nothing else is filled and nothing given up."""
    with slots_of(2) as slots, rank(slots, apart=True) as r:
        r.ask("set 17")
        assert r.ask("begin 40 1") == "ok 40"
        seen = slots[0].look(0)
        assert (seen.ready, seen.generation) == (False, 1)
        assert (r.ask("claim"), r.ask("take"), r.ask("step 0")) == ("ok 0", "ok -1", "ok -1")
        assert (r.ask("let"), r.ask("wait"), r.ask("take")) == ("ok 0", "ok 0", "ok -1")
        seen = slots[0].look(0)
        assert (seen.ready, seen.step, seen.final) == (True, 40, True)
        slots[0].hold(seen)
        assert copy_of(slots[0]) == expected(17, slots[0].layout)
        r.ask("set 18")
        assert (r.ask("claim"), r.ask("begin 41 0"), r.ask("let"), r.ask("wait")) == ("ok 1", "ok 41", "ok 0", "ok 1")
        assert copy_of(slots[1]) == expected(18, slots[1].layout)
        with rank(slots, epoch=6) as cpu:  # the two kinds of rank fill and restore the same bytes
            assert (cpu.ask("restore 1 41"), cpu.ask("check 18")) == ("ok 1", "ok 0")


def test_a_rank_that_dies_in_a_fill_leaves_the_snapshot_before() -> None:
    with slots_of(2) as slots:
        with rank(slots, apart=True) as r:
            r.ask("set 17")
            assert (r.ask("begin 40 0"), r.ask("let"), r.ask("wait")) == ("ok 40", "ok 0", "ok 0")
            r.ask("set 18")
            assert r.ask("begin 41 0") == "ok 41"
            r.process.kill()
            r.process.wait()
        assert (slots[0].look(0).ready, slots[1].look(1).ready) == (True, False)
        with rank(slots, epoch=6, apart=True) as again:
            assert (again.ask("step 0"), again.ask("step 1"), again.ask("claim")) == ("ok 40", "ok -1", "ok 1")
            assert (again.ask("restore 0 40"), again.ask("check 17")) == ("ok 0", "ok 0")
            assert (again.ask("begin 41 0"), again.ask("let"), again.ask("wait")) == ("ok 41", "ok 0", "ok 1")


def test_copies_that_fail_are_said_and_their_slot_is_nobodys() -> None:
    with slots_of(2) as slots, rank(slots, apart=True) as r:
        assert (r.ask("begin 40 0"), r.ask("fail")) == ("ok 40", "ok 0")
        assert r.ask("wait") == "DEVICE the snapshot of step 40: it fell off its bus"
        assert (slots[0].look(0).ready, r.ask("step 0")) == (False, "ok -1")


def test_a_device_gets_no_byte_of_a_damaged_slot() -> None:
    with slots_of(1) as slots, rank(slots, apart=True) as r:
        r.ask("set 17")
        assert (r.ask("begin 40 0"), r.ask("let"), r.ask("wait")) == ("ok 40", "ok 0", "ok 0")
        issued = r.ask("copies")
        at = slots[0].layout.data_offset + slots[0].layout.data_bytes // 2
        os.pwrite(slots[0].fd, bytes([os.pread(slots[0].fd, 1, at)[0] ^ 1]), at)
        assert r.ask("restore 0 40").startswith("RESTORE chunk ")
        assert r.ask("copies") == issued
        os.pwrite(slots[0].fd, bytes([os.pread(slots[0].fd, 1, at)[0] ^ 1]), at)
        r.ask("set 1")
        assert (r.ask("restore 0 40"), r.ask("check 17")) == ("ok 0", "ok 0")
        assert r.ask("copies") != issued
