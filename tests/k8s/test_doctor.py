"""What the doctor finds on a cluster, each with its mend; and that it stays within its time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes.client import Configuration

from k8s.api import PODS, Api
from k8s.doctor import RIGHTS, Check, RunNeeds, examine
from k8s.kubeconfig import Access
from tests.k8s.api_server import ApiServer
from tests.k8s.test_launcher import LAUNCH_OF, NAME, connect, run_pods
from tests.k8s.test_render import rendered
from tests.k8s.test_watch import until

NODES = "/api/v1/nodes"
SPACE = "/api/v1/namespaces/train"


def node(name: str, cpu: str = "8", memory: str = "16Gi", **spec: Any) -> dict[str, Any]:
    status = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"cpu": cpu, "memory": memory}}
    return {"metadata": {"name": name, "labels": {"pool": "a"}}, "spec": spec, "status": status}


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as made:
        made.documents["/version"] = {"gitVersion": "v1.35.4+k3s1"}
        made.documents[NODES] = {"items": [node("m1"), node("m2")]}
        made.documents[SPACE] = {
            "metadata": {"name": "train", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}
        }
        made.put(
            f"{SPACE}/secrets",
            {"metadata": {"name": "s3"}, "data": {"AWS_ACCESS_KEY_ID": "eA==", "AWS_SECRET_ACCESS_KEY": "eA=="}},
        )
        yield made


def examined(server: ApiServer, on_gpus: bool = False, **launch: Any) -> dict[str, list[Check]]:
    configuration = Configuration()
    configuration.host = server.url
    launch = {"store_secret": "s3", "image": "reg/engine:1", "agent_image": "reg/agent:1", **launch}
    job = rendered(**launch)[0]
    fabric = launch.get("fabric", "tcp")
    wanted = RunNeeds("train", job, "s3://b/p", launch["store_secret"], launch.get("queue", ""), fabric, on_gpus)
    found: dict[str, list[Check]] = {}
    for check in examine(Api(Access(configuration)), wanted):
        found.setdefault(check.name, []).append(check)
    return found


def test_a_fit_cluster_has_nothing_to_mend(server: ApiServer) -> None:
    found = examined(server)
    assert {check.verdict for checks in found.values() for check in checks} == {"ok"}
    assert set(found) == {"version", "rights", "namespace", "quota", "machines", "images", "store", "admission"}


def test_rights_fit_the_role_of_fifteen_pairs() -> None:
    assert sum(len(verbs) for _, _, verbs in RIGHTS) <= 15


@pytest.mark.parametrize(("resource", "verb"), [(r, v) for _, r, verbs in RIGHTS for v in verbs])
def test_every_missing_right_is_named_with_the_role(server: ApiServer, resource: str, verb: str) -> None:
    server.denied.add((verb, resource))
    (check,) = examined(server)["rights"]
    assert check.verdict in ("bad", "warn")
    assert f"may not {verb} {resource}" in check.text
    assert "Role hotstage-launcher" in check.mend


def test_an_old_cluster(server: ApiServer) -> None:
    server.documents["/version"] = {"gitVersion": "v1.28.9"}
    (check,) = examined(server)["version"]
    assert (check.verdict, "native sidecar" in check.mend) == ("bad", True)


def test_a_fabric_that_the_namespace_does_not_allow(server: ApiServer) -> None:
    (check,) = examined(server, fabric="infiniband")["namespace"]
    assert check.verdict == "bad"
    assert "IPC_LOCK" in check.text


def test_a_quota_that_is_too_small(server: ApiServer) -> None:
    server.put(
        f"{SPACE}/resourcequotas",
        {
            "metadata": {"name": "small"},
            "status": {"hard": {"pods": "3", "requests.memory": "1Gi"}, "used": {"pods": "2"}},
        },
    )
    texts = [c.text for c in examined(server)["quota"]]
    assert any("leaves 1 of pods, the run asks for 2" in text for text in texts)
    assert any("requests.memory" in text for text in texts)


COUNTED = {"metadata": {"name": "team"}, "status": {"hard": {"limits.cpu": "100", "pods": "1e3"}}}


def test_a_quota_on_what_our_pods_do_not_set(server: ApiServer) -> None:
    """The finding, then what its mend makes of it, then what the namespace's own default makes of it."""
    server.put(f"{SPACE}/resourcequotas", COUNTED)
    (check,) = examined(server)["quota"]
    assert check.verdict == "bad"
    assert "quota team counts limits.cpu and containers agent, engine set none" in check.text
    assert 'set launch.resources."limits.cpu" and launch.agent_resources."limits.cpu"' in check.mend
    mended = {"resources": {"limits.cpu": "4"}, "agent_resources": {"limits.cpu": "1"}}
    assert [c.verdict for c in examined(server, **mended)["quota"]] == ["ok"]

    server.denied.add(("list", "limitranges"))
    (check,) = examined(server)["quota"]
    assert (check.verdict, "may not list limitranges" in check.text) == ("warn", True)
    server.denied.clear()

    default = {"type": "Container", "default": {"cpu": "2"}, "defaultRequest": {"cpu": "1"}, "max": {"cpu": "3"}}
    server.put(f"{SPACE}/limitranges", {"metadata": {"name": "usual"}, "spec": {"limits": [default]}})
    assert [c.verdict for c in examined(server)["quota"]] == ["ok"]
    (check,) = examined(server, **mended)["quota"]
    assert "LimitRange usual allows at most 3 cpu; container engine has a limit of 4" in check.text
    assert 'set launch.resources."limits.cpu"' in check.mend


