"""The manifests against the API server's own schemas and admission: a server-side dry run of every overlay."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.cluster.cluster import ROOT, Cluster

FOREIGN = {"PodMonitor", "PrometheusRule", "LocalQueue"}  # of operators that this cluster does not have


@pytest.mark.parametrize("overlay", ["quick", "production"])
def test_the_api_server_takes_every_object(cluster: Cluster, overlay: str) -> None:
    built = cluster.kubectl("kustomize", str(ROOT / "k8s" / "overlays" / overlay))
    with cluster.namespace("overlay") as namespace:
        objects: list[dict[str, Any]] = []
        for item in yaml.safe_load_all(built):
            if item["kind"] in FOREIGN or item["kind"] == "Namespace":
                continue
            item["metadata"]["namespace"] = namespace
            for subject in item.get("subjects", ()):
                subject["namespace"] = namespace
            objects.append(item)
        said = cluster.apply(*objects, args=("--dry-run=server",))
    assert said.count("serverside-applied") == len(objects)


def test_the_doctor_finds_nothing_bad_here(cluster: Cluster) -> None:
    from k8s.api import Api
    from k8s.doctor import RunNeeds, examine

    with cluster.namespace("doctor") as namespace:
        checks = examine(Api.load(str(cluster.kubeconfig)), RunNeeds(namespace))
    assert [c for c in checks if c.verdict == "bad"] == []
    assert {c.name for c in checks} >= {"version", "rights", "namespace", "quota", "machines"}
