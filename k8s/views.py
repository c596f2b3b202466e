"""Raw Job and Pod objects reduced to what decisions need: small, frozen, tolerant of what a server leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from k8s.api import Json
from k8s.labels import INDEX, LAUNCH, MANAGED_BY, MANAGER, SPEC_DIGEST


@dataclass(frozen=True)
class Condition:
    status: str
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class ContainerView:
    """A container: ``state`` is waiting, running or terminated; ``last_…`` of its run before, where there was one."""

    state: str = "waiting"
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    restarts: int = 0
    last_code: int | None = None
    last_reason: str = ""
    last_message: str = ""


@dataclass(frozen=True)
class PodView:
    name: str
    uid: str = ""
    job_uid: str = ""
    index: int | None = None
    phase: str = "Pending"
    place: str = ""
    reason: str = ""
    message: str = ""
    deleting: bool = False
    created: str = ""
    conditions: Mapping[str, Condition] = field(default_factory=dict)
    containers: Mapping[str, ContainerView] = field(default_factory=dict)


@dataclass(frozen=True)
class JobView:
    name: str
    uid: str = ""
    launch: str = ""
    ours: bool = True
    digest: str = ""
    queue: str = ""
    completions: int = 1
    suspended: bool = False
    deleting: bool = False
    active: int = 0
    failed: int = 0
    created: str = ""
    conditions: Mapping[str, Condition] = field(default_factory=dict)

    def is_(self, condition: str) -> bool:
        known = self.conditions.get(condition)
        return known is not None and known.status == "True"


@dataclass(frozen=True)
class EventView:
    """A Kubernetes event, newest last."""

    about: str
    reason: str
    message: str
    type: str = "Normal"
    count: int = 1


def pod_view(raw: Json) -> PodView:
    meta, spec, status = raw.get("metadata") or {}, raw.get("spec") or {}, raw.get("status") or {}
    labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    index = labels.get(INDEX, notes.get(INDEX))
    owner: Json = next((o for o in meta.get("ownerReferences") or () if o.get("controller")), {})
    statuses = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    return PodView(
        name=meta.get("name", ""),
        uid=meta.get("uid", ""),
        job_uid=labels.get("batch.kubernetes.io/controller-uid") or owner.get("uid", ""),
        index=int(index) if index is not None and str(index).isdigit() else None,
        phase=status.get("phase") or "Pending",
        place=spec.get("nodeName") or "",
        reason=status.get("reason") or "",
        message=status.get("message") or "",
        deleting=bool(meta.get("deletionTimestamp")),
        created=meta.get("creationTimestamp") or "",
        conditions=_conditions(status),
        containers={c["name"]: _container(c) for c in statuses},
    )


def job_view(raw: Json) -> JobView:
    meta, spec, status = raw.get("metadata") or {}, raw.get("spec") or {}, raw.get("status") or {}
    labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    return JobView(
        name=meta.get("name", ""),
        uid=meta.get("uid", ""),
        launch=labels.get(LAUNCH, ""),
        ours=labels.get(MANAGED_BY) == MANAGER,
        digest=notes.get(SPEC_DIGEST, ""),
        queue=labels.get("kueue.x-k8s.io/queue-name", ""),
        completions=int(spec.get("completions") or 1),
        suspended=bool(spec.get("suspend")),
        deleting=bool(meta.get("deletionTimestamp")),
        active=int(status.get("active") or 0),
        failed=int(status.get("failed") or 0),
        created=meta.get("creationTimestamp") or "",
        conditions=_conditions(status),
    )


def event_view(raw: Json) -> EventView:
    return EventView(
        about=(raw.get("involvedObject") or {}).get("name", ""),
        reason=raw.get("reason") or "",
        message=raw.get("message") or "",
        type=raw.get("type") or "Normal",
        count=int(raw.get("count") or 1),
    )


def _conditions(status: Json) -> dict[str, Condition]:
    return {
        c["type"]: Condition(c.get("status", ""), c.get("reason") or "", c.get("message") or "")
        for c in status.get("conditions") or ()
    }


def _container(raw: Json) -> ContainerView:
    state, now = _state(raw.get("state"))
    last_state, last = _state(raw.get("lastState"))
    ended = last_state == "terminated"
    return ContainerView(
        state=state,
        reason=now.get("reason") or "",
        message=now.get("message") or "",
        exit_code=now.get("exitCode") if state == "terminated" else None,
        restarts=int(raw.get("restartCount") or 0),
        last_code=last.get("exitCode") if ended else None,
        last_reason=(last.get("reason") or "") if ended else "",
        last_message=(last.get("message") or "") if ended else "",
    )


def _state(raw: Any) -> tuple[str, dict[str, Any]]:
    for name in ("terminated", "running", "waiting"):
        if raw and raw.get(name) is not None:
            return name, raw[name]
    return "waiting", {}
