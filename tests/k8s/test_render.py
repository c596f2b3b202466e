"""The objects of a launch, against the client's own models and against the contracts that they must keep."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import V1Job, V1Service

import k8s
from flows.show.foretell import stand_in
from k8s.labels import object_name
from k8s.patch import apply_patch
from k8s.render import (
    AGENT,
    CUDA_IMAGE,
    DEFAULT_IMAGE,
    ENGINE,
    FABRICS,
    PORT_BASE,
    PORTS,
    check_fabric,
    render_launch,
)
from trainer.errors import LaunchRefused
from trainer.plan import compile_plan
from trainer.plan.memory import WORKSPACE_BYTES_PER_THREAD
from trainer.spec import parse_spec, what_digest
from trainer.wire import EXITS

TINY = {
    "name": "tiny",
    "model": {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "vocab": 300, "context": 16},
    "train": {"steps": 4, "batch": 4, "microbatch": 2, "sequence": 16},
    "parallel": {"stages": 4},
    "launch": {"target": "kubernetes", "nodes": 2, "namespace": "train"},
}


def rendered(*sets: str, **launch: Any) -> list[dict[str, Any]]:
    spec = parse_spec({**TINY, "launch": {**TINY["launch"], **launch}}, sets)  # type: ignore[dict-item]
    data = stand_in(spec)
    spec = spec.resolve(data)
    return render_launch(
        spec, compile_plan(spec, data, what_digest(spec, data)), run="tiny-0a1b2c", store_url="s3://b/p"
    )


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"node_selector": {"gpu": "a b"}}, r"node_selector.gpu = 'a b' is no label's value: at most 63 letters"),
        ({"node_selector": {"gpu": "x" * 64}}, "is no label's value"),
        ({"node_selector": {"gpu": "-a"}}, "is no label's value"),
        ({"node_selector": {"a/b/c": "x"}}, "'a/b/c' is no label of a machine"),
        ({"tolerations": [{"key": "a b"}]}, r"tolerations\[0\] has the key 'a b', which no taint has"),
        ({"tolerations": [{"ky": "a"}]}, "has the key 'ky'; there are key, operator"),
        (
            {"tolerations": [{"effect": "NoSchedule"}]},
            'has no key; name one, or bear all taints by operator = "Exists"',
        ),
        ({"tolerations": [{"key": "a", "operator": "Equals"}]}, "has the operator 'Equals'; take one of Exists"),
        ({"tolerations": [{"key": "a", "effect": "NoScedule"}]}, "has the effect 'NoScedule'; take one of NoSchedule"),
        ({"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}, "value 'b' with operator \"Exists\""),
        ({"tolerations": [{"key": "a", "value": True}]}, "has the value True: it is at most 63"),
        ({"tolerations": [{"key": "a", "tolerationSeconds": 5}]}, 'goes with effect = "NoExecute" alone'),
        ({"image": "registry/Name:tag"}, "is no image: Name is written in lower case"),
        ({"labels": {"a b": "c"}}, "launch.labels: 'a b' is no label's name; write as example.com/team"),
        ({"annotations": {"a/b/c": "c"}}, "launch.annotations: 'a/b/c' is no annotation's name"),
        ({"labels": {"team": "a b"}}, "labels.team = 'a b' is no label's value: .*launch.annotations.*any text"),
        (
            {"labels": {"hotstage.dev/run": "x"}},
            "hotstage.dev/run is set by hotstage or Kubernetes itself; take it out",
        ),
        ({"labels": {"app.kubernetes.io/name": "x"}}, "app.kubernetes.io/name is set by hotstage"),
        ({"annotations": {"batch.kubernetes.io/x": "x"}}, "batch.kubernetes.io/x is set by hotstage"),
        ({"labels": {"kueue.x-k8s.io/queue-name": "a"}}, "kueue.x-k8s.io/queue-name is launch.queue here"),
    ],
)
def test_names_that_the_api_server_does_not_take(launch: dict[str, Any], words: str) -> None:
    with pytest.raises(LaunchRefused, match=words):
        rendered(**launch)


def test_names_at_their_limits_are_taken() -> None:
    bears = [{"operator": "Exists"}, {"key": "a.b/c_D", "value": "", "effect": "NoExecute", "tolerationSeconds": 0}]
    selects = {"a.b/c": "x" * 63, "gpu": "", "A_b": "1.0"}
    image = "Registry.example:5000/a/b:Tag@sha256:0A"
    job, _, _ = rendered(node_selector=selects, tolerations=bears, image=image)
    pod = job["spec"]["template"]["spec"]
    assert (pod["nodeSelector"], pod["containers"][0]["image"]) == (selects, image)
    assert all(bear in pod["tolerations"] for bear in bears)


def test_labels_and_annotations_of_the_users_own() -> None:
    """What meshes, autoscalers and policies of a cluster look for; without them the objects are as before."""
    sets = ("launch.labels.sidecar.istio.io/inject='false'", "launch.annotations.karpenter.sh/do-not-disrupt='true'")
    objects, plain = rendered(*sets, labels={"team": "nlp"}), rendered()
    mine = {"team": "nlp", "sidecar.istio.io/inject": "false"}
    noted = {"karpenter.sh/do-not-disrupt": "true"}
    pods, was = (job["spec"]["template"]["metadata"] for job in (objects[0], plain[0]))
    assert [o["metadata"]["labels"] for o in objects] == [{**o["metadata"]["labels"], **mine} for o in plain]
    assert pods == {"labels": {**was["labels"], **mine}, "annotations": noted}
    assert objects[0]["metadata"]["annotations"] != plain[0]["metadata"]["annotations"]  # the digest of what it says
    assert noted.items() <= objects[0]["metadata"]["annotations"].items()
    assert "annotations" not in was


def test_objects_pass_the_clients_models() -> None:
    job, service, _ = rendered()
    V1Service.model_validate(service)
    V1Job.model_validate(job)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_another_fabric_than_tcp_is_for_ranks_on_gpus(device: str) -> None:
    spec = parse_spec({**TINY, "launch": {**TINY["launch"], "fabric": "roce"}}, [f"parallel.device={device}"])  # type: ignore[dict-item]
    with nullcontext() if device == "cuda" else pytest.raises(LaunchRefused, match="is for ranks on GPUs alone"):
        check_fabric(spec)


def test_another_fabric_than_tcp_does_not_join_replicas() -> None:
    sets = ["parallel.device=cuda", "parallel.replicas=2", "train.batch=16", "train.microbatch=1"]
    for fabric in sorted(FABRICS):
        spec = parse_spec({**TINY, "launch": {**TINY["launch"], "fabric": fabric}}, sets)  # type: ignore[dict-item]
        words = (
            f"launch.fabric = '{fabric}' with parallel.replicas = 2: .*set launch.fabric = 'tcp', or parallel.replicas"
        )
        with nullcontext() if fabric == "tcp" else pytest.raises(LaunchRefused, match=words):
            check_fabric(spec)


@pytest.mark.parametrize("fabric", sorted(FABRICS))
def test_every_fabric_renders_and_validates(fabric: str) -> None:
    job, _, _ = rendered(fabric=fabric)
    V1Job.model_validate(job)
    capabilities = job["spec"]["template"]["spec"]["containers"][0]["securityContext"]["capabilities"]
    assert ("add" in capabilities) == ("capabilities" in FABRICS[fabric])


def test_a_misspelt_field_would_not_pass() -> None:
    job, _, _ = rendered()
    job["spec"]["backoffLimits"] = 0
    with pytest.raises(ValueError, match="backoffLimits"):
        V1Job.model_validate(job)


def test_the_gang_is_one_indexed_job_a_pod_a_node() -> None:
    job, service, _ = rendered()
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    assert (spec["backoffLimit"], spec["template"]["spec"]["restartPolicy"]) == (0, "Never")
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]


def test_a_pods_ranks_listen_on_ports_that_the_network_rules_open() -> None:
    for nodes, first, sets in ((2, PORT_BASE, {}), (4, PORT_BASE, {}), (2, 9000, {"port_base": 9000})):
        job, service, _ = rendered(nodes=nodes, **sets)
        (agent,) = job["spec"]["template"]["spec"]["initContainers"]
        assert agent["args"][agent["args"].index("--port-base") + 1] == str(first)
        assert [p["port"] for p in service["spec"]["ports"]] == list(range(first, first + 4 // nodes))
    rules = yaml.safe_load_all((Path(k8s.__file__).parent / "base" / "network.yaml").read_text())
    (peers,) = [r["spec"] for r in rules if r["metadata"]["name"] == "trainer-peers"]
    opened = [{"protocol": "TCP", "port": PORT_BASE, "endPort": PORT_BASE + PORTS - 1}]
    assert [r["ports"] for r in (*peers["ingress"], *peers["egress"])] == [opened, opened]


def test_every_exit_code_rule_names_the_engine() -> None:
    rules = rendered()[0]["spec"]["podFailurePolicy"]["rules"]
    on_codes = [rule["onExitCodes"] for rule in rules if "onExitCodes" in rule]
    assert all(rule["containerName"] == ENGINE for rule in on_codes)
    assert set(on_codes[0]["values"]) == {code for code in EXITS if code}


def test_credentials_reach_the_agent_alone() -> None:
    pod = rendered(store_secret="s3-rights")[0]["spec"]["template"]["spec"]
    (engine,), (agent,) = pod["containers"], pod["initContainers"]
    assert agent["envFrom"] == [{"secretRef": {"name": "s3-rights"}}]
    assert "envFrom" not in engine
    assert "launch-key" not in [m["name"] for m in engine["volumeMounts"]]
    assert pod["automountServiceAccountToken"] is False


def test_containers_are_restricted() -> None:
    pod = rendered()[0]["spec"]["template"]["spec"]
    for container in (*pod["containers"], *pod["initContainers"]):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["initContainers"][0]["restartPolicy"] == "Always"


def test_memory_comes_from_the_plan_and_less_is_refused() -> None:
    pod = rendered()[0]["spec"]["template"]["spec"]
    assert int(pod["containers"][0]["resources"]["limits"]["memory"].removesuffix("Mi")) > 128
    with pytest.raises(LaunchRefused, match=r"less than the .*Mi that the plan needs"):
        rendered(resources={"memory": "1Mi"})
    with pytest.raises(LaunchRefused, match=r"launch.resources.cpu = 'a lot' is no quantity"):
        rendered(resources={"cpu": "a lot"})
    with pytest.raises(LaunchRefused, match=r"launch.agent_resources.memory = '1 GB' is no quantity"):
        rendered(agent_resources={"memory": "1 GB"})


def test_the_ranks_of_replicas_are_shared_by_the_pods() -> None:
    """2 stages x 2 replicas are 4 ranks; with two pods the second has the first one's positions again."""
    for nodes in (1, 2, 4):
        job, service, _ = rendered("parallel.stages=2", "parallel.replicas=2", nodes=nodes)
        assert job["spec"]["completions"] == nodes
        assert len(service["spec"]["ports"]) == 4 // nodes

    def memory(*sets: str, nodes: int) -> int:
        container = rendered("parallel.stages=2", *sets, nodes=nodes)[0]["spec"]["template"]["spec"]["containers"][0]
        return int(container["resources"]["limits"]["memory"].removesuffix("Mi"))

    one = memory(nodes=1)
    assert one <= memory("parallel.replicas=2", nodes=2) < memory("parallel.replicas=2", nodes=1)


