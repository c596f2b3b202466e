"""What the doctor says of quotas and limit ranges is what the API server does: each case is judged by both."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest

from k8s.api import PODS
from k8s.quantity import amount
from k8s.quota import quota_problems, range_problems
from k8s.refusal import refusal
from tests.cluster.cluster import Cluster
from tests.k8s.test_quota import BOTH, GPU
from tests.k8s.test_render import rendered
from trainer.errors import LaunchError

SAID = {"resources": {"cpu": "1", "limits.cpu": "1"}, "agent_resources": {"cpu": "500m", "limits.cpu": "1"}}
# (hard of a ResourceQuota and its scopes, limits of a LimitRange, launch, why a pod is refused; "" where it is not)
CASES: list[tuple[dict[str, str], list[str], dict[str, Any], dict[str, Any], str]] = [
    ({"limits.cpu": "100"}, [], {}, {}, "unset"),
    ({"cpu": "100"}, [], {}, {}, "unset"),
    ({"limits.cpu": "100"}, [], {}, BOTH, ""),
    ({"limits.cpu": "1e2", "pods": "1e3", "limits.memory": "1E"}, [], {}, BOTH, ""),
    ({"limits.cpu": "4999m"}, [], {}, BOTH, "quota"),
    ({"limits.cpu": "5"}, [], {}, BOTH, ""),
    ({"requests.cpu": "2.5"}, [], {}, BOTH, ""),
    ({"requests.cpu": "2499m"}, [], {}, BOTH, "quota"),
    ({"requests.memory": "1Mi"}, [], {}, {}, "quota"),
    ({"pods": "0"}, [], {}, {}, "quota"),
    ({"requests.ephemeral-storage": "1Gi"}, [], {}, {}, ""),
    ({"requests.ephemeral-storage": "1Gi"}, [], {}, {"resources": {"ephemeral-storage": "2Gi"}}, "quota"),
    ({f"requests.{GPU}": "3"}, [], {}, {"resources": {GPU: "4"}}, "quota"),
    ({f"requests.{GPU}": "4"}, [], {}, {"resources": {GPU: "4"}}, ""),
    ({"pods": "0"}, ["BestEffort"], {}, {}, ""),
    ({"pods": "0"}, ["NotBestEffort"], {}, {}, "quota"),
    ({"pods": "0"}, ["Terminating"], {}, {}, ""),
    ({"limits.cpu": "100"}, ["NotTerminating"], {}, {}, "unset"),
    ({"limits.cpu": "4"}, [], {"default": {"cpu": "2"}, "defaultRequest": {"cpu": "1"}}, {}, ""),
    ({"limits.cpu": "3"}, [], {"default": {"cpu": "2"}, "defaultRequest": {"cpu": "1"}}, {}, "quota"),
    ({}, [], {"max": {"cpu": "3"}}, BOTH, "range"),
    ({}, [], {"max": {"cpu": "4"}}, BOTH, ""),
    ({}, [], {"max": {"cpu": "4"}}, {}, ""),  # it is the default too
    ({}, [], {"min": {"cpu": "600m"}}, BOTH, "range"),
    ({}, [], {"min": {"ephemeral-storage": "1Gi"}}, {}, ""),  # it is the default too
    ({}, [], {"maxLimitRequestRatio": {"cpu": "1.5"}}, SAID, "range"),
    ({}, [], {"maxLimitRequestRatio": {"cpu": "2"}}, SAID, ""),
    ({}, [], {"default": {"cpu": "1"}, "defaultRequest": {"cpu": "500m"}}, {"resources": {"cpu": "2"}}, "range"),
    ({}, [], {"type": "Pod", "max": {"cpu": "4900m"}}, BOTH, "range"),
    ({}, [], {"type": "Pod", "max": {"cpu": "5"}}, BOTH, ""),
    ({}, [], {"type": "Pod", "min": {"cpu": "1"}}, {}, "range"),
]


@pytest.fixture(scope="module")
def namespace(standing: Cluster) -> Iterator[str]:
    with standing.namespace("quotas") as name:
        yield name


def _refusal_of(cluster: Cluster, namespace: str, job: dict[str, Any]) -> str:
    """What the API server says to a pod of the Job; empty where it takes it. None is made."""
    template = job["spec"]["template"]
    meta = {**template["metadata"], "name": "of-the-launch", "namespace": namespace}
    pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": meta}
    try:
        cluster.api.create(PODS.path(namespace), pod, dry_run=True)
    except LaunchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_doctor_and_the_api_server_agree(cluster: Cluster, namespace: str, number: int) -> None:
    hard, scopes, bounds, launch, why = CASES[number]
    meta, quotas, ranges = {"name": f"case-{number}", "namespace": namespace}, [], []
    if hard:
        spec = {"hard": hard, **({"scopes": scopes} if scopes else {})}
        cluster.put({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": meta, "spec": spec})
    if bounds:
        limits = [{"type": "Container", **bounds}]
        cluster.put({"apiVersion": "v1", "kind": "LimitRange", "metadata": meta, "spec": {"limits": limits}})
    try:
        if hard:
            cluster.until(
                lambda: "used" in _here(cluster, namespace, "resourcequotas")[0].get("status", {}), "its status"
            )
        quotas, ranges = (_here(cluster, namespace, kind) for kind in ("resourcequotas", "limitranges"))
        job = rendered(**launch)[0]
        found = [p for item in ranges for p in range_problems(item, job["spec"]["template"]["spec"], ranges)]
        found += [p for item in quotas for p in quota_problems(item, job, ranges) if p.never]
        told = ""

        def as_foreseen() -> bool:
            """Admission sees what was just made a moment later."""
            nonlocal told
            told = _refusal_of(cluster, namespace, job)
            refused = refusal(told)
            return (refused.kind if refused else "") == why

        cluster.until(as_foreseen, f"an answer of kind {why!r}", 10, lambda: told)
        assert bool(found) == bool(why), (found, told)
    finally:
        for kind in ("resourcequotas", "limitranges"):
            cluster.delete(kind, f"case-{number}", n=namespace)
        cluster.until(
            lambda: not any(_here(cluster, namespace, kind) for kind in ("resourcequotas", "limitranges")), "their end"
        )


def _here(cluster: Cluster, namespace: str, kind: str) -> list[dict[str, Any]]:
    return list(cluster.get(kind, n=namespace)["items"])


def test_quantities_are_read_as_the_api_server_reads_them(cluster: Cluster, namespace: str) -> None:
    """What it makes of each in a quota, in its own canonical form."""
    texts = ["1e3", "1E3", "1E", "0.5", "100m", "1Ki", "1.5Gi", "5k", ".5", "1.", "1e-3", "0.1n", "+3", "007", "9Ei"]
    hard = {f"requests.example.com/q{n}": text for n, text in enumerate(texts)}
    body = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "forms"}, "spec": {"hard": hard}}
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    answer = cluster.api.create(path, body, dry_run=True)["spec"]["hard"]
    for n, text in enumerate(texts):
        kept = Fraction(math.ceil(amount(text) * 1000), 1000)  # lists of resources have nothing finer
        assert amount(answer[f"requests.example.com/q{n}"]) == kept, text
