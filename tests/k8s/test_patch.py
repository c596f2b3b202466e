"""What ``launch.pod_patch`` may say: a pod's own keys in their form, or a refusal that names the place."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.client import V1PodSpec

from k8s.patch import POD_FIELDS
from tests.k8s.test_render import rendered
from trainer.errors import LaunchRefused


def test_the_fields_are_those_of_the_clients_model() -> None:
    assert set(V1PodSpec.attribute_map.values()) <= POD_FIELDS


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        ({"spec": {"nodeName": "a"}}, "pod_patch.spec: a pod's spec has no such key; .* leave that level out"),
        ({"metadata": {"labels": {}}}, "pod_patch.metadata: .* labels and annotations of the pods are launch.labels"),
        ({"nodeSelectr": {"a": "b"}}, "did you mean nodeSelector"),
        ({"containers": "x"}, r"pod_patch.containers 'x' is no list; write \[{name = …}\]"),
        ({"containers": ["x"]}, r"pod_patch.containers\[0\] 'x' is no table"),
        ({"containers": [{"image": "x"}]}, r"pod_patch.containers\[0\] has no name"),
        ({"containers": [{"name": ["x"]}]}, r"containers\[0\]: its name \['x'\]"),
        ({"containers": [{"name": "enigne"}]}, "'enigne' has no image, and is none of the pod's own .engine"),
        ({"containers": None}, "pod_patch.containers is null"),
        ({"containers": [{"name": "engine", "env": [{"name": "A", "value": 1}]}]}, "env A is 1, .* in quotes"),
        ({"containers": [{"name": "engine", "env": {"A": "1"}}]}, r"containers\[0\].env .* is no list"),
        ({"containers": [{"name": "engine", "resources": "big"}]}, "resources 'big' is no table"),
        ({"containers": [{"name": "engine", "volumeMounts": [{"mountPath": "/x", "name": "y"}]}]},
         "/x mounts the volume 'y', and the pod has launch-key, run, work"),
        ({"volumes": {}}, "pod_patch.volumes {} is no list"),
        ({"affinity": {"nodeAffinity": "x"}}, "affinity.nodeAffinity 'x' is no table"),
        ({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": {}}}}},
         "nodeSelectorTerms {} is no list"),
        ({"terminationGracePeriodSeconds": 0}, "GracePeriodSeconds = 0: .* needs [0-9]+ s to save its state"),
        ({"terminationGracePeriodSeconds": "99"}, "terminationGracePeriodSeconds = '99'"),
        ({"containers": [{"name": "engine", "image": "Bad Image"}]}, "container engine: image = .Bad Image. is no"),
        ({"hostNetwork": True}, "pod_patch sets hostNetwork, which the gang's contract fixes; take it out"),
        ({"shareProcessNamespace": True}, "pod_patch sets shareProcessNamespace, which the gang's contract fixes"),
        ({"hostname": "a"}, "pod_patch sets hostname, which the gang's contract fixes"),
        ({"securityContext": None}, "takes the pod's securityContext away, which confines the engine"),
        ({"securityContext": {"runAsNonRoot": False}}, "securityContext.runAsNonRoot = False: the engine runs with"),
        ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccompProfile = .*Unconfined.*restricted"),
        ({"securityContext": {"runAsUser": 0}}, "securityContext.runAsUser = 0 is root, and the engine is none; write"),
        ({"securityContext": {"fsGroup": 0}}, "securityContext.fsGroup = 0 is root"),
        ({"containers": [{"name": "engine", "securityContext": {"privileged": True}}]},
         "changes securityContext of container 'engine', which the gang's contract fixes"),
        ({"containers": [{"name": "engine", "env": [
            {"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}]},
         "gives the engine's container K of a Secret; credentials go to the agent only"),
    ],
)  # fmt: skip
def test_a_patch_that_is_not_of_a_pods_form_is_refused(patch: dict[str, Any], words: str) -> None:
    with pytest.raises(LaunchRefused, match=words):
        rendered(pod_patch=patch)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"resources": {"gpu": "1"}}, "launch.resources.gpu is no resource; .* GPUs nvidia.com/gpu"),
        ({"resources": {"cpu": "1Gi"}}, "launch.resources.cpu = '1Gi' is more than the 10000 CPUs that no"),
        (
            {"resources": {"limits.memory": "1e30"}},
            "launch.resources.limits.memory = '1e30' is more than 1Pi, which no",
        ),
        ({"resources": {"limits.mem": "1Gi"}}, "launch.resources.limits.mem is no resource; there are cpu, memory"),
        ({"queue": "Bad_Queue"}, "launch.queue = 'Bad_Queue' is no object's name"),
        ({"store_secret": "My Secret"}, "launch.store_secret = 'My Secret' is no object's name"),
        ({"image": "registry/name :tag"}, "launch.image = 'registry/name :tag' is no image"),
        ({"agent_image": "https://registry/name"}, "launch.agent_image = .* is no image"),
        ({"spread": "foo bar"}, "launch.spread: 'foo bar' is no label"),
        ({"node_selector": {"a b": "c"}}, "launch.node_selector: 'a b' is no label"),
    ],
)
def test_a_name_that_the_server_would_not_take_is_refused(launch: dict[str, Any], words: str) -> None:
    with pytest.raises(LaunchRefused, match=words):
        rendered(**launch)


def test_names_as_clusters_have_them_are_taken() -> None:
    job = rendered(
        image="localhost:5000/team/engine@sha256:" + "0" * 64,
        queue="team-a",
        priority_class="high",
        spread="topology.kubernetes.io/zone",
        node_selector={"node.kubernetes.io/instance-type": "x.large"},
        resources={"limits.cpu": "2", "ephemeral-storage": "1Gi"},
    )[0]
    assert job["spec"]["template"]["spec"]["priorityClassName"] == "high"


def test_a_cluster_may_give_users_of_its_own() -> None:
    own = {"runAsUser": None, "runAsGroup": 1000660000, "fsGroup": None}
    rendered(pod_patch={"securityContext": own})
