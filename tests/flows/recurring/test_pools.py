"""prefect.yaml and `hotstage schedule --pool` with Prefect's own `prefect deploy` and a worker that trains.

By night and in `make test-postgres`: each of Prefect's commands takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.conftest import Api, deployment, of
from tests.support.place import ROOT, Place

pytestmark = pytest.mark.slow


@pytest.fixture
def team(hosted: Place) -> Place:
    """A place with the environment that prefect.yaml asks for."""
    hosted.env |= {
        "HOTSTAGE_POOL": f"pool-{os.getpid()}",
        "HOTSTAGE_STORE": (hosted.folder / "store").as_uri(),
        "HOTSTAGE_FLOWS_IMAGE": "registry.example/hotstage-flows:0.1.0",
        "HOTSTAGE_NAMESPACE": "training",
    }
    return hosted


def prefect_says(place: Place, *args: str, code: int = 0, cwd: Path = ROOT) -> str:
    """What a command of Prefect's says."""
    command = [sys.executable, "-m", "prefect", *args]
    env = place.env | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_a_process_pool_has_every_flow_and_its_worker_trains(prefect: Api, team: Place) -> None:
    pool = team.env["HOTSTAGE_POOL"]
    prefect_says(team, "work-pool", "create", pool, "--type", "process")
    prefect_says(team, "deploy", "--all", "--no-prompt")
    made = {row["name"]: row for row in prefect.ask("deployments/filter", {}) if row["work_pool_name"] == pool}
    assert {name: row["entrypoint"] for name, row in made.items()} == {
        name: f"flows.flow.{name}_flow" for name in ("train", "sweep", "prepare", "collect")
    }
    assert {row["parameters"]["store"] for row in made.values()} == {team.env["HOTSTAGE_STORE"]}
    assert [s["active"] for s in made["collect"]["schedules"]] == [False]  # nothing is deleted unasked

    sets = ["--set", "name='pooled'", "--set", "train.steps=6", "--set", "parallel.stages=1"]
    source = f"data.source='text:{team.folder}/corpus/*.txt'"
    said = team.run("schedule", "spec.toml", "--cron", "0 2 1 1 *", "--pool", pool, *sets, "--set", source)
    assert f"the workers of pool {pool} start its runs" in said
    assert "fires Fri 2027-01-01 02:00:00 +0000 (UTC)" in said
    assert deployment(prefect, "pooled")["work_pool_name"] == pool
    prefect.tell(f"deployments/{deployment(prefect, 'pooled')['id']}/create_flow_run", {})
    prefect_says(team, "worker", "start", "--pool", pool, "--type", "process", "--run-once", cwd=team.folder)
    (flow_run,) = of(prefect, "pooled", "COMPLETED")
    assert flow_run["name"].startswith("pooled-")
    assert "train/pooled" in team.run("schedules", "ls")
    for name in (*made, "pooled"):
        prefect.delete(f"deployments/{deployment(prefect, name)['id']}")


def test_a_kubernetes_pool_is_told_image_namespace_and_account(prefect: Api, team: Place) -> None:
    """By the pool's own template, which the server checks."""
    pool = team.env["HOTSTAGE_POOL"] + "-k"
    team.env["HOTSTAGE_POOL"] = pool
    prefect_says(team, "work-pool", "create", pool, "--type", "kubernetes")
    prefect_says(team, "deploy", "--all", "--no-prompt", "--prefect-file", "k8s/prefect/prefect.yaml")
    made = [row for row in prefect.ask("deployments/filter", {}) if row["work_pool_name"] == pool]
    assert len(made) == 4
    for row in made:
        assert row["job_variables"] == {
            "image": "registry.example/hotstage-flows:0.1.0",
            "namespace": "training",
            "service_account_name": "hotstage-flows",
            "finished_job_ttl": 3600,
        }
        prefect.delete(f"deployments/{row['id']}")


def test_what_only_a_served_schedule_does_is_refused_for_a_pool(team: Place) -> None:
    done = team.call("schedule", "spec.toml", "--interval", "60", "--pool", "any", "--overlap", "cancel")
    assert (done.code, "are for a schedule that this command serves" in done.err) == (2, True)
    done = team.call("schedule", "spec.toml", "--interval", "60", "--pool", "nobody-made-it")
    assert (done.code, "prefect work-pool create nobody-made-it" in done.err) == (78, True), done.err
