"""k8s/base and its overlays: the client's models, rights, confinement, network, and kustomize itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from k8s.doctor import RIGHTS, ROLE
from k8s.render import PORT_BASE, PORTS
from tests.support.go import cache
from trainer.spec import load_spec

FOLDER = Path(__file__).resolve().parents[2] / "k8s"
KUSTOMIZATIONS = sorted(path.parent for path in FOLDER.rglob("kustomization.yaml"))
PREFECT = FOLDER / "prefect"
"""Prefect's own deployments for a cluster's work pool: none of Kubernetes' objects."""
FILES = sorted(p for p in FOLDER.rglob("*.yaml") if p.name != "kustomization.yaml" and p.parent != PREFECT)
PATCHES = {"prefect-data.yaml", "prefect-database.yaml", "identity.yaml", "flows-metrics.yaml"}
# kinds of operators: the client has no models of them
FOREIGN = {"PodMonitor", "PrometheusRule", "LocalQueue"}


def documents(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def everything() -> Iterator[dict[str, Any]]:
    for path in FILES:
        if path.name not in PATCHES:
            yield from documents(path)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(FOLDER)))
def test_every_object_passes_the_clients_models(path: Path) -> None:
    for item in documents(path):
        if item["kind"] in FOREIGN or path.name in PATCHES - {"identity.yaml"}:
            assert {"apiVersion", "kind", "metadata"} <= set(item)
            continue
        getattr(client, f"V1{item['kind']}").model_validate(item)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda p: str(p.relative_to(FOLDER)))
def test_every_file_that_is_named_is_there_and_every_file_is_named(folder: Path) -> None:
    (top,) = documents(folder / "kustomization.yaml")
    named = [*top.get("resources", ()), *top.get("components", ()), *(p["path"] for p in top.get("patches", ()))]
    named += [file for g in top.get("configMapGenerator", ()) for file in g.get("files", ())]
    for name in named:
        assert (folder / name).exists(), name
    inside = {p.name for p in folder.iterdir() if p.is_file() and p.name != "kustomization.yaml"}
    assert inside == {name for name in named if "/" not in name}


def test_the_role_is_the_doctors_list_of_at_most_fifteen_pairs() -> None:
    (role,) = [d for d in everything() if d["kind"] == "Role"]
    assert role["metadata"]["name"] == ROLE
    pairs = {(r, v) for rule in role["rules"] for r in rule["resources"] for v in rule["verbs"]}
    assert pairs == {(r, v) for _, r, verbs in RIGHTS for v in verbs}
    assert len(pairs) <= 15
    assert not [
        d for d in everything() if d["kind"] in ("ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition")
    ]


def test_every_pod_is_restricted() -> None:
    pods = [d["spec"]["template"]["spec"] for d in everything() if d["kind"] == "Deployment"]
    pods += [d["spec"]["jobTemplate"]["spec"]["template"]["spec"] for d in everything() if d["kind"] == "CronJob"]
    assert len(pods) == 4
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]


