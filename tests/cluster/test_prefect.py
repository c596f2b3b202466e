"""The demo's run through Prefect on the cluster: a completed flow run with its artifacts, and the local run's bits."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.prefect_server import PrefectServer
from k8s.labels import LAUNCH
from k8s.render import PORT_BASE
from tests.cluster.cluster import Cluster
from tests.cluster.gang import Gang, ended, gang, until
from tests.flows.conftest import Api
from tests.support.place import Place
from tests.support.s3_server import S3Server
from tests.support.shared import kept
from trainer.presets import PRESETS

STEPS = 200
SHORT = [f"train.steps={STEPS}", "train.schedule.warmup=20", "checkpoint.every=50"]
ON_THE_CLUSTER = ["launch.target=kubernetes", "launch.store_secret=store", "parallel.stages=4"]


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with kept(tmp_path_factory, "prefect", "tests.flows.conftest:keep_server") as told:
        yield Api(PrefectServer(Path(told["home"]), told["port"]))


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(run, state digest) of the same spec on this machine, in the demo's own two stages."""
    place = Place(tmp_path_factory.mktemp("local") / "p", PRESETS["gpt2-demo"])
    try:
        result = place.train(*SHORT)
    finally:
        place.stop_all()
    assert (result["outcome"], result["step"]) == ("succeeded", STEPS)
    return str(result["run"]), str(result["state_digest"])


@pytest.fixture
def one(cluster: Cluster, s3: S3Server, prefect: Api, tmp_path: Path) -> Iterator[Gang]:
    """A namespace, and a place whose commands find the Prefect server."""
    with gang(cluster, tmp_path / "p", s3, [*SHORT, *ON_THE_CLUSTER]) as made:
        (made.place.folder / "spec.toml").write_text(PRESETS["gpt2-demo"])
        made.place.env |= {**prefect.server.environment(), "PREFECT_HOME": str(tmp_path / "prefect")}
        yield made


def talks(pid: int, others: set[str]) -> list[set[int]]:
    """The two ports of every connection of the process's pod with these addresses."""
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        near, far, state = line.split()[1:4]
        address = socket.inet_ntoa(bytes.fromhex(far.split(":")[0])[::-1])
        if state == "01" and address in others:
            found.append({int(end.split(":")[1], 16) for end in (near, far)})
    return found


def apart(run: str) -> str:
    """A patch for pods: on both machines, however full one of them is (what `launch.spread` only prefers). Pods of this
    launch alone count: an empty selector counts whatever else lies in the namespace."""
    own = f'matchLabels = {{ "{LAUNCH}" = "{run}-k1" }}'
    return (
        '{ topologySpreadConstraints = [{ maxSkew = 1, topologyKey = "kubernetes.io/hostname", '
        f'labelSelector = {{ {own} }}, whenUnsatisfiable = "DoNotSchedule" }}] }}'
    )


@pytest.mark.parametrize("nodes", [2, 4])
def test_four_stages_end_as_a_completed_flow_run_with_the_local_runs_bits(
    prefect: Api, one: Gang, local: tuple[str, str], nodes: int
) -> None:
    more = ["--set", f"launch.nodes={nodes}", "--set", f"launch.pod_patch={apart(local[0])}"]
    driver = one.drive("train", "spec.toml", "--json", *one.arguments, *more)
    until(lambda: one.attempts() == 1, "its data, and the first attempt", 300.0, one.picture)
    one.reached(4)
    pods = one.pods()
    assert len(pods) == nodes
    assert len({p["spec"]["nodeName"] for p in pods}) == 2
    if one.cluster.own:  # ranks of different pods meet where the network rules let them
        connections = talks(one.rank(0), {p["status"]["podIP"] for p in pods[1:]})
        assert connections
        assert all(ports & set(range(PORT_BASE, PORT_BASE + 4 // nodes)) for ports in connections)
    result = ended(driver)
    assert (result["outcome"], result["step"], result["attempts"]) == ("succeeded", STEPS, 1)
    assert (result["run"], result["state_digest"]) == local

    (flow_run,) = [f for f in prefect.named(result["run"]) if one.namespace in f["parameters"]["store"]]
    assert flow_run["state_type"] == "COMPLETED"
    artifacts = prefect.artifacts(flow_run["id"])
    assert float(artifacts[result["run"]]["data"]) == 100.0
    assert f"step {STEPS} of {STEPS}, step {STEPS} saved" in artifacts[result["run"]]["description"]
    assert f"at step {STEPS}" in artifacts[f"{result['run']}-loss"]["data"]
    (attempt,) = json.loads(artifacts[f"{result['run']}-attempts"]["data"])
    assert (attempt["attempt"], attempt["because"], attempt["steps"]) == (1, "start", f"1–{STEPS}")
    told = json.dumps([flow_run, artifacts, prefect.logs(flow_run["id"])])
    for secret in one.s3.identities["trainer"]:
        assert secret not in told
