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
        ({"metadata": {"labels": {}}}, "pod_patch.metadata: a pod's spec has no such key"),
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
    ],
)  # fmt: skip
def test_a_patch_that_is_not_of_a_pods_form_is_refused(patch: dict[str, Any], words: str) -> None:
    with pytest.raises(LaunchRefused, match=words):
        rendered(pod_patch=patch)
