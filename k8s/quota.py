"""Whether a namespace's ResourceQuotas and LimitRanges take the pods of a launch, by the API server's own rules. Pure.

The order is the server's: a container's limit is its request where that is missing; a LimitRange fills in its defaults,
then judges each container and the pod; a ResourceQuota asks that every container names what it counts of processor and
memory, and counts the pods one after the other (``pkg/quota/v1/evaluator/core``, ``plugin/pkg/admission/limitranger``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from k8s.quantity import amount, spelled
from k8s.refusal import keys_of, lowering

Json = dict[str, Any]
Amounts = dict[str, Fraction]

_NAMED = ("cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory")
"""What every container must say for itself where a quota counts it."""
_NATIVE = ("cpu", "memory", "ephemeral-storage")
_OBJECTS = {"jobs.batch": 1, "services": 1, "secrets": 1}
"""What a launch makes beside its pods; each is counted as ``count/<this>``, the last two by their bare names too."""


@dataclass(frozen=True)
class QuotaProblem:
    """``never``: no pod of this launch is taken as it is written; else it waits for room. ``unnamed``: never,
    because containers do not say what the quota counts, which a LimitRange can say for them.
    """

    text: str
    mend: str
    never: bool = False
    unnamed: bool = False


@dataclass(frozen=True)
class PodUse:
    """What a container or a pod asks for, and what it may use at most."""

    name: str
    requests: Amounts
    limits: Amounts


def uses(pod: Mapping[str, Any], ranges: Sequence[Json] = ()) -> list[tuple[PodUse, str]]:
    """Every container with the defaults that the namespace gives it, and how it counts: "main", "sidecar", "init"."""
    found = []
    for group, raw in (("init", "initContainers"), ("main", "containers")):
        for container in pod.get(raw) or ():
            said = container.get("resources") or {}
            use = PodUse(container["name"], _amounts(said.get("requests")), _amounts(said.get("limits")))
            for key, value in use.limits.items():
                use.requests.setdefault(key, value)
            for item in ranges:
                for limit in _items(item, "Container"):
                    for key, value in _amounts(limit.get("default")).items():
                        use.limits.setdefault(key, value)
                    for key, value in _amounts(limit.get("defaultRequest")).items():
                        use.requests.setdefault(key, value)
            found.append((use, "sidecar" if group == "init" and container.get("restartPolicy") == "Always" else group))
    return found


def of_pod(containers: Sequence[tuple[PodUse, str]]) -> PodUse:
    """The pod's own: containers and sidecars together, or what a plain init container needs beside the sidecars before
    it, whichever is more.
    """

    def total(side: str) -> Amounts:
        running: Amounts = {}
        starting: Amounts = {}
        for use, kind in containers:
            mine: Amounts = getattr(use, side)
            if kind == "init":
                starting = _most(starting, _sum(running, mine))
            else:
                running = _sum(running, mine)
        return _most(running, starting)

    return PodUse("pod", total("requests"), total("limits"))


def charges(pod: PodUse) -> Amounts:
    """What one pod counts in a quota, by the quota's keys."""
    found: Amounts = {"pods": Fraction(1), "count/pods": Fraction(1)}
    for key, value in pod.requests.items():
        if key in _NATIVE or key.startswith("hugepages-"):
            found[key] = value
        found[f"requests.{key}"] = value
    for key, value in pod.limits.items():
        if key in _NATIVE:
            found[f"limits.{key}"] = value
    return found


# --- LimitRange ---------------------------------------------------------------------------------------------


def range_problems(item: Json, pod: Mapping[str, Any], ranges: Sequence[Json]) -> list[QuotaProblem]:
    """What one LimitRange refuses of the pod, after the defaults of all ``ranges``."""
    name, containers = item["metadata"]["name"], uses(pod, ranges)
    found = [QuotaProblem(*words, never=True) for use, _ in containers for words in _above_limit(name, use, pod)]
    for limit in _items(item, "Container"):
        for use, _ in containers:
            found += _bounded(name, limit, use, (use.name,))
    everybody = tuple(use.name for use, _ in containers)
    for limit in _items(item, "Pod"):
        found += _bounded(name, limit, of_pod(containers), everybody)
    return found


