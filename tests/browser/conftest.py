"""One real Prefect server, one browser, one demo and one schedule for the session."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.browser.browser import Browser, missing
from tests.flows.conftest import Api, started
from tests.flows.test_demo import SHORT
from tests.support.place import ROOT, Place, finish
from tests.support.wait import wait_for

IMAGES = ROOT / "docs" / "images"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/browser/" in str(item.path):
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    server = started(tmp_path_factory.mktemp("prefect"))
    yield Api(server)
    server.stop()


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    gone = missing()
    assert not gone, f"missing: {', '.join(gone)}; `python -m tests.browser` installs them (Debian, root)"
    made = Browser(tmp_path_factory.mktemp("browser")).start()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def picture(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Takes a screenshot; kept in docs/images only where HOTSTAGE_KEEP_IMAGES is set: tests do not dirty the tree."""
    folder = IMAGES if os.environ.get("HOTSTAGE_KEEP_IMAGES") else tmp_path_factory.mktemp("images")
    return lambda name: browser.screenshot(folder / f"{name}.png")


@dataclass(frozen=True)
class Shown:
    """A run that has ended, where its flow run is, and what the command said."""

    place: Place
    run: str
    flow_run: dict[str, Any]
    said: str


@pytest.fixture(scope="session")
def demo(prefect: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """The demo, shortened: two stages, one killed halfway."""
    folder = tmp_path_factory.mktemp("demo")
    place = Place(folder / "p", env={**prefect.server.environment(), "PREFECT_HOME": str(folder / "prefect")})
    try:
        done = place.call("demo", "--out", "demo", *SHORT, "--set", "train.steps=240", seconds=300)
        assert done.code == 0, done.out + done.err
        result = json.loads((place.folder / "demo" / "result.json").read_text())
        (flow_run,) = prefect.named(result["run"])
        yield Shown(place, result["run"], flow_run, done.out)
    finally:
        place.stop_all()


@pytest.fixture(scope="session")
def schedule(prefect: Api, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """A deployment that fires every few seconds, until one run of it has completed; then nightly."""
    folder = tmp_path_factory.mktemp("schedule")
    place = Place(folder / "p", env={**prefect.server.environment(), "PREFECT_HOME": str(folder / "prefect")})
    sets = ["--set", "train.steps=40", "--set", "parallel.stages=1", "--name", "nightly"]
    try:
        process = place.start("schedule", "spec.toml", "--interval", "5", *sets)
        known = {"deployments": {"name": {"any_": ["nightly"]}}}

        def completed() -> list[dict[str, Any]]:
            found = prefect.ask("deployments/filter", known)
            state = {"type": {"any_": ["COMPLETED"]}}
            return prefect.flow_runs(deployment_id={"any_": [found[0]["id"]]}, state=state) if found else []

        flow_run = wait_for(completed, "a scheduled run", 120)[0]
        process.send_signal(signal.SIGINT)
        finish(process, 60)
        process = place.start("schedule", "spec.toml", "--cron", "30 2 * * *", "--timezone", "Europe/Berlin", *sets)
        assert process.stdout is not None
        said = ""
        while len(re.findall("^  fires", said, re.MULTILINE)) < 3:
            line = process.stdout.readline().decode()
            assert line, said
            assert "no more firings" not in line, said
            said += line
        yield Shown(place, str(flow_run["name"]), flow_run, said)  # it is served while it is looked at
        process.send_signal(signal.SIGINT)
        finish(process, 60)
    finally:
        place.stop_all()


@pytest.fixture(scope="session")
def swept(prefect: Api, schedule: Shown) -> dict[str, Any]:
    """The flow run of a sweep of two, which a deployment's firing started."""
    sets = ["--set", "train.steps=40", "--set", "parallel.stages=1", "--name", "sweeps"]
    grid = ["--grid", "train.optimizer.lr=1e-3,1e-2", "--at-once", "2"]
    process = schedule.place.start("schedule", "spec.toml", "--interval", "4", "--mode", "sweep", *grid, *sets)
    known = {"deployments": {"name": {"any_": ["sweeps"]}}}

    def completed() -> list[dict[str, Any]]:
        found = prefect.ask("deployments/filter", known)
        state = {"type": {"any_": ["COMPLETED"]}}
        return prefect.flow_runs(deployment_id={"any_": [found[0]["id"]]}, state=state) if found else []

    flow_run = wait_for(completed, "a sweep", 180, 0.5)[0]
    process.send_signal(signal.SIGINT)
    assert finish(process, 60).code == 0
    return dict(flow_run)


@pytest.fixture(scope="session")
def page(prefect: Api) -> str:
    """Where the server's pages begin: the new ones."""
    return f"{prefect.server.page}/v2"


def report_of(shown: Shown) -> Path:
    return shown.place.folder / "demo" / "report.html"
