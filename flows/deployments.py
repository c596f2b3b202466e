"""Our flows as Prefect deployments: parameters, limits and descriptions. ``serve.py`` serves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.schedules import Schedule
from prefect.types.entrypoint import EntrypointType

from flows.flow import collect_flow, reconcile_flow, sweep_flow, train_flow
from flows.recurring.due import Overlap
from flows.recurring.state import OVERLAP_TAG
from trainer.spec import RunSpec

SKIPS = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
WAITS = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
_OVERLAPS = {
    "skip": "is skipped",
    "queue": "waits its turn",
    "cancel": "cancels it",
}


def _deployed(
    flow: Any,
    name: str,
    parameters: dict[str, Any],
    when: Schedule | None = None,
    description: str | None = None,
    overlap: Overlap | None = None,
) -> RunnerDeployment:
    """Of this flow. ``overlap``: what becomes of a firing while an older one's run goes on; None: any may go on."""
    more: dict[str, Any] = {}
    if overlap is not None:
        more["concurrency_limit"] = SKIPS if overlap == "skip" else WAITS
        more["tags"] = [] if overlap == "skip" else [f"{OVERLAP_TAG}{overlap}"]
    if when is not None:
        more["schedules"] = [when]
    made = flow.to_deployment(
        name=name, parameters=parameters, description=description, entrypoint_type=EntrypointType.MODULE_PATH, **more
    )
    return cast("RunnerDeployment", made)


def scheduled(
    spec: RunSpec,
    store_url: str,
    out: str,
    when: Schedule,
    name: str,
    told: str = "",
    *,
    mode: str = "fresh",
    lr_schedule: str = "extend",
    overlap: Overlap = "skip",
) -> RunnerDeployment:
    """A deployment that starts a run each firing, one at a time; ``overlap``: of one that fires while an older run goes
    on.
    """
    what = f"A new run of `{spec.name}` each time" if mode == "fresh" else f"`{spec.name}` goes on each time"
    parameters: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "store": store_url, "fresh": True, "out": out}
    if mode != "fresh":
        parameters |= {"mode": mode, "lr_schedule": lr_schedule}
    if overlap != "skip":
        parameters |= {"overlap": overlap}
    description = f"{what}: {told}. A firing that overlaps {_OVERLAPS[overlap]}." if told else None
    return _deployed(train_flow, name, parameters, when, description, overlap)


def sweeping(
    spec: RunSpec,
    points: Sequence[Sequence[str]],
    at_once: int,
    store_url: str,
    out: str,
    when: Schedule,
    name: str,
    told: str = "",
    *,
    overlap: Overlap = "skip",
) -> RunnerDeployment:
    """A deployment that trains all points of a sweep each firing."""
    parameters = {
        "spec": spec.model_dump(mode="json"),
        "points": [list(point) for point in points],
        "at_once": at_once,
        "store": store_url,
        "fresh": True,
        "out": out,
    }
    description = f"A sweep of {len(points)} runs of `{spec.name}` each time: {told}."
    return _deployed(sweep_flow, name, parameters, when, description, overlap)


def collecting(store_url: str, run: str, when: Schedule, told: str) -> RunnerDeployment:
    """A deployment that collects each time it fires, one pass at a time."""
    description = f"Old checkpoints are given up and deleted: {told}."
    return _deployed(collect_flow, "collect", {"store": store_url, "run": run}, when, description, "skip")


def reconciling(store_url: str, out: str, when: Schedule, told: str, interval: float) -> RunnerDeployment:
    """A deployment that looks after runs that nobody drives, one flow run at a time, each until the next is due."""
    description = f"Open runs whose drivers have died are driven: {told}."
    parameters = {"store": store_url, "out": out, "seconds": interval - 1.0}
    return _deployed(reconcile_flow, "reconcile", parameters, when, description, "skip")


def on_demand(store_url: str, name: str = "train") -> RunnerDeployment:
    """A deployment without a schedule: Prefect's form starts runs of any spec."""
    return _deployed(train_flow, name, {"store": store_url})
