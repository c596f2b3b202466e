"""The cluster is a real one: nodes, names, logs, Pod Security, and the launch's objects accepted by its API server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flows.show.foretell import stand_in
from k8s.render import render_launch
from tests.cluster.cluster import Cluster
from tests.cluster.host import ClusterError
from trainer.plan import compile_plan
from trainer.spec import parse_spec, what_digest

PEER = """
import os, socket, time
index, name = int(os.environ["JOB_COMPLETION_INDEX"]), os.environ["PEERS"]
peer = f"{name}-{1 - index}.{name}"
end = time.monotonic() + 60
while True:
    try:
        address = socket.getaddrinfo(peer, 7777, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        if index == 0:
            break
        talk = socket.create_connection(address, 5)
        break
    except OSError:
        if time.monotonic() > end:
            raise
        time.sleep(0.1)
if index == 0:
    door = socket.create_server(("0.0.0.0", 7777))
    door.settimeout(60)
    talk, _ = door.accept()
talk.sendall(socket.gethostname().encode().ljust(64))
said = talk.recv(64, socket.MSG_WAITALL).decode().strip()
print("met", said)
"""
CONFINED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def peers(name: str, image: str) -> list[dict[str, Any]]:
    """A Job of two pods on two nodes, and the Service that gives them names."""
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"batch.kubernetes.io/job-name": name}},
    }
    pod = {
        "restartPolicy": "Never",
        "subdomain": name,
        "topologySpreadConstraints": [spread],
        "containers": [
            {
                "name": "peer",
                "image": image,
                "imagePullPolicy": "Never",
                "command": ["python3", "-c", PEER],
                "env": [{"name": "PEERS", "value": name}],
                "securityContext": CONFINED,
            }
        ],
    }
    body = {
        "completionMode": "Indexed",
        "completions": 2,
        "parallelism": 2,
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    select = {"batch.kubernetes.io/job-name": name}
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": select}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": body},
    ]


def launch(namespace: str) -> list[dict[str, Any]]:
    """The objects of a launch of 4 stages in 2 pods."""
    spec = parse_spec(
        {
            "name": "tiny",
            "model": {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "vocab": 300, "context": 16},
            "train": {"steps": 4, "batch": 4, "microbatch": 2, "sequence": 16},
            "parallel": {"stages": 4},
            "launch": {"target": "kubernetes", "nodes": 2, "namespace": namespace},
        }
    )
    data = stand_in(spec)
    spec = spec.resolve(data)
    plan = compile_plan(spec, data, what_digest(spec, data))
    return render_launch(spec, plan, run="tiny-abc123", store_url="s3://bucket/prefix")


def test_every_node_is_ready(cluster: Cluster) -> None:
    nodes = cluster.get("nodes")["items"]
    assert {n["metadata"]["name"] for n in nodes} == set(cluster.nodes)
    for node in nodes:
        ready = [c for c in node["status"]["conditions"] if c["type"] == "Ready"]
        assert ready[0]["status"] == "True", node["status"]["conditions"]
    if cluster.own:
        assert len(nodes) == 2


def test_pods_on_both_nodes_find_each_other_by_name(cluster: Cluster, python_image: str) -> None:
    with cluster.namespace("peers") as namespace:
        cluster.apply(*peers("meet", python_image), args=["-n", namespace])
        cluster.kubectl("-n", namespace, "wait", "job/meet", "--for=condition=Complete", "--timeout=90s")
        pods = cluster.get("pods", n=namespace)["items"]
        assert {p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for p in pods} == {"0", "1"}
        assert len({p["spec"]["nodeName"] for p in pods}) == 2
        said = {
            p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: cluster.kubectl(
                "-n", namespace, "logs", p["metadata"]["name"]
            ).strip()
            for p in pods
        }
        assert said == {"0": "met meet-1", "1": "met meet-0"}


def test_a_service_is_reached_from_both_nodes(cluster: Cluster, python_image: str) -> None:
    """By its name and its own address; from the node of the pod behind it as well as from the other one."""
    marks = {"app": "web"}
    confined = {"image": python_image, "imagePullPolicy": "Never", "securityContext": CONFINED}
    web = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web", "labels": marks},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "web", "command": ["python3", "-m", "http.server", "8000"], **confined}],
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": marks, "ports": [{"port": 80, "targetPort": 8000}]},
    }
    script = (
        "import time, urllib.request as u\n"
        "end = time.monotonic() + 60\n"
        "while True:\n"
        "    try:\n"
        "        print(u.urlopen('http://web/', timeout=5).status)\n"
        "        break\n"
        "    except OSError:\n"
        "        if time.monotonic() > end: raise\n"
        "        time.sleep(0.1)\n"
    )
    _, job = peers("ask", python_image)
    job["spec"]["template"]["spec"]["containers"] = [{"name": "ask", "command": ["python3", "-c", script], **confined}]
    with cluster.namespace("service") as namespace:
        cluster.apply(web, service, job, args=["-n", namespace])
        cluster.kubectl("-n", namespace, "wait", "job/ask", "--for=condition=Complete", "--timeout=90s")
        asked = cluster.get("pods", n=namespace, labels="batch.kubernetes.io/job-name=ask")["items"]
        assert len({p["spec"]["nodeName"] for p in asked}) == 2


def test_a_launch_is_accepted_as_it_is_rendered(cluster: Cluster) -> None:
    with cluster.namespace("launch", "restricted") as namespace:
        objects = launch(namespace)
        cluster.apply(*objects, args=["--dry-run=server", "--validate=strict", "--warnings-as-errors"])
        job = next(o for o in objects if o["kind"] == "Job")
        template = job["spec"]["template"]
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        pod["metadata"] = {**template.get("metadata", {}), "name": "of-the-launch", "namespace": namespace}
        cluster.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(pod))


def test_the_namespace_refuses_what_is_not_confined(cluster: Cluster) -> None:
    with cluster.namespace("confined", "restricted") as namespace:
        free = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "free", "namespace": namespace},
            "spec": {"containers": [{"name": "free", "image": "any:1"}]},
        }
        with pytest.raises(ClusterError, match="violates PodSecurity"):
            cluster.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(free))


def test_an_account_has_the_rights_of_its_rules_and_no_others(cluster: Cluster) -> None:
    with cluster.namespace("rights") as namespace:
        rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
        path = cluster.account(namespace, "reader", rules)
        assert cluster.kubectl("--kubeconfig", str(path), "get", "pods", "-o", "name") == ""
        for verb, what in (("get", "secrets"), ("get", "nodes")):
            with pytest.raises(ClusterError, match="forbidden"):
                cluster.kubectl("--kubeconfig", str(path), verb, what)


def test_a_pod_reaches_the_api_by_its_service(cluster: Cluster, python_image: str) -> None:
    """In-cluster configuration holds: the address, the name and the authority's certificate."""
    script = (
        "import os, ssl, urllib.request as u\n"
        "at = '/var/run/secrets/kubernetes.io/serviceaccount'\n"
        "context = ssl.create_default_context(cafile=at + '/ca.crt')\n"
        "for host in (os.environ['KUBERNETES_SERVICE_HOST'], 'kubernetes.default.svc'):\n"
        "    print(u.urlopen(f'https://{host}/version', context=context, timeout=10).status)\n"
    )
    with cluster.namespace("inside") as namespace:
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "inside"},
            "spec": {
                "restartPolicy": "Never",
                "containers": [
                    {
                        "name": "inside",
                        "image": python_image,
                        "imagePullPolicy": "Never",
                        "command": ["python3", "-c", script],
                        "securityContext": CONFINED,
                    }
                ],
            },
        }
        cluster.apply(body, args=["-n", namespace])
        cluster.kubectl(
            "-n", namespace, "wait", "pod/inside", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s"
        )
        assert cluster.kubectl("-n", namespace, "logs", "inside").split() == ["200", "200"]


@pytest.mark.alone
def test_a_node_without_its_kubelet_is_not_ready_and_comes_back(cluster: Cluster) -> None:
    if not cluster.own:
        pytest.skip("a kubelet is only stopped in a cluster of our own")

    def state() -> str:
        conditions = cluster.get("nodes", "node2")["status"]["conditions"]
        return str(next(c["status"] for c in conditions if c["type"] == "Ready"))

    with cluster.away("kubelet-node2"):
        cluster.until(lambda: state() == "Unknown", "node2 to be missed", 60)
    cluster.until(lambda: state() == "True", "node2 to be Ready again", 60)
