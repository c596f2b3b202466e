"""Stores for the tests of this folder: memory, a folder, and a real S3 server started once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.store import Store, open_store
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
