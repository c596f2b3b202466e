"""Descriptors of slots: each is closed once, whatever goes wrong, and nothing touches one that was given back."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from checkpoint.agent.memory_pages import HUGE_BYTES, take_pages
from checkpoint.agent.slots import Slot, SlotChanged, SlotTable, fence, membarrier
from checkpoint.layout import PlanLayout
from tests.support.agents import make_run, tiny_spec
from trainer import wire

SEALS = 0x1 | 0x2 | 0x4


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> PlanLayout:
    run, plan = make_run(tmp_path_factory.mktemp("run"), tiny_spec())
    return run.layouts[plan]


def table_of(layout: PlanLayout, count: int = 3) -> SlotTable:
    return SlotTable({0: layout.rank(0)}, layout.digest, layout.what_digest, count)


def opened() -> dict[int, str]:
    """The descriptors of this process and what they are."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # the listing's own
            continue
    return found


def handed_back(layout: PlanLayout, wrong: int | None, how: str) -> list[int]:
    """Three descriptors as a rank hands them back; one of them is no slot of this plan."""
    fds = []
    for number in range(3):
        if number == wrong and how == "no memfd":
            fds.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
            continue
        bytes_ = layout.rank(0).slot_bytes + (4096 if number == wrong and how == "size" else 0)
        fd = os.memfd_create("hotstage-slot-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, bytes_)
        if not (number == wrong and how == "seals"):
            fcntl.fcntl(fd, 1033, SEALS)
        if number != wrong or how != "header":
            slot = Slot.create(layout.rank(0), layout.digest, layout.what_digest)
            os.pwrite(fd, os.pread(slot.fd, 4096, 0), 0)
            slot.close()
        fds.append(fd)
    return fds


@pytest.mark.parametrize("how", ["size", "seals", "header", "no memfd"])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_slots_that_cannot_be_taken_over_are_closed_once(layout: PlanLayout, wrong: int, how: str) -> None:
    before = opened()
    table = table_of(layout)
    with pytest.raises(SlotChanged):
        table.adopt(0, handed_back(layout, wrong, how))
    assert opened() == before
    assert table.slots == {}


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_another_number_of_slots_is_not_taken_over(layout: PlanLayout, count: int) -> None:
    before = opened()
    fds = handed_back(layout, None, "")[: min(count, 3)]
    fds += [os.dup(fds[0]) for _ in range(count - len(fds))]
    spare = set(opened()) - set(before) - set(fds)
    with pytest.raises(SlotChanged, match=rf"rank 0 handed back {count} slots, the plan says 3"):
        table_of(layout).adopt(0, fds)
    for fd in spare:
        os.close(fd)
    assert opened() == before


def test_slots_that_are_taken_over_are_closed_with_the_table(layout: PlanLayout) -> None:
    before = opened()
    table = table_of(layout)
    table.adopt(0, handed_back(layout, None, ""))
    assert len(opened()) > len(before)
    assert table.close()
    assert table.close(), "closing again does nothing"
    assert opened() == before


def test_slots_that_cannot_all_be_made_leave_none(layout: PlanLayout) -> None:
    before = opened()
    free = [number for number in range(max(before) + 8) if number not in before]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    table = table_of(layout)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free[4] + 1, hard))  # a slot takes two, its own and its mapping's
        with pytest.raises(OSError, match="Too many open files"):
            table.create(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert table.slots == {}
    assert opened() == before


def test_prefault_after_the_close_touches_no_other_file(layout: PlanLayout, tmp_path: Path) -> None:
    """A table is retired while a thread still prefaults it, and its numbers go to other files."""
    table = table_of(layout)
    table.create(0)
    numbers = [slot.fd for slot in table.slots[0]]
    assert table.close()
    others = []
    for number in numbers:
        fd = os.open(tmp_path / f"foreign-{number}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        if fd != number:
            os.dup2(fd, number, inheritable=False)
            os.close(fd)
        others.append(number)
    try:
        thread = threading.Thread(target=table.prefault)
        thread.start()
        thread.join()
        assert [os.fstat(fd).st_size for fd in others] == [0, 0, 0]
    finally:
        for fd in others:
            os.close(fd)


def test_the_kernel_s_fence_is_there() -> None:
    """What an agent on arm64 needs of its kernel; on x86-64 a locked instruction does it."""
    membarrier()
    fence()


@pytest.mark.parametrize("size", [4096, (2 << 20) - 4096, 2 << 20, (37 << 20) + 4096])
def test_all_pages_of_a_slot_are_taken_and_none_beyond(size: int) -> None:
    fd = os.memfd_create("pages", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, b"kept", size - 8)
        take_pages(fd, size)
        assert size <= os.fstat(fd).st_blocks * 512 < size + HUGE_BYTES
        assert os.pread(fd, size, 0) == bytes(size - 8) + b"kept" + bytes(4)
        os.ftruncate(fd, 0)
        os.ftruncate(fd, size)
        looks = iter([True, False])
        take_pages(fd, size, lambda: next(looks))
        assert os.fstat(fd).st_blocks * 512 <= 16 << 20
    finally:
        os.close(fd)


@pytest.mark.parametrize("told", [0.0, 0.5, 1.0])
def test_chunks_are_summed_when_they_are_whole(
    layout: PlanLayout, monkeypatch: pytest.MonkeyPatch, told: float
) -> None:
    """By several threads, in any order and cut anywhere; what nobody told of is summed at the end."""
    monkeypatch.setattr(wire, "SLOT_CHUNK", 4096)
    rng, slot = random.Random(told), Slot.create(layout.rank(0), layout.digest, layout.what_digest)
    size = layout.rank(0).data_bytes
    data = rng.randbytes(size)
    borders = sorted({0, size, *(rng.randrange(1, size) for _ in range(150))})
    ranges = [pair for pair in pairwise(borders) if rng.random() < told]
    rng.shuffle(ranges)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):  # a fill knows nothing of the one before
            with slot.begin_fill() as view:
                assert slot._sums == [None] * len(slot._sums)
                view[:] = data
            list(pool.map(lambda pair: slot.filled(*pair), ranges))
            whole = sum(found is not None for found in slot._sums)
            assert whole == len(slot._sums) if told == 1 else whole == 0 if told == 0 else 0 < whole < len(slot._sums)
            slot.finish_fill(8, 3, pool)
            sums = struct.unpack_from(f"<{-(-size // 4096)}Q", slot._map, wire.SLOT_HEADER_BYTES)
            assert list(sums) == [zlib.crc32(data[at : at + 4096]) for at in range(0, size, 4096)]
    assert slot.close()
