"""A Prefect server as a test asks it, without Prefect's own client."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from flows.prefect_server import PrefectServer
from tests.support.wait import wait_for

ANSWER_S = 60.0


@dataclass(frozen=True)
class Api:
    """A Prefect server as a client without Prefect sees it."""

    server: PrefectServer

    def ask(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The answer of a ``…/filter`` question."""
        return list(self._post(path, body))

    def tell(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """What was made."""
        return dict(self._post(path, body))

    def delete(self, path: str) -> None:
        self._ask(urllib.request.Request(f"{self.server.api}/{path}", method="DELETE"))

    def task_runs(self, flow_run: str) -> list[dict[str, Any]]:
        return self.ask("task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{self.server.api}/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        return self._ask(request)

    def _ask(self, request: urllib.request.Request) -> Any:
        def asked() -> list[Any] | None:
            """The answer, in a list: it may be nothing."""
            try:
                with urllib.request.urlopen(request, timeout=ANSWER_S) as reply:
                    return [json.loads(reply.read() or b"null")]
            except urllib.error.HTTPError as error:
                if error.code != 503:  # its SQLite is busy
                    raise
                return None

        return wait_for(asked, f"another answer of {request.full_url} than 503", ANSWER_S, 0.2)[0]

    def flow_runs(self, **flow_run_filter: Any) -> list[dict[str, Any]]:
        return self.ask("flow_runs/filter", {"flow_runs": flow_run_filter, "sort": "EXPECTED_START_TIME_ASC"})

    def named(self, name: str) -> list[dict[str, Any]]:
        return self.flow_runs(name={"any_": [name]})

    def artifacts(self, flow_run: str) -> dict[str, dict[str, Any]]:
        """The newest artifact of each key of a flow run."""
        rows = self.ask("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200})
        return {row["key"]: row for row in sorted(rows, key=lambda row: str(row["updated"]))}

    def logs(self, flow_run: str) -> list[str]:
        body = {"logs": {"flow_run_id": {"any_": [flow_run]}}, "sort": "TIMESTAMP_ASC"}
        return [str(row["message"]) for row in self.ask("logs/filter", body)]