def test_a_quota_that_cannot_be_read_is_no_traceback(server: ApiServer) -> None:
    server.put(f"{SPACE}/resourcequotas", {"metadata": {"name": "odd"}, "status": {"hard": {"pods": "1e"}}})
    (check,) = examined(server)["quota"]
    assert (check.verdict, "'1e' is no quantity" in check.text) == ("unknown", True)


def test_credentials_that_have_expired_are_bad_and_missing_rights_are_not(server: ApiServer) -> None:
    server.denied.add(("list", "resourcequotas"))
    (check,) = examined(server)["quota"]
    assert check.verdict == "unknown"
    server.expired = True
    assert examined(server)["version"][0].verdict == "bad"


def test_a_fabric_that_is_not_run(server: ApiServer) -> None:
    (check,) = examined(server, fabric="nvl72")["fabric"]
    assert (check.verdict, check.text) == ("bad", "launch.fabric = 'nvl72' is for ranks on GPUs alone")
    assert "set launch.fabric = 'tcp'" in check.mend
    (check,) = examined(server, on_gpus=True, fabric="nvl72")["fabric"]
    assert check.verdict == "warn"
    assert "on every TCP port (trainer-peers)" in check.mend


@pytest.mark.parametrize(
    ("machine", "launch", "why"),
    [
        (node("m1", cpu="1"), {"resources": {"cpu": "4"}}, "has 1 cpu"),
        (node("m1", taints=[{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]), {}, "taint gpu=yes"),
        (node("m1"), {"node_selector": {"pool": "b"}}, "has no label pool=b"),
    ],
)
def test_machines_that_do_not_fit(server: ApiServer, machine: dict[str, Any], launch: dict[str, Any], why: str) -> None:
    server.documents[NODES] = {"items": [machine]}
    (check,) = examined(server, **launch)["machines"]
    assert (check.verdict, why in check.text) == ("bad", True)


def test_a_toleration_helps(server: ApiServer) -> None:
    server.documents[NODES] = {"items": [node("m1", taints=[{"key": "gpu", "effect": "NoSchedule"}])] * 2}
    (check,) = examined(server, tolerations=[{"key": "gpu", "operator": "Exists"}])["machines"]
    assert check.verdict == "ok"


def test_machines_that_may_not_be_listed_are_no_fault(server: ApiServer) -> None:
    del server.documents[NODES]
    server.denied.add(("list", "nodes"))
    (check,) = examined(server)["machines"]
    assert check.verdict == "unknown"


@pytest.mark.parametrize(
    ("image", "text"), [("reg/engine:latest", "no fixed version"), ("reg/engine", "no fixed"), ("engine:1", "registry")]
)
def test_images_that_may_not_come(server: ApiServer, image: str, text: str) -> None:
    (check,) = examined(server, image=image)["images"]
    assert (check.verdict, text in check.text) == ("warn", True)


def test_the_store_and_its_secret(server: ApiServer) -> None:
    (check,) = examined(server, store_secret="missing")["store"]
    assert (check.verdict, "kubectl -n train create secret" in check.mend) == ("bad", True)
    server.put(f"{SPACE}/secrets", {"metadata": {"name": "half"}, "data": {"AWS_ACCESS_KEY_ID": "eA=="}})
    (check,) = examined(server, store_secret="half")["store"]
    assert "AWS_SECRET_ACCESS_KEY" in check.text


def test_a_queue_that_is_not_there(server: ApiServer) -> None:
    """Whatever version of its API Kueue serves: v1beta1 is no more since 2026."""
    (check,) = examined(server, queue="team")["queue"]
    assert (check.verdict, check.text) == ("bad", "the cluster has no Kueue")
    server.documents["/apis/kueue.x-k8s.io"] = {"preferredVersion": {"version": "v1beta2"}}
    (check,) = examined(server, queue="team")["queue"]
    assert (check.verdict, check.text) == ("bad", "there is no LocalQueue team in train")
    server.put("/apis/kueue.x-k8s.io/v1beta2/namespaces/train/localqueues", {"metadata": {"name": "team"}})
    assert [c.verdict for c in examined(server, queue="team")["queue"]] == ["ok"]


def test_nobody_there(server: ApiServer) -> None:
    configuration = Configuration()
    configuration.host = "http://127.0.0.1:9"
    (check,) = examine(Api(Access(configuration)), RunNeeds("train"))
    assert (check.name, check.verdict) == ("version", "bad")


PATCH = {
    "imagePullSecrets": [{"name": "pull"}],
    "volumes": [
        {"name": "work", "emptyDir": None, "persistentVolumeClaim": {"claimName": "scratch"}},
        {"name": "more", "projected": {"sources": [{"configMap": {"name": "roots", "items": [{"key": "ca.crt"}]}}]}},
    ],
    "initContainers": [
        {
            "name": "agent",
            "env": [
                {"name": "A", "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "url"}}},
                {"name": "B", "valueFrom": {"secretKeyRef": {"name": "maybe", "key": "x", "optional": True}}},
            ],
        }
    ],
}


def test_what_the_pods_name_is_looked_for(server: ApiServer) -> None:
    found = [(c.verdict, c.text) for c in examined(server, pod_patch=PATCH)["named"]]
    assert found == [
        ("warn", "there is no Secret pull in train: images are pulled without it"),
        ("bad", "there is no PersistentVolumeClaim scratch in train: pods wait for it, and do not start"),
        ("bad", "there is no ConfigMap roots in train: pods wait for it, and do not start"),
        ("bad", "there is no Secret proxy in train: pods wait for it, and do not start"),
    ]
    for plural, item in (
        ("secrets", {"metadata": {"name": "pull"}, "type": "Opaque"}),
        ("persistentvolumeclaims", {"metadata": {"name": "scratch"}, "status": {"phase": "Lost"}}),
        ("configmaps", {"metadata": {"name": "roots"}, "data": {"ca.pem": "x"}}),
        ("secrets", {"metadata": {"name": "proxy"}, "data": {"url": "eA=="}}),
    ):
        server.put(f"{SPACE}/{plural}", item)
    assert [c.text for c in examined(server, pod_patch=PATCH)["named"]] == [
        "Secret pull is none for registries: its type is Opaque",
        "PersistentVolumeClaim scratch has lost its volume",
        "ConfigMap roots lacks ca.crt, which the pods name",
    ]
    once = {"metadata": {"name": "scratch"}, "spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Bound"}}
    server.put(f"{SPACE}/persistentvolumeclaims", once)
    (_, claim, _) = examined(server, pod_patch=PATCH)["named"]
    assert (claim.verdict, "ReadWriteOnce, for one machine: of 2 pods those on others" in claim.text) == ("warn", True)
    assert "ReadWriteMany" in claim.mend
    server.denied.add(("get", "configmaps"))
    (_, _, check) = examined(server, pod_patch=PATCH)["named"]
    assert (check.verdict, check.text.endswith("nobody looked whether ConfigMap roots is there")) == ("unknown", True)


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ('error looking up service account train/gone: serviceaccount "gone" not found', "launch.service_account"),
        ("no PriorityClass with name high was found", "launch.priority_class"),
        ('pod rejected: RuntimeClass "kata" not found', "launch.runtime_class"),
        ('violates PodSecurity "restricted:latest": hostPath volumes', "lower Pod Security level"),
    ],
)
def test_what_the_api_server_says_of_a_pod_is_told(server: ApiServer, said: str, mend: str) -> None:
    """Of a Job alone it says nothing of that."""
    server.refused[f"{SPACE}/pods"] = f'pods "tiny-doctor" is forbidden: {said}'
    (check,) = examined(server)["admission"]
    assert (check.verdict, said in check.text, mend in check.text) == ("bad", True, True)


