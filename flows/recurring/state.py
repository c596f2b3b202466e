"""Where a schedule stands, out of what a Prefect server knows of its deployment."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from flows.recurring.deployments import Deployments, time_of
from flows.recurring.due import span

OVERLAP_TAG = "overlap:"
"""Of a deployment whose firings do otherwise than being skipped."""
SERVED_S = 60.0
"""Who serves a deployment asks each second; Prefect itself calls one that was not asked for so long not ready."""


def served_s(row: Mapping[str, Any], now: datetime | None = None) -> float | None:
    """How long ago somebody asked for its firings; None where nobody serves it."""
    polled = row.get("last_polled")
    active = not row["schedules"] or any(schedule["active"] for schedule in row["schedules"])
    if not polled or not active:
        return None
    ago = ((now or datetime.now(UTC)) - time_of(polled)).total_seconds()
    return ago if ago < SERVED_S else None


def schedule_row(served: Deployments, row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A row of `schedules ls`."""
    deployment = UUID(str(row["id"]))
    parameters: Mapping[str, Any] = row.get("parameters") or {}
    planned = served.runs(
        deployment, "SCHEDULED", expected_start_time={"after_": datetime.now(UTC).isoformat()}, limit=1
    )
    late = served.count(deployment, state={"name": {"any_": ["Late"]}})
    pool = served.pool(str(row["work_pool_name"])) if row.get("work_pool_name") else None
    return {
        "name": name,
        "state": _state_word(row, pool),
        "when": ", ".join(map(_when, row["schedules"])) or "started by hand",
        "mode": "sweep" if "points" in parameters else parameters.get("mode", "fresh"),
        "overlap": _overlap_word(row),
        "store": parameters.get("store") or "",
        "next": planned[0]["expected_start_time"] if planned and (pool or served_s(row) is not None) else "",
        "late": late,
        "lacks": pool_words(pool, row.get("job_variables") or {}, served.queue(pool, row)) if pool else [],
        "going_on": len(served.going_on(deployment)),
    }


def pool_words(pool: Mapping[str, Any], variables: Mapping[str, Any], queue: Mapping[str, Any]) -> list[str]:
    """What keeps runs of a work pool from starting, each with its mend. ``variables``: of the deployment's jobs;
    ``queue``: the pool's work queue that they are in.
    """
    name, found = pool["name"], []
    own = queue.get("name", "")
    if pool.get("is_paused"):
        found.append(f"pool {name} is paused: nothing starts before `prefect work-pool resume {name}`")
    elif queue.get("is_paused"):
        resume = f"prefect work-queue resume {own} --pool {name}"
        found.append(f"queue {own} of pool {name} is paused: nothing starts before `{resume}`")
    elif pool.get("concurrency_limit") == 0:
        clear = f"prefect work-pool clear-concurrency-limit {name}"
        found.append(f"pool {name} takes no run at a time: nothing starts before `{clear}`")
    elif queue.get("concurrency_limit") == 0:
        clear = f"prefect work-queue clear-concurrency-limit {own} --pool {name}"
        found.append(f"queue {own} of pool {name} takes no run at a time: nothing starts before `{clear}`")
    elif pool.get("status") == "NOT_READY":
        found.append(f"no worker of pool {name} is online: `prefect worker start --pool {name}` where its runs train")
    known = ((pool.get("base_job_template") or {}).get("variables") or {}).get("properties") or {}
    if "image" in known and not (variables.get("image") or known["image"].get("default")):
        found.append(
            f"runs of pool {name} get Prefect's own image, which does not hold hotstage: name one in the pool's base "
            "job template, or deploy prefect.yaml there (k8s/prefect for Kubernetes) and schedule again"
        )
    return found


def _state_word(row: Mapping[str, Any], pool: Mapping[str, Any] | None) -> str:
    if row.get("paused"):
        return "paused"
    if pool is not None:
        return f"in pool {pool['name']}"
    ago = served_s(row)
    if ago is not None:
        return "served"
    if row["schedules"] and not any(schedule["active"] for schedule in row["schedules"]):
        return "ended: `hotstage schedule` starts it again"
    polled = row.get("last_polled")
    since = f", for {span((datetime.now(UTC) - time_of(polled)).total_seconds())}" if polled else ""
    return f"served by nobody{since}: `hotstage schedule` serves it again"


def _when(schedule: Mapping[str, Any]) -> str:
    plan = schedule["schedule"]
    if "cron" in plan:
        return f"cron {plan['cron']!r} in {plan.get('timezone') or 'UTC'}"
    return f"every {span(float(plan['interval']))}" if "interval" in plan else "a recurrence rule"


def _overlap_word(row: Mapping[str, Any]) -> str:
    for tag in row.get("tags") or ():
        if tag.startswith(OVERLAP_TAG):
            policy = str(tag).removeprefix(OVERLAP_TAG)
            return {"queue": "waits its turn", "cancel": "cancels the older run"}.get(policy, policy)
    return "is skipped" if row.get("concurrency_options") else "is started too"
