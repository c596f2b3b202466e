"""A run's page on a real Prefect server: all of it whatever the server does meanwhile, and nobody waits for it."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest

from checkpoint.evaluated import Evaluation, Evaluations, Ran
from checkpoint.keys import evaluated_key
from checkpoint.log import RunLog, RunState
from checkpoint.log.records import OUTCOMES
from checkpoint.store import Store
from flows.drive.events import WARNS, Event, Outcome
from flows.hosting import Prefect, undisturbed
from flows.page import Page, end_message
from flows.page.ends import END_STATES
from flows.prefect_api import Client, Gone, PrefectSettingsError, Refused
from tests.checkpoint.samples import point_body
from tests.flows.conftest import Api
from tests.support.front import Front
from tests.support.wait import wait_for

ATTEMPT: dict[str, Any] = {
    "launch": "l1",
    "nodes": 1,
    "ranks": 2,
    "how": {},
    "plan": "ab" * 32,
    "what": "cd" * 32,
    "slot_epochs": [],
    "reason": "start",
    "cause": None,
    "restore": {"checkpoint": None, "step": 0, "slots": None, "parent": None},
}
KILLED = {"class": "signal", "text": "rank 1 was killed (signal 9)", "mend": "", "step": 33}


class Told:
    """A run told to a page, as its driver would; the log is the real one."""

    def __init__(self, store: Store, connect: Callable[[], Client | None], **more: Any) -> None:
        self.run = f"page-{uuid4().hex[:6]}"
        self.warned: list[str] = []
        self.page = Page(connect, store, name="page", every_s=0.05, warn=self.warned.append, **more).start()
        self.log = RunLog(store, self.run)
        self.state: RunState = self.log.fold()

    def begin(self) -> None:
        with self.page.task("prepare-data", "prepare data") as told:
            told("600 documents")
        self.page.run_is(self.run, 60)
        self.attempt()
        for step in range(1, 31):
            self.step(step, self.state.attempts[-1].epoch)

    def attempt(self, **more: Any) -> None:
        self.state = self.log.append("attempt", {**ATTEMPT, **more}, self.state)
        self.page.tell(Event("attempt", {"number": len(self.state.attempts)}))

    def step(self, step: int, epoch: int) -> None:
        self.page.tell(Event("step", {"step": step, "epoch": epoch, "loss": 7.0 / step}))

    def evaluate(self, step: int) -> None:
        """As `hotstage evaluate` beside the run: into the store, then its driver tells."""
        epoch = self.state.attempts[-1].epoch
        self.state = self.log.append("checkpoint", point_body(step, epoch), self.state, epoch=epoch)
        there = Evaluations()
        there.add(Evaluation(step, epoch, loss=2.5, commands={"bench": Ran({}, 1.0, "it exited with 1")}))
        self.page.store.put(evaluated_key(self.run), there.to_bytes())
        self.page.tell(Event("evaluated", {"found": "numbers", "step": step}))

    def fail_and_end(self) -> bool:
        self.page.line("attempt 2: at step 30 from memory; because rank 1 was killed (signal 9)")
        saved = self.state.at_step()
        begins = {"step": 30, "checkpoint": saved.n if saved else None}
        self.attempt(cause=KILLED, restore={**ATTEMPT["restore"], **begins})
        for step in range(31, 61):
            self.step(step, self.state.attempts[-1].epoch)
        self.page.tell(Event("recovered", {"epoch": self.state.attempts[-1].epoch, "seconds": 0.62}))
        body = {"outcome": "succeeded", "reason": "", "step": 60, "state_digest": "ef" * 32}
        self.state = self.log.append("ended", body, self.state)
        self.page.tell(Event("ended", {"outcome": "succeeded"}))
        return self.page.close(Outcome(self.run, "succeeded", "", 60, "ef" * 32, 2, 0), patience_s=60)


def assert_whole(api: Api, told: Told) -> dict[str, Any]:
    """Everything that a person should see is on the server, by its own API."""
    flow_run = api.named(told.run)[-1]
    assert flow_run["state_type"] == "COMPLETED"
    ends = ["COMPLETED", "COMPLETED", "CRASHED"]  # the server records task runs a moment after it was told
    wait_for(lambda: sorted(r["state_type"] for r in api.task_runs(flow_run["id"])) == ends, "the task runs", 60)
    tasks = {row["name"]: row for row in api.task_runs(flow_run["id"])}
    assert sorted(tasks) == ["attempt 1: rank 1 was killed (signal 9)", "attempt 2", "prepare data"]
    assert tasks["prepare data"]["state"]["message"] == "600 documents"
    crashed = tasks["attempt 1: rank 1 was killed (signal 9)"]
    assert (crashed["state_type"], crashed["state"]["message"]) == ("CRASHED", KILLED["text"])
    assert crashed["end_time"] == tasks["attempt 2"]["start_time"]  # the log's times, not those of the telling
    artifacts = api.artifacts(flow_run["id"])
    assert float(artifacts[told.run]["data"]) == 100.0
    assert "loss 7.0000 → 0.1167 at step 60" in artifacts[f"{told.run}-loss"]["data"]
    assert artifacts[f"{told.run}-curve"]["data"].startswith("data:image/svg+xml")
    rows = json.loads(artifacts[f"{told.run}-attempts"]["data"])
    assert [(r["from step"], r["steps"], r["because"], r["back after"]) for r in rows] == [
        (0, "1–30", "start", ""),
        (30, "31–60", KILLED["text"], "0.62 s"),
    ]
    assert any("because rank 1 was killed" in line for line in api.logs(flow_run["id"]))
    return flow_run


def test_all_of_it_is_there(prefect: Api, store: Store) -> None:
    told = Told(store, lambda: Client.connect(prefect.server.api))
    told.begin()
    told.evaluate(30)
    told.page.line(f"{WARNS}4,432 tokens a second, where 44,192 are usual")
    assert told.fail_and_end(), told.warned
    flow_run = assert_whole(prefect, told)
    warned = {"level": {"ge_": logging.WARNING}, "flow_run_id": {"any_": [flow_run["id"]]}}
    assert [row["message"] for row in prefect.ask("logs/filter", {"logs": warned})] == [
        "4,432 tokens a second, where 44,192 are usual"
    ]
    files = prefect.artifacts(flow_run["id"])[f"{told.run}-files"]["data"]
    assert f"`hotstage ckpt export {told.run} --store {store.url} -o model/`" in files
    scores = prefect.artifacts(flow_run["id"])[f"{told.run}-evaluations"]["data"]
    assert "| 30 | 2.5 | bench: it exited with 1 |" in scores
    assert told.warned == []


@pytest.mark.parametrize("mode", ["shut", 500, 401, "hang", "html"])
def test_a_server_that_is_away_is_caught_up(
    prefect: Api, store: Store, front: Front, mode: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.prefect_api.TIMEOUT_S", 1.0)
    told = Told(store, lambda: Client.connect(front.api))
    told.begin()
    wait_for(lambda: prefect.named(told.run), "the flow run", 60)
    if mode == "shut":
        front.shut()
    else:
        front.mode = mode
    began = time.thread_time()
    told.step(30, told.state.attempts[-1].epoch)
    told.page.line("while Prefect is away")
    wait_for(lambda: told.page.failures > 0, "a failure that is seen", 60)
    assert time.thread_time() - began < 5.0
    assert len(told.warned) == 1
    assert ("API key" in told.warned[0]) == (mode == 401)
    if mode == "shut":
        front.open()
    front.mode = "pass"
    front.released.set()
    assert told.fail_and_end(), told.warned
    flow_run = assert_whole(prefect, told)
    assert "while Prefect is away" in prefect.logs(flow_run["id"])


def test_a_flow_run_that_the_server_has_lost_is_written_anew(prefect: Api, store: Store) -> None:
    told = Told(store, lambda: Client.connect(prefect.server.api))
    told.begin()
    wait_for(lambda: prefect.named(told.run), "the flow run", 60)
    prefect.delete(f"flow_runs/{prefect.named(told.run)[0]['id']}")
    told.page.line("a line before it is noticed")
    told.step(30, told.state.attempts[-1].epoch)
    wait_for(lambda: prefect.named(told.run), "another flow run", 60)
    assert told.fail_and_end(), told.warned
    assert_whole(prefect, told)


def test_a_run_that_is_parked_ends_its_flow_run(prefect: Api, store: Store) -> None:
    """Its hours are used; it stayed Running for ever. Each end that a log may tell has a state."""
    assert set(OUTCOMES) <= END_STATES.keys()
    told = Told(store, lambda: Client.connect(prefect.server.api))
    told.begin()
    told.log.append("ended", {"outcome": "preempted", "reason": "used", "step": 30, "state_digest": None}, told.state)
    told.page.tell(Event("ended", {"outcome": "parked"}))
    assert told.page.close(Outcome(told.run, "parked", "used", 30, None, 1, 85), patience_s=60), told.warned
    (flow_run,) = prefect.named(told.run)
    assert flow_run["state"]["message"] == f"run {told.run} was parked at step 30: used"
    assert (flow_run["state_type"], told.warned) == ("CANCELLED", [])


def test_what_the_page_s_retry_would_not_do_is_told_with_the_end() -> None:
    for outcome, told in (("gave_up", True), ("cancelled", True), ("parked", False), ("stopped", False)):
        said = end_message(Outcome("a-1", outcome, "why", 3, None, 1, 75), "file:///a b")
        assert ("Retry trains nothing here: `hotstage runs resume a-1 --store 'file:///a b'`" in said) == told, said


def test_a_server_that_comes_late_is_told_all(prefect: Api, store: Store) -> None:
    there: list[str] = []
    told = Told(store, lambda: Client.connect(prefect.server.api) if there else None)
    told.begin()
    there.append("now")
    assert told.fail_and_end(), told.warned
    assert_whole(prefect, told)


def test_nobody_waits_for_a_server_that_never_answered(store: Store, front: Front) -> None:
    front.shut()
    told = Told(store, lambda: Client.connect(front.api))
    told.begin()
    assert not told.fail_and_end()
    assert "no answer at" in told.warned[0]


def test_the_end_is_told_to_a_server_that_is_busy_for_long(prefect: Api, store: Store, front: Front) -> None:
    """Ten seconds are for silence: a server that answers, if only that it is busy, is told all of it."""
    now = [0.0]
    told = Told(store, lambda: Client.connect(front.api), clock=lambda: now[0])
    told.begin()

    def shown() -> str | None:
        now[0] += 1.0  # what the server was too busy for is told again after a pause
        return told.page.flow_run

    wait_for(shown, "the flow run", 60)
    front.mode = 503
    outcome = Outcome(told.run, "succeeded", "", 60, "ef" * 32, 1, 0)
    with ThreadPoolExecutor(1) as pool:
        end = pool.submit(told.page.close, outcome, patience_s=10.0, answering_s=60.0)
        for _ in range(10):
            asked = front.asked
            now[0] += 4.0
            wait_for(lambda k=asked: front.asked > k or end.done(), "a question", 60)
        front.mode = "pass"
        assert end.result(), told.warned
    assert prefect.named(told.run)[0]["state_type"] == "COMPLETED"


def test_telling_never_blocks_and_memory_is_bounded(store: Store) -> None:
    told = Told(store, lambda: None)
    for number in range(30_000):
        told.step(number + 1, 1)
        told.page.line(f"line {number}")
    wait_for(lambda: told.page._queue.empty(), "the queue to be taken", 60)
    assert len(told.page._lines) <= 2000
    assert len(told.page._curve) <= 8000
    assert not told.page.close(None, "left", patience_s=0.1)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_server_that_is_up_after_the_run_s_end(prefect: Api, store: Store, keeps: bool) -> None:
    """It gets all of the run; a page that is gone with this process is not announced any more."""
    told = Told(store, lambda: Client.connect(prefect.server.api) if told.page._closing.is_set() else None)
    addresses: list[str] = []
    told.page.keeps, told.page.shown = (lambda: keeps), addresses.append
    told.begin()
    assert told.page.awaited
    assert told.fail_and_end(), told.warned
    assert not told.page.awaited
    assert len(addresses) == keeps
    assert_whole(prefect, told)


def test_who_goes_on_without_prefect_waits_for_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> None:
        raise PrefectSettingsError("Prefect cannot read its settings")

    monkeypatch.setattr("flows.hosting.configured", unreadable)
    said: list[str] = []
    told = Told(store, Prefect(say=said.append).connect)
    told.begin()
    told.page._thread.join(60)
    assert not told.page._thread.is_alive()
    assert told.page.alone
    assert not told.page.awaited
    assert said == ["Prefect cannot read its settings: going on without Prefect"]
    assert not told.warned


def test_who_cancels_on_the_page_cancels_the_run(prefect: Api, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.page.page.LOOK_EVERY_S", 0.1)
    told = Told(store, lambda: Client.connect(prefect.server.api))
    told.begin()
    wait_for(lambda: prefect.named(told.run), "the flow run", 60)
    (flow_run,) = prefect.named(told.run)
    prefect.tell(f"flow_runs/{flow_run['id']}/set_state", {"state": {"type": "CANCELLING"}, "force": True})
    wait_for(lambda: told.log.fold().ended is not None, "the run's end", 60)
    ended = told.log.fold().ended
    assert ended is not None
    assert (ended.outcome, ended.reason) == ("cancelled", "cancelled on Prefect's page")
    told.page.close(Outcome(told.run, "cancelled", ended.reason, 0, None, 1, 1), patience_s=60)
    assert prefect.named(told.run)[0]["state_type"] == "CANCELLED"


def test_a_lease_that_cannot_be_renewed_does_not_end_the_work(
    prefect: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prefect throws into the flow's thread then; its own code does it here, with a lease that the server lacks."""
    from prefect.concurrency import _leases
    from prefect.context import SettingsContext, get_settings_context
    from prefect.settings import PREFECT_API_URL

    monkeypatch.setattr(_leases, "_RENEWAL_RETRY_BASE_DELAY", 0.01)
    cancelled: list[str] = []

    class Scope(_leases.WatcherThreadCancelScope):
        def cancel(self, throw: bool = True) -> bool:
            cancelled.append("thrown")
            return super().cancel(throw)

    monkeypatch.setattr(_leases, "WatcherThreadCancelScope", Scope)

    def work() -> str:
        wait_for(lambda: cancelled, "the exception to be thrown")
        wait_for(lambda: "the run goes on" in caplog.text, "the exception in the flow's thread")
        return "trained to the end"

    known = get_settings_context()
    settings = known.settings.copy_with_update(updates={PREFECT_API_URL: prefect.server.api})
    with (
        SettingsContext(profile=known.profile, settings=settings),
        _leases.maintain_concurrency_lease(uuid4(), 300, raise_on_lease_renewal_failure=True),
    ):
        assert undisturbed(work) == "trained to the end"
    assert cancelled


def test_what_work_raises_is_raised() -> None:
    def work() -> None:
        raise Refused("no")

    with pytest.raises(Refused):
        undisturbed(work)
    assert issubclass(Refused, Exception)
    assert not issubclass(Refused, Gone)
