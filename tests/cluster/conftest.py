"""The cluster, its images and an S3 server, once a session. Every test here is of the kind `cluster`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from k8s.images.base import NAME, VERSION, base_image
from k8s.images.build import Image, build
from k8s.images.builder import Builder
from tests.cluster import cluster as room
from tests.cluster.cluster import Cluster
from tests.cluster.control import HOST
from tests.support.go import cache
from tests.support.s3_server import S3Server, s3_server

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def builder() -> Iterator[Builder]:
    """What builds images here, with a storage of its own."""
    found = Builder.find(storage=cache() / "storage")
    yield found
    found.tidy()


@pytest.fixture(scope="session")
def base(builder: Builder) -> str:
    """A Python image for the others to stand on."""
    return base_image(builder)


@pytest.fixture(scope="session")
def images(builder: Builder, base: str) -> dict[str, Image]:
    """The engine's and the agent's images, built from this tree."""
    folder = cache() / "images" / "test"
    return {
        name: build(name, base=base, python=VERSION, out=folder, builder=builder, revision="test")
        for name in ("engine", "agent")
    }


@pytest.fixture(scope="session")
def cluster(images: dict[str, Image]) -> Iterator[Cluster]:
    """The cluster, with the images on every node."""
    with room.cluster() as made:
        for image in images.values():
            made.load_image(image.archive)
        yield made


@pytest.fixture(scope="session")
def python_image(cluster: Cluster, builder: Builder, base: str) -> str:
    """The name of an image with a Python, on every node."""
    archive = cache() / "images" / f"{NAME.replace(':', '-')}.tar"
    if not archive.exists():
        partial = archive.with_suffix(".part")
        builder.save(NAME, partial)
        partial.rename(archive)
    cluster.load_image(archive)
    return NAME


@pytest.fixture(scope="session")
def s3(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server that the pods reach: on the first bridge, which leads nowhere else."""
    if not cluster.own:
        pytest.skip("pods of a cluster elsewhere do not reach a server of this machine")
    with s3_server(tmp_path_factory.mktemp("s3") / "server", HOST) as server:
        yield server