def _above_limit(name: str, use: PodUse, pod: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A default limit below what the container asks for makes a pod that is not valid."""
    own = {c["name"]: (c.get("resources") or {}).get("limits") or {} for c in _all(pod)}[use.name]
    return [
        (
            f"LimitRange {name} limits container {use.name} to {spelled(use.limits[key], key)} {key}, and it requests "
            f"{spelled(asked, key)}",
            f"set {keys_of([use.name], f'limits.{key}')} to at least {spelled(asked, key)}",
        )
        for key, asked in use.requests.items()
        if key in use.limits and key not in own and asked > use.limits[key]
    ]


def _bounded(name: str, limit: Json, use: PodUse, containers: Sequence[str]) -> list[QuotaProblem]:
    who = "the pod" if use.name == "pod" and len(containers) != 1 else f"container {use.name}"
    found: list[tuple[str, str]] = []

    def told(what: str, side: str, key: str, words: str) -> None:
        found.append((f"LimitRange {name} {what}; {who} {words}", f"set {keys_of(containers, f'{side}.{key}')}"))

    for key, least in _amounts(limit.get("min")).items():
        what, asked = f"wants at least {spelled(least, key)} {key}", use.requests.get(key)
        if asked is None:
            told(what, "requests", key, "requests none")
        elif asked < least:
            told(what, "requests", key, f"requests {spelled(asked, key)}")
        elif key in use.limits and use.limits[key] < least:
            told(what, "limits", key, f"is limited to {spelled(use.limits[key], key)}")
    for key, most in _amounts(limit.get("max")).items():
        what, cap = f"allows at most {spelled(most, key)} {key}", use.limits.get(key)
        if cap is None:
            told(what, "limits", key, "has no limit")
        elif cap > most:
            told(what, "limits", key, f"has a limit of {spelled(cap, key)}")
        elif key in use.requests and use.requests[key] > most:
            told(what, "requests", key, f"requests {spelled(use.requests[key], key)}")
    for key, ratio in _amounts(limit.get("maxLimitRequestRatio")).items():
        what, asked, cap = (
            f"allows a limit of at most {ratio} requests of {key}",
            use.requests.get(key),
            use.limits.get(key),
        )
        if not asked:
            told(what, "requests", key, "requests none")
        elif not cap:
            told(what, "limits", key, "has no limit")
        elif cap / asked > ratio:
            told(what, "limits", key, f"has {spelled(cap, key)} for {spelled(asked, key)}")
    return [QuotaProblem(*words, never=True) for words in found]


# --- ResourceQuota ------------------------------------------------------------------------------------------


def quota_problems(item: Json, job: Json, ranges: Sequence[Json] = ()) -> list[QuotaProblem]:
    """What one ResourceQuota has against the launch of this Job. Raises ValueError for what is no quantity."""
    name, pod, count = item["metadata"]["name"], job["spec"]["template"]["spec"], int(job["spec"]["completions"])
    status, spec = item.get("status") or {}, item.get("spec") or {}
    hard, used = _amounts(status.get("hard") or spec.get("hard")), _amounts(status.get("used"))
    scopes = _scopes(spec)
    containers = uses(pod, ranges)
    mine = of_pod(containers)
    counts = all(_in_scope(scope, pod, mine) for scope in scopes)
    unnamed = _unnamed(name, hard, containers) if counts else {}
    found = list(unnamed.values())
    each = charges(mine) if counts else {}
    objects = {} if scopes else _objects()
    for key in hard:
        ask = each.get(key, Fraction(0)) * count + objects.get(key, 0)
        left = hard[key] - used.get(key, Fraction(0))
        if not ask or ask <= left or key in unnamed:
            continue
        most, words = max(each.get(key, Fraction(0)), Fraction(objects.get(key, 0))), spelled(ask, key)
        lower = f", or lower {lowering(key)}" if lowering(key) else ""
        if most > hard[key]:
            text = f"quota {name} has {spelled(hard[key], key)} of {key} in total, and one "
            text += f"{'pod' if key in each else 'launch'} asks for {spelled(most, key)}"
            found.append(QuotaProblem(text, f"raise the quota{lower}", never=True))
        elif ask > hard[key]:
            text = f"quota {name} has {spelled(hard[key], key)} of {key} in total, the run asks for {words}"
            found.append(QuotaProblem(text, f"raise the quota{lower}; the run waits until then"))
        else:
            text = f"quota {name} leaves {spelled(left, key)} of {key}, the run asks for {words}"
            found.append(QuotaProblem(text, f"raise the quota, end what uses it{lower}; the run waits until then"))
    return found


def _objects() -> dict[str, int]:
    bare = {key: count for key, count in _OBJECTS.items() if "." not in key}
    return {**{f"count/{key}": count for key, count in _OBJECTS.items()}, **bare}


def _unnamed(name: str, hard: Amounts, containers: Sequence[tuple[PodUse, str]]) -> dict[str, QuotaProblem]:
    found = {}
    for key in (k for k in _NAMED if k in hard):
        side, what = ("limits" if key.startswith("limits.") else "requests"), key.rpartition(".")[2]
        lacking = [use.name for use, _ in containers if what not in getattr(use, side)]
        if lacking:
            who = f"container {lacking[0]} sets" if len(lacking) == 1 else f"containers {', '.join(lacking)} set"
            text = f"quota {name} counts {key} and {who} none: no pod of the run is accepted"
            found[key] = QuotaProblem(
                text, f'set {keys_of(lacking, key)} (a quantity, for example "2")', True, unnamed=True
            )
    return found


def _scopes(spec: Json) -> list[Json]:
    plain = [{"scopeName": scope, "operator": "Exists"} for scope in spec.get("scopes") or ()]
    return [*plain, *((spec.get("scopeSelector") or {}).get("matchExpressions") or ())]


def _in_scope(scope: Json, pod: Mapping[str, Any], use: PodUse) -> bool:
    name, operator, values = scope["scopeName"], scope.get("operator", "Exists"), scope.get("values") or ()
    deadline = pod.get("activeDeadlineSeconds")
    best_effort = not any(side.get(key) for side in (use.requests, use.limits) for key in ("cpu", "memory"))
    return {
        "Terminating": deadline is not None,
        "NotTerminating": deadline is None,
        "BestEffort": best_effort,
        "NotBestEffort": not best_effort,
        "PriorityClass": taken(pod.get("priorityClassName") or None, operator, values),
        "CrossNamespacePodAffinity": _across(pod),
    }.get(name, False)


def taken(value: str | None, operator: str, values: Collection[str]) -> bool:
    """Whether a requirement of Kubernetes' selectors takes a value (None: there is none)."""
    return {
        "Exists": value is not None,
        "DoesNotExist": value is None,
        "In": value in values,
        "NotIn": value not in values,
    }.get(operator, False)


def _across(pod: Mapping[str, Any]) -> bool:
    affinity = pod.get("affinity") or {}
    for kind in ("podAffinity", "podAntiAffinity"):
        rules = affinity.get(kind) or {}
        terms = list(rules.get("requiredDuringSchedulingIgnoredDuringExecution") or ())
        preferred = rules.get("preferredDuringSchedulingIgnoredDuringExecution") or ()
        terms += [t.get("podAffinityTerm") or {} for t in preferred]
        if any(t.get("namespaces") or t.get("namespaceSelector") is not None for t in terms):
            return True
    return False


# --- numbers ------------------------------------------------------------------------------------------------


def _amounts(raw: Mapping[str, Any] | None) -> Amounts:
    """A list of resources as the API server keeps it: what is finer than a thousandth is rounded up."""
    return {key: Fraction(math.ceil(amount(value) * 1000), 1000) for key, value in (raw or {}).items()}


def _items(item: Json, kind: str) -> list[Json]:
    return [limit for limit in (item.get("spec") or {}).get("limits") or () if limit.get("type") == kind]


def _all(pod: Mapping[str, Any]) -> list[Json]:
    return [*(pod.get("initContainers") or ()), *(pod.get("containers") or ())]


def _sum(a: Amounts, b: Amounts) -> Amounts:
    return {key: a.get(key, Fraction(0)) + b.get(key, Fraction(0)) for key in {**a, **b}}


def _most(a: Amounts, b: Amounts) -> Amounts:
    return {key: max(a.get(key, Fraction(0)), b.get(key, Fraction(0))) for key in {**a, **b}}
