"""Large bodies, which are sent and read in slices, through every fault of a store and of the network between."""

from __future__ import annotations

import base64
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import urllib3.connection

from checkpoint.errors import CheckpointError, Damaged, StoreUnavailable
from checkpoint.store import s3_bodies
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_answers import Retry
from tests.support.hostile_s3 import Fault, HostileS3, hostile_s3

Client = Callable[..., S3Store]
KEY = "runs/r/chunks/a"
BODY = random.Random(0).randbytes((1 << 20) + 77)
DIGEST = hashlib.sha256(BODY).digest()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[HostileS3, dict[int, S3Store]]]:
    """One server and one client a number of attempts: making a client takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch, hostile_s3() as server:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2hunter2")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        stores = {}
        for attempts in (1, 2, 4):
            stores[attempts] = S3Store(
                "bucket", "p", endpoint=f"http://127.0.0.1:{server.port}", region="us-east-1", path_style=True,
                retry=Retry(attempts=attempts, sleep=lambda _: None), connect_s=0.5, read_s=0.5,
            )  # fmt: skip
        yield server, stores


@pytest.fixture
def peer(running: tuple[HostileS3, dict[int, S3Store]]) -> HostileS3:
    server, _ = running
    for kept in (server.objects, server.kept, server.faults, server.requests):
        kept.clear()
    server.applies, server.sums, server.cut_resets = ("PUT", "GET"), False, True
    server.length, server.ignore_range = "told", False
    return server


@pytest.fixture
def client(running: tuple[HostileS3, dict[int, S3Store]]) -> Callable[..., S3Store]:
    return lambda attempts=4: running[1][attempts]


def fetched(store: S3Store) -> bytes:
    memory = bytearray(len(BODY))
    store.read_into(KEY, [memoryview(memory)[: 1 << 20], memoryview(memory)[1 << 20 :]])
    return bytes(memory)


@pytest.mark.parametrize(
    "faults",
    [
        ["500"], ["503", "503"], ["409"], ["429"], ["reset"], ["no-xml"], ["bad-digest"], ["hang"], ["drip"],
        ["wrong-sum"],
        ["done-500"], ["done-409"], ["done-412"], ["done-reset"], ["done-hang"], ["503", "done-reset"],
    ],
    ids="+".join,
)  # fmt: skip
def test_a_large_create_that_went_through_is_won(peer: HostileS3, client: Client, faults: list[Fault]) -> None:
    """Also of a store that tells the checksum of what it has (``sums``), so that it need not be read back."""
    peer.applies = ("PUT",)
    for peer.sums in (False, True):
        peer.faults.extend(faults)
        peer.objects.clear()
        peer.requests.clear()
        assert client().create(KEY, memoryview(BODY), sha256=DIGEST) is True
        assert peer.objects == {f"p/{KEY}": BODY}
        assert not peer.faults
    assert not any(request.startswith("GET") for request in peer.requests)


@pytest.mark.parametrize("sums", [False, True])
def test_a_large_create_that_another_won_is_lost(peer: HostileS3, client: Client, sums: bool) -> None:
    peer.sums = sums
    other = BODY[:-1] + b"!"
    peer.objects[f"p/{KEY}"] = other
    peer.kept[f"p/{KEY}"] = base64.b64encode(hashlib.sha256(other).digest()).decode()
    assert client().create(KEY, BODY, sha256=DIGEST) is False
    assert peer.objects == {f"p/{KEY}": other}


def test_a_store_that_says_it_stored_other_bytes_is_not_believed(peer: HostileS3, client: Client) -> None:
    peer.applies = ("PUT",)
    peer.faults.extend(["wrong-sum"] * 10)
    peer.sums = True
    store = client(attempts=1)
    with pytest.raises(StoreUnavailable, match="stored other bytes than were sent"):
        store.create(KEY, BODY, sha256=DIGEST)


@pytest.mark.parametrize(
    "faults", [["500"], ["503", "reset"], ["short"], ["short", "short"], ["drip"], ["429"]], ids="+".join
)
def test_a_large_read_is_tried_again(peer: HostileS3, client: Client, faults: list[Fault]) -> None:
    peer.objects[f"p/{KEY}"] = BODY
    peer.applies = ("GET",)
    peer.faults.extend(faults)
    assert fetched(client()) == BODY
    assert not peer.faults


def places(of: int, seed: str) -> list[int]:
    """Where a connection is cut: the ends, the borders of slices and what is beside them, and drawn ones."""
    rng = random.Random(seed)
    fixed = {0, 1, 15, of - 1, 1 << 20, (1 << 20) - 1, (1 << 20) + 1, 256 << 10}
    return sorted(at for at in fixed | {rng.randrange(of) for _ in range(6)} if 0 <= at < of)


@pytest.mark.parametrize("resets", [True, False], ids=["reset", "closed"])
def test_an_answer_that_is_cut_at_any_byte(peer: HostileS3, client: Client, resets: bool) -> None:
    peer.objects[f"p/{KEY}"] = BODY
    peer.applies, peer.cut_resets = ("GET",), resets
    store = client()
    for peer.cut_at in places(len(BODY) + 200, f"get {resets}"):
        peer.faults.append("cut")
        assert fetched(store) == BODY, peer.cut_at


@pytest.mark.parametrize("resets", [True, False], ids=["reset", "closed"])
def test_the_answer_to_a_create_that_is_cut_at_any_byte(peer: HostileS3, client: Client, resets: bool) -> None:
    peer.applies, peer.sums, peer.cut_resets = ("PUT",), True, resets
    store = client()
    for peer.cut_at in (0, 1, 5, 9, 14, 20, 40, 60, 90):
        key = f"{KEY}{peer.cut_at}"
        peer.faults.append("cut")
        assert store.create(key, BODY, sha256=DIGEST) is True, peer.cut_at
        assert peer.objects[f"p/{key}"] == BODY


def test_a_body_that_is_cut_at_any_byte(peer: HostileS3, client: Client) -> None:
    peer.applies = ("PUT",)
    store = client()
    for peer.cut_at in places(len(BODY), "put"):
        key = f"{KEY}{peer.cut_at}"
        peer.faults.append("cut-body")
        assert store.create(key, BODY, sha256=DIGEST) is True, peer.cut_at
        assert peer.objects[f"p/{key}"] == BODY


def test_a_peer_that_drips_ends_in_bounded_time(peer: HostileS3, client: Client) -> None:
    """Bytes that keep coming, one by one, keep no request alive: each time-out of the socket alone would."""
    peer.objects[f"p/{KEY}"] = BODY
    peer.faults.extend(["drip"] * 20)
    store = client(attempts=2)
    before = time.monotonic()
    with pytest.raises(StoreUnavailable, match="counts as lost"):
        fetched(store)
    with pytest.raises(StoreUnavailable):
        store.create(KEY + "2", BODY, sha256=DIGEST)
    assert time.monotonic() - before < 30.0  # at one byte in 50 ms it would be a day


def test_an_object_that_was_cut_short_is_damaged(peer: HostileS3, client: Client) -> None:
    peer.objects[f"p/{KEY}"] = BODY[:-1]
    with pytest.raises(Damaged, match="cut short"):
        fetched(client())


def test_large_reads_go_straight_into_memory_over_one_connection(
    peer: HostileS3, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copies(_: Any) -> Callable[[int], bytes]:
        return lambda count: pytest.fail(f"{count} bytes were copied")

    def connects(connection: urllib3.connection.HTTPConnection) -> None:
        opened.append(connection)
        connect(connection)

    peer.objects[f"p/{KEY}"] = BODY
    opened, connect = list[Any](), urllib3.connection.HTTPConnection.connect
    monkeypatch.setattr(s3_bodies, "_reads", copies)
    monkeypatch.setattr(urllib3.connection.HTTPConnection, "connect", connects)
    for _ in range(3):
        assert fetched(client()) == BODY
    assert len(opened) <= 1  # that of a test before


@pytest.mark.parametrize("length", ["chunked", "close"])
@pytest.mark.parametrize("ignores", [False, True])
def test_large_reads_through_odd_gateways(peer: HostileS3, client: Client, length: str, ignores: bool) -> None:
    peer.objects[f"p/{KEY}"] = BODY
    peer.length, peer.ignore_range = length, ignores  # type: ignore[assignment]
    store = client()
    assert fetched(store) == BODY
    some = bytearray(1000)
    store.read_into(KEY, [memoryview(some)], first=777)
    assert some == BODY[777:1777]
    with pytest.raises(CheckpointError):
        store.read_into(KEY, [memoryview(some)], first=len(BODY) - 3)
