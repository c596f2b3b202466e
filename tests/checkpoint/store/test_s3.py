"""S3 beyond the contract: conditions that are ignored, unclear answers, odd servers, refusals of a real one."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Literal

import botocore.auth
import botocore.exceptions
import botocore.parsers
import pytest

from checkpoint.errors import CheckpointError, Damaged, NotFound, StoreRefused, StoreUnavailable
from checkpoint.probe import probe
from checkpoint.store import open_store
from checkpoint.store.limits import until
from checkpoint.store.s3 import S3Store
from checkpoint.store.s3_answers import Retry
from tests.support.front import Front
from tests.support.hostile_s3 import SECRET, Fault, HostileS3, Length, client, hostile_s3
from tests.support.s3_server import BUCKET, S3Server

KEY = "runs/r/log/00000000000000000001"


# --- a store that ignores the condition --------------------------------------------------------------------


def test_probe_refuses_a_store_that_ignores_conditions(peer: HostileS3) -> None:
    peer.ignore_conditions = True
    with pytest.raises(StoreRefused, match=r"racing creators .* told that they made it.*create-if-absent"):
        probe(client(peer))


def test_probe_passes_on_the_same_server_that_heeds_them(peer: HostileS3) -> None:
    probe(client(peer))


def test_probe_says_unavailable_where_the_store_does_not_answer(peer: HostileS3) -> None:
    peer.applies = ("HEAD",)
    peer.faults.extend(["503"] * 100)
    with pytest.raises(StoreUnavailable):
        probe(client(peer))


# --- unclear answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "faults",
    [
        ["reset"],
        ["done-reset"],
        ["done-500"],
        ["done-409"],
        ["done-412"],
        ["500"],
        ["503", "503"],
        ["409"],
        ["hang"],
        ["done-hang"],
        ["no-xml"],
        ["bad-digest"],
        ["reset", "500", "done-reset"],
    ],
    ids="+".join,
)
def test_a_create_that_went_through_is_won(peer: HostileS3, faults: list[Fault]) -> None:
    peer.faults.extend(faults)
    assert client(peer).create(KEY, b"mine") is True
    assert peer.objects == {f"p/{KEY}": b"mine"}


@pytest.mark.parametrize("faults", [["other-500"], ["other-500", "reset"]], ids="+".join)
def test_a_create_that_another_won_is_lost(peer: HostileS3, faults: list[Fault]) -> None:
    peer.faults.extend(faults)
    assert client(peer).create(KEY, b"mine") is False
    assert peer.objects == {f"p/{KEY}": b"another's"}


def test_a_create_is_lost_where_the_name_is_taken_and_the_first_answer_unclear(peer: HostileS3) -> None:
    peer.objects[f"p/{KEY}"] = b"other"
    peer.faults.extend(["reset"])
    assert client(peer).create(KEY, b"mine!") is False
    assert client(peer).create(KEY, b"mine!") is False


def test_attempts_are_bounded(peer: HostileS3) -> None:
    peer.faults.extend(["503"] * 100)
    with pytest.raises(StoreUnavailable, match="503 SlowDown"):
        client(peer, attempts=3).create(KEY, b"x")
    assert sum(request.startswith("PUT") for request in peer.requests) == 3


def test_the_deadline_bounds_the_attempts() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    calls = []

    def call() -> None:
        calls.append(now[0])
        now[0] += 10
        raise StoreUnavailable("no")

    retry = Retry(attempts=100, deadline_s=35, clock=lambda: now[0], sleep=sleep)
    with pytest.raises(StoreUnavailable):
        retry.run("calling", call)
    assert len(calls) == 4  # none begins after the deadline


def test_nothing_is_asked_for_when_the_time_is_over(peer: HostileS3) -> None:
    """The thread's deadline ends retries too, whatever the store's own would still allow."""
    store = client(peer, attempts=100)
    with until(time.monotonic() - 1.0):
        for ask in (lambda: store.create(KEY, b"late"), lambda: store.get(KEY), lambda: store.head(KEY)):
            with pytest.raises(StoreUnavailable, match="time that this was given is over"):
                ask()
    assert peer.requests == []
    peer.faults.extend(["503"] * 100)
    with until(time.monotonic() + 0.2), pytest.raises(StoreUnavailable):
        client(peer, attempts=10_000).create(KEY, b"x")
    peer.faults.clear()
    assert store.create(KEY, b"in time")


@pytest.mark.parametrize("faults", [["500"], ["reset", "503"], ["short"], ["short", "short"]], ids="+".join)
def test_a_read_is_tried_again(peer: HostileS3, faults: list[Fault]) -> None:
    peer.objects[f"p/{KEY}"] = bytes(range(256)) * 1000
    peer.applies = ("GET",)
    peer.faults.extend(faults)
    assert client(peer).get(KEY) == bytes(range(256)) * 1000


def test_a_read_that_stays_short_is_unavailable_never_short(peer: HostileS3) -> None:
    peer.objects[f"p/{KEY}"] = bytes(1000)
    peer.applies = ("GET",)
    peer.faults.extend(["short"] * 10)
    with pytest.raises(StoreUnavailable):
        client(peer).get(KEY)


# --- odd servers and gateways -------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["told", "chunked", "close"])
@pytest.mark.parametrize("quirk", ["", "ignore_range", "lower_case", "no_etag"])
def test_sizes_that_are_not_told_are_found_out(peer: HostileS3, length: Length, quirk: str) -> None:
    peer.length, peer.etag = length, quirk != "no_etag"
    peer.ignore_range, peer.lower_case = quirk == "ignore_range", quirk == "lower_case"
    data = bytes(range(256)) * 40
    store = client(peer)
    assert store.create(KEY, data)
    assert not store.create(KEY, data[:-1] + b"x")
    peer.faults.append("done-500")
    assert store.create(KEY + "1", b"settled by reading back")
    assert store.get(KEY) == data
    assert store.get(KEY, max_bytes=len(data)) == data
    assert store.get(KEY, first=300, length=77) == data[300:377]
    assert store.get(KEY, first=10_000) == data[10_000:]
    assert store.get(KEY, first=5, length=0) == b""
    info = store.head(KEY)
    assert info is not None
    assert info.bytes == len(data)
    assert store.head("runs/none") is None
    with pytest.raises(Damaged):
        store.get(KEY, max_bytes=len(data) - 1)
    with pytest.raises(Damaged):
        store.get(KEY, first=len(data) - 3, length=5)
    with pytest.raises(NotFound):
        store.get("runs/none")
    probe(store, rounds=1, creators=3)


def test_a_body_that_the_connection_ends_is_compared_with_the_listing(peer: HostileS3) -> None:
    peer.objects[f"p/{KEY}"] = bytes(1000)
    peer.length, peer.applies = "close", ("GET",)
    peer.faults.append("short")  # half of it, and the connection closes: nothing in the answer tells
    assert client(peer).get(KEY) == bytes(1000)


def test_a_gateway_that_tells_a_size_nowhere_is_named(peer: HostileS3) -> None:
    peer.objects[f"p/{KEY}"] = bytes(1000)
    peer.length, peer.lists = "chunked", False
    for ask in (lambda: client(peer).head(KEY), lambda: client(peer).get(KEY)):
        with pytest.raises(StoreUnavailable, match=r"no Content-Length.*cannot be used"):
            ask()


def test_a_size_that_is_wrong_is_unavailable(peer: HostileS3) -> None:
    peer.objects[f"p/{KEY}"] = bytes(1000)
    peer.length = "wrong"
    with pytest.raises(StoreUnavailable):
        client(peer).get(KEY)


def test_what_is_no_object_of_ours_is_not_listed(peer: HostileS3) -> None:
    """Marks of folders, as web consoles and some servers make them, and copies of tools."""
    for name in (
        "p/",
        "p/runs/",
        "p/runs/r/log/",
        f"p/{KEY}",
        "p/runs/r/log/copy of 1",
        "p/runs/.DS_Store",
        "pp/runs/x",
    ):
        peer.objects[name] = b""
    assert [info.key for info in client(peer).list("runs/")] == [KEY]
    assert [info.key for info in client(peer).list("")] == [KEY]


def test_listings_of_many_pages(peer: HostileS3) -> None:
    names = [f"runs/r/live/{n}" for n in range(9)]
    peer.objects |= {f"p/{name}": b"" for name in names}
    peer.page = 2
    assert [info.key for info in client(peer).list("runs/")] == names


@pytest.mark.parametrize(("goes_on", "says"), [("again", "shows the same page again"), ("unsaid", "not how to go on")])
def test_a_listing_without_an_end_is_refused(peer: HostileS3, goes_on: Literal["again", "unsaid"], says: str) -> None:
    peer.objects |= {f"p/runs/r/live/{n}": b"" for n in range(9)}
    peer.page, peer.goes_on = 4, goes_on
    with pytest.raises(StoreRefused, match=f"lists 4 names, says that there are more, and {says}.*use another one"):
        list(client(peer).list("runs/"))


def test_a_listing_of_other_names_is_refused(peer: HostileS3) -> None:
    """As by a proxy that drops what stands behind the question mark, or takes a + in it for a blank."""
    peer.objects[f"other/{KEY}"], peer.any_prefix = b"", True
    with pytest.raises(StoreRefused, match=r"lists 'other/runs/.*does not begin so"):
        list(client(peer).list("runs/"))


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [("html", StoreRefused, "not S3"), ("301", StoreRefused, "another region"), ("429", StoreUnavailable, "429")],
)
def test_answers_that_are_no_answers(peer: HostileS3, fault: Fault, kind: type[CheckpointError], says: str) -> None:
    peer.objects[f"p/{KEY}"] = bytes(1000)
    peer.etag = False  # of the objects; a page has none either
    peer.applies = ("GET", "PUT", "HEAD")
    store = client(peer, attempts=2)
    for ask in (
        lambda: store.create(KEY, b"x"),
        lambda: store.put("runs/r/live/x", b"x"),
        lambda: store.get(KEY),
        lambda: store.get(KEY, first=3, length=5),
        lambda: store.head(KEY),
        lambda: list(store.list("runs/")),
    ):
        peer.faults.clear()
        peer.faults.extend([fault] * 8)
        with pytest.raises(kind, match=says):
            ask()
    assert peer.objects == {f"p/{KEY}": bytes(1000)}


# --- a real server's refusals ------------------------------------------------------------------------------


def test_the_trainers_identity_cannot_delete(server: S3Server) -> None:
    with server.identity("trainer"):
        store = open_store(server.url("no-delete"))
    store.create(KEY, b"x")
    with pytest.raises(StoreRefused, match="AccessDenied"):
        store.delete(KEY)
    assert store.get(KEY) == b"x"


def test_a_prefix_that_is_an_object_is_told(server: S3Server) -> None:
    """On a server that keeps objects as files; it was asked again and again, and called one that does not answer."""
    with server.identity("trainer"):
        assert open_store(server.url("taken")).create("by", b"another program")
        with pytest.raises(StoreRefused, match=r"ObjectParentIsFile.*choose another prefix"):
            open_store(server.url("taken/by")).create(KEY, b"x")


def test_wrong_secret_unknown_key_missing_bucket(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="checkpoint")
    with server.identity("trainer"):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        wrong = open_store(server.url("x"))
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        unknown = open_store(server.url("x"))
    with server.identity("root"):
        missing = open_store(server.url("x").replace(f"s3://{BUCKET}/", "s3://no-such-bucket/"))
    for store, says in ((wrong, "SignatureDoesNotMatch"), (unknown, "InvalidAccessKeyId"), (missing, "NoSuchBucket")):
        with pytest.raises(StoreRefused, match=says) as caught:
            store.create(KEY, b"x")
        assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


def test_a_proxy_that_changes_what_was_signed_is_told_beside_the_secret(server: S3Server) -> None:
    front = Front(server.endpoint)  # it names the server itself as the Host
    try:
        with server.identity("trainer"):
            store = open_store(server.url("x").replace(server.endpoint, front.api.removesuffix("/api")))
        with pytest.raises(StoreRefused, match=r"DoesNotMatch.*check AWS_SECRET_ACCESS_KEY; or a proxy on the way"):
            store.create(KEY, b"x")
    finally:
        front.close()


def test_an_endpoint_that_sends_its_callers_on_is_told_with_the_one_to_write(server: S3Server) -> None:
    front = Front(server.endpoint)
    front.mode = "moved"  # as http to https: a region was blamed
    try:
        with server.identity("trainer"):
            store = open_store(server.url("x").replace(server.endpoint, front.api.removesuffix("/api")))
        for ask in (lambda: store.create(KEY, b"x"), lambda: list(store.list("runs/")), lambda: store.get(KEY)):
            with pytest.raises(StoreRefused, match=f"sends its callers on to {server.endpoint}: write that as the end"):
                ask()
    finally:
        front.close()


def test_clocks_that_are_apart_are_both_told(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    now = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: now(*a, **k) - timedelta(hours=1))
    with server.identity("trainer"):
        store = open_store(server.url("x"))
    with pytest.raises(StoreRefused, match=r"RequestTimeTooSkewed.*: it is .{25} GMT there, .{25} GMT here: the two"):
        store.create(KEY, b"x")


def test_a_secret_that_ends_with_a_lines_end_is_told(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.identity("trainer"):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET + "\n")
        with pytest.raises(
            StoreRefused, match=r"AWS_SECRET_ACCESS_KEY in this .* a line's end, which .* no key"
        ) as caught:
            open_store(server.url("x")).head(KEY)
    assert SECRET not in str(caught.value)


def test_no_credentials_says_how_to_give_them(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with server.identity("trainer"):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        store = open_store(server.url("x"))
        with pytest.raises(StoreRefused, match="set AWS_ACCESS_KEY_ID"):
            store.get(KEY)


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch, peer: HostileS3) -> None:
    port = peer.port
    peer.stopping.set()
    with hostile_s3() as other:
        gone = other.port
    assert gone != port
    store = S3Store("bucket", "p", endpoint=f"http://127.0.0.1:{gone}", region="us-east-1", path_style=True,
                    retry=Retry(attempts=2, sleep=lambda _: None))  # fmt: skip
    with pytest.raises(StoreUnavailable, match="EndpointConnectionError"):
        store.create(KEY, b"x")


def test_a_corrupted_upload_is_refused_by_the_server(server: S3Server) -> None:
    """The digest is sent: bytes that change on the way in are not stored."""
    with server.identity("trainer"):
        store = open_store(server.url("corrupt"))
    assert isinstance(store, S3Store)
    with pytest.raises(botocore.exceptions.ClientError, match=r"BadDigest|ChecksumMismatch|checksum|did not match"):
        store.client.put_object(Bucket=BUCKET, Key="corrupt/k", Body=b"other bytes", ChecksumSHA256="A" * 43 + "=")
    assert store.head("k") is None