def test_who_may_not_create_pods_hears_that_nobody_asked(server: ApiServer) -> None:
    server.denied.add(("create", "pods"))
    (check,) = examined(server)["admission"]
    assert (check.verdict, "this user may not create pods" in check.text) == ("ok", True)


@pytest.mark.parametrize(
    ("rules", "fits"),
    [
        ([{"key": "pool", "operator": "In", "values": ["a", "b"]}], True),
        ([{"key": "pool", "operator": "NotIn", "values": ["a"]}], False),
        ([{"key": "pool", "operator": "Exists"}, {"key": "gone", "operator": "DoesNotExist"}], True),
        ([{"key": "cores", "operator": "Gt", "values": ["4"]}], False),
    ],
)
def test_machines_that_affinity_leaves(server: ApiServer, rules: list[dict[str, Any]], fits: bool) -> None:
    required = {"nodeSelectorTerms": [{"matchExpressions": rules}]}
    patch = {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}
    (check,) = examined(server, pod_patch=patch)["machines"]
    assert (check.verdict == "ok", "nodeAffinity" in check.text) == (fits, not fits)


def test_no_time_left_is_said(server: ApiServer) -> None:
    configuration = Configuration()
    configuration.host = server.url
    times = iter([0.0, 1.0, *([20.0] * 20)])
    found = examine(Api(Access(configuration)), RunNeeds("train"), clock=lambda: next(times))
    assert [c.verdict for c in found] == ["ok"] + ["unknown"] * 11