def test_memory_counts_the_threads_of_the_cpus_that_are_asked_for() -> None:
    """4 stages on 2 nodes: two ranks a pod share its CPUs, and each thread has a workspace."""

    def memory(**launch: Any) -> int:
        limits = rendered(**launch)[0]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        return int(limits["memory"].removesuffix("Mi"))

    each = WORKSPACE_BYTES_PER_THREAD / (1 << 20)
    assert memory(resources={"cpu": "64"}) - memory() == pytest.approx(2 * (32 - 2) * each, abs=1)
    assert memory(resources={"cpu": "2500m"}) == memory(), "fewer threads than the plan counts take no less"


def test_a_patch_adds_but_does_not_break_the_contract() -> None:
    patch = {
        "affinity": {"nodeAffinity": {}},
        "containers": [{"name": ENGINE, "env": [{"name": "X", "value": "1"}]}],
        "imagePullSecrets": [{"name": "pull"}],
    }
    pod = rendered(pod_patch=patch)[0]["spec"]["template"]["spec"]
    assert {"name": "X", "value": "1"} in pod["containers"][0]["env"]
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    for bad in (
        {"hostNetwork": True},
        {"restartPolicy": "Always"},
        {"containers": [{"name": ENGINE, "args": ["sleep"]}]},
        {"containers": [{"name": ENGINE, "securityContext": {"privileged": True}}]},
        {"initContainers": [{"name": AGENT, "restartPolicy": "Never"}]},
        {"containers": [{"name": ENGINE, "envFrom": [{"secretRef": {"name": "s"}}]}]},
    ):
        with pytest.raises(LaunchRefused, match="pod_patch"):
            apply_patch(pod, bad)


