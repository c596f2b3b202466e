"""The store's contract (checkpoint/store/base.py), the same for memory, a folder and a real S3 server."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from checkpoint.errors import Damaged, NotFound, StoreRefused
from checkpoint.probe import ensure_probed, probe
from checkpoint.store import Info, Store, open_store

KEY = "runs/r/log/00000000000000000001"


def test_create_then_get(store: Store) -> None:
    assert store.create(KEY, b"abc") is True
    assert store.get(KEY) == b"abc"
    assert store.head(KEY) == Info(KEY, 3)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda b: memoryview(bytearray(b"_" + b))[1:]])
def test_any_buffer_is_taken(store: Store, wrap: object) -> None:
    assert callable(wrap)
    data = bytes(range(256)) * 300
    assert store.create("runs/r/chunks/a/b", wrap(data), sha256=hashlib.sha256(data).digest())
    store.put("runs/r/live/1/x", wrap(data))
    assert store.get("runs/r/chunks/a/b") == store.get("runs/r/live/1/x") == data


def test_second_create_loses_and_changes_nothing(store: Store) -> None:
    assert store.create(KEY, b"first")
    assert store.create(KEY, b"second") is False
    assert store.create(KEY, b"FIRST") is False  # same size
    assert store.get(KEY) == b"first"


def test_identical_create_counts_as_made(store: Store) -> None:
    assert store.create(KEY, b"same")
    assert store.create(KEY, b"same") is True


def test_empty_object(store: Store) -> None:
    assert store.create("runs/r/a", b"")
    assert store.get("runs/r/a") == b""
    assert store.head("runs/r/a") == Info("runs/r/a", 0)
    assert store.create("runs/r/a", b"x") is False


def test_wrong_sha256_is_refused_and_nothing_written(store: Store) -> None:
    with pytest.raises(StoreRefused, match="SHA-256"):
        store.create(KEY, b"abc", sha256=bytes(32))
    assert store.head(KEY) is None


def test_absent(store: Store) -> None:
    assert store.head(KEY) is None
    with pytest.raises(NotFound) as caught:
        store.get(KEY)
    assert caught.value.key == KEY
    with pytest.raises(NotFound):
        store.get(KEY, first=0, length=1)
    with pytest.raises(NotFound):
        store.get(KEY, first=0, length=0)
    assert list(store.list("runs/")) == []


def test_ranges(store: Store) -> None:
    data = bytes(range(200))
    store.create(KEY, data)
    assert store.get(KEY, first=10, length=5) == data[10:15]
    assert store.get(KEY, first=190) == data[190:]
    assert store.get(KEY, first=200) == b""
    assert store.get(KEY, first=7, length=0) == b""
    assert store.get(KEY, first=0, length=200) == data
    for first, length in ((190, 11), (200, 1), (500, 1), (201, None), (0, 201), (-1, 5), (5, -1)):
        with pytest.raises(Damaged):
            store.get(KEY, first=first, length=length)


def test_reads_go_where_they_are_wanted(store: Store) -> None:
    data = bytes(range(256)) * 5000
    assert store.create("runs/r/chunks/a", data, sha256=hashlib.sha256(data).digest())
    memory = bytearray(len(data))
    views = [memoryview(memory)[at : at + 300_001] for at in range(0, len(data), 300_001)]
    told: list[int] = []

    def filled(number: int) -> None:
        assert views[number] == data[300_001 * number :][:300_001]
        assert not any(memory[300_001 * (number + 1) :])  # what follows has not begun
        told.append(number)

    store.read_into("runs/r/chunks/a", views, filled=filled)
    assert told == list(range(len(views)))
    memory[:] = bytes(len(data))
    store.read_into("runs/r/chunks/a", [*views, memoryview(bytearray())])
    assert memory == data

    def enough(number: int) -> None:
        if number == 1:
            raise Damaged("seen enough")

    memory[:] = bytes(len(data))
    with pytest.raises(Damaged, match="seen enough"):
        store.read_into("runs/r/chunks/a", views, filled=enough)
    assert not any(memory[600_002:])
    some = bytearray(7)
    store.read_into("runs/r/chunks/a", [memoryview(some)[:3], memoryview(some)[3:]], first=259)
    assert some == data[259:266]
    for first, length in ((len(data) - 6, 7), (-1, 3), (len(data) + 1, 1)):
        with pytest.raises(Damaged):
            store.read_into("runs/r/chunks/a", [memoryview(bytearray(length))], first=first)
    with pytest.raises(NotFound):
        store.read_into("runs/none", [memoryview(some)])


@pytest.mark.parametrize("size", [0, 1000, 2 << 20])
def test_whether_it_holds_these_bytes(store: Store, size: int) -> None:
    data = bytes(range(250)) * (size // 250)
    digest = hashlib.sha256(data).digest()
    assert not store.holds(KEY, data, sha256=digest)
    assert store.create(KEY, data, sha256=digest)
    assert store.holds(KEY, data, sha256=digest)
    other = (b"x" if data[:1] != b"x" else b"y") + data[1:]
    assert not store.holds(KEY, other, sha256=hashlib.sha256(other).digest())
    assert not store.holds(KEY, data + b"!", sha256=hashlib.sha256(data + b"!").digest())
    assert store.create(KEY, other) is False
    assert store.create(KEY, data, sha256=digest) is True


def test_large_objects_under_a_bandwidth_cap(store: Store) -> None:
    """They arrive whole; how fast, is said in test_limits.py."""
    data = memoryview(bytearray(range(256)) * 9000)
    store.limit(1e9)
    assert store.create(KEY, data, sha256=hashlib.sha256(data).digest())
    assert store.get(KEY) == data
    store.limit(None)
    assert store.create(KEY + "1", data)


def test_size_limit(store: Store) -> None:
    store.create(KEY, bytes(100))
    assert len(store.get(KEY, max_bytes=100)) == 100
    with pytest.raises(Damaged, match="at most 99"):
        store.get(KEY, max_bytes=99)
    assert len(store.get(KEY, max_bytes=10, first=5, length=10)) == 10


def test_put_replaces_hints_only(store: Store) -> None:
    store.put("runs/r/live/nodes/l/0", b"1")
    store.put("runs/r/live/nodes/l/0", b"22")
    assert store.get("runs/r/live/nodes/l/0") == b"22"
    for key in (KEY, "runs/r/spec", "data/live/x", "runs/live/r/x", "runs/r/live"):
        with pytest.raises(StoreRefused, match="may not be overwritten"):
            store.put(key, b"x")


def test_the_store_says_when_an_object_was_written(store: Store) -> None:
    before = time.time()
    store.create(KEY, b"x")
    store.put("runs/r/live/x", b"1")
    after = time.time()
    for info in (store.head(KEY), store.head("runs/r/live/x"), *store.list("runs/")):
        assert info is not None
        assert info.modified is not None
        assert before - 2 < info.modified < after + 2  # whole seconds, and a file system's own tick
    assert Info(KEY, 1, 5.0) == Info(KEY, 1)


def test_list_in_key_order(store: Store) -> None:
    names = ["runs/r/a/1", "runs/r/a-b", "runs/r/a.b", "runs/r/a0", "runs/r/b/x/y", "runs/r/b/x-", "runs/s/1", "data/q"]
    for name in names:
        store.create(name, name.encode())
    every = [i.key for i in store.list("")]
    assert every == sorted(names)
    assert [i.key for i in store.list("runs/r/")] == sorted(n for n in names if n.startswith("runs/r/"))
    assert [i.key for i in store.list("runs/r/a")] == sorted(n for n in names if n.startswith("runs/r/a"))
    for after in [*names, "runs/r/a", "runs/r/a/", "runs/r/b/x", "zzz", "0"]:
        assert [i.key for i in store.list("runs/", start_after=after)] == sorted(
            n for n in names if n.startswith("runs/") and n > after
        )
    assert all(i.bytes == len(i.key) for i in store.list(""))


def test_list_more_than_a_page(store: Store) -> None:
    names = [f"runs/r/log/{n:020d}" for n in range(1, 1105)]  # S3 answers 1000 at a time
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda name: store.create(name, b"x"), names))
    assert [i.key for i in store.list("runs/r/log/")] == names
    assert [i.key for i in store.list("runs/r/log/", start_after=names[1050])] == names[1051:]


BAD_KEYS = [
    *("", "/etc/passwd", "a//b", "a/", "../b", "a/../b", "a/./b", ".tmp/x", "a/.hidden", "a\\b", "a\0b", "a b", "ä"),
    *("x" * 201, "/".join(["x" * 100] * 10), "a\nb", "a?b", "a%2e%2e/b", "a\udc80"),
]


def test_keys_are_checked(store: Store) -> None:
    for key in BAD_KEYS:
        for call in (
            partial(store.create, key, b"x"),
            partial(store.get, key),
            partial(store.head, key),
            partial(store.delete, key),
            partial(store.local_path, key),
            partial(store.put, f"runs/r/live/{key}", b"x"),
        ):
            with pytest.raises(StoreRefused):
                call()


def test_delete(store: Store, collector: Store) -> None:
    store.create(KEY, b"abc")
    collector.delete(KEY)
    collector.delete(KEY)
    assert store.head(KEY) is None
    assert list(store.list("")) == []
    assert store.create(KEY, b"anew")


def test_racing_creators_have_one_winner_each_round(store: Store) -> None:
    rounds, creators = 40, 16
    gate = threading.Barrier(creators)

    def one(creator: int) -> list[bool]:
        won = []
        for number in range(rounds):
            gate.wait()
            won.append(store.create(f"runs/r/log/{number:020d}", f"{creator} of round {number}".encode()))
        return won

    with ThreadPoolExecutor(creators) as pool:
        answers = list(pool.map(one, range(creators)))
    for number in range(rounds):
        winners = [creator for creator in range(creators) if answers[creator][number]]
        assert len(winners) == 1, f"round {number}"
        assert store.get(f"runs/r/log/{number:020d}") == f"{winners[0]} of round {number}".encode()


def test_readers_never_see_a_part_of_an_object(store: Store) -> None:
    """While 2 MiB objects are created, every look sees nothing or all."""
    data = [bytes([n]) * (2 << 20) for n in range(12)]
    done = threading.Event()
    torn: list[str] = []

    def look() -> None:
        while not done.is_set():
            for number in range(len(data)):
                try:
                    if store.get(f"runs/r/chunks/{number}") != data[number]:
                        torn.append(f"chunk {number}")
                except NotFound:
                    continue
            for info in store.list("runs/r/chunks/"):
                if info.bytes != 2 << 20:
                    torn.append(f"{info.key} listed with {info.bytes} bytes")

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number, one in enumerate(data):
            assert store.create(f"runs/r/chunks/{number}", one)
    finally:
        done.set()
        reader.join()
    assert torn == []


def test_probe_passes_and_is_remembered(store: Store) -> None:
    probe(store, rounds=2)
    ensure_probed(store)
    before = [i.key for i in store.list("probe/")]
    ensure_probed(store)
    assert [i.key for i in store.list("probe/")] == before


def test_the_address_opens_it_again(store: Store, request: pytest.FixtureRequest) -> None:
    if store.url == "memory:":
        pytest.skip("memory has no second opener")
    store.create(KEY, b"abc")
    if store.url.startswith("s3:"):
        with request.getfixturevalue("server").identity("trainer"):
            again = open_store(store.url)
    else:
        again = open_store(store.url)
    assert again.get(KEY) == b"abc"
    assert again.url == store.url


def test_local_path(store: Store) -> None:
    store.create(KEY, b"abc")
    path = store.local_path(KEY)
    if store.url.startswith("file:"):
        assert path is not None
        assert path.read_bytes() == b"abc"
    else:
        assert path is None


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("file://relative/path", "file:///absolute/path"),
        ("file:///", "not the root folder"),
        ("file:///a?b=1", "without host or query"),
        ("gs://bucket/x", "schemes are"),
        ("/just/a/path", "schemes are"),
        ("memory:x", "no name"),
        ("s3://user:hunter2@bucket/x", "holds no credentials"),
        ("s3://bucket/x?endpoint=http://user:hunter2@host", "holds no credentials"),
        ("s3://bucket/x?secret=hunter2", "unknown option 'secret'"),
        ("s3://b/x", "3 to 63"),
        ("s3://bucket/x?endpoint=ftp://h", "http://host:port"),
        ("s3://bucket/x?endpoint=http://h/path", "write http://h, without it"),
        ("s3://bucket/x?path_style=yes", "path_style is 1"),
        ("s3://bucket/../x", "not a plain name"),
    ],
)
def test_addresses_are_checked_and_secrets_not_repeated(url: str, says: str) -> None:
    with pytest.raises(StoreRefused) as caught:
        open_store(url)
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)
