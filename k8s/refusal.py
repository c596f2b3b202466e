"""What admission says when it takes no object: its words read once, into a typed refusal with its mend. Pure.

The API server gives quotas, limit ranges, Pod Security and webhooks no code of their own: 403 and a sentence. This is
the one place that reads those sentences (apiserver ``resourcequota``, ``limitranger`` and ``podsecurity`` plugins).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from k8s.labels import AGENT, ENGINE
from k8s.quantity import amount

Kind = Literal["quota", "unset", "range", "security", "account", "admission"]
WHERE = {ENGINE: "launch.resources", AGENT: "launch.agent_resources"}


@dataclass(frozen=True)
class Refusal:
    """``waits``: the same object will be taken once others have gone; else never, as it is written."""

    kind: Kind
    mend: str
    waits: bool = False


def key_of(container: str, resource: str) -> str:
    """The spec's key that sets what a quota calls ``limits.cpu``, ``requests.cpu`` or ``cpu`` of a container.

    >>> key_of("engine", "limits.cpu"), key_of("agent", "requests.nvidia.com/gpu")
    ('launch.resources."limits.cpu"', 'launch.agent_resources."nvidia.com/gpu"')
    """
    where = WHERE.get(container, f"launch.pod_patch, container {container}: resources")
    name = resource.removeprefix("requests.").replace("limits.memory", "memory")  # its limit is its request
    return f"{where}.{name}" if name.isalnum() else f'{where}."{name}"'


def keys_of(containers: Iterable[str], resource: str) -> str:
    return " and ".join(key_of(c, resource) for c in sorted(containers, key=lambda c: (c != ENGINE, c)))


_EXCEEDED = re.compile(r"exceeded quota: (\S+), requested: (\S+), used: (\S+), limited: (\S+)")
_UNSET = re.compile(r"failed quota: (\S+): must specify (.+)")
_UNSET_ONE = re.compile(r"(\S+) for: ([^;\s]+)")
_RANGE = re.compile(
    r"(?P<side>minimum|maximum) (?P<what>\S+) usage per (?P<of>Container|Pod) is (?P<bound>[^\s,]+?)[.,](?:\s|\Z)"
    r"|(?P<ratio>\S+) max limit to request ratio per (?:Container|Pod) is [^\s,]+"
)
_ABOVE_LIMIT = re.compile(r"must be less than or equal to (\S+) limit(?: of (\S+))?")

_NAMED = re.compile(r"no (PriorityClass) with name \S+ was found|(RuntimeClass) \S+ not found")
_NAMES = {"PriorityClass": "launch.priority_class", "RuntimeClass": "launch.runtime_class"}
_SOON = re.compile(r"not yet ready to handle request|status unknown for quota")
_ADMISSION = re.compile(r'admission webhook|is invalid|denied (the )?request|is forbidden: (?!(?i:user) ")')
"""What is forbidden to a user is a question of rights; all else that is forbidden is refused whoever asks."""


def refusal(message: str) -> Refusal | None:
    """What the sentence of a 403, 422 or a FailedCreate event stands for; None where it is about something else."""
    if match := _UNSET.search(message):
        found = _UNSET_ONE.findall(match[2])
        keys = ", ".join(keys_of(names.split(","), resource) for resource, names in found)
        keys = keys or f"{match[2]} in launch.resources and launch.agent_resources"
        return Refusal("unset", f"quota {match[1]} accepts only pods that say it: set {keys}")
    if match := _EXCEEDED.search(message):
        return _exceeded(match[1], *(_listed(match[n]) for n in (2, 4)))
    if "exceeded quota" in message:
        return Refusal("quota", _ROOM, waits=True)
    if "insufficient quota" in message:
        return Refusal("unset", "the cluster accepts such pods only where a ResourceQuota grants them: ask for one")
    if _RANGE.search(message):
        return Refusal("range", f"a LimitRange of the namespace bounds it: {', '.join(_bounds(message))}")
    if match := _ABOVE_LIMIT.search(message):
        keys = keys_of((ENGINE, AGENT), f"limits.{match[1]}")
        return Refusal("range", f"a LimitRange gives a limit below the request: set {keys}")
    if "violates PodSecurity" in message:
        mend = "use a fabric that restricted allows (tcp), take what the message names out of launch.pod_patch, or use "
        return Refusal("security", mend + "a namespace of a lower Pod Security level")
    if "serviceaccount" in message.lower() and "not found" in message:
        return Refusal("account", "create that ServiceAccount, or correct launch.service_account")
    if "failed calling webhook" in message or "failed to call webhook" in message:
        mend = "a webhook of the cluster does not answer: tell whoever runs it; it goes on by itself then"
        return Refusal("admission", mend, waits=True)
    if _SOON.search(message):
        return Refusal(
            "admission", "the API server has just begun to look at the namespace: it is asked again", waits=True
        )
    if match := _NAMED.search(message):
        kind = next(kind for kind in match.groups() if kind)
        return Refusal("admission", f"create that {kind}, or correct {_NAMES[kind]}")
    if "is being terminated" in message:
        mend = "the namespace is being deleted: take another one (launch.namespace), or create it anew once it is gone"
        return Refusal("admission", mend)
    if "security context constraint" in message:
        mend = "let the cluster choose the users: launch.pod_patch.securityContext with runAsUser, runAsGroup and "
        return Refusal("security", mend + "fsGroup null; or ask for a constraint such as nonroot-v2")
    if _ADMISSION.search(message):
        mend = "the cluster's admission refuses it: the message says what to change (launch.pod_patch, launch.labels, "
        mend += "launch.annotations, launch.resources)"
        return Refusal("admission", mend)
    return None


_ROOM = "raise the quota, end what uses it, or lower launch.resources: it goes on by itself then"


def lowering(key: str) -> str:
    """What of a spec lowers the use of a quota's key; empty where nothing does.

    >>> lowering("pods"), lowering("requests.cpu"), lowering("count/jobs.batch")
    ('launch.nodes', 'launch.resources.cpu and launch.agent_resources.cpu', '')
    """
    if key in ("pods", "count/pods"):
        return "launch.nodes"
    compute = key.startswith(("requests.", "limits.", "hugepages-")) or key in ("cpu", "memory", "ephemeral-storage")
    return keys_of((ENGINE, AGENT), key) if compute else ""


def _exceeded(quota: str, requested: dict[str, str], limited: dict[str, str]) -> Refusal:
    never = [key for key, asked in requested.items() if _above(asked, limited.get(key))]
    if not never:
        return Refusal("quota", _ROOM, waits=True)
    told = ", ".join(
        f"{requested[key]} of {key} is asked for at once, the whole quota is {limited[key]}" for key in never
    )
    lower = [keys for key in never if (keys := lowering(key))]
    return Refusal(
        "quota", f"it never fits: {told}; raise quota {quota}{' or lower ' if lower else ''}{', '.join(lower)}"
    )


def _listed(text: str) -> dict[str, str]:
    """``a=1,b=2``; keys may hold dots and slashes, no comma."""
    return {key: value for key, _, value in (item.partition("=") for item in text.split(","))}


def _above(asked: str, limit: str | None) -> bool:
    try:
        return limit is not None and amount(asked) > amount(limit)
    except ValueError:
        return False


def _bounds(message: str) -> list[str]:
    found = []
    for match in _RANGE.finditer(message):
        if match["ratio"]:
            both = (
                keys_of((ENGINE, AGENT), match["ratio"]) + ", " + keys_of((ENGINE, AGENT), f"limits.{match['ratio']}")
            )
            found.append(f"bring request and limit of {match['ratio']} closer together ({both})")
        else:
            low = match["side"] == "minimum"
            keys = keys_of((ENGINE, AGENT), f"{'requests' if low else 'limits'}.{match['what']}")
            found.append(f"set {keys} to {'at least' if low else 'at most'} {match['bound']}")
    return list(dict.fromkeys(found))
