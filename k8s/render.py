"""The objects of one launch: an Indexed Job (a pod a node), its headless Service, its Secret. Pure.

A pod is a node: the engine's supervisor with all its ranks, and the checkpoint agent as a native sidecar. Attempts
happen inside the pods, so the Job never restarts anything: ``restartPolicy: Never``, ``backoffLimit: 0``, and a failure
policy that carries the engine's exit code into the Job's condition. The engine's container has no service account
token, no credentials, a read-only root and no capability; only the agent sees the store's Secret.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from k8s.diagnosis import Limits
from k8s.labels import AGENT, ENGINE, LAUNCH, QUEUE, SPEC_DIGEST, labels, object_name
from k8s.names import check_names
from k8s.patch import apply_patch, check_quantity
from k8s.quantity import amount
from trainer.errors import LaunchRefused
from trainer.failures import FAIL_JOB_CODES, FAIL_JOB_CONDITIONS
from trainer.plan import Plan
from trainer.plan.devices import on_host
from trainer.plan.memory import more_threads_bytes
from trainer.spec import RunSpec

SOCKET = "/run/hotstage/agent.sock"
WORK = "/var/lib/hotstage"
KEY_FOLDER = "/etc/hotstage"
PORT_BASE = 7400  # a pod's ranks listen from here on; k8s/base/network.yaml opens PORTS of them
PORTS = 256
METRICS_PORT = 7390  # of a pod's agent; k8s/components/monitoring opens it to Prometheus
AGENT_OVERHEAD = 512 << 20
ENGINE_OVERHEAD = 128 << 20
DEFAULT_IMAGE, DEFAULT_AGENT_IMAGE = "hotstage-engine:0.1.0", "hotstage-agent:0.1.0"
CUDA_IMAGE = "hotstage-engine-cuda:0.1.0"
GPU = "nvidia.com/gpu"
SHM_BYTES = 256 << 20  # of /dev/shm, where NCCL exchanges what its ranks need to begin: the runtime's 64 MiB are few
CUDA_HOST_BYTES = 1 << 30  # of a rank's process: driver, libraries, pinned windows; assumed, not measured yet
# fabric -> devices, capabilities and environment; all but tcp are for ranks on GPUs, whose NCCL uses them
FABRICS: Mapping[str, Mapping[str, Any]] = {
    "tcp": {},
    "infiniband": {
        "resources": {"rdma/ib": "1"},
        "capabilities": ["IPC_LOCK"],
        "env": {"HOTSTAGE_ENGINE_FABRIC": "infiniband"},
    },
    "roce": {"resources": {"rdma/roce": "1"}, "capabilities": ["IPC_LOCK"], "env": {"HOTSTAGE_ENGINE_FABRIC": "roce"}},
    "efa": {
        "resources": {"vpc.amazonaws.com/efa": "1"},
        "capabilities": ["IPC_LOCK"],
        "env": {"HOTSTAGE_ENGINE_FABRIC": "efa"},
    },
    "nvl72": {"claims": ["imex-channel"], "env": {"HOTSTAGE_ENGINE_FABRIC": "nvl72"}},
}
FABRIC_MEND = "set launch.fabric = 'tcp', or parallel.device = 'cuda'; `hotstage k8s render` shows the objects"


def check_fabric(spec: RunSpec) -> None:
    """Raises LaunchRefused for a fabric that the ranks would not use: on CPUs they talk TCP, replicas everywhere."""
    fabric, replicas = spec.launch.fabric, spec.parallel.replicas
    if not uses_fabric(spec):
        raise LaunchRefused(f"launch.fabric = {fabric!r} is for ranks on GPUs alone; {FABRIC_MEND}")
    if fabric != "tcp" and replicas > 1:
        raise LaunchRefused(
            f"launch.fabric = {fabric!r} with parallel.replicas = {replicas}: messages between replicas go over TCP "
            "alone in this version, which that fabric rules out; set launch.fabric = 'tcp', or parallel.replicas = 1"
        )


def uses_fabric(spec: RunSpec) -> bool:
    """Whether ranks talk over what ``launch.fabric`` names; ``auto`` may turn out to be CPUs."""
    return spec.launch.fabric == "tcp" or spec.parallel.device == "cuda"


def render_launch(
    spec: RunSpec,
    plan: Plan,
    *,
    run: str,
    store_url: str,
    launch: str | None = None,
    avoid: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Job, Service and Secret, as plain objects. The Secret is without its key (the launcher makes that once), the two
    others without their owner (the Job's UID is not known before it is made). ``avoid``: machines that are not used.

    Raises LaunchRefused where a quantity, a name or ``launch.pod_patch`` does not hold.
    """
    check_names(spec)
    launch = launch or f"{run}-k1"
    name = object_name(launch, spec.launch.nodes)
    marks = {**spec.launch.labels, **labels(run, launch)}
    meta = {"namespace": spec.launch.namespace, "labels": marks}
    job = _job(spec, plan, run, launch, name, marks, store_url, avoid)
    service: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, **meta},
        "spec": {
            "clusterIP": "None",
            # peers must find each other before any of them is ready
            "publishNotReadyAddresses": True,
            "selector": {"batch.kubernetes.io/job-name": name},
            "ports": [{"name": f"rank-{k}", "port": port, "protocol": "TCP"} for k, port in enumerate(_ports(spec))],
        },
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {"name": f"{name}-key", **meta},
        "immutable": True,
    }
    return [job, service, secret]