def test_long_names_stay_dns_labels() -> None:
    name = object_name("a" * 80, 1000)
    assert len(f"{name}-999") <= 63
    assert name != object_name("a" * 81, 1000)
    with pytest.raises(LaunchRefused, match="DNS label"):
        object_name("Not_a_label", 2)


def test_rendering_is_deterministic() -> None:
    assert rendered() == rendered()


def test_a_quantity_of_the_patch_that_is_none_is_refused() -> None:
    patch = {"containers": [{"name": "engine", "resources": {"limits": {"cpu": "x"}}}]}
    with pytest.raises(
        LaunchRefused, match=r"launch\.pod_patch of container engine: .*limits\.cpu = 'x' is no quantity"
    ):
        rendered(pod_patch=patch)


def on_gpus(*sets: str, **launch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod of a gang that asks for CUDA, and its engine's container."""
    job = rendered("parallel.device=cuda", *sets, **launch)[0]
    V1Job.model_validate(job)
    pod = job["spec"]["template"]["spec"]
    return pod, pod["containers"][0]


def test_a_rank_gets_a_gpu_in_the_engines_container_alone() -> None:
    pod, engine = on_gpus(runtime_class="nvidia")
    assert engine["resources"]["requests"]["nvidia.com/gpu"] == engine["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert engine["image"] == CUDA_IMAGE
    assert "nvidia.com/gpu" not in pod["initContainers"][0]["resources"]["limits"]
    assert pod["runtimeClassName"] == "nvidia"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    (shm,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "256Mi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in engine["volumeMounts"]
    assert engine["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_what_resources_name_of_gpus_holds() -> None:
    """Fewer than ranks (they share), slices of one, or a device for a run that takes what there is (auto)."""
    assert on_gpus(resources={"nvidia.com/gpu": "1"})[1]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    slices = on_gpus(resources={"nvidia.com/mig-3g.40gb": "2"})[1]["resources"]["limits"]
    assert (slices["nvidia.com/mig-3g.40gb"], "nvidia.com/gpu" in slices) == ("2", False)
    auto = rendered(resources={"nvidia.com/gpu": "2"})[0]["spec"]["template"]["spec"]["containers"][0]
    assert (auto["image"], auto["resources"]["requests"]["nvidia.com/gpu"]) == (CUDA_IMAGE, "2")
    cpu = rendered("parallel.device=cpu", resources={"nvidia.com/gpu": "2"})[0]["spec"]["template"]["spec"]
    assert cpu["containers"][0]["image"] == DEFAULT_IMAGE
    exact = rendered("launch.kernel_path=cuda-exact")[0]["spec"]["template"]["spec"]["containers"][0]
    assert exact["resources"]["limits"]["nvidia.com/gpu"] == "2"
    with pytest.raises(LaunchRefused, match=r"nvidia.com/gpu = '0.5': devices are whole"):
        on_gpus(resources={"nvidia.com/gpu": "0.5"})


def test_a_pod_on_gpus_has_no_arena_in_its_host_memory() -> None:
    big = ("model.width=2048", "model.layers=16")

    def memory(*sets: str) -> int:
        limits = rendered(*sets)[0]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
        return int(limits["memory"].removesuffix("Mi"))

    small, windows = memory("parallel.device=cuda"), 64  # MiB, of messages on their way
    assert small <= memory("parallel.device=cuda", *big) < small + windows < memory(*big)
    assert memory('launch.resources."nvidia.com/gpu"="2"', *big) == memory(*big), "auto may turn out to be the CPU"
