"""The Prefect flows: `prepare` and `train`, thin over plain functions. The run is in the log, not in Prefect: a flow run that is
killed loses nothing, and the next one attaches.
"""

from __future__ import annotations

import re
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import EntrypointType
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.api import make_driver, store_at
from flows.loop import Outcome, Sink
from flows.prepare import prepare
from flows.run import Prepared, load_run, prepare_run
from flows.sink import Lines, Many, PrefectSink
from trainer.spec import RunSpec


class RunFailed(RuntimeError):
    """The run ended without success; the text says why and what to do."""


@task(name="prepare data", cache_policy=NO_CACHE)
def prepare_data(spec: RunSpec, store_url: str) -> dict[str, Any]:
    """Text to token shards in the store; content-addressed, so a second time finds them."""
    return prepare(spec.data, store_at(store_url), say=get_run_logger().info).to_map()


@task(name="compile plan", cache_policy=NO_CACHE)
def compile_run(spec: RunSpec, store_url: str, suffix: str) -> str:
    """The plan and the run's identity, in the store; gives the run's name."""
    return prepare_run(spec, store_at(store_url), suffix=suffix, say=get_run_logger().info).run


@flow(name="prepare")
def prepare_flow(spec: RunSpec, store: str) -> dict[str, Any]:
    """Prepare a spec's dataset."""
    return prepare_data(spec, store)


@flow(name="train", log_prints=False, persist_result=False)
def train_flow(
    spec: RunSpec | None = None,
    store: str = "",
    run: str = "",
    sets: tuple[str, ...] = (),
    fresh: bool = False,
    out: str = "out",
) -> dict[str, Any]:
    """Train a spec to its end, or go on with the run of that name; succeeds only when the run does.

    ``fresh``: each scheduled firing is a run of its own (its scheduled time joins the name).
    """
    opened = store_at(store or None)
    if spec is not None:
        suffix = scheduled_suffix() if fresh else ""
        prepare_data(spec, opened.url)
        name = compile_run(spec, opened.url, suffix)
    else:
        name = run
    prepared = load_run(opened, name, list(sets)) if spec is None else prepare_run(spec, opened, suffix=suffix)
    outcome = drive(prepared, opened.url, Path(out))
    if outcome.outcome == "gave_up":
        raise RunFailed(f"run {outcome.run} gave up: {outcome.reason}")
    return asdict(outcome)


def scheduled_suffix() -> str:
    """The flow run's scheduled time, as a run's name can hold it."""
    at = flow_run.scheduled_start_time
    return re.sub(r"[^0-9a-z]", "", at.strftime("%Y%m%dt%H%M%S")) if at else ""


# The command gives its own sink and stop event to the flow that it hosts: they are no parameters, because they are not data.
_hosted: dict[str, Any] = {}


def host(sink: Sink | None, stop: threading.Event | None, reopen: bool = False) -> dict[str, Any]:
    """For the command: sink and stop event of the flow that this process hosts; holds the outcome afterwards."""
    _hosted.clear()
    _hosted.update({"sink": sink, "stop": stop, "reopen": reopen, "outcome": None})
    return _hosted


def drive(prepared: Prepared, store_url: str, out: Path) -> Outcome:
    """The driver inside a flow run: artifacts to Prefect, lines to the flow's log or to the hosting command."""
    store = store_at(store_url)
    prefect_sink = PrefectSink(prepared.run, prepared.spec.train.steps)
    own = _hosted.get("sink") or Lines(get_run_logger().info, prepared.spec.train.steps, every_s=10.0)
    driver = make_driver(
        prepared,
        store,
        sink=Many([own, prefect_sink]),
        out=out,
        stop=_hosted.get("stop"),
        reopen=bool(_hosted.get("reopen")),
    )
    try:
        outcome = driver.run()
        _hosted["outcome"] = outcome
        return outcome
    finally:
        prefect_sink.close()


def serve_schedule(
    spec: RunSpec, store_url: str, out: str, *, cron: str | None, interval: float | None, name: str | None
) -> None:
    """Serve a deployment in the foreground: a new run each firing, at most one at a time, a late one skipped."""
    train_flow.serve(
        name=name or spec.name,
        cron=cron,
        interval=interval,
        parameters={"spec": spec.model_dump(mode="json"), "store": store_url, "fresh": True, "out": out},
        global_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        pause_on_shutdown=False,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
