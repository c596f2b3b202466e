"""The cluster and its images, once a session. Every test here is of the kind `cluster`: `make test-cluster` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from k8s.images.build import Image, build
from k8s.images.builder import Builder
from tests.cluster.base import NAME, base_image
from tests.cluster.cluster import Cluster, cluster
from tests.support.go import cache

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def kube() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest.fixture(scope="session")
def builder() -> Builder:
    """What builds images here, with a storage of its own."""
    return Builder.find(storage=cache() / "storage")


@pytest.fixture(scope="session")
def base(builder: Builder) -> str:
    """A Python image for the others to stand on."""
    return base_image(builder)


@pytest.fixture(scope="session")
def python_image(kube: Cluster, builder: Builder, base: str) -> str:
    """An image with a Python, on every node."""
    archive = cache() / "images" / f"{NAME.replace(':', '-')}.tar"
    if not archive.exists():
        partial = archive.with_suffix(".part")
        builder.save(NAME, partial)
        partial.rename(archive)
    kube.load_image(archive)
    return NAME


@pytest.fixture(scope="session")
def images(kube: Cluster, builder: Builder, base: str) -> dict[str, Image]:
    """The engine's and the agent's images, built from this tree and on every node."""
    folder = cache() / "images" / "test"
    made = {name: build(name, base=base, out=folder, builder=builder, revision="test") for name in ("engine", "agent")}
    for image in made.values():
        kube.load_image(image.archive)
    return made
