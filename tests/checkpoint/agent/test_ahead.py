"""Data that comes ahead of its readers: what is needed is there, within the room that there is, whatever fails."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.agent import cache
from checkpoint.agent.ahead import Ahead, There, ahead_of
from checkpoint.agent.fetch import DataRefused
from checkpoint.agent.gang import CannotStart, Gang
from checkpoint.agent.window import Window
from checkpoint.amendments import NONE, Amendments
from checkpoint.dataset import ShardLeaves
from checkpoint.errors import StoreUnavailable
from checkpoint.layout import PlanLayout, read_plan
from checkpoint.log import AttemptInfo
from checkpoint.store.memory import MemoryStore
from tests.support.agents import tiny_spec
from tests.support.token_data import held_bytes, put_tokens
from tests.support.wait import wait_for
from trainer.plan import compile_plan
from trainer.spec import how_map, what_digest

GIB = 1 << 30
LEAF = 4096


# --- which leaves, pure -------------------------------------------------------------------------------------


def test_a_window_holds_what_steps_need_within_its_room() -> None:
    """Against the whole history: what a step that is not behind needs is there; all of it never exceeds the room."""
    rng = random.Random(5)
    for _ in range(60):
        sizes = {leaf: rng.choice((1, 4, 4, 4)) for leaf in range(40)}
        steps = [sorted(rng.sample(range(40), rng.randrange(1, 6))) for _ in range(120)]
        window = Window(rng.randrange(48, 120), sizes.__getitem__, rng.sample(range(40), 5))
        there: set[int] = set()
        taken = read = 0
        while read < len(steps):
            found = window.take(taken, steps[taken]) if taken < len(steps) else None
            if found is None:
                assert taken > read, "a step that waits has one before it that is held"
                read += 1
                window.passed(read)
                continue
            there -= set(found.drop)
            there |= set(found.bring)
            taken += 1
            for held in steps[read:taken]:
                assert set(held) <= there
            assert window.bytes <= window.capacity
            assert window.bytes >= sum(sizes[leaf] for leaf in there)


def test_leaves_that_nobody_needs_go_longest_first_and_are_not_brought_twice() -> None:
    window = Window(3, lambda _: 1)
    assert window.take(1, [1, 2]) is not None
    assert window.take(2, [2, 3]) is not None
    assert window.take(3, [4]) is None
    window.passed(2)
    found = window.take(3, [4])
    assert found is not None
    assert (found.bring, found.drop) == ([4], [1])
    window.passed(3)
    found = window.take(4, [2])
    assert found is not None
    assert (found.bring, found.drop) == ([], [])


def test_found_leaves_are_looked_at_before_they_are_used_and_go_where_there_is_no_room() -> None:
    window = Window(2, lambda _: 1, [7, 8, 9])
    assert window.trim() == [7]
    found = window.take(1, [9])
    assert found is not None
    assert (found.bring, found.drop, window.bytes) == ([9], [], 2)


# --- files and a store --------------------------------------------------------------------------------------


class Away(MemoryStore):
    """Counts what is read of it, and can be away."""

    def __init__(self) -> None:
        super().__init__()
        self.away = threading.Event()
        self.asked: list[tuple[str, int]] = []

    def get(
        self, key: str, *, max_bytes: int | None = None, first: int | None = None, length: int | None = None
    ) -> bytes:
        if self.away.is_set():
            raise StoreUnavailable(f"{key}: no answer from the store")
        data = super().get(key, max_bytes=max_bytes, first=first, length=length)
        self.asked.append((key, len(data)))
        return data

    def shard_bytes(self) -> int:
        return sum(size for key, size in self.asked if key.endswith(".bin") and "/leaves/" not in key)


ROOM = 16 * LEAF
SHARDS = (80_000, 100, 20, 80_000, 79_999, 90_001)


@dataclass
class World:
    """A plan over random tokens in a store, of some 160 leaves, and a node's folder with room for 16."""

    store: Away
    layout: PlanLayout
    how: dict[str, Any]
    work: Path
    digest: str
    heard: list[There] = field(default_factory=list)

    @contextmanager
    def ahead(
        self, first: int | None = 1, ranks: range = range(1), amended: Amendments = NONE, room: int = ROOM
    ) -> Iterator[Ahead]:
        record = AttemptInfo(
            n=1,
            time=0.0,
            launch="l",
            nodes=1,
            ranks=self.layout.ranks,
            plan="",
            what="",
            checkpoint=None,
            step=0,
            slots=None,
            reason="",
            body={"how": {**self.how, "data": {"cache_gib": room / GIB}}},
            amendments=amended,
        )
        gang = Gang(record, ranks.start, len(ranks))
        made = ahead_of(self.store, self.layout, gang, self.work, first, self.heard.append)
        assert made is not None
        try:
            yield made
        finally:
            made.stop()
            made.join()

    def file(self, shard: int) -> Path:
        return self.work / "data-cache" / self.digest / keys.shard_name(shard)

    def holds(self, batch: int, replica: int = 0) -> bool:
        """Whether the files have the true bytes of all samples of a batch."""
        data = self.layout.data
        assert data is not None
        for place in data.places(batch, replica):
            shard, first, end = data.place(data.order.sample(place))
            with self.file(shard).open("rb") as file:
                found = os.pread(file.fileno(), end - first, first)
            if found != self.store._objects[keys.dataset_key(self.digest, keys.shard_name(shard))][first:end]:
                return False
        return True

    @property
    def disk_bytes(self) -> int:
        """Of one moment: another thread fills and empties the files, so they are looked at until two looks in a row
        find the same."""
        found: list[int] = []
        while (now := [held_bytes(self.file(shard)) for shard in range(len(SHARDS))]) != found:
            found = now
        return sum(found)


