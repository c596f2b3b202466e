"""MLflow, by its own library: one MLflow run for a run, found again by its tags, whoever drives it.

A line that an order left behind stays in its own MLflow run: what follows is another one, a child of it by MLflow's own
tag, as a fork is of its parent. Server and credentials come from its environment alone (``MLFLOW_TRACKING_*``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flows.tracking.writers import About, Written

STEP = "train/step"
"""Its value is the last step that was written: what a driver goes on from."""
AT_ONCE = 900
"""Metrics of a request; the server takes 1,000."""
STATUS = {"succeeded": "FINISHED", "gave_up": "FAILED", "cancelled": "KILLED"}


class MlflowWriter:
    """``experiment``: its name; it is made where there is none."""

    name = "MLflow"

    def __init__(self, experiment: str) -> None:
        self.experiment = experiment
        self._client: Any = None
        self._id = ""
        self._waiting: list[Any] = []

    def begin(self, about: About, held: Written | None) -> Written:
        from mlflow.tracking import MlflowClient

        self._waiting.clear()
        self._client = client = MlflowClient()
        found = client.get_experiment_by_name(self.experiment)
        experiment = found.experiment_id if found is not None else client.create_experiment(self.experiment)
        run = self._find(experiment, about.run, about.branch)
        begins = Written(about.begins, about.branch, about.begins)
        if run is None:
            run = self._create(experiment, about)
        elif held is not None and held.branch == about.branch:
            begins = held
        self._id = run.info.run_id
        client.update_run(self._id, status="RUNNING")
        begins.step = max(begins.step, int(run.data.metrics.get(STEP, begins.step)))
        return begins

    def numbers(self, step: int, time: float, values: Mapping[str, float], *, late: bool = False) -> None:
        from mlflow.entities import Metric

        own = {} if late else {STEP: float(step)}
        self._waiting += [Metric(_key(k), v, int(time * 1000), step) for k, v in {**values, **own}.items()]
        if len(self._waiting) >= AT_ONCE:
            self._send()

    def text(self, step: int, time: float, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/step-{step:012d}.txt")

    def flush(self, held: Written) -> None:
        self._send()

    def end(self, outcome: str) -> None:
        if self._client is None:
            return
        self._send()
        if outcome in STATUS:
            self._client.set_terminated(self._id, STATUS[outcome])
        self._client = None

    def _send(self) -> None:
        while self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting[:AT_ONCE])
            del self._waiting[:AT_ONCE]

    def _find(self, experiment: str, run: str, branch: int) -> Any:
        query = f"tags.`hotstage.run` = '{run}' and tags.`hotstage.branch` = '{branch}'"
        found = self._client.search_runs([experiment], query, max_results=1)
        return found[0] if found else None

    def _create(self, experiment: str, about: About) -> Any:
        from mlflow.entities import Param

        tags = {"hotstage.run": about.run, "hotstage.branch": str(about.branch), "hotstage.store": about.store}
        parent = (about.run, about.begins) if about.branch else about.parent
        if parent is not None:
            tags |= {"hotstage.parent": parent[0], "hotstage.parent_step": str(parent[1])}
            before = self._client.search_runs([experiment], f"tags.`hotstage.run` = '{parent[0]}'", max_results=1)
            if before:
                tags["mlflow.parentRunId"] = before[0].info.run_id
        name = f"{about.run} from step {about.begins}" if about.branch else about.run
        run = self._client.create_run(experiment, run_name=name, tags=tags)
        self._client.log_batch(run.info.run_id, params=[Param(_key(k), str(v)[:6000]) for k, v in about.config.items()])
        return self._client.get_run(run.info.run_id)


def _key(name: str) -> str:
    """As MLflow takes names: letters, digits and ``_ - . space : /``."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)[:250]
