"""What a cluster lacks before a run is started on it, in at most ten seconds, with the mend beside each finding.

Every check is one or two reads, or one of each object that the pods name (and two server-side dry runs): nothing is
made or changed. A check that may not look (cluster-wide reads are not in the Role) says so and is no fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, Protocol

from k8s.api import CLAIMS, CONFIGS, JOBS, PODS, QUOTAS, RANGES, SECRETS, Json
from k8s.errors import ApiUnavailable, Missing, NotAllowed, Unauthenticated
from k8s.labels import AGENT, ENGINE
from k8s.named import Named, named_by
from k8s.quantity import amount, spelled
from k8s.quota import of_pod, quota_problems, range_problems, taken, uses
from k8s.render import CUDA_IMAGE, DEFAULT_IMAGE, FABRIC_MEND
from k8s.version import MEND, OLDEST, too_old
from trainer.errors import LaunchError

LIMIT_S = 10.0
READ_S = 3.0
ROLE = "hotstage-launcher"

RIGHTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("batch", "jobs", ("list", "watch", "create", "patch", "delete")),
    ("", "pods", ("list", "watch")),
    ("", "pods/log", ("get",)),
    ("", "services", ("create", "get")),
    ("", "secrets", ("create", "get")),
    ("", "events", ("list",)),
    ("", "resourcequotas", ("list",)),
    ("", "namespaces", ("get",)),
)
"""(API group, resource, verbs): all that the launcher and this doctor need, and all that the Role grants."""

_GPUS = "nvidia.com/"
_OPTIONAL = {("resourcequotas", "list"), ("namespaces", "get"), ("events", "list"), ("pods/log", "get")}


@dataclass(frozen=True)
class Check:
    """One finding. ``verdict``: ok; warn (it may work); bad (it will not); unknown (could not look)."""

    name: str
    verdict: Literal["ok", "warn", "bad", "unknown"]
    text: str
    mend: str = ""


class Reader(Protocol):
    """What the doctor needs of ``k8s.api.Api``."""

    def get(self, path: str, query: Mapping[str, str] | None = None, read_s: float = 20.0) -> Json: ...

    def create(self, path: str, body: Json, *, dry_run: bool = False) -> Json: ...


@dataclass(frozen=True)
class RunNeeds:
    """What a run would ask for: the rendered Job, the store, the Secret with its credentials."""

    namespace: str
    job: Json | None = None
    store_url: str = ""
    store_secret: str = ""
    queue: str = ""
    fabric: str = "tcp"
    on_gpus: bool = False


def examine(api: Reader, wanted: RunNeeds, clock: Callable[[], float] = time.monotonic) -> list[Check]:
    """Every check, in the order in which a person mends them; those that no time is left for say so."""
    checks: tuple[tuple[str, Callable[[Reader, RunNeeds], list[Check]]], ...] = (
        ("version", _version),
        ("rights", _rights),
        ("namespace", _namespace),
        ("fabric", _fabric),
        ("quota", _quota),
        ("machines", _machines),
        ("gpus", _gpus),
        ("images", _images),
        ("store", _store),
        ("named", _named),
        ("queue", _queue),
        ("admission", _admission),
    )
    deadline, found = clock() + LIMIT_S - READ_S, []
    for name, check in checks:
        if clock() > deadline:
            found.append(Check(name, "unknown", f"no time left: the API server took {LIMIT_S:.0f} s for the others"))
            continue
        try:
            found += check(api, wanted)
        except ApiUnavailable as error:
            found.append(Check(name, "bad", str(error), "check the network, the kubeconfig's server and its proxy"))
            if name == "version":
                break
        except Unauthenticated as error:
            found.append(Check(name, "bad", str(error)))
        except NotAllowed as error:
            found.append(Check(name, "unknown", str(error)))
        except LaunchError as error:
            found.append(Check(name, "bad", str(error)))
        except ValueError as error:  # a quantity of the cluster that is none
            found.append(Check(name, "unknown", f"the cluster's objects cannot be read: {error}"))
    return found


def _version(api: Reader, wanted: RunNeeds) -> list[Check]:
    said = api.get("/version", read_s=READ_S)
    text = str(said.get("gitVersion", "unknown"))
    old = too_old(text)
    if old is None:
        return [Check("version", "unknown", f"the API server reports version {text!r}")]
    if old:
        return [Check("version", "bad", f"Kubernetes {text} is older than {'.'.join(map(str, OLDEST))}", MEND)]
    return [Check("version", "ok", f"Kubernetes {text}")]


def _rights(api: Reader, wanted: RunNeeds) -> list[Check]:
    missing = [
        (verb, resource, group)
        for group, resource, verbs in RIGHTS
        for verb in verbs
        if not _may(api, wanted.namespace, group, resource, verb)
    ]
    found = []
    for verb, resource, group in missing:
        weak = (resource, verb) in _OPTIONAL
        what = f"{resource}.{group}" if group else resource
        found.append(
            Check(
                "rights",
                "warn" if weak else "bad",
                f"may not {verb} {what} in namespace {wanted.namespace}",
                f"apply the Role {ROLE} of k8s/base/rbac.yaml in {wanted.namespace} and bind it to this user",
            )
        )
    count = sum(len(verbs) for _, _, verbs in RIGHTS)
    return found or [Check("rights", "ok", f"all {count} rights of the Role {ROLE} in {wanted.namespace}")]


def _may(api: Reader, namespace: str, group: str, resource: str, verb: str) -> bool:
    resource, _, sub = resource.partition("/")
    asked = {"namespace": namespace, "verb": verb, "group": group, "resource": resource, "subresource": sub}
    if resource == "namespaces":
        asked["name"] = namespace
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {k: v for k, v in asked.items() if v}},
    }
    answer = api.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
    return bool((answer.get("status") or {}).get("allowed"))


def _namespace(api: Reader, wanted: RunNeeds) -> list[Check]:
    name = wanted.namespace
    try:
        raw = api.get(f"/api/v1/namespaces/{name}", read_s=READ_S)
    except Missing:
        return [Check("namespace", "bad", f"there is no namespace {name}", f"kubectl create namespace {name}")]
    level = (raw["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce", "")
    added = _added_capabilities(wanted.job)
    if level in ("restricted", "baseline") and added:
        return [
            Check(
                "namespace",
                "bad",
                f"{name} enforces Pod Security {level!r}, and launch.fabric adds {', '.join(added)}",
                "use launch.fabric = 'tcp', or a namespace whose level is privileged",
            )
        ]
    if not level:
        mend = f"kubectl label namespace {name} pod-security.kubernetes.io/enforce=restricted"
        return [Check("namespace", "warn", f"{name} enforces no Pod Security level (not needed to run)", mend)]
    return [Check("namespace", "ok", f"{name} enforces Pod Security {level!r}")]


def _added_capabilities(job: Json | None) -> list[str]:
    return [
        c
        for container in _containers(job)
        for c in ((container.get("securityContext") or {}).get("capabilities") or {}).get("add") or ()
    ]


def _quota(api: Reader, wanted: RunNeeds) -> list[Check]:
    """Limit ranges first: they give the pods what quotas count."""
    space = wanted.namespace
    quotas = api.get(QUOTAS.path(space), read_s=READ_S).get("items") or ()
    try:
        ranges, blind = list(api.get(RANGES.path(space), read_s=READ_S).get("items") or ()), False
    except NotAllowed:  # not needed to run, and not in the Role
        ranges, blind = [], True
    if not quotas and not ranges:
        return [Check("quota", "ok", f"no quota in {space}")]
    if wanted.job is None:
        return [Check("quota", "ok", f"{len(quotas)} quotas and {len(ranges)} limit ranges in {space}; no spec given")]
    pod, found = wanted.job["spec"]["template"]["spec"], []
    for problem in (p for item in ranges for p in range_problems(item, pod, ranges)):
        found.append(Check("quota", "bad", problem.text, problem.mend))
    for problem in (p for item in quotas for p in quota_problems(item, wanted.job, ranges)):
        if problem.unnamed and blind:
            text = f"{problem.text}, unless a LimitRange gives a default (this user may not list limitranges)"
            found.append(Check("quota", "warn", text, problem.mend))
        else:
            found.append(Check("quota", "bad", problem.text, problem.mend))
    return found or [Check("quota", "ok", f"{len(quotas)} quota in {space}, room for the run")]


def _fabric(api: Reader, wanted: RunNeeds) -> list[Check]:
    if wanted.fabric == "tcp":
        return []
    if not wanted.on_gpus:
        return [Check("fabric", "bad", f"launch.fabric = {wanted.fabric!r} is for ranks on GPUs alone", FABRIC_MEND)]
    text = f"launch.fabric = {wanted.fabric!r}: messages between pods go by NCCL, which meets on ports of its own"
    mend = "where a NetworkPolicy holds, let the pods of a run reach each other on every TCP port (trainer-peers)"
    return [Check("fabric", "warn", text, mend)]


def _containers(job: Json | None) -> list[Json]:
    pod = job["spec"]["template"]["spec"] if job else {}
    return [*pod.get("initContainers", ()), *pod.get("containers", ())]


def _machines(api: Reader, wanted: RunNeeds) -> list[Check]:
    try:
        items = api.get("/api/v1/nodes", {"limit": "1000"}, read_s=READ_S).get("items") or ()
    except NotAllowed:
        return [Check("machines", "unknown", "this user may not list machines (not needed to run)")]
    pod = wanted.job["spec"]["template"]["spec"] if wanted.job else {}
    need = of_pod(uses(pod)).requests
    fit, reasons = 0, []
    for item in items:
        why = _unfit(item, pod, need)
        if why is None:
            fit += 1
        else:
            reasons.append(f"{item['metadata']['name']}: {why}")
    text = f"{fit} of {len(items)} machines fit a pod of the run"
    if fit == 0:
        mend = "add machines, lower launch.resources, or set launch.tolerations and launch.node_selector"
        return [Check("machines", "bad", f"{text} ({'; '.join(reasons[:5]) or 'there are none'})", mend)]
    count = int(wanted.job["spec"]["completions"]) if wanted.job else 1
    if fit < count:
        mend = "several pods will share a machine where it has room; else set recovery.layouts"
        return [Check("machines", "warn", f"{text}, and it has {count} pods", mend)]
    return [Check("machines", "ok", text)]


def _gpus(api: Reader, wanted: RunNeeds) -> list[Check]:
    """What the cluster has of each kind of NVIDIA device that a pod asks for; and whether its image can use them."""
    pod = wanted.job["spec"]["template"]["spec"] if wanted.job else {}
    asked = {key: value for key, value in of_pod(uses(pod)).requests.items() if key.startswith(_GPUS) and value}
    if not asked:
        return []
    found = [
        Check(
            "gpus",
            "bad",
            f"the engine's image {container['image']} is the one for CPUs: it opens no CUDA device",
            f"take {CUDA_IMAGE} (`make images IMAGES=engine-cuda` builds it), or unset launch.image",
        )
        for container in _containers(wanted.job)
        if container["name"] == ENGINE and _image_name(container["image"]) == _image_name(DEFAULT_IMAGE)
    ]
    try:
        items = api.get("/api/v1/nodes", {"limit": "1000"}, read_s=READ_S).get("items") or ()
    except NotAllowed:
        return [*found, Check("gpus", "unknown", "this user may not list machines (not needed to run)")]
    assert wanted.job is not None
    pods = int(wanted.job["spec"]["completions"])
    for key, value in sorted(asked.items()):
        has = [amount(((item.get("status") or {}).get("allocatable") or {}).get(key, "0")) for item in items]
        room = sum(int(one / value) for one in has)
        text = f"{sum(has)} {key} on {sum(one > 0 for one in has)} of {len(items)} machines; the run asks for "
        text += f"{spelled(value, key)} in each of {pods} pods"
        if not any(has):
            mend = (
                "install NVIDIA's device plugin (or its GPU operator) where machines have GPUs; or name what they offer"
            )
            found.append(Check("gpus", "bad", text, f"{mend} in launch.resources"))
        elif room < pods:
            mend = "lower launch.nodes or the ranks of a pod, or add machines; recovery.layouts goes on with fewer"
            found.append(Check("gpus", "bad", f"{text}: room for {room}", mend))
        else:
            found.append(Check("gpus", "ok", text))
    return found


def _image_name(image: str) -> str:
    """Without registry, tag and digest."""
    return image.rsplit("/", 1)[-1].partition("@")[0].partition(":")[0]


def _unfit(node: Json, pod: Json, need: Mapping[str, Fraction]) -> str | None:
    spec, status = node.get("spec") or {}, node.get("status") or {}
    ready: Json = next((c for c in status.get("conditions") or () if c["type"] == "Ready"), {})
    if ready.get("status") != "True":
        return "not ready"
    labels = node["metadata"].get("labels") or {}
    for key, value in (pod.get("nodeSelector") or {}).items():
        if labels.get(key) != value:
            return f"has no label {key}={value}"
    rules = (pod.get("affinity") or {}).get("nodeAffinity") or {}
    terms = (rules.get("requiredDuringSchedulingIgnoredDuringExecution") or {}).get("nodeSelectorTerms") or ()
    if terms and not any(_chosen(node, term) for term in terms):
        return "is not what its nodeAffinity asks for"
    for taint in spec.get("taints") or ():
        if taint.get("effect") in ("NoSchedule", "NoExecute") and not _tolerates(pod.get("tolerations") or (), taint):
            return f"taint {taint['key']}={taint.get('value', '')}:{taint['effect']}"
    for key, value in need.items():
        has = amount((status.get("allocatable") or {}).get(key, "0"))
        if has < value:
            return f"has {spelled(has, key)} {key}, a pod asks for {spelled(value, key)}"
    return None


def _chosen(node: Json, term: Json) -> bool:
    """By one term of a nodeAffinity; an empty one chooses none."""
    labels = node["metadata"].get("labels") or {}
    rules = [(labels, rule) for rule in term.get("matchExpressions") or ()]
    rules += [({"metadata.name": node["metadata"]["name"]}, rule) for rule in term.get("matchFields") or ()]
    return bool(rules) and all(_holds(has.get(rule["key"]), rule) for has, rule in rules)


def _holds(value: str | None, rule: Json) -> bool:
    operator, values = rule["operator"], list(rule.get("values") or ())
    if operator in ("Gt", "Lt"):
        try:
            number, bound = int(value or ""), int(values[0])
        except (ValueError, IndexError):
            return False
        return number > bound if operator == "Gt" else number < bound
    return taken(value, operator, values)


def _tolerates(tolerations: Sequence[Mapping[str, Any]], taint: Mapping[str, Any]) -> bool:
    return any(
        (not t.get("key") or t["key"] == taint["key"])
        and (t.get("operator") == "Exists" or t.get("value", "") == taint.get("value", ""))
        and t.get("effect") in (None, "", taint["effect"])
        for t in tolerations
    )


def _images(api: Reader, wanted: RunNeeds) -> list[Check]:
    found = []
    for container in _containers(wanted.job):
        if container["name"] not in (ENGINE, AGENT):
            continue
        image, policy = container["image"], container.get("imagePullPolicy")
        tag = image.rsplit("/", 1)[-1]
        if "@" not in tag and (":" not in tag or tag.endswith(":latest")):
            mend = "name a version or a digest, so that every pod of a run gets the same engine"
            found.append(Check("images", "warn", f"{image} has no fixed version", mend))
        elif "/" not in image and policy != "Never":
            mend = "push it to your registry (`make images`), set launch.image and launch.agent_image to that name"
            found.append(Check("images", "warn", f"{image} names no registry: it must be on every machine", mend))
    return found or [Check("images", "ok", "fixed versions" if wanted.job else "no spec given")]


def _store(api: Reader, wanted: RunNeeds) -> list[Check]:
    if wanted.store_url and not wanted.store_url.startswith("s3:"):
        mend = "use an s3:// store that the pods reach (--store, HOTSTAGE_STORE)"
        return [Check("store", "bad", f"{wanted.store_url} is a store of one machine", mend)]
    if not wanted.store_secret:
        text = "no launch.store_secret: the agent's rights must come from its service account (IRSA, workload identity)"
        return [Check("store", "ok" if not wanted.store_url else "warn", text)]
    try:
        raw = api.get(SECRETS.path(wanted.namespace, wanted.store_secret), read_s=READ_S)
    except Missing:
        mend = (
            f"kubectl -n {wanted.namespace} create secret generic {wanted.store_secret} "
            "--from-literal=AWS_ACCESS_KEY_ID=… --from-literal=AWS_SECRET_ACCESS_KEY=…"
        )
        return [Check("store", "bad", f"there is no Secret {wanted.store_secret} in {wanted.namespace}", mend)]
    lacks = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} - set(raw.get("data") or {})
    if lacks:
        mend = "its keys become the agent's environment: add them under these names"
        return [Check("store", "bad", f"Secret {wanted.store_secret} lacks {', '.join(sorted(lacks))}", mend)]
    return [Check("store", "ok", f"Secret {wanted.store_secret} has the store's credentials")]


def _named(api: Reader, wanted: RunNeeds) -> list[Check]:
    """What the pods name beside the store's Secret and their launch's own, which is made with it."""
    if wanted.job is None:
        return []
    own = {wanted.store_secret, f"{wanted.job['metadata']['name']}-key"}
    named = [n for n in named_by(wanted.job["spec"]["template"]["spec"]) if n.kind != "Secret" or n.name not in own]
    pods = int(wanted.job["spec"]["completions"])
    return [check for one in named if (check := _one_named(api, wanted.namespace, one, pods)) is not None]


def _one_named(api: Reader, space: str, one: Named, pods: int) -> Check | None:
    """What is wrong with it; None: nothing."""
    resource = next(r for r in (CLAIMS, CONFIGS, SECRETS) if r.kind == one.kind)
    verdict: Literal["warn", "bad"] = "warn" if one.pulls else "bad"
    try:
        raw = api.get(resource.path(space, one.name), read_s=READ_S)
    except NotAllowed:
        text = f"this user may not read {resource.plural}: nobody looked whether {one.kind} {one.name} is there"
        return Check("named", "unknown", text)
    except Missing:
        what = "images are pulled without it" if one.pulls else "pods wait for it, and do not start"
        mend = "create it, or correct its name in launch.pod_patch"
        return Check("named", verdict, f"there is no {one.kind} {one.name} in {space}: {what}", mend)
    if one.pulls and not str(raw.get("type", "")).startswith("kubernetes.io/dockerc"):
        mend = "create it by kubectl create secret docker-registry"
        return Check("named", verdict, f"Secret {one.name} is none for registries: its type is {raw.get('type')}", mend)
    lacks = one.keys - set(raw.get("data") or {}) - set(raw.get("binaryData") or {})
    if lacks and one.kind != "PersistentVolumeClaim":
        text = f"{one.kind} {one.name} lacks {', '.join(sorted(lacks))}, which the pods name"
        return Check("named", verdict, text, "add it there, or correct launch.pod_patch")
    if (raw.get("status") or {}).get("phase") == "Lost":
        text = f"PersistentVolumeClaim {one.name} has lost its volume"
        return Check("named", verdict, text, "name another one in launch.pod_patch")
    modes = set((raw.get("spec") or {}).get("accessModes") or ())
    if modes and pods > 1 and modes <= {"ReadWriteOnce", "ReadWriteOncePod"}:
        pod = "ReadWriteOncePod" in modes
        text = f"PersistentVolumeClaim {one.name} is {', '.join(sorted(modes))}, for one {'pod' if pod else 'machine'}"
        text += f": of {pods} pods {'all but one' if pod else 'those on others'} wait for it, and do not start"
        mend = "take a claim of ReadWriteMany or ReadOnlyMany, or a volume of each pod's own (ephemeral, emptyDir)"
        return Check("named", "bad" if pod else "warn", text, mend)
    return None


def _queue(api: Reader, wanted: RunNeeds) -> list[Check]:
    if not wanted.queue:
        return []
    group = "/apis/kueue.x-k8s.io"
    try:
        serves = (api.get(group, read_s=READ_S).get("preferredVersion") or {}).get("version", "v1beta2")
    except Missing:
        mend = "install Kueue, or unset launch.queue: the Job stays suspended without it"
        return [Check("queue", "bad", "the cluster has no Kueue", mend)]
    try:
        api.get(f"{group}/{serves}/namespaces/{wanted.namespace}/localqueues/{wanted.queue}", read_s=READ_S)
    except Missing:
        mend = "make that LocalQueue, or unset launch.queue: the Job stays suspended without it"
        return [Check("queue", "bad", f"there is no LocalQueue {wanted.queue} in {wanted.namespace}", mend)]
    return [Check("queue", "ok", f"LocalQueue {wanted.queue}")]


def _admission(api: Reader, wanted: RunNeeds) -> list[Check]:
    """The API server's own verdict on the Job and on a pod of it: schema, defaults, webhooks; the pod's account and
    classes, Pod Security, limits and quotas, which nobody looks at before pods are made.
    """
    if wanted.job is None:
        return []
    api.create(JOBS.path(wanted.namespace), wanted.job, dry_run=True)
    template, name = wanted.job["spec"]["template"], wanted.job["metadata"]["name"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {**template.get("metadata", {}), "name": f"{name}-doctor"},
        "spec": template["spec"],
    }
    try:
        api.create(PODS.path(wanted.namespace), pod, dry_run=True)
    except Unauthenticated:
        raise
    except NotAllowed:
        text = (
            "the API server accepts the Job (server-side dry run); of its pods nobody asked: this user may not create"
        )
        return [Check("admission", "ok", f"{text} pods (not needed to run)")]
    return [Check("admission", "ok", "the API server accepts the Job and its pods (server-side dry run)")]
