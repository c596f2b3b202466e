"""The newcomer's first five minutes: `kubectl apply -k` of the quick overlay, one command, a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from k8s.images.base import VERSION
from k8s.images.build import build
from k8s.images.builder import ImageBuilder
from tests.cluster.cluster import ROOT, Cluster
from tests.support.go import cache
from trainer.spec import load_spec

OVERLAY = ROOT / "k8s" / "overlays" / "quick"
SPACE = "hotstage"
CLAIMS = {"prefect": "1Gi", "store": "20Gi"}
RUNS_OF_PREFECT = (
    "import json, urllib.request as u; "
    "q = u.Request('http://prefect:4200/api/flow_runs/filter', b'{}', {'content-type': 'application/json'}); "
    "print(u.urlopen(q, timeout=30).read().decode())"
)

pytestmark = pytest.mark.slow


@pytest.fixture
def images_of_the_overlay(cluster: Cluster, builder: ImageBuilder, base: str) -> None:
    """What `make images BASE=local` makes beside the engine and the agent, on every node."""
    for name in ("flows", "store"):
        out = cache() / "images" / "test"
        cluster.load_image(build(name, base=base, python=VERSION, out=out, builder=builder, revision="test").archive)


@pytest.fixture
def volumes(cluster: Cluster, tmp_path: Path) -> Iterator[None]:
    """What a newcomer's cluster has a provisioner for: a volume a claim, owned by root as it comes."""
    if not cluster.own:
        yield
        return
    for name, size in CLAIMS.items():
        folder = tmp_path / name
        folder.mkdir(mode=0o755)
        cluster.apply(volume(f"{SPACE}-{name}", name, size, folder, cluster.nodes[0]))
    try:
        yield
    finally:
        cluster.kubectl("delete", "pv", *(f"{SPACE}-{name}" for name in CLAIMS), "--wait=false")
        shutil.rmtree(tmp_path, ignore_errors=True)


def volume(name: str, claim: str, size: str, folder: Path, node: str) -> dict[str, Any]:
    on_node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": size},
            "accessModes": ["ReadWriteOnce"],
            "claimRef": {"namespace": SPACE, "name": claim},
            "local": {"path": str(folder)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [on_node]}]}},
        },
    }


@pytest.fixture
def applied(cluster: Cluster, images_of_the_overlay: None, volumes: None) -> Iterator[Cluster]:
    if SPACE in cluster.kubectl("get", "namespaces", "-o", "name"):
        pytest.skip(f"there is a namespace {SPACE} that is not ours to delete")
    cluster.kubectl("apply", "-k", str(OVERLAY))
    try:
        yield cluster
    finally:
        cluster.kubectl("delete", "-k", str(OVERLAY), "--wait=false", check=False)
        cluster.kubectl("-n", SPACE, "delete", "pods", "--all", "--grace-period=1", "--wait=false", check=False)
        cluster.kubectl("delete", "namespace", SPACE, "--timeout=90s", check=False, seconds=120)


def test_one_command_after_apply_gives_a_finished_run(applied: Cluster) -> None:
    def inside(*command: str, seconds: float = 120) -> str:
        return applied.kubectl("-n", SPACE, "exec", "deploy/hotstage-flows", "--", *command, seconds=seconds)

    def picture() -> str:
        return applied.kubectl("-n", SPACE, "get", "pods,pvc,jobs,events", "-o", "wide", check=False)

    # the lines of docs/kubernetes.md
    try:
        applied.kubectl("-n", SPACE, "wait", "deploy", "--all", "--for=condition=Available", "--timeout=120s")
        said = inside("hotstage", "train", "/etc/hotstage/quick.toml", seconds=400)
    except Exception as error:
        raise AssertionError(f"{error}\n{picture()}") from error
    spec = load_spec(OVERLAY / "quick.toml")
    assert f"succeeded: step {spec.train.steps}" in said
    (run,) = json.loads(inside("hotstage", "runs", "ls", "--json"))
    assert (run["state"], run["saved_step"], run["attempts"]) == ("succeeded", spec.train.steps, 1)
    restarts = {
        f"{p['metadata']['name']}/{c['name']}": c["restartCount"]
        for p in applied.get("pods", n=SPACE)["items"]
        for c in p["status"]["containerStatuses"]
    }
    assert set(restarts.values()) == {0}
    (flow_run,) = json.loads(inside("python3", "-c", RUNS_OF_PREFECT))
    assert (flow_run["name"], flow_run["state_type"]) == (run["run"], "COMPLETED")
    # what it learned comes out of the store again
    inside("hotstage", "ckpt", "export", run["run"], "-o", "/tmp/model")
    assert inside("hotstage", "generate", run["run"], "--prompt", "def ").strip()
