"""`hotstage k8s serve`, what the manifests run: it does not need Prefect to be there first, nor to stay."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.prefect_server import PrefectServer, free_port
from tests.flows.conftest import ON_POSTGRES, Api
from tests.support.place import Place
from tests.support.postgres import running
from tests.support.wait import wait_for


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PrefectServer]:
    """Not started yet."""
    with contextlib.ExitStack() as stack:
        made = PrefectServer(tmp_path / "server", free_port())
        if ON_POSTGRES:
            made.settings = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": stack.enter_context(running())}
        stack.callback(made.stop)
        yield made


def deployments(server: PrefectServer) -> list[str]:
    return [str(row["name"]) for row in Api(server).ask("deployments/filter", {})]


def test_it_waits_for_prefect_and_serves_the_deployment_then(place: Place, server: PrefectServer) -> None:
    place.env["PREFECT_API_URL"] = server.api
    process = place.start("k8s", "serve")
    try:
        assert process.stdout is not None
        assert process.stdout.readline().decode() == f"waiting for Prefect at {server.api}\n"
        server.start()
        assert server.wait(180)
        wait_for(lambda: deployments(server) == ["train"], "the deployment", 60, 0.1)
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_it_serves_again_where_prefect_was_away(place: Place, server: PrefectServer) -> None:
    server.start()
    assert server.wait(180)
    place.env["PREFECT_API_URL"] = server.api
    with open(place.folder / "said", "wb") as said:
        process = subprocess.Popen(
            place.command("k8s", "serve"), cwd=place.folder, env=place.env, stdout=said, stderr=said
        )
    try:
        wait_for(lambda: deployments(server) == ["train"], "the deployment", 60, 0.1)
        assert server.process is not None
        os.killpg(server.process.pid, signal.SIGKILL)  # a session of its own: the server and all that it started
        server.process.wait()
        server.start()  # over the same database
        assert server.wait(180)
        api = Api(server)
        (deployment,) = api.ask("deployments/filter", {})
        asked = api.tell(f"deployments/{deployment['id']}/create_flow_run", {"parameters": {"run": "nobody-knows-it"}})
        # it is taken up, and says what is wrong with it
        wait_for(lambda: api.flow_runs(id={"any_": [asked["id"]]})[0]["state_type"] == "FAILED", "its end", 120, 0.1)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
