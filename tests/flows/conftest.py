"""One real Prefect server for the session, on loopback, its database in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from checkpoint.store import Store, open_store
from flows.prefect_api import Client, Gone
from flows.prefect_server import PrefectServer
from flows.recurring.deployments import Deployments
from tests.support.front import Front
from tests.support.place import LEARNT, Place
from tests.support.postgres import running
from tests.support.prefect import Api
from tests.support.shared import kept
from tests.support.undisturbed import undisturbed_run
from tests.support.wait import wait_for
from trainer.spec import RunSpec, parse_spec

MEMORY = "/dev/shm"
ON_POSTGRES = bool(os.environ.get("HOTSTAGE_TEST_POSTGRES"))
"""`make test-postgres`: the session's Prefect server has a real PostgreSQL instead of SQLite."""


def started(home: Path, database: str = "") -> PrefectServer:
    settings = {"PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "1"}
    if database:
        settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    server = PrefectServer(home, settings=settings)
    home.mkdir(parents=True, exist_ok=True)
    (home / "queue.py").write_text("")  # what lies where a person works is no module of a server's
    with contextlib.chdir(home):
        server.start()
    if not server.wait(180):
        server.stop()
        raise AssertionError((home / "server.log").read_text()[-4000:])
    return server


@contextlib.contextmanager
def keep_server(folder: Path) -> Iterator[dict[str, Any]]:
    # its database in memory where there is some: other tests keep the disk busy, and SQLite's lock waits for the disk
    with contextlib.ExitStack() as stack:
        where = MEMORY if os.access(MEMORY, os.W_OK) else folder
        home = stack.enter_context(tempfile.TemporaryDirectory(dir=where))
        server = started(Path(home), stack.enter_context(running()) if ON_POSTGRES else "")
        stack.callback(server.stop)
        assert ON_POSTGRES is not any(Path(home).glob("*.db*")), "its database is another one than was asked for"
        yield {"home": home, "port": server.port}


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with kept(tmp_path_factory, "prefect", "tests.flows.conftest:keep_server") as told:
        yield Api(PrefectServer(Path(told["home"]), told["port"]))


@pytest.fixture
def front(prefect: Api) -> Iterator[Front]:
    """A door in front of the server."""
    made = Front(prefect.server.api)
    yield made
    made.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place that knows no Prefect."""
    made = Place(tmp_path / "p", env={"PREFECT_HOME": str(tmp_path / "prefect")})
    yield made
    made.stop_all()


@pytest.fixture
def hosted(tmp_path: Path, prefect: Api) -> Iterator[Place]:
    """A place whose commands find the server."""
    made = Place(tmp_path / "p", env={**prefect.server.environment(), "PREFECT_HOME": str(tmp_path / "prefect")})
    yield made
    made.stop_all()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A tiny run that has succeeded, on one stage, without Prefect, for those who look at it."""
    folder, run, digest = undisturbed_run(tmp_path_factory, LEARNT)
    return Trained(Place.again(folder), run, digest)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state digest that every run of a place's spec must have."""
    return undisturbed_run(tmp_path_factory)[2]


@dataclass(frozen=True)
class Trained:
    place: Place
    run: str
    digest: str


SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 16},
    "train": {"steps": 4, "batch": 4, "microbatch": 2, "sequence": 16},
    "data": {"vocab_size": 300},
}


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, RunSpec]:
    """A store with the data of a tiny spec, where each test makes a run of its own (``suffix``)."""
    folder = tmp_path_factory.mktemp("ground")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    spec = parse_spec({**SMALL, "data": {**SMALL["data"], "source": f"text:{folder}/a.txt"}})
    return open_store(f"file://{folder}/store"), spec


def deployment(api: Api, name: str) -> dict[str, Any]:
    """The one of that name."""
    (found,) = api.ask("deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    return found


def of(api: Api, name: str, *types: str) -> list[dict[str, Any]]:
    """A deployment's flow runs in these states."""
    found = api.ask("deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    return (
        api.flow_runs(deployment_id={"any_": [found[0]["id"]]}, state={"type": {"any_": list(types)}}) if found else []
    )


def registered(client: Client, flow: Any) -> UUID:
    """As the schedule's process does it: a server that is busy (503) is asked again."""
    found: list[UUID] = []

    def ask() -> bool:
        with contextlib.suppress(Gone):
            found.append(Deployments(client).register(flow).deployment)
        return bool(found)

    wait_for(ask, "the deployment", 60, 0.1)
    return found[0]