def owned(item: Mapping[str, Any], job_name: str, job_uid: str) -> dict[str, Any]:
    """The object with the Job as its owner: one delete takes all."""
    out = copy.deepcopy(dict(item))
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job_name, "uid": job_uid}
    out["metadata"]["ownerReferences"] = [owner]
    return out


def _ports(spec: RunSpec) -> range:
    """The ports of a pod's ranks: the same in every pod, each has an address of its own."""
    first = spec.launch.port_base or PORT_BASE
    return range(first, first + _local_ranks(spec))


def _local_ranks(spec: RunSpec) -> int:
    return spec.parallel.ranks // spec.launch.nodes


def _job(
    spec: RunSpec,
    plan: Plan,
    run: str,
    launch: str,
    name: str,
    marks: dict[str, str],
    store_url: str,
    avoid: Sequence[str],
) -> dict[str, Any]:
    pod = _pod(spec, plan, run, launch, name, store_url)
    pod = _avoiding(apply_patch(pod, spec.launch.pod_patch), avoid)
    notes = dict(spec.launch.annotations)
    template = {"metadata": {"labels": marks, **({"annotations": notes} if notes else {})}, "spec": pod}
    body: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": spec.launch.nodes,
        "parallelism": spec.launch.nodes,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": failure_rules()},
        "ttlSecondsAfterFinished": 86_400,
        "template": template,
    }
    queue = {QUEUE: spec.launch.queue} if spec.launch.queue else {}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": spec.launch.namespace,
            "labels": {**marks, **queue},
            "annotations": {**notes, SPEC_DIGEST: digest},
        },
        # until its Secret and its Service are there; with a queue, until Kueue admits it
        "spec": {**body, "suspend": True},
    }


def failure_rules() -> list[dict[str, Any]]:
    """Every failing exit code of the engine fails the Job with that code in its condition; so does a disruption.

    Each rule on exit codes names the engine's container: a sidecar's end is never taken for it.
    """
    codes, conditions = list(FAIL_JOB_CODES), [{"type": name, "status": "True"} for name in FAIL_JOB_CONDITIONS]
    return [
        {"action": "FailJob", "onExitCodes": {"containerName": ENGINE, "operator": "In", "values": codes}},
        {"action": "FailJob", "onPodConditions": conditions},
        {"action": "FailJob", "onExitCodes": {"containerName": ENGINE, "operator": "NotIn", "values": [0]}},
    ]


def _pod(spec: RunSpec, plan: Plan, run: str, launch: str, name: str, store_url: str) -> dict[str, Any]:
    engine = _engine(spec, plan)
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "subdomain": name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": int(spec.checkpoint.commit_s) + 30,
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532,
                            "seccompProfile": {"type": "RuntimeDefault"}},
        # dead nodes are fenced, not waited for
        "tolerations": [
            *(_silent(key, spec.launch.toleration_s) for key in ("not-ready", "unreachable")),
            *(dict(t) for t in spec.launch.tolerations),
        ],
        "initContainers": [_agent(spec, plan, run, launch, store_url)],
        "containers": [engine],
        "volumes": [
            {"name": "run", "emptyDir": {}},
            {"name": "work", "emptyDir": {}},
            {"name": "launch-key", "secret": {"secretName": f"{name}-key", "defaultMode": 0o440}},
        ],
    }  # fmt: skip
    if has_gpus(spec):
        pod["tolerations"].append({"key": GPU, "operator": "Exists", "effect": "NoSchedule"})
        pod["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{SHM_BYTES >> 20}Mi"}})
        engine["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
    if spec.launch.runtime_class:
        pod["runtimeClassName"] = spec.launch.runtime_class
    if spec.launch.node_selector:
        pod["nodeSelector"] = dict(spec.launch.node_selector)
    if spec.launch.priority_class:
        pod["priorityClassName"] = spec.launch.priority_class
    if spec.launch.spread and spec.launch.nodes > 1:
        pod["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": spec.launch.spread,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {LAUNCH: labels(run, launch)[LAUNCH]}},
            }
        ]
    if spec.launch.service_account:
        pod["serviceAccountName"] = spec.launch.service_account
    claims = FABRICS[spec.launch.fabric].get("claims", ())
    if claims:
        pod["resourceClaims"] = [{"name": c, "resourceClaimTemplateName": c} for c in claims]
        engine["resources"]["claims"] = [{"name": c} for c in claims]
    return pod