def world(folder: Path, leaf_bytes: int | None = LEAF, **changes: Any) -> World:
    store = Away()
    dataset = put_tokens(store, SHARDS, leaf_bytes=leaf_bytes)
    spec = tiny_spec(**{"train__sequence": 32, "train__batch": 8, "data__block": 4, "data__window": 4, **changes})
    plan = compile_plan(spec.resolve(dataset), dataset, what_digest(spec, dataset))
    return World(store, read_plan(plan.to_bytes()), how_map(spec), folder, dataset.digest)


def go_on() -> None: ...


def up_to(here: World, step: int) -> None:
    wait_for(lambda: here.heard and here.heard[-1].step >= step, f"the data of step {step}")


@pytest.mark.parametrize("shuffled", [True, False])
def test_each_steps_data_is_there_when_it_is_said_to_be_in_a_tenth_of_the_room(tmp_path: Path, shuffled: bool) -> None:
    here = world(tmp_path, train__steps=90, data__shuffled=shuffled)
    with here.ahead() as ahead:
        ahead.first(go_on)
        assert here.holds(1)
        ahead.start()
        for step in range(1, 91):
            up_to(here, step)
            assert here.holds(step)
            assert here.disk_bytes <= ROOM
            ahead.read(0, step, here.heard[-1].step)
        up_to(here, 90)
    whole = sum(2 * tokens + 64 for tokens in SHARDS)
    assert whole > 10 * ROOM
    fetched, _, held = ahead.figures
    assert held <= ROOM
    assert fetched >= here.store.shard_bytes()
    if not shuffled:  # a leaf is read once, in its turn
        assert here.store.shard_bytes() <= 90 * 8 * 64 + 3 * LEAF


def test_a_replicas_node_reads_its_share_and_a_stage_between_reads_nothing(tmp_path: Path) -> None:
    here = world(
        tmp_path, train__steps=15, data__shuffled=False, parallel__replicas=2, parallel__stages=4, train__batch=512
    )
    data = here.layout.data
    assert data is not None
    assert data.readers == frozenset({0, 3})
    assert [data.replicas_of(ranks, 4) for ranks in (range(1, 3), range(3, 5))] == [(), (0, 1)]
    with here.ahead(ranks=range(4, 8), room=100 * LEAF) as ahead:
        ahead.first(go_on)
        ahead.start()
        for step in range(1, 16):
            up_to(here, step)
            assert here.holds(step, replica=1)
            ahead.read(4, step, step)
            ahead.read(7, step, step)
    read_by_both = 15 * 512 * 32 * 2
    assert here.store.shard_bytes() < 0.65 * read_by_both


def test_batches_that_are_passed_over_are_not_brought(tmp_path: Path) -> None:
    here = world(tmp_path, train__steps=30, data__shuffled=False)
    with here.ahead(amended=Amendments(skip=((4, 500),))) as ahead:
        ahead.first(go_on)
        ahead.start()
        for step in range(1, 31):
            up_to(here, step)
            assert here.holds(step if step < 4 else step + 497)
            ahead.read(0, step, step)
    assert here.store.shard_bytes() < 8 * LEAF


def test_a_store_that_is_away_is_told_and_costs_nothing_once_it_is_back(tmp_path: Path) -> None:
    here = world(tmp_path, train__steps=60)
    with here.ahead() as ahead:
        ahead.first(go_on)
        here.store.away.set()
        ahead.start()
        wait_for(lambda: here.heard[-1].code if here.heard else 0, "a word of the outage")
        assert here.heard[-1] == There(1, 75, here.heard[-1].words)
        assert f"data/{here.digest}/0000" in here.heard[-1].words
        assert "is awaited, for steps up to" in here.heard[-1].words
        assert "no answer from the store" in here.heard[-1].words
        here.store.away.clear()
        for step in range(1, 61):
            up_to(here, step)
            assert here.holds(step)
            ahead.read(0, step, step)
        assert here.heard[-1].code == 0


