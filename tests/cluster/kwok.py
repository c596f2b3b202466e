"""Nodes that are none: kwok, built from its Go module, answers for the kubelets of as many nodes as a test wants.

    with kwok(cluster, nodes=20) as selector:      # the label of these nodes

API server, scheduler and Job controller are the real ones; what a kwok node runs is Running, and nothing else happens.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.build import say
from tests.cluster.cluster import Cluster
from tests.support.go import cache, go

VERSION = "v0.8.0"
MODULE = "sigs.k8s.io/kwok"
LABEL = "hotstage.test/kwok"
# not `pod-complete`, which ends whatever a Job owns
STAGES = ("node/fast/node-initialize", "node/heartbeat-with-lease/node-heartbeat-with-lease",
          "pod/fast/pod-ready", "pod/fast/pod-delete")  # fmt: skip


def binary() -> Path:
    """The kwok command; built where the cache lacks it, by one process at a time."""
    found = cache() / f"kwok-{VERSION}" / "kwok"
    found.parent.mkdir(exist_ok=True)
    with open(found.parent / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            say(f"building kwok {VERSION} from its Go module (about 3 minutes of CPU, once)")
            partial = found.parent / f".bin-{os.getpid()}"
            env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off", "GOBIN": str(partial)}
            command = [go(), "install", f"{MODULE}/cmd/kwok@{VERSION}"]
            subprocess.run(command, env=env, check=True, preexec_fn=lambda: os.nice(10))
            os.replace(partial / "kwok", found)
            partial.rmdir()
    return found


def stages() -> str:
    """What happens to nodes and pods, from the module's own files."""
    env = {**os.environ, "GOFLAGS": "", "GOWORK": "off"}
    told = subprocess.run([go(), "env", "GOMODCACHE"], env=env, check=True, capture_output=True, text=True).stdout
    folder = Path(told.strip()) / f"{MODULE}@{VERSION}" / "kustomize" / "stage"
    return "\n---\n".join((folder / f"{name}.yaml").read_text() for name in STAGES)


@contextlib.contextmanager
def kwok(cluster: Cluster, nodes: int, scratch: Path) -> Iterator[dict[str, str]]:
    """So many Ready nodes for the block; the labels that choose them. Nothing of them is left."""
    config, log = scratch / "stages.yaml", scratch / "kwok.log"
    config.write_text(stages())
    names = [f"kwok-{number}" for number in range(nodes)]
    command = [str(binary()), "--kubeconfig", str(cluster.kubeconfig), "--config", str(config)]
    command += ["--manage-all-nodes=false", f"--manage-nodes-with-label-selector={LABEL}=true"]
    command += ["--node-lease-duration-seconds=40"]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, env=cluster.environment(), stdout=out, stderr=out)
    try:
        cluster.apply(
            *(
                {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {LABEL: "true"}}}
                for name in names
            )
        )
        cluster.until(lambda: _ready(cluster) == nodes, f"{nodes} kwok nodes to be Ready", 60, log.read_text)
        yield {LABEL: "true"}
    finally:
        cluster.kubectl("delete", "nodes", "-l", f"{LABEL}=true", "--wait=false", check=False)
        process.send_signal(signal.SIGTERM)
        process.wait()


def _ready(cluster: Cluster) -> int:
    conditions = [c for n in cluster.get("nodes", labels=f"{LABEL}=true")["items"] for c in n["status"]["conditions"]]
    return sum(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