def test_every_right_of_the_role_is_needed_and_no_other_is(server: ApiServer) -> None:
    """A launch's life, the doctor and the logs, and every request that they make: the Role is that list."""
    first, second = connect(server), connect(server)
    first.ensure(LAUNCH_OF)
    second.ensure(LAUNCH_OF)  # adopts: reads what is there
    until(lambda: first.observe(NAME).state == "waiting", "the Job to be seen")
    (pod, _) = run_pods(server)
    until(lambda: first.observe(NAME).state == "running", "the pods to run")
    configuration = Configuration()
    configuration.host = server.url
    server.documents[f"{SPACE}/pods/{pod}/log"] = {}
    Api(Access(configuration)).text(PODS.path("train", pod, "log"))
    first.stop(NAME, 5.0)
    first.close()
    second.close()
    examined(server)
    wanted = {(verb, resource) for _, resource, verbs in RIGHTS for verb in verbs}
    more = {("list", "nodes"), ("list", "version"), ("list", "limitranges"), ("create", "pods")}  # or not needed
    assert server.used - more == wanted


def with_gpus(server: ApiServer, *counts: int, **launch: Any) -> list[Check]:
    machines = [node(f"m{number}") for number, _ in enumerate(counts)]
    for machine, count in zip(machines, counts, strict=True):
        if count:
            machine["status"]["allocatable"]["nvidia.com/gpu"] = str(count)
    server.documents[NODES] = {"items": machines}
    return examined(server, resources={"nvidia.com/gpu": "4"}, **launch)["gpus"]


def test_gpus_of_the_cluster_and_of_the_run(server: ApiServer) -> None:
    (check,) = with_gpus(server, 8, 0)
    assert check == Check("gpus", "ok", "8 nvidia.com/gpu on 1 of 2 machines; the run asks for 4 in each of 2 pods")
    (check,) = with_gpus(server, 7, 2)
    assert (check.verdict, check.text.endswith("in each of 2 pods: room for 1")) == ("bad", True)
    (check,) = with_gpus(server, 0, 0)
    assert (check.verdict, check.mend.startswith("install NVIDIA's device plugin")) == ("bad", True)


def test_the_image_for_cpus_on_gpus(server: ApiServer) -> None:
    image, room = with_gpus(server, 8, image="reg.example/train/hotstage-engine:0.1.0")
    assert (image.verdict, room.verdict) == ("bad", "ok")
    assert "is the one for CPUs" in image.text
    assert "hotstage-engine-cuda:0.1.0" in image.mend
