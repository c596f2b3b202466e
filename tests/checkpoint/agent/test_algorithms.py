"""The run's choice of algorithms: created once, whoever is first; the same for everybody, also over attempts."""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from checkpoint import keys
from checkpoint.agent.algorithms import FILE, Table, agree, answer, bring, digest, tables
from checkpoint.errors import Damaged, OtherVersion, StoreUnavailable
from checkpoint.store import Data, Store
from checkpoint.store.file import FileStore
from trainer import wire

RUN, NEVER = "run", threading.Event()


def table(
    products: Sequence[int], choice: int, device: bytes = b"NVIDIA H100", library: bytes = b"cuBLASLt 13.1.0"
) -> Table:
    entries = {}
    for m in products:
        entry = wire.Algorithm(key=wire.AlgorithmKey(m=m, n=8, k=8))
        entry.algorithm[0] = choice
        entries[bytes(entry.key)] = bytes(entry)
    return Table(device, library, 90, entries)


def choices(agreed: Table | None) -> dict[int, int]:
    assert agreed is not None
    entries = [wire.Algorithm.from_buffer_copy(entry) for entry in agreed.entries.values()]
    return {entry.key.m: entry.algorithm[0] for entry in entries}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return FileStore(tmp_path / "store")


def test_the_first_choice_of_a_product_is_the_run_s(store: Store) -> None:
    assert choices(agree(store, RUN, table([1, 2], 5), NEVER)) == {1: 5, 2: 5}
    assert choices(agree(store, RUN, table([3, 2, 1], 6), NEVER)) == {3: 6, 2: 5, 1: 5}
    assert choices(agree(store, RUN, table([3, 1], 7), NEVER)) == {3: 6, 1: 5}
    assert [choices(one) for one in tables(store, RUN)] == [{1: 5, 2: 5}, {3: 6}]


@pytest.mark.parametrize("other", [{"device": b"NVIDIA H200"}, {"library": b"cuBLASLt 13.2.0"}])
def test_each_kind_of_device_and_library_has_its_own(store: Store, other: dict[str, bytes]) -> None:
    agree(store, RUN, table([1], 5), NEVER)
    assert choices(agree(store, RUN, table([1], 6, **other), NEVER)) == {1: 6}
    assert choices(agree(store, RUN, table([1], 7), NEVER)) == {1: 5}


def test_a_race_has_one_winner(store: Store) -> None:
    """Eight ranks that overlap, at once: each product has one choice, and every rank hears it."""
    proposals = [table(range(n, n + 4), n) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        heard = [choices(agreed) for agreed in pool.map(lambda one: agree(store, RUN, one, NEVER), proposals)]
    for product in range(11):
        assert len({one[product] for one in heard if product in one}) == 1
    for n, one in enumerate(heard):
        assert list(one) == list(range(n, n + 4))


class Flaky:
    """A store whose first requests fail, and in which another rank is first."""

    def __init__(self, store: Store, fails: int, rival: Table) -> None:
        self._store, self.fails = store, fails
        self._rival: Table | None = rival

    def get(self, key: str, *, max_bytes: int | None = None) -> bytes:
        if self.fails:
            self.fails -= 1
            raise StoreUnavailable("not now")
        return self._store.get(key, max_bytes=max_bytes)

    def create(self, key: str, data: Data) -> bool:
        rival, self._rival = self._rival, None
        if rival is not None:
            self._store.create(key, rival.to_bytes())
        return self._store.create(key, data)


def test_who_comes_second_takes_the_first_one_s(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoint.agent.algorithms.RETRY_S", 0.0)
    flaky = Flaky(store, 2, table([2, 3], 9))
    assert choices(agree(flaky, RUN, table([1, 2], 5), NEVER)) == {1: 5, 2: 9}  # type: ignore[arg-type]
    assert flaky.fails == 0


def test_what_is_cancelled_ends(store: Store) -> None:
    over = threading.Event()
    over.set()
    assert agree(store, RUN, table([1], 5), over) is None
    assert answer(store, RUN, table([1], 5).to_bytes(), over) is None


def test_the_next_attempt_finds_it(store: Store, tmp_path: Path) -> None:
    bring(store, RUN, tmp_path, NEVER)
    assert not (tmp_path / FILE).exists()
    assert digest(tmp_path) == bytes(32)
    agree(store, RUN, table([1, 2], 5), NEVER)
    agree(store, RUN, table([3], 6, b"NVIDIA H200"), NEVER)
    bring(store, RUN, tmp_path, NEVER)
    assert (tmp_path / FILE).read_bytes() == table([1, 2], 5).to_bytes() + table([3], 6, b"NVIDIA H200").to_bytes()
    assert digest(tmp_path) == hashlib.sha256((tmp_path / FILE).read_bytes()).digest()
    bring(FileStore(tmp_path / "another"), RUN, tmp_path, NEVER)
    assert not (tmp_path / FILE).exists(), "what an attempt of another run left would be taken for this one's"


def cut(data: bytearray) -> None:
    del data[-1]


def flip(data: bytearray) -> None:
    data[-1] ^= 1


def twice(data: bytearray) -> None:
    data[:] = table([1], 5).to_bytes()
    doubled = data[ctypes.sizeof(wire.Algorithms) :] * 2
    head = Table(b"NVIDIA H100", b"cuBLASLt 13.1.0", 90, dict(enumerate([bytes(doubled[:152]), bytes(doubled[152:])])))  # type: ignore[arg-type]
    data[:] = head.to_bytes()


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "bytes for 2 algorithms"),
        (flip, "does not have its checksum"),
        (twice, "two algorithms for one product"),
        (lambda data: data.clear(), "is not a table of algorithms"),
    ],
)
def test_damage_is_told(store: Store, harm: object, words: str) -> None:
    data = bytearray(table([1, 2], 5).to_bytes())
    harm(data)  # type: ignore[operator]
    assert (heard := answer(store, RUN, bytes(data), NEVER)) is not None
    assert heard[0] == 78
    assert words in heard[1].decode()
    store.create(keys.algorithms_key(RUN, 0), bytes(data))
    with pytest.raises(Damaged, match=words):
        agree(store, RUN, table([1], 5), NEVER)


def test_a_newer_version_is_not_damage(store: Store) -> None:
    data = bytearray(table([1], 5).to_bytes())
    data[8] = 9
    with pytest.raises(OtherVersion, match="has version 9, this hotstage reads version 1"):
        Table.parse(bytes(data), "a table")
