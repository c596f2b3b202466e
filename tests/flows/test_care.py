"""Looking after runs that nobody drives: the flow and its deployment, and a store that is away."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger
from prefect.schedules import Interval

from checkpoint.errors import StoreUnavailable
from checkpoint.log import RunLog
from checkpoint.store import MemoryStore, Store, open_store
from flows.care import Care
from flows.deployments import reconciling
from flows.drive.begin import prepare_run
from flows.drive.run import attempt_body
from flows.flow import reconcile_flow
from flows.serve import RECONCILE
from tests.flows.drive.test_reconcile import Cluster
from trainer.launch import Launch
from trainer.spec import RunSpec, parse_spec


def test_its_deployment_has_one_flow_run_at_a_time_until_the_next_is_due() -> None:
    made = reconciling("file:///store", "/out", Interval(timedelta(seconds=300)), "every 300 s", 300.0)
    assert made.entrypoint == RECONCILE
    assert made.parameters == {"store": "file:///store", "out": "/out", "seconds": 299.0}
    assert made.concurrency_limit == 1


def test_the_flow_takes_over_what_is_open_and_ends_with_it(
    ground: tuple[Store, RunSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store, spec = open_store((tmp_path / "store").as_uri()), ground[1]  # without the open runs that others have there
    on_a_cluster = parse_spec({**spec.model_dump(mode="json"), "name": "cared", "launch": {"target": "kubernetes"}})
    prepared = prepare_run(on_a_cluster, store)
    log = RunLog(store, prepared.run)
    restore = {"checkpoint": None, "step": 0, "slots": None}
    log.append("attempt", attempt_body(prepared, f"{prepared.run}-k1", restore, reason="start", cause=None), log.fold())

    class Left(Cluster):
        """Its nodes have gone; somebody cancels the run once it is driven."""

        def __init__(self) -> None:
            super().__init__()
            self.left = True

        def ensure(self, launch: Launch) -> None:
            state = log.fold()
            if state.ended is None:
                body = {"outcome": "cancelled", "reason": "", "step": 0, "state_digest": None}
                log.append("ended", body, state)

    monkeypatch.setattr("flows.drive.train.launcher_for", lambda *_: Left())
    monkeypatch.setattr("flows.care.configured", lambda: None)
    monkeypatch.setattr("flows.care.EVERY_S", 0.05)
    with disable_run_logger():
        assert reconcile_flow.fn(store=store.url, out=str(tmp_path)) == 1
        assert reconcile_flow.fn(store=store.url, out=str(tmp_path)) == 0
    ended = log.fold().ended
    assert ended is not None
    assert ended.outcome == "cancelled"


def test_a_store_that_is_away_is_said_once_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.care.configured", lambda: None)
    said, stop, looks = list[str](), threading.Event(), [0]
    care = Care(MemoryStore(), tmp_path, said.append, every_s=0.0, stop=stop)

    def look() -> list[str]:
        looks[0] += 1
        if looks[0] <= 3:
            raise StoreUnavailable("no answer")
        stop.set()
        return []

    monkeypatch.setattr(care.reconciler, "look", look)
    assert care.run() == 0
    assert said == [
        "the store does not answer: no answer; gangs train on, and it is asked again",
        "the store answers again",
    ]
    looks[0] = 0
    stop.clear()
    with pytest.raises(StoreUnavailable):
        care.run(0.0)
