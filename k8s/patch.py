"""``launch.pod_patch`` over a rendered pod: a strategic merge as far as a pod needs it. Refused where it breaks the
gang's contract or the engine's confinement, or is not of a pod's form. Pure.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from k8s.labels import ENGINE
from k8s.names import check_image
from k8s.quantity import amount
from trainer.errors import LaunchRefused
from trainer.spec_fields import shown

_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "tolerations": "key",
    "ports": "containerPort",
}
"""Lists of tables, each told from the others by a key."""
_CONTRACT = (
    *("restartPolicy", "subdomain", "hostname", "hostnameOverride", "automountServiceAccountToken"),
    *("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"),
)
_CONFINED = ("runAsNonRoot", "seccompProfile")
"""Of a pod's securityContext: what the engine's confinement, and Pod Security ``restricted``, rest on."""
_NATIVE = ("cpu", "memory", "ephemeral-storage")
_MOST = {"cpu": (10_000, "the 10000 CPUs that no machine has"), "memory": (1 << 50, "1Pi, which no machine has")}
"""A pod that asks for more waits for ever."""
_KEPT = ("containers", "initContainers")
_BELOW_SPEC = "the patch is of what stands below spec: leave that level out"
_ELSEWHERE = {
    "spec": _BELOW_SPEC,
    "template": _BELOW_SPEC,
    "metadata": "labels and annotations of the pods are launch.labels and launch.annotations",
}
POD_FIELDS = frozenset({
    "activeDeadlineSeconds", "affinity", "automountServiceAccountToken", "containers", "dnsConfig", "dnsPolicy",
    "enableServiceLinks", "ephemeralContainers", "evictionResponders", "hostAliases", "hostIPC", "hostNetwork",
    "hostPID", "hostUsers", "hostname", "hostnameOverride", "imagePullSecrets", "initContainers", "nodeName",
    "nodeSelector", "os", "overhead", "preemptionPolicy", "priority", "priorityClassName", "readinessGates",
    "resourceClaims", "resources", "restartPolicy", "runtimeClassName", "schedulerName", "schedulingGates",
    "schedulingGroup", "securityContext", "serviceAccount", "serviceAccountName", "setHostnameAsFQDN",
    "shareProcessNamespace", "subdomain", "terminationGracePeriodSeconds", "tolerations",
    "topologySpreadConstraints", "volumes",
})  # fmt: skip
"""Of a pod's spec, as Kubernetes 1.37 has them."""


