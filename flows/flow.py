"""The Prefect flows: `prepare` and `train`, thin over plain functions. The run is in the log, not in Prefect: a flow
run that is killed loses nothing, and the next one attaches.

Nothing secret is ever a parameter: a store's URL cannot hold credentials, and a spec names a Kubernetes Secret at most.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import CancelledRun
from prefect.logging import get_run_logger
from prefect.runner import Runner
from prefect.runtime import flow_run
from prefect.states import Cancelled
from prefect.types.entrypoint import EntrypointType

from flows import hosting
from flows.api import make_driver, store_at
from flows.data import prepare
from flows.facts import attempt_rows
from flows.loop import Outcome
from flows.orders import Asked, place
from flows.run import Prepared, ask_run, load_run, prepare_run
from flows.sink import Lines, Many, PrefectSink
from trainer.spec import RunSpec


class RunFailed(RuntimeError):
    """The run ended without success; the text says why and what to do."""


def is_own_end(error: BaseException) -> bool:
    """Whether the flow raised to say how the run ended (Failed, Cancelled), rather than because Prefect failed."""
    return isinstance(error, RunFailed | CancelledRun)


def flow_run_name() -> str:
    """The hotstage run's name where it is known; for a scheduled firing the spec's name and the scheduled time."""
    given = flow_run.parameters
    spec = given.get("spec")
    if spec is None:
        return str(given.get("run"))
    name = spec.name if isinstance(spec, RunSpec) else str(spec["name"])
    return f"{name}-{scheduled_suffix()}" if given.get("fresh") else name


@task(name="prepare data", cache_policy=NO_CACHE)
def prepare_data(spec: RunSpec, store_url: str) -> dict[str, Any]:
    """Text to token shards in the store; content-addressed, so a second time finds them."""
    say, sequence = get_run_logger().info, spec.train.sequence
    return prepare(spec.data, store_at(store_url), say=say, sequence=sequence).to_map()


@task(name="compile plan", cache_policy=NO_CACHE)
def compile_run(spec: RunSpec, store_url: str, digest: str, suffix: str) -> Prepared:
    """The plan and the run's identity, in the store."""
    ready = spec.model_copy(update={"data": spec.data.model_copy(update={"source": f"dataset:{digest}"})})
    return prepare_run(ready, store_at(store_url), suffix=suffix, say=get_run_logger().info)


@flow(name="prepare")
def prepare_flow(spec: RunSpec, store: str = "") -> dict[str, Any]:
    """Prepare a spec's dataset; gives its description (``DatasetRef.to_map``)."""
    return prepare_data(spec, store_at(store or None).url)


@flow(name="train", flow_run_name=flow_run_name, log_prints=False, persist_result=False)
def train_flow(
    spec: RunSpec | None = None,
    store: str = "",
    run: str = "",
    sets: tuple[str, ...] = (),
    fresh: bool = False,
    out: str = "out",
) -> Any:
    """Train a spec to its end, or go on with the run of that name. Completed only when the run succeeded; Failed with
    the reason when it gave up; Cancelled when it was cancelled or stopped.

    ``fresh``: each scheduled firing is a run of its own (its scheduled time joins the name).
    """
    opened = store_at(store or None)
    if spec is None:
        prepared = hosting.prepared_for(run) or (ask_run(opened, run, list(sets)) if sets else load_run(opened, run))
    else:
        digest = str(prepare_data(spec, opened.url)["digest"])
        prepared = compile_run(spec, opened.url, digest, scheduled_suffix() if fresh else "")
    if (spec is not None or sets) and flow_run.run_count <= 1:  # a person's order; executed again it is nobody's
        place(opened, prepared, Asked(f"flow run {flow_run.name}"))
    return ended_as(drive(prepared, opened.url, Path(out)))


def ended_as(outcome: Outcome) -> dict[str, Any] | State[Any]:
    """The flow run's own end: a value (Completed), a Cancelled state, or RunFailed."""
    if outcome.outcome == "gave_up":
        raise RunFailed(f"run {outcome.run} gave up: {outcome.reason}")
    if outcome.outcome in ("cancelled", "stopped", "superseded"):
        return Cancelled(message=f"run {outcome.run} was {outcome.outcome} at step {outcome.step}: {outcome.reason}")
    return asdict(outcome)


def scheduled_suffix() -> str:
    """The flow run's scheduled time (UTC), as a run's name can hold it: 20260301t020000."""
    at: datetime | None = flow_run.scheduled_start_time
    return re.sub(r"[^0-9a-z]", "", at.strftime("%Y%m%dt%H%M%S")) if at else ""


def drive(prepared: Prepared, store_url: str, out: Path) -> Outcome:
    """The driver inside a flow run: artifacts to Prefect, lines to the flow's log or to the hosting command."""
    hosted = hosting.current()
    hosted.driving = True
    store = store_at(store_url)
    steps = prepared.spec.train.steps
    prefect_sink = PrefectSink(prepared.run, steps, lambda: attempt_rows(store, prepared.run))
    own = hosted.sink or Lines(get_run_logger().info, steps, every_s=10.0)
    driver = make_driver(prepared, store, sink=Many([own, prefect_sink]), out=out, stop=hosted.stop)
    try:
        hosted.outcome = driver.run()
        return hosted.outcome
    finally:
        prefect_sink.close()


async def serve_schedule(
    spec: RunSpec, store_url: str, out: str, *, cron: str | None, interval: float | None, name: str | None
) -> None:
    """Serve a deployment until it is cancelled: a new run each firing, one at a time, an overlapping one skipped.

    Not ``train_flow.serve``: its runner takes runs ten seconds before their time, and judges overlap then. This one
    looks every second and starts nothing early. Each run is a process of its own (``prefect.flow_engine``).
    """
    runner = Runner(name=name or spec.name, query_seconds=1.0, prefetch_seconds=0, pause_on_shutdown=False)
    deployment: RunnerDeployment = await train_flow.ato_deployment(
        name=name or spec.name,
        cron=cron,
        interval=interval,
        parameters={"spec": spec.model_dump(mode="json"), "store": store_url, "fresh": True, "out": out},
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    await runner.aadd_deployment(deployment)
    await runner.start()


def serve_train(store_url: str, name: str = "train") -> None:
    """Serve the flow in the foreground as a deployment without a schedule: Prefect's form starts runs of any spec."""
    train_flow.serve(
        name=name,
        parameters={"store": store_url},
        pause_on_shutdown=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