def _engine(spec: RunSpec, plan: Plan) -> dict[str, Any]:
    """The container of the supervisor and its ranks."""
    fabric = FABRICS[spec.launch.fabric]
    return {
        "name": ENGINE,
        "image": spec.launch.image or (CUDA_IMAGE if has_gpus(spec) else DEFAULT_IMAGE),
        "args": ["node", "--agent", SOCKET],
        "env": [{"name": key, "value": value} for key, value in sorted(fabric.get("env", {}).items())],
        "resources": _resources("resources", _engine_memory(spec, plan), _with_gpus(spec), fabric.get("resources", {})),
        "securityContext": _restricted(fabric.get("capabilities", ())),
        "volumeMounts": [
            {"name": "run", "mountPath": "/run/hotstage"},
            {"name": "work", "mountPath": WORK},
        ],
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _agent(spec: RunSpec, plan: Plan, run: str, launch: str, store_url: str) -> dict[str, Any]:
    """The container of the checkpoint agent."""
    agent: dict[str, Any] = {
        "name": AGENT,
        "image": spec.launch.agent_image or DEFAULT_AGENT_IMAGE,
        # a native sidecar: up before the engine, still there while the engine leaves
        "restartPolicy": "Always",
        "args": [
            *("--store", store_url),
            *("--run", run),
            *("--launch", launch),
            *("--node", "$(JOB_COMPLETION_INDEX)"),
            *("--nodes", str(spec.launch.nodes)),
            *("--socket", SOCKET),
            *("--work", WORK),
            *("--key-file", f"{KEY_FOLDER}/launch.key"),
            # an address, not a name: a pod keeps it for life, and names come late and are remembered as missing
            *("--host", "$(POD_IP)"),
            *("--port-base", str(_ports(spec).start)),
            *("--metrics", f"$(POD_IP):{METRICS_PORT}"),
        ],
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "env": [_from_field("JOB_COMPLETION_INDEX", _INDEX_FIELD), _from_field("POD_IP", "status.podIP")],
        "resources": _resources("agent_resources", _agent_memory(spec, plan), spec.launch.agent_resources, {}),
        "securityContext": _restricted(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "startupProbe": {
            "exec": {"command": ["test", "-S", SOCKET]},
            "periodSeconds": 1,
            "failureThreshold": 120,
        },
        "volumeMounts": [
            {"name": "run", "mountPath": "/run/hotstage"},
            {"name": "work", "mountPath": WORK},
            {"name": "launch-key", "mountPath": KEY_FOLDER, "readOnly": True},
        ],
    }
    if spec.launch.store_secret:
        agent["envFrom"] = [{"secretRef": {"name": spec.launch.store_secret}}]
    return agent


def _restricted(capabilities: Sequence[str] = ()) -> dict[str, Any]:
    """What a container may: nothing, but for these capabilities."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"], **({"add": list(capabilities)} if capabilities else {})},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def has_gpus(spec: RunSpec) -> bool:
    """Whether the engine's container gets GPUs: ranks are asked to run on them, or ``launch.resources`` names some."""
    named = any(key.removeprefix("limits.").startswith("nvidia.com/") for key in spec.launch.resources)
    return spec.parallel.on_cuda(spec.launch.kernel_path) or (named and spec.parallel.device != "cpu")


def _with_gpus(spec: RunSpec) -> Mapping[str, str]:
    """``launch.resources``, with a GPU for each rank of the pod where ranks need them and nothing names any."""
    given = spec.launch.resources
    if not spec.parallel.on_cuda(spec.launch.kernel_path) or any("nvidia.com/" in key for key in given):
        return given
    return {**given, GPU: str(_local_ranks(spec))}


_INDEX_FIELD = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def _from_field(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _silent(key: str, seconds: int) -> dict[str, Any]:
    taint = f"node.kubernetes.io/{key}"
    return {"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}


def _avoiding(pod: dict[str, Any], machines: Sequence[str]) -> dict[str, Any]:
    """The pod, never on these machines: every term of its node affinity gets one more condition a machine."""
    if not machines:
        return pod
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in sorted(machines)]
    wanted = pod.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = wanted.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    for term in required.setdefault("nodeSelectorTerms", [{}]):
        term.setdefault("matchFields", []).extend(copy.deepcopy(fields))
    return pod


def limits_of(spec: RunSpec, plan: Plan, job: Mapping[str, Any]) -> Limits:
    """What the plan needs and what the rendered containers may use."""
    pod = job["spec"]["template"]["spec"]
    engine = next(c for c in pod["containers"] if c["name"] == ENGINE)
    agent = next(c for c in pod["initContainers"] if c["name"] == AGENT)
    return Limits(
        engine_needs=_engine_memory(spec, plan),
        engine_limit=math.floor(amount(engine["resources"]["limits"]["memory"])),
        agent_needs=_agent_memory(spec, plan),
        agent_limit=math.floor(amount(agent["resources"]["limits"]["memory"])),
    )


def _engine_memory(spec: RunSpec, plan: Plan) -> int:
    """Bytes of the ranks of the fullest node, without their snapshot slots (the agent's: it makes them)."""
    nodes = plan.on_nodes(spec.launch.nodes)
    on_cuda = 0
    if has_gpus(spec):
        beside = max(sum(sum(on_host(plan, p).values()) - p.bytes_by_kind["slots"] for p in node) for node in nodes)
        on_cuda = beside + _local_ranks(spec) * CUDA_HOST_BYTES + SHM_BYTES + ENGINE_OVERHEAD
        if spec.parallel.on_cuda(spec.launch.kernel_path):
            return on_cuda  # else its ranks may turn out to run on the CPU
    # without a number of CPUs nobody knows the machine's: the engine starts as many threads as the limit has room for
    try:
        more = more_threads_bytes(spec, float(amount(spec.launch.resources["cpu"])))
    except (KeyError, ValueError):  # _resources refuses what is no quantity
        more = 0
    on_cpu = max(sum(p.total_bytes - p.bytes_by_kind["slots"] + max(more, 0) for p in node) for node in nodes)
    return max(on_cpu + ENGINE_OVERHEAD, on_cuda)


def _agent_memory(spec: RunSpec, plan: Plan) -> int:
    nodes = plan.on_nodes(spec.launch.nodes)
    return max(sum(p.bytes_by_kind["slots"] for p in node) for node in nodes) + AGENT_OVERHEAD


def _resources(said: str, memory: int, wanted: Mapping[str, str], more: Mapping[str, str]) -> dict[str, Any]:
    """Requests and limits. A plain key of ``launch.<said>`` is a request, of memory and of devices the limit as well;
    ``"limits.cpu"`` and ``"requests.cpu"`` say one of the two. Memory is the plan's where nothing is said; a limit of
    less is refused, and so is what the API server would refuse.
    """
    where: dict[tuple[str, str], str] = {}  # (side, resource) -> the key that said it
    values: dict[tuple[str, str], str] = {}
    for key in sorted(wanted, key=lambda k: k.startswith(_SIDES)):  # what names its side comes last and holds
        check_quantity(said, key, wanted[key])
        side, _, name = key.partition(".") if key.startswith(_SIDES) else ("", "", key)
        for one in [side] if side else ["requests", *(["limits"] if name == "memory" or _whole(name) else [])]:
            where[one, name], values[one, name] = key, wanted[key]
    plan = f"{-(-memory // (1 << 20))}Mi"
    limit = values.setdefault(("limits", "memory"), values.get(("requests", "memory"), plan))
    values.setdefault(("requests", "memory"), limit)
    if amount(limit) < memory:
        key = where.get(("limits", "memory"), "memory")
        raise LaunchRefused(
            f"launch.{said}.{key} = {limit} is less than the {plan} that the plan needs; raise it, or take more "
            "stages, smaller microbatches or fewer slots"
        )
    for (side, name), value in values.items():
        cap = values.get(("limits", name))
        if side == "requests" and cap is not None and amount(value) > amount(cap):
            raise LaunchRefused(
                f"launch.{said} requests {value} of {name}, more than its limit of {cap}; lower launch.{said}."
                f"{where.get(('requests', name), name)}, or raise {where.get(('limits', name), f'limits.{name}')}"
            )
    sides = {side: {n: v for (s, n), v in values.items() if s == side} for side in ("requests", "limits")}
    return {side: {**given, **more} for side, given in sides.items()}


_SIDES = ("requests.", "limits.")


def _whole(name: str) -> bool:
    """Whether a resource comes in whole pieces that are never shared: its request is its limit."""
    return "/" in name or name.startswith("hugepages-")
