"""For the tests of this folder: stores in memory, in a folder and on a real S3 server started once; a long log."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.log import FOLD_EVERY, RunLog, RunState
from checkpoint.store import Store, open_store
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import long_log
from tests.support.hostile_s3 import SECRET, HostileS3, hostile_s3
from tests.support.s3_server import S3Server, s3_server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(params=["memory", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind, opened by its address as the agent would (on S3: as the trainer, without delete)."""
    if request.param == "memory":
        return open_store("memory:")
    if request.param == "file":
        return open_store((tmp_path / "store").as_uri())
    running: S3Server = request.getfixturevalue("server")
    with running.identity("trainer"):
        return open_store(running.url(f"test-{next(_numbers)}"))


@pytest.fixture
def collector(store: Store, request: pytest.FixtureRequest) -> Store:
    """The same store as an identity that may delete."""
    if not store.url.startswith("s3:"):
        return store
    running: S3Server = request.getfixturevalue("server")
    with running.identity("root"):
        return open_store(store.url)


@pytest.fixture
def files(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileS3]:
    """A server that answers as it is told to, and credentials for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with hostile_s3() as running:
        yield running


@pytest.fixture(scope="session")
def long() -> tuple[RunLog, RunState]:
    """A log with three folds."""
    return long_log(MemoryStore(), 3 * FOLD_EVERY + 100)
