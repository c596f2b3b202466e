"""A corpus in a bucket of a real S3 server: the same documents, and what is wrong is told with its source."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import CredentialsRefused, StoreError, StoreRefused, StoreUnavailable
from checkpoint.store import open_store
from checkpoint.store.s3_address import open_s3
from flows.data import prepare
from flows.data.sources import open_source
from flows.data.sources.base import Borne
from tests.flows.data.test_sources import TEXTS, lines, spec_of, table, texts
from tests.support.s3_server import S3Server, environment
from trainer.errors import DatasetError


@pytest.fixture
def bucket(server: S3Server) -> Iterator[Callable[..., str]]:
    """Puts objects under a prefix of their own; gives the address of a pattern there."""
    prefix = f"corpus-{random.randrange(1 << 40):x}"
    with server.identity("root"):
        client = open_s3(server.url()).client

        def fill(pattern: str, **objects: bytes) -> str:
            for name, data in objects.items():
                client.put_object(Bucket="hotstage", Key=f"{prefix}/{name}", Body=data)
            return f"s3://hotstage/{prefix}/{pattern}?endpoint={server.endpoint}&region=us-east-1"

        yield fill


def test_a_corpus_in_a_bucket(bucket: Callable[..., str], here: Path, small: Callable[[int], None]) -> None:
    table("c/t.parquet", text=TEXTS[20:])
    where = bucket(
        "**/*",
        **{
            "a b/ü [1].jsonl": lines(TEXTS[:9]),
            "a b/ü [2].jsonl.gz": gzip.compress(lines(TEXTS[9:20])),
            "a b/.checkpoints/x.jsonl": b"no text",
            "a b/.ü [1].jsonl": b"no text",
            "t.parquet": Path("c/t.parquet").read_bytes(),
        },
    )
    assert texts("jsonl:" + where.replace("**/*", "**/*.jsonl*")) == TEXTS[:20]
    assert texts("jsonl:" + where.replace("**/*", "a b/ü [[]1].jsonl")) == TEXTS[:9]
    assert texts("jsonl:" + where.replace("**/*", "a b/**")) == TEXTS[:20], "names that begin with a dot are left out"
    assert texts("parquet:" + where.replace("**/*", "*.parquet")) == TEXTS[20:]
    with pytest.raises(DatasetError, match="matches no object"):
        texts("jsonl:" + where.replace("**/*", "a b?ü [[]1].jsonl"))
    Path("c/a.jsonl").write_bytes(lines(TEXTS[:20]))
    want = prepare(spec_of("jsonl:c/a.jsonl"), open_store("memory:"))
    small(300)
    store = open_store("memory:")
    spec = spec_of("jsonl:" + where.replace("**/*", "*/*"))
    assert prepare(spec, store) == want
    assert len(list(store.list("data/seen/"))) == 1  # an ETag is of the content
    assert prepare(spec, store) == want
    with pytest.raises(DatasetError, match=r"matches no object: 5 begin with .* and none of them fits"):
        texts("jsonl:" + where.replace("**/*", "*.txt"))


def test_a_bucket_that_everybody_may_read_needs_no_account(bucket: Callable[..., str], server: S3Server) -> None:
    where = bucket("*.jsonl", **{"a.jsonl": lines(TEXTS)})
    client = open_s3(server.url()).client
    client.create_bucket(Bucket="public")
    everybody = {"Effect": "Allow", "Principal": "*"}
    rows = [
        {**everybody, "Action": "s3:GetObject", "Resource": "arn:aws:s3:::public/*"},
        {**everybody, "Action": "s3:ListBucket", "Resource": "arn:aws:s3:::public"},
    ]
    client.put_bucket_policy(Bucket="public", Policy=json.dumps({"Version": "2012-10-17", "Statement": rows}))
    client.put_object(Bucket="public", Key="c/a.jsonl", Body=lines(TEXTS))
    open_to_all = f"jsonl:s3://public/c/*.jsonl?endpoint={server.endpoint}&region=us-east-1"
    with environment(dict.fromkeys(server.environment("root"), os.devnull) | {"AWS_ACCESS_KEY_ID": ""}):
        assert texts(f"{open_to_all}&anonymous=1") == TEXTS
        with pytest.raises(CredentialsRefused, match="everybody may read needs none with anonymous=1 in its address"):
            texts(open_to_all)
        with pytest.raises(StoreRefused, match=r"AccessDenied.*: not everybody may do it: leave anonymous=1 out"):
            texts(f"jsonl:{where}&anonymous=1")
        with pytest.raises(StoreRefused, match="anonymous is 1"):
            texts(f"{open_to_all}&anonymous=yes")


def test_who_asks_takes_the_costs_where_the_address_says_so(server: S3Server) -> None:
    for more, said in (("", None), ("&requester_pays=1", "requester")):
        with server.identity("root"):
            store = open_s3(server.url("payer") + more)
        asked: list[str | None] = []

        def see(request: Any, asked: list[str | None] = asked, **_: Any) -> None:
            asked.append(request.headers.get("x-amz-request-payer", b"").decode() or None)

        store.client.meta.events.register("before-send.s3", see)
        store.create(f"index/r{len(more)}", b"x")
        store.create(f"data/{len(more):064d}/00000.bin", b"x" * (2 << 20))  # handed over in slices
        assert list(store.list("index/"))
        assert store.get(f"index/r{len(more)}") == b"x"
        assert asked == [said] * 4
        assert ("requester_pays=1" in store.url) == bool(more)
    for wrong, told in (("requester_pays=0", "requester_pays is 1"), ("requester_pays=1&anonymous=1", "nobody pays")):
        with pytest.raises(StoreRefused, match=told):
            open_s3(f"{server.url()}&{wrong}")


def test_an_object_that_changes_while_it_is_read(bucket: Callable[..., str]) -> None:
    where = bucket("*", **{"a.jsonl": lines(TEXTS), "b.jsonl": lines(TEXTS)})
    source = open_source(spec_of("jsonl:" + where))
    first, second = source.look()
    bucket("*", **{"a.jsonl": lines(TEXTS[1:])})
    with pytest.raises(DatasetError, match=r"a.jsonl.* changed while it was read"):
        list(source.read(first, 0, -1, Borne()))
    assert len(list(source.read(second, 0, -1, Borne()))) == len(TEXTS)


def test_a_bucket_without_rights(bucket: Callable[..., str], server: S3Server) -> None:
    where = bucket("*", **{"a.jsonl": lines(TEXTS)})
    other = where.replace("s3://hotstage/", "s3://not-there/")
    with pytest.raises(StoreError, match="not-there"):
        texts("jsonl:" + other)
    _fresh()
    with server.identity("agent"), pytest.raises(StoreRefused, match=r"data.source 's3://.*a.jsonl") as caught:
        texts("jsonl:" + where)
    assert caught.value.exit_code == 78


def test_credentials_that_nobody_knows(bucket: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    where = bucket("*", **{"a.jsonl": lines(TEXTS)})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    _fresh()
    with pytest.raises(CredentialsRefused, match=r"data.source 'jsonl:s3://"):
        texts("jsonl:" + where)


def test_a_server_that_is_not_there_is_told_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(StoreUnavailable, match=r"data.source 'jsonl:s3://bucket/.*endpoint=http://127.0.0.1:9"):
        texts("jsonl:s3://bucket/*.jsonl?endpoint=http://127.0.0.1:9&path_style=1")


@pytest.fixture(autouse=True)
def _no_store_of_before() -> None:
    _fresh()


def _fresh() -> None:
    """As in a process of its own: buckets are opened with the credentials of now."""
    from flows.data.sources import objects

    objects._local.__dict__.clear()