def test_the_collector_is_an_account_of_its_own_with_credentials_of_its_own() -> None:
    """And nobody else's: what deletes does not drive, and what drives does not delete."""
    (job,) = [d for d in everything() if d["kind"] == "CronJob"]
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    others = [d["spec"]["template"]["spec"] for d in everything() if d["kind"] == "Deployment"]
    assert pod["serviceAccountName"] == "hotstage-collector"
    assert pod["automountServiceAccountToken"] is False
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    (container,) = pod["containers"]
    assert container["command"] == ["hotstage", "ckpt", "gc"]

    def secrets(of: dict[str, Any]) -> set[str]:
        return {e["secretRef"]["name"] for c in of["containers"] for e in c.get("envFrom", ()) if "secretRef" in e}

    assert secrets(pod) == {"hotstage-collector"}
    assert not any("hotstage-collector" in {*secrets(o), o.get("serviceAccountName")} for o in others)
    roles = {d["metadata"]["name"]: d for d in documents(FOLDER / "overlays" / "production" / "identity.yaml")}
    arns = {name: d["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] for name, d in roles.items()}
    assert set(arns) == {"hotstage-trainer", "hotstage-flows", "hotstage-collector"}
    assert len(set(arns.values())) == 3


def test_the_trainer_has_no_rights_and_nothing_is_open_by_default() -> None:
    bindings = [d for d in everything() if d["kind"] == "RoleBinding"]
    assert [s["name"] for b in bindings for s in b["subjects"]] == ["hotstage-flows"]
    (deny,) = [d for d in everything() if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "deny-all"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.toml")), ids=lambda p: p.name)
def test_the_specs_load(path: Path) -> None:
    spec = load_spec(path)
    assert spec.launch.target == "kubernetes"
    assert spec.launch.namespace == "hotstage"


def kubectl() -> list[str] | None:
    """The test cluster's kubectl, where it has been built; never built here."""
    named = os.environ.get("HOTSTAGE_KUBE")
    found = [Path(named)] if named else sorted((cache() / "kube").glob("*/kube"))
    return [str(found[0]), "kubectl"] if found else None


@pytest.mark.parametrize("overlay", ["quick", "production"])
def test_kustomize_builds_the_overlays(overlay: str) -> None:
    program = kubectl()
    if program is None:
        pytest.skip("the test cluster's kubectl is not built (make test-cluster builds it)")
    done = subprocess.run(
        [*program, "kustomize", str(FOLDER / "overlays" / overlay)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    built = [d for d in yaml.safe_load_all(done.stdout) if d]
    kinds = [d["kind"] for d in built]
    assert kinds.count("Deployment") == (3 if overlay == "quick" else 2)
    assert kinds.count("CronJob") == 1
    assert all(d["metadata"].get("namespace") == "hotstage" for d in built if d["kind"] != "Namespace")
    for item in built:
        if item["kind"] not in FOREIGN:
            getattr(client, f"V1{item['kind']}").model_validate(item)


# --- who reaches whom, by the quick overlay's network rules (the test cluster's network plugin enforces none) ---------

POLICIES = [
    item["spec"]
    for path in (FOLDER / "base" / "network.yaml", FOLDER / "overlays" / "quick" / "store.yaml")
    for item in documents(path)
    if item["kind"] == "NetworkPolicy"
]


def selects(selector: dict[str, Any], name: str) -> bool:
    """Whether a pod of this app.kubernetes.io/name is meant."""
    labels = {"app.kubernetes.io/name": name}
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    known = [e for e in selector.get("matchExpressions", ()) if e["operator"] == "In"]
    assert len(known) == len(selector.get("matchExpressions", ()))
    return all(labels.get(e["key"]) in e["values"] for e in known)


def passes(direction: str, who: str, other: str | None, port: int) -> bool:
    """Whether ``who`` may talk so; ``other`` is a pod's name, None for what is outside of the namespace."""
    mine = [p for p in POLICIES if direction in p["policyTypes"] and selects(p["podSelector"], who)]
    for rule in (rule for p in mine for rule in p.get(direction.lower(), ())):
        peers = rule.get("to" if direction == "Egress" else "from")
        meant = peers is None or any(
            other is not None and "podSelector" in peer and selects(peer["podSelector"], other) for peer in peers
        )
        if meant and any(p["port"] <= port <= p.get("endPort", p["port"]) for p in rule["ports"]):
            return True
    return not mine


def reaches(who: str, other: str | None, port: int) -> bool:
    return passes("Egress", who, other, port) and (other is None or passes("Ingress", other, who, port))


@pytest.mark.parametrize(
    ("who", "other", "port"),
    [
        ("hotstage-trainer", "hotstage-trainer", PORT_BASE),
        ("hotstage-trainer", "hotstage-trainer", PORT_BASE + PORTS - 1),
        ("hotstage-trainer", "store", 7070),
        ("hotstage-trainer", None, 443),  # a store elsewhere
        ("hotstage-trainer", None, 53),
        ("hotstage-flows", "store", 7070),
        ("hotstage-collector", "store", 7070),
        ("hotstage-collector", None, 443),
        ("hotstage-flows", "prefect", 4200),
        ("hotstage-flows", None, 443),
        ("hotstage-flows", None, 6443),  # the API server
    ],
)
def test_what_a_run_needs_is_open(who: str, other: str | None, port: int) -> None:
    assert reaches(who, other, port)


@pytest.mark.parametrize(
    ("who", "other", "port"),
    [
        ("hotstage-trainer", "hotstage-trainer", PORT_BASE - 1),
        ("hotstage-trainer", "hotstage-trainer", PORT_BASE + PORTS),
        ("hotstage-trainer", "prefect", 4200),
        ("hotstage-trainer", None, 6443),
        ("hotstage-trainer", None, 80),
        ("hotstage-flows", "hotstage-trainer", PORT_BASE),
        ("hotstage-collector", "prefect", 4200),
        ("hotstage-collector", "hotstage-trainer", PORT_BASE),
        ("hotstage-collector", None, 6443),
        ("somebody", "hotstage-trainer", PORT_BASE),
        ("somebody", "store", 7070),
        ("somebody", "prefect", 4200),
        ("prefect", None, 443),
        ("store", None, 443),
    ],
)
def test_what_no_run_needs_is_closed(who: str, other: str | None, port: int) -> None:
    assert not reaches(who, other, port)
