"""Deployments of a Prefect server, as a schedule serves them and a person manages them.

A deployment is this program's where its entrypoint is one of ours, and this schedule's where its store and its spec's
name are. What a schedule that ends had planned is taken away with it: Prefect would show it as Late for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import quote
from uuid import UUID

from flows.prefect_api import OPEN_STATES, Client, Lost
from flows.recurring.due import DueFiring

OURS = "flows.flow."
PAGE = 200
"""Most rows of an answer of Prefect's."""
WAITS = "AwaitingConcurrencySlot"
"""Prefect's state of a firing that was refused for want of room."""


@dataclass(frozen=True)
class Registered:
    """What a server calls a deployment and its flow."""

    deployment: UUID
    flow: UUID


@dataclass(frozen=True)
class Deployments:
    """Over a client; every method raises what its methods raise."""

    client: Client

    def register(self, deployment: Any) -> Registered:
        """Give the server a deployment (Prefect's ``RunnerDeployment``)."""
        import asyncio

        import httpx
        from prefect.deployments.runner import DeploymentApplyError

        def apply() -> Any:
            try:
                return asyncio.run(deployment.aapply())
            except DeploymentApplyError as error:  # Prefect's words around what the server answered, or did not
                if isinstance(error.__cause__, httpx.HTTPError):
                    raise error.__cause__ from None
                raise

        made = UUID(str(self.client.call(apply)))
        return Registered(made, UUID(str(self.read(made)["flow_id"])))

    def read(self, deployment: UUID) -> dict[str, Any]:
        return dict(self.client.send("GET", f"/deployments/{deployment}").json())

    def named(self, flow: str, name: str) -> dict[str, Any] | None:
        """A deployment by the names of its flow and its own."""
        body = {"deployments": {"name": {"any_": [name]}}, "flows": {"name": {"any_": [flow]}}, "limit": 1}
        found = self.client.send("POST", "/deployments/filter", body).json()
        return dict(found[0]) if found else None

    def pool(self, name: str) -> dict[str, Any] | None:
        """A work pool; None where there is none of that name."""
        try:
            return dict(self.client.send("GET", f"/work_pools/{quote(name, safe='')}").json())
        except Lost:
            return None

    def queue(self, pool: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
        """The work queue of a pool that a deployment's runs are in; nothing where there is none any more."""
        queue = row.get("work_queue_id") or pool.get("default_queue_id")
        try:
            return dict(self.client.send("GET", f"/work_queues/{queue}").json()) if queue else {}
        except Lost:
            return {}

    def ours(self) -> list[dict[str, Any]]:
        """Every deployment of one of our flows."""
        rows: list[dict[str, Any]] = []
        while True:
            body = {"limit": PAGE, "offset": len(rows), "sort": "NAME_ASC"}
            found = self.client.send("POST", "/deployments/filter", body).json()
            rows += found
            if len(found) < PAGE:
                return [row for row in rows if is_ours(row)]

    def whereabouts(self, known: Registered) -> Literal["there", "removed", "lost"]:
        """removed: its flow is there still, so the database was not lost."""
        try:
            self.read(known.deployment)
        except Lost:
            try:
                self.client.send("GET", f"/flows/{known.flow}")
            except Lost:
                return "lost"
            return "removed"
        return "there"

    # --- its firings --------------------------------------------------------------------------------------

    def due(self, deployment: UUID) -> tuple[list[DueFiring], bool]:
        """The oldest of those whose time has come, and whether there are newer ones. Tells Prefect that somebody serves
        this deployment."""
        rows = self.client.call(
            lambda: self.client.inner.get_scheduled_flow_runs_for_deployments([deployment], datetime.now(UTC))
        )
        return [_firing(row) for row in rows], len(rows) >= PAGE

    def oldest_waiting(self, deployment: UUID) -> tuple[datetime, str] | None:
        """The time and id of the oldest firing that was refused for want of room and asks again later, if any."""
        waits = {"state": {"type": {"any_": ["SCHEDULED"]}, "name": {"any_": [WAITS]}}}
        rows = self.runs(deployment, "SCHEDULED", limit=1, **waits)
        return (time_of(rows[0]["expected_start_time"]), str(rows[0]["id"])) if rows else None

    def plan_firings(self, deployment: UUID, count: int, first: str = "", last: str = "") -> list[datetime]:
        """Have the server plan its next firings now (or those between two times); the times of what is planned next."""
        span = {"start_time": first, "end_time": last} if first else {}
        self.client.send("POST", f"/deployments/{deployment}/schedule", {"min_runs": count, **span})
        after = {"expected_start_time": {"after_": datetime.now(UTC).isoformat()}}  # not what is late already
        return [time_of(row["expected_start_time"]) for row in self.runs(deployment, "SCHEDULED", limit=count, **after)]

    def runs(self, deployment: UUID, *types: str, limit: int = PAGE, **more: Any) -> list[dict[str, Any]]:
        """Its flow runs in states of these types, the oldest first."""
        body = {
            "deployments": {"id": {"any_": [str(deployment)]}},
            "flow_runs": {"state": {"type": {"any_": list(types)}}, **more},
            "sort": "EXPECTED_START_TIME_ASC",
            "limit": limit,
        }
        return list(self.client.send("POST", "/flow_runs/filter", body).json())

    def count(self, deployment: UUID, **flow_runs: Any) -> int:
        body = {"deployments": {"id": {"any_": [str(deployment)]}}, "flow_runs": flow_runs}
        return int(self.client.send("POST", "/flow_runs/count", body).json())

    def take(self, flow_run: UUID) -> bool:
        """Propose that a due flow run becomes Pending; False where the server says no (an overlap, a pause)."""
        from prefect.states import Pending

        told: Any = self.client.call(lambda: self.client.inner.set_flow_run_state(flow_run, Pending()))
        return told.state is not None and str(told.status.value) == "ACCEPT" and told.state.is_pending()

    def going_on(self, deployment: UUID) -> list[tuple[str, str]]:
        """Its flow runs that have been taken and have not ended: id and type of state."""
        return [(str(row["id"]), str(row["state_type"])) for row in self.runs(deployment, *OPEN_STATES)]

    def names_going_on(self, deployment: UUID) -> list[str]:
        """The names of those."""
        return [str(row["name"]) for row in self.runs(deployment, *OPEN_STATES)]

    def ask_cancel(self, flow_run: str, why: str) -> None:
        """As the page's own button does: its process cancels the run and ends."""
        self.client.set_state(flow_run, "CANCELLING", "Cancelling", why)

    # --- its end ------------------------------------------------------------------------------------------

    def stop_planning(self, deployment: UUID) -> None:
        """Its schedules stay to be read, and plan nothing more; what they had planned is taken away."""
        for schedule in self.read(deployment)["schedules"]:
            where = f"/deployments/{deployment}/schedules/{schedule['id']}"
            self.client.send("PATCH", where, {"active": False})
        self.clear(deployment)

    def clear(self, deployment: UUID, *, asked: bool = False) -> int:
        """Take away every planned firing that has not started, also those that are late or wait their turn; how many.
        ``asked``: and those that a person asked for.
        """
        gone: set[str] = set()
        while True:
            rows = [row for row in self.runs(deployment, "SCHEDULED") if asked or row["auto_scheduled"]]
            planned = [str(row["id"]) for row in rows if row["id"] not in gone]  # others: it was told of them
            if not planned:
                return len(gone)
            body = {"flow_runs": {"id": {"any_": planned}}, "limit": len(planned)}
            self.client.send("POST", "/flow_runs/bulk_delete", body)
            gone.update(planned)

    def pause(self, deployment: UUID) -> None:
        self.client.send("POST", f"/deployments/{deployment}/pause_deployment", None)

    def resume(self, deployment: UUID) -> None:
        self.client.send("POST", f"/deployments/{deployment}/resume_deployment", None)

    def remove(self, deployment: UUID) -> int:
        """Take the deployment away, and its firings that have not started; how many those were."""
        gone = self.count(deployment, state={"type": {"any_": ["SCHEDULED"]}})
        self.stop_planning(deployment)
        self.clear(deployment, asked=True)
        with contextlib.suppress(Lost):  # asked a second time, where the first answer came too late
            self.client.send("DELETE", f"/deployments/{deployment}")
        return gone


def is_ours(row: Mapping[str, Any]) -> bool:
    return str(row.get("entrypoint") or "").startswith(OURS)


def whose(row: Mapping[str, Any], entrypoint: str, parameters: Mapping[str, Any]) -> str:
    """Why a deployment that is there is another one than that of this entrypoint and these parameters; empty where it
    is the same one."""
    there: Mapping[str, Any] = row.get("parameters") or {}
    if row.get("entrypoint") != entrypoint:
        return f"another project's, with the entrypoint {row.get('entrypoint')!r}"
    theirs, ours = (str(p.get("store") or "") for p in (there, parameters))
    if theirs != ours:
        return f"of another store, {theirs or 'the default one'}"
    names = [str((p.get("spec") or {}).get("name") or "") for p in (there, parameters)]
    if names[0] != names[1]:
        return f"of another spec, {names[0]!r}"
    return ""


def time_of(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def _firing(row: Any) -> DueFiring:
    """Of Prefect's flow run, as its client reads it."""
    waits = row.state is not None and row.state.name == WAITS
    return DueFiring(row.id, str(row.name), row.expected_start_time, bool(row.auto_scheduled), waits)