def test_the_first_steps_data_is_asked_for_like_the_rest_of_a_preparation(tmp_path: Path) -> None:
    here = world(tmp_path)
    here.store.away.set()
    with here.ahead() as ahead, pytest.raises(StoreUnavailable):
        ahead.first(go_on)
    here.store.away.clear()

    def cancelled() -> None:
        raise CannotStart(75, "nobody waits")

    with here.ahead() as ahead, pytest.raises(CannotStart, match="nobody waits"):
        ahead.first(cancelled)


def test_a_restarted_agent_finds_the_cache_and_takes_nothing_away_that_was_promised(tmp_path: Path) -> None:
    here = world(tmp_path, train__steps=60)
    with here.ahead() as ahead:
        ahead.first(go_on)
        ahead.start()
        for step in range(1, 21):
            up_to(here, step)
            ahead.read(0, step, step)
        promised = here.heard[-1].step
    before = here.store.shard_bytes()
    here.heard.clear()
    here.store.away.set()  # what is there is found without it
    with here.ahead(first=None) as ahead:
        ahead.start()
        ahead.read(0, 20, promised)
        up_to(here, promised)
        assert here.store.shard_bytes() == before
        for step in range(20, promised + 1):
            assert here.holds(step)
        here.store.away.clear()
        for step in range(21, 61):
            up_to(here, step)
            assert here.holds(step)
            ahead.read(0, step, step)


def test_a_leaf_whose_bytes_have_changed_here_is_fetched_anew(tmp_path: Path) -> None:
    here = world(tmp_path, train__steps=3)
    for _ in range(2):
        with here.ahead() as ahead:
            ahead.first(go_on)
            assert here.holds(1)
        data = here.layout.data
        assert data is not None
        shard, first, _ = data.place(data.order.sample(0))
        with here.file(shard).open("r+b") as file:
            os.pwrite(file.fileno(), b"\xff", first)
        assert not here.holds(1)


@pytest.mark.parametrize("which", ["shard", "digest", "gone"])
def test_what_the_store_has_damaged_is_refused_by_its_name(tmp_path: Path, which: str) -> None:
    here = world(tmp_path)
    data = here.layout.data
    assert data is not None
    shard, first, _ = data.place(data.order.sample(0))
    key = keys.dataset_key(here.digest, keys.shard_name(shard))
    if which == "shard":
        good = here.store._objects[key]
        here.store._objects[key] = good[:first] + bytes([good[first] ^ 1]) + good[first + 1 :]
    elif which == "gone":
        del here.store._objects[key]
    else:
        table = ShardLeaves.parse(here.store._objects[keys.leaves_key(here.digest, shard)], "it")
        here.store._objects[keys.leaves_key(here.digest, shard)] = replace(
            table, digests=bytes(len(table.digests))
        ).pack()
    with here.ahead() as ahead, pytest.raises(DataRefused, match=key) as error:
        ahead.first(go_on)
    assert ("missing" if which == "gone" else "data prepare SPEC --again") in str(error.value)


def test_a_dataset_of_before_there_were_leaves_is_read_whole_once(tmp_path: Path) -> None:
    here = world(tmp_path, leaf_bytes=None, train__steps=2)
    with here.ahead(room=GIB) as ahead:
        ahead.first(go_on)
        assert here.holds(1)
    first = here.store.shard_bytes()
    with here.ahead(room=GIB) as ahead:
        ahead.first(go_on)
    assert here.store.shard_bytes() == first  # its digests were kept, and what was brought
    for shard, tokens in enumerate(SHARDS):
        here.store._objects[keys.dataset_key(here.digest, keys.shard_name(shard))] = bytes(2 * tokens + 64)
    other = replace(here, work=tmp_path / "other", heard=[])
    with other.ahead(room=GIB) as ahead, pytest.raises(DataRefused, match="is damaged"):
        ahead.first(go_on)


def test_too_little_room_is_refused_with_the_key(tmp_path: Path) -> None:
    here = world(tmp_path)
    with (
        here.ahead(room=2 * LEAF) as ahead,
        pytest.raises(CannotStart, match=r"raise it to that") as error,
    ):
        ahead.first(go_on)
    assert error.value.code == 78
    assert "two steps of this node (8 samples each) may read up to 6.1e-05 GiB, in pieces of 4 KiB" in str(error.value)


def test_a_folder_that_cannot_give_back_parts_of_files_or_is_full_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = world(tmp_path)

    def cannot(fd: int, first: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    with monkeypatch.context() as patch:
        patch.setattr(cache, "punch", cannot)
        with here.ahead() as ahead, pytest.raises(CannotStart, match="ext4, xfs, btrfs or tmpfs"):
            ahead.first(go_on)
    full = os.statvfs_result((4096, 4096, 100, 1, 1, 100, 100, 100, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: full)
        with here.ahead() as ahead, pytest.raises(CannotStart, match=r"lower data\.cache_gib"):
            ahead.first(go_on)
