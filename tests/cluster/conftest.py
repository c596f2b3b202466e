"""The cluster, its images and what else a session shares. Every test here is of the kind `cluster`.

Several pytest processes use one cluster side by side (pytest-xdist): each gang has a namespace of its own. What
disturbs everybody (a control plane that is away, a machine that falls silent) is marked ``alone`` and has the cluster
to itself. Tests about bringing one up come first and have the machine to themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from k8s.images.base import NAME, VERSION, base_image
from k8s.images.build import Image, build
from k8s.images.builder import ImageBuilder
from tests.cluster import cluster as room
from tests.cluster.cluster import Cluster
from tests.cluster.control import HOST
from tests.cluster.host import Ledger, myself, wait_for
from tests.support.go import cache
from tests.support.s3_server import S3Server, s3_server
from tests.support.shared import folder_of, kept

HERE = Path(__file__).resolve().parent


SESSION = "HOTSTAGE_CLUSTER_SESSION"
TOGETHER = ("test_bring_up", "test_rights", "test_prefect", "test_quotas")  # in one process: they share what they make


def pytest_configure() -> None:
    os.environ.setdefault(SESSION, uuid.uuid4().hex)  # its processes inherit it


def pytest_unconfigure(config: pytest.Config) -> None:
    """The session has ended when its cluster is gone: the process that keeps it takes it down behind the last user."""
    if hasattr(config, "workerinput"):
        return
    ledger = Ledger.load()
    mark = f"{SESSION}={os.environ[SESSION]}".encode()
    if ledger is None or ledger.owner is None or ledger.owner == myself():
        return
    with contextlib.suppress(OSError):
        if mark in Path(f"/proc/{ledger.owner.pid}/environ").read_bytes().split(b"\0"):
            wait_for(lambda: Ledger.load() is None, "the cluster to be taken down", 90)


class _Together(LoadScopeScheduling):
    """Tests go to whichever process is free, one by one and in order; those of some files stay in one process."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if Path(file).stem in TOGETHER else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Together:
    config.option.loadscopereorder = False
    return _Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.path.is_relative_to(HERE)]
    for item in mine:
        item.add_marker(pytest.mark.cluster)
    items[:] = [item for item in items if item not in mine] + sorted(mine, key=_turn)


def _turn(item: pytest.Item) -> int:
    """Bringing up first, then the long ones; what needs no cluster comes while one test has it alone for minutes."""
    if item.path.stem == "test_bring_up":
        return 0
    if "standing" not in getattr(item, "fixturenames", ()):
        return 4
    if item.get_closest_marker("alone"):
        return 3 if "two_minutes" in item.name else 5
    return 1 if item.path.stem in ("test_faults", "test_prefect") else 2


@contextlib.contextmanager
def holding(factory: pytest.TempPathFactory, what: str, *, alone: bool) -> Iterator[None]:
    """Share something with the other processes of the session, or have it alone; who wants it alone comes first."""
    folder = folder_of(factory, f"lock-{what}")
    with (folder / "gate").open("w") as gate, (folder / "held").open("w") as held:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(held, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.fixture(scope="session")
def builder() -> Iterator[ImageBuilder]:
    """What builds images here, with a storage of its own."""
    found = ImageBuilder.find(storage=cache() / "storage")
    yield found
    found.tidy()


@pytest.fixture(scope="session")
def base(builder: ImageBuilder) -> str:
    """A Python image for the others to stand on."""
    return base_image(builder)


@pytest.fixture(scope="session")
def images(builder: ImageBuilder, base: str) -> dict[str, Image]:
    """The engine's and the agent's images, built from this tree."""
    folder = cache() / "images" / "test"
    return {
        name: build(name, base=base, python=VERSION, out=folder, builder=builder, revision="test")
        for name in ("engine", "agent")
    }


@contextlib.contextmanager
def keep_cluster(folder: Path) -> Iterator[dict[str, Any]]:
    """The cluster of all processes of the session."""
    with room.cluster() as made:
        yield made.told()


@pytest.fixture(scope="session")
def standing(images: dict[str, Image], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, with the images on every node."""
    with (
        holding(tmp_path_factory, "machine", alone=False),
        kept(tmp_path_factory, "cluster", "tests.cluster.conftest:keep_cluster") as told,
    ):
        made = Cluster.again(told)
        with holding(tmp_path_factory, "images", alone=True):
            for image in images.values():
                made.load_image(image.archive)
        yield made


@pytest.fixture
def cluster(
    standing: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """The same, beside others that use it, or ``alone``."""
    alone = request.node.get_closest_marker("alone") is not None
    with holding(tmp_path_factory, "cluster", alone=alone):
        yield standing


@pytest.fixture(scope="session")
def python_image(standing: Cluster, builder: ImageBuilder, base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of an image with a Python, on every node."""
    archive = cache() / "images" / f"{NAME.replace(':', '-')}.tar"
    with holding(tmp_path_factory, "images", alone=True):
        if not archive.exists():
            partial = archive.with_suffix(".part")
            builder.save(NAME, partial)
            partial.rename(archive)
        standing.load_image(archive)
    return NAME


@pytest.fixture(scope="session")
def s3(standing: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server that the pods reach: on the first bridge, which leads nowhere else."""
    if not standing.own:
        pytest.skip("pods of a cluster elsewhere do not reach a server of this machine")
    with s3_server(tmp_path_factory.mktemp("s3") / "server", HOST) as server:
        yield server