def apply_patch(pod: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """``launch.pod_patch`` over the pod; refused where it breaks the gang's contract or the engine's confinement, and
    where the API server would not know what it says."""
    _check_keys(patch)
    for key in _CONTRACT:
        if key in patch:
            raise LaunchRefused(
                f"launch.pod_patch sets {key}, which the gang's contract fixes; take it out of the patch"
            )
    patched = _merge(copy.deepcopy(dict(pod)), patch, "launch.pod_patch")
    for group in _KEPT:
        before = {c["name"]: c for c in pod[group]}
        for container in patched[group]:
            was = before.get(container["name"])
            if was is None:
                _check_new(container, group, before)
                continue
            for key in ("args", "command", "restartPolicy", "securityContext"):
                if container.get(key) != was.get(key):
                    raise LaunchRefused(
                        f"launch.pod_patch changes {key} of container {container['name']!r}, which the gang's contract "
                        "fixes; take it out of the patch"
                    )
    _check_confined(pod["securityContext"], patched.get("securityContext"))
    grace, least = patched.get("terminationGracePeriodSeconds"), pod["terminationGracePeriodSeconds"]
    if not isinstance(grace, int) or grace < least:
        raise LaunchRefused(
            f"launch.pod_patch.terminationGracePeriodSeconds = {shown(grace)}: a pod that is asked to leave needs "
            f"{least} s to save its state (checkpoint.commit_s and 30); write as many or more"
        )
    _check_affinity(patched)
    volumes = {volume["name"] for volume in patched["volumes"]}
    for container in [*patched["initContainers"], *patched["containers"]]:
        _check_container(container, volumes)
    engine = next(c for c in patched["containers"] if c["name"] == ENGINE)
    if engine.get("envFrom"):
        raise LaunchRefused("launch.pod_patch gives the engine's container envFrom; credentials go to the agent only")
    secret = next((e["name"] for e in engine.get("env", ()) if "secretKeyRef" in (e.get("valueFrom") or {})), None)
    if secret is not None:
        raise LaunchRefused(
            f"launch.pod_patch gives the engine's container {secret} of a Secret; credentials go to the agent only"
        )
    return patched


def _check_confined(was: Mapping[str, Any], now: Any) -> None:
    """Users and groups of the pod may be others (a cluster may give its own), never root."""
    if not isinstance(now, Mapping):
        raise LaunchRefused(
            "launch.pod_patch takes the pod's securityContext away, which confines the engine; take it out of the patch"
        )
    for key in _CONFINED:
        if now.get(key) != was[key]:
            raise LaunchRefused(
                f"launch.pod_patch.securityContext.{key} = {shown(now.get(key))}: the engine runs with {was[key]} "
                "alone, as Pod Security `restricted` asks; take it out of the patch"
            )
    for key in ("runAsUser", "runAsGroup", "fsGroup"):
        if now.get(key) == 0:
            raise LaunchRefused(
                f"launch.pod_patch.securityContext.{key} = 0 is root, and the engine is none; write another number "
                f"({was[key]} where the patch says none), or null where the cluster gives one"
            )


def _check_keys(patch: Mapping[str, Any]) -> None:
    for key, value in patch.items():
        if key not in POD_FIELDS:
            near = difflib.get_close_matches(key, sorted(POD_FIELDS), n=1)
            mend = _ELSEWHERE.get(key) or (
                f"did you mean {near[0]}?" if near else "it takes what stands in a pod below spec, such as containers, "
                "volumes, affinity"
            )  # fmt: skip
            raise LaunchRefused(f"launch.pod_patch.{key}: a pod's spec has no such key; {mend}")
        if value is None and key in (*_KEPT, "volumes"):
            raise LaunchRefused(
                f"launch.pod_patch.{key} is null: the gang has some of its own; take it out of the patch"
            )


def _check_new(container: Mapping[str, Any], group: str, own: Mapping[str, Any]) -> None:
    if not container.get("image"):
        raise LaunchRefused(
            f"launch.pod_patch.{group}: container {shown(container['name'])} has no image, and is none of the pod's "
            f"own ({', '.join(own)}); correct its name, or give it an image"
        )


def _check_affinity(pod: Mapping[str, Any]) -> None:
    """Its form down to the terms, each of which gets the machines to avoid when a launch has some."""
    node, where = pod, "launch.pod_patch"
    for key in ("affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution"):
        node, where = node.get(key, {}), f"{where}.{key}"
        if not isinstance(node, Mapping):
            raise LaunchRefused(f"{where} {shown(node)} is no table; write it as a pod's")
    terms = node.get("nodeSelectorTerms", [])
    if not isinstance(terms, list | tuple) or not all(isinstance(term, Mapping) for term in terms):
        raise LaunchRefused(f"{where}.nodeSelectorTerms {shown(terms)} is no list of tables; write it as a pod's")


def _check_container(container: Mapping[str, Any], volumes: set[str]) -> None:
    what = f"launch.pod_patch of container {container['name']}"
    check_image(f"pod_patch of container {container['name']}: image", container["image"])
    resources = container.get("resources")
    if resources is not None and not isinstance(resources, Mapping):
        raise LaunchRefused(f'{what}: resources {shown(resources)} is no table; write {{limits = {{cpu = "4"}}}}')
    for side, given in (resources or {}).items():
        for key, value in given.items() if isinstance(given, Mapping) else ():
            check_quantity(f"pod_patch of container {container['name']}: resources.{side}", key, value)
    for entry in container.get("env") or ():
        if not isinstance(entry.get("value", ""), str):
            raise LaunchRefused(
                f"{what}: env {entry['name']} is {shown(entry['value'])}, and a variable is text; write it in quotes"
            )
    for mount in container.get("volumeMounts") or ():
        if mount.get("name") not in volumes:
            raise LaunchRefused(
                f"{what}: {mount['mountPath']} mounts the volume {shown(mount.get('name'))}, and the pod has "
                f"{', '.join(sorted(volumes))}; correct the name, or add it to launch.pod_patch.volumes"
            )


def check_quantity(said: str, key: str, value: Any) -> None:
    """LaunchRefused where ``launch.<said>.<key>`` is no resource, or no quantity, that the API server takes."""
    name = key.removeprefix("requests.").removeprefix("limits.")
    if "/" not in name and name not in _NATIVE and not name.startswith("hugepages-"):
        mend = ", GPUs nvidia.com/gpu" if "gpu" in name.lower() else ", devices such as nvidia.com/gpu"
        raise LaunchRefused(f"launch.{said}.{key} is no resource; there are {', '.join(_NATIVE)}{mend}")
    try:
        number = amount(value)
    except ValueError as error:
        raise LaunchRefused(f"launch.{said}.{key} = {error}") from error
    if number < 0:
        raise LaunchRefused(f"launch.{said}.{key} = {value!r} is below 0; write for example 4, 500m, 16Gi")
    most = _MOST.get(name)
    if most is not None and number > most[0]:
        raise LaunchRefused(f"launch.{said}.{key} = {shown(value)} is more than {most[1]}; correct its unit")
    if "/" in key and number.denominator != 1:
        raise LaunchRefused(f"launch.{said}.{key} = {value!r}: devices are whole; write for example 1")


def _merge(base: dict[str, Any], patch: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key, value in patch.items():
        if value is None:
            base.pop(key, None)
            continue
        place, there = f"{where}.{key}", base.get(key)
        if key in _MERGE_KEYS:
            base[key] = _merge_tables(there if isinstance(there, list) else [], value, _MERGE_KEYS[key], place)
        elif isinstance(there, dict):
            if not isinstance(value, Mapping):
                raise LaunchRefused(f"{place} {shown(value)} is no table; the pod has one there")
            base[key] = _merge(there, value, place)
        else:
            base[key] = copy.deepcopy(value)
    return base


def _merge_tables(base: list[Any], items: Any, by: str, where: str) -> list[Any]:
    """A list of tables over another one: those with the same ``by`` are one."""
    if not isinstance(items, list | tuple):
        raise LaunchRefused(f"{where} {shown(items)} is no list; write [{{{by} = …}}]")
    index = {item.get(by): n for n, item in enumerate(base)}
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise LaunchRefused(f"{where}[{number}] {shown(item)} is no table; write {{{by} = …}}")
        if by not in item and by != "key":  # a toleration without a key is of all taints
            raise LaunchRefused(f"{where}[{number}] has no {by}, which tells it from the others; add it")
        if by in item and not isinstance(item[by], str | int):
            raise LaunchRefused(f"{where}[{number}]: its {by} {shown(item[by])} is no text; correct it")
        at = index.get(item.get(by)) if by in item else None
        if at is None:
            base.append(_merge({}, item, f"{where}[{number}]"))
        else:
            base[at] = _merge(base[at], item, f"{where}[{number}]")
    return base
