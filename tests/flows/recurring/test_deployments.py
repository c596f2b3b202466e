"""Deployments on a real Prefect server, and serving them: which firings start, what stays when a schedule ends.

Processes of flows are stood in for by ones that wait; the server's rules are its own.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.deployments.runner import DeploymentApplyError
from prefect.schedules import Interval
from prefect.settings import PREFECT_API_URL, temporary_settings

from checkpoint.keys import index_key, manifest_name, run_key
from checkpoint.log import RunLog
from checkpoint.store import open_store
from flows.cli.main import exit_code_of
from flows.deployments import collecting, scheduled
from flows.flow import RunFailed, collect_flow
from flows.prefect_api import Client, Gone, Refused
from flows.recurring.deployments import Deployments
from flows.recurring.due import FiringPolicy, Overlap
from flows.recurring.state import schedule_row
from flows.recurring.when import cron_of
from flows.serve import COLLECT, ENTRYPOINT, Server
from tests.flows.conftest import Api, deployment, of, registered
from tests.support.front import Front
from tests.support.place import ROOT
from tests.support.small_checkpoints import RUN, begin, save
from tests.support.wait import wait_for
from trainer.spec import load_spec

SPEC = load_spec(ROOT / "examples" / "demo.toml", [])


@pytest.fixture
def there(prefect: Api) -> Iterator[Client]:
    """A client, where this process's settings name the server."""
    with temporary_settings({PREFECT_API_URL: prefect.server.api}), Client.open(None, patience_s=30.0) as client:
        yield client


def hourly(name: str, overlap: Overlap = "skip", store: str = "file:///nowhere") -> Any:
    return scheduled(SPEC, store, "out", Interval(timedelta(hours=1)), name, "each hour", overlap=overlap)


@dataclass
class Serving:
    """A schedule that is served by a thread; the processes of its runs wait until the test ends them."""

    api: Api
    name: str
    server: Server
    said: list[str] = field(default_factory=list)
    error: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server.say = self.said.append
        context = contextvars.copy_context()  # with this thread's settings of Prefect
        self.thread = threading.Thread(target=lambda: context.run(self._serve))
        self.thread.start()

    def _serve(self) -> None:
        try:
            self.server.run()
        except BaseException as error:
            self.error.append(error)

    def end(self) -> None:
        self.server.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()
        for child in self.server.children.values():
            child.kill()
            child.wait()

    def child(self) -> tuple[UUID, subprocess.Popen[bytes]]:
        """The process that it has started, and of which flow run."""
        return wait_for(lambda: next(iter(self.server.children.items()), None), "its process")

    def kill_child(self) -> None:
        self.child()[1].kill()

    def states(self) -> list[str]:
        """Of its firings that were due, the oldest first; one that waits is Late once the server has looked."""
        rows = of(
            self.api, self.name, "PENDING", "RUNNING", "CANCELLING", "CANCELLED", "CRASHED", "COMPLETED", "SCHEDULED"
        )
        now = datetime.now(UTC).isoformat()
        due = [row["state_name"] for row in rows if row["expected_start_time"][:19] <= now[:19]]
        return ["Scheduled" if name == "Late" else name for name in due]

    def states_are(self, *states: str) -> None:
        with contextlib.suppress(AssertionError):  # told below, with what they are by then
            wait_for(lambda: self.states() == list(states), f"{states}", 90, 0.2)
        assert self.states() == list(states), self.said


def fire(client: Client, made: UUID, *hours: int) -> None:
    """Firings whose time was so many hours ago, planned by the server as any."""
    now = datetime.now(UTC)
    for ago in hours:
        first, last = now - timedelta(hours=ago), now - timedelta(hours=ago - 1)
        Deployments(client).plan_firings(made, 1, first.isoformat(), last.isoformat())


@pytest.fixture
def serve(prefect: Api, there: Client) -> Iterator[Any]:
    """Gives a schedule that is served, by name and policy; its deployments are gone with the test."""
    started: list[Serving] = []

    def begin(name: str, policy: FiringPolicy | None = None) -> tuple[Serving, UUID]:
        policy = policy or FiringPolicy()
        known: list[UUID] = []
        server = Server(
            lambda: hourly(name, policy.overlap),
            print,
            command=("sleep", "600"),
            every_s=0.3,
            policy=policy,
        )
        server.registered = lambda _client, made: known.append(made)
        started.append(Serving(prefect, name, server))
        wait_for(lambda: bool(known or started[-1].error), f"{name} to be registered", 60)
        assert not started[-1].error
        return started[-1], known[0]

    yield begin
    for one in started:
        one.end()
        with contextlib.suppress(Exception):
            prefect.delete(f"deployments/{deployment(prefect, one.name)['id']}")


def test_overlap_skip(prefect: Api, there: Client, serve: Any) -> None:
    one, made = serve("skips")
    fire(there, made, 3)
    one.states_are("Pending")
    fire(there, made, 2, 1)
    one.states_are("Pending", "Cancelled", "Cancelled")
    first, *_, newest = of(prefect, "skips", "PENDING", "CANCELLED")
    told = f"an older run of this schedule goes on: {first['name']}; "  # Prefect's own words name no run
    wait_for(lambda: any(f"skipped {newest['name']}: {told}" in line for line in one.said), "who has the room", 60)
    assert of(prefect, "skips", "CANCELLED")[-1]["state"]["message"].startswith(told)
    one.kill_child()
    one.states_are("Crashed", "Cancelled", "Cancelled")


def test_a_server_that_is_busy_now_and_then_starts_what_is_due(front: Front, there: Client, serve: Any) -> None:
    """As SQLite is under load: each round was begun again at each 503, and came to no firing's start."""
    with temporary_settings({PREFECT_API_URL: front.api}):
        one, made = serve("busy")
    front.busy_each = 3
    fire(there, made, 1)
    one.states_are("Pending")


def test_a_server_that_goes_away_while_a_run_is_started(front: Front, there: Client, serve: Any) -> None:
    """Its answer to the start is lost, and then it hears too late whose the flow run is. As nobody's, for ever, that
    would keep the room of each that follows."""
    with temporary_settings({PREFECT_API_URL: front.api}):
        one, made = serve("lost")

    def say(text: str) -> None:
        one.said.append(text)
        if text.startswith("started"):
            front.mode = 503

    one.server.say = say
    front.lost = "/set_state"
    fire(there, made, 1)
    wait_for(lambda: any("Prefect is away" in text for text in one.said), "the answer to be lost", 60)
    assert not one.server.children
    front.mode, asked = "pass", front.asked
    wait_for(lambda: one.server.children and front.mode == 503, "its start", 60)
    wait_for(lambda: front.asked > asked + 20, "more requests than one is made again", 60)
    one.kill_child()
    front.mode = "pass"
    one.states_are("Crashed")


@pytest.mark.slow
def test_overlap_queue_keeps_the_order(there: Client, serve: Any) -> None:
    one, made = serve("queues", FiringPolicy("queue"))
    fire(there, made, 3)
    one.states_are("Pending")
    fire(there, made, 2)
    one.states_are("Pending", "AwaitingConcurrencySlot")
    fire(there, made, 1)
    one.states_are("Pending", "AwaitingConcurrencySlot", "AwaitingConcurrencySlot")
    for states in (("Crashed", "Pending", "AwaitingConcurrencySlot"), ("Crashed", "Crashed", "Pending")):
        one.kill_child()
        one.states_are(*states)


def test_overlap_cancel_ends_the_older_and_then_starts_the_newest(prefect: Api, there: Client, serve: Any) -> None:
    one, made = serve("cancels", FiringPolicy("cancel"))
    fire(there, made, 3)
    one.states_are("Pending")
    older, child = one.child()
    there.set_state(str(older), "RUNNING", "Running", "")
    fire(there, made, 2)
    one.states_are("Cancelling", "Scheduled")
    fire(there, made, 1)
    one.states_are("Cancelling", "Cancelled", "Scheduled")  # only the newest waits
    there.set_state(str(older), "CANCELLED", "Cancelled", "by its own process")
    child.kill()
    one.states_are("Cancelled", "Cancelled", "Pending")
    assert [line for line in one.said if "the older run is cancelled" in line] == [
        "the time of the next firing has come: the older run is cancelled"
    ]


def test_what_a_killed_schedule_left_is_passed_over_but_for_the_newest(prefect: Api, there: Client, serve: Any) -> None:
    made = registered(there, hourly("left"))
    fire(there, made, *range(9, 0, -1))  # nobody serves it: Prefect calls them Late
    one, again = serve("left")
    assert again == made
    one.states_are(*["Cancelled"] * 8, "Pending")
    told = {row["state"]["message"] for row in of(prefect, "left", "CANCELLED")}
    assert told == {"missed: a newer firing's time has come before anybody could start this one"}


def test_late_firings_are_skipped_by_choice(prefect: Api, there: Client, serve: Any) -> None:
    one, made = serve("punctual", FiringPolicy(late_s=1800.0))
    fire(there, made, 2)
    one.states_are("Cancelled")
    (row,) = of(prefect, "punctual", "CANCELLED")
    assert "more than the 30 min that it may be" in row["state"]["message"]


def test_an_ended_schedule_leaves_no_firing_behind(
    prefect: Api, there: Client, serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prefect showed 97 of them as Late for ever."""
    one, made = serve("ends", FiringPolicy("queue"))
    fire(there, made, 3)
    one.states_are("Pending")
    fire(there, made, 2)
    one.states_are("Pending", "AwaitingConcurrencySlot")
    wait_for(lambda: len(of(prefect, "ends", "SCHEDULED")) > 2, "firings that the server has planned", 60, 0.2)
    one.end()
    assert not of(prefect, "ends", "SCHEDULED")
    (plan,) = deployment(prefect, "ends")["schedules"]
    assert (plan["active"], plan["schedule"]["interval"]) == (False, 3600.0)
    assert exit_code_of(["schedules", "ls"]) == 0
    assert "train/ends: ended: `hotstage schedule` starts it again; every 60 min; fresh" in capsys.readouterr().out
    again, same = serve("ends", FiringPolicy("queue"))  # and planning begins again
    assert same == made
    assert deployment(prefect, "ends")["schedules"][0]["active"] is True
    again.end()
    assert not of(prefect, "ends", "SCHEDULED")


def test_firings_that_a_server_shows_when_they_are_gone_are_taken_away_once() -> None:
    """One that lists by an older copy of its database."""
    asked: list[str] = []

    class Behind:
        def send(self, _method: str, path: str, _body: Any) -> httpx.Response:
            asked.append(path)
            return httpx.Response(200, json=[{"id": "1", "auto_scheduled": True}])

    assert Deployments(cast("Client", Behind())).clear(uuid4()) == 1
    assert asked.count("/flow_runs/bulk_delete") == 1


def test_schedules_are_listed_paused_resumed_and_removed(
    prefect: Api, there: Client, serve: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one, made = serve("managed", FiringPolicy("cancel"))
    wait_for(lambda: of(prefect, "managed", "SCHEDULED"), "its firings", 60, 0.2)

    def row() -> dict[str, Any]:
        capsys.readouterr()
        assert exit_code_of(["schedules", "ls", "--json"]) == 0
        (found,) = [r for r in json.loads(capsys.readouterr().out) if r["name"] == "train/managed"]
        return dict(found)

    wait_for(lambda: row()["state"] == "served", "somebody to ask for its firings", 60, 0.2)
    assert (row()["when"], row()["mode"], row()["overlap"]) == ("every 60 min", "fresh", "cancels the older run")
    assert row()["next"]
    assert exit_code_of(["schedules", "pause", "managed"]) == 0
    assert (row()["state"], row()["next"], of(prefect, "managed", "SCHEDULED")) == ("paused", "", [])
    assert exit_code_of(["schedules", "resume", "train/managed"]) == 0
    wait_for(lambda: of(prefect, "managed", "SCHEDULED"), "its firings again", 60, 0.2)
    capsys.readouterr()
    assert exit_code_of(["schedules", "rm", "manged"]) == 78
    assert "train/managed" in capsys.readouterr().err
    assert exit_code_of(["schedules", "rm", "managed"]) == 0
    assert "train/managed is gone, and" in capsys.readouterr().out
    one.thread.join(60)  # who served it ends by itself
    assert not one.thread.is_alive()
    assert "the deployment was taken away: this schedule ends" in one.said
    assert not prefect.ask("deployments/filter", {"deployments": {"name": {"any_": ["managed"]}}})
    assert not prefect.flow_runs(state={"type": {"any_": ["SCHEDULED"]}}, deployment_id={"any_": [str(made)]})


def test_a_pool_says_what_keeps_its_runs_from_starting(prefect: Api, there: Client) -> None:
    """A schedule in a paused pool said that its workers start its runs; the list, that nobody serves it."""
    name, said = f"pool-{uuid4().hex[:6]}", list[str]()
    server = Server(lambda: hourly("pooled"), said.append)
    with pytest.raises(Refused, match=f"prefect work-pool create {name} --type process"):
        server.hand_over(name)
    image: dict[str, Any] = {"title": "Image", "type": "string"}
    template = {"job_configuration": {"image": "{{ image }}"}, "variables": {"properties": {"image": image}}}
    prefect.tell("work_pools/", {"name": name, "type": "process", "is_paused": True, "base_job_template": template})
    flow = prefect.tell("flows/", {"name": "train"})["id"]
    beside = {"name": "train", "flow_id": flow, "entrypoint": ENTRYPOINT, "work_pool_name": name}
    server.hand_over(name)
    assert f"prefect work-pool resume {name}" in said[0]
    assert "Prefect's own image, which does not hold hotstage" in said[1]
    prefect.tell("deployments/", {**beside, "job_variables": {"image": "registry.example/flows:1"}})
    there.send("PATCH", f"/work_pools/{name}", {"is_paused": False})
    said.clear()
    server.hand_over(name)  # with the image that prefect.yaml gave the pool's other deployment
    assert [line.split(":")[0] for line in said] == [f"  no worker of pool {name} is online"]
    row = schedule_row(Deployments(there), deployment(prefect, "pooled"), "train/pooled")
    assert (row["state"], len(row["lacks"])) == (f"in pool {name}", 1)
    queue, pool = f"/work_queues/{deployment(prefect, 'pooled')['work_queue_id']}", f"/work_pools/{name}"
    for where, change, mend in (
        (queue, {"is_paused": True}, f"prefect work-queue resume default --pool {name}"),
        (queue, {"is_paused": False, "concurrency_limit": 0}, "work-queue clear-concurrency-limit default --pool "),
        (pool, {"concurrency_limit": 0}, f"prefect work-pool clear-concurrency-limit {name}"),
    ):
        there.send("PATCH", where, change)
        (lack,) = schedule_row(Deployments(there), deployment(prefect, "pooled"), "train/pooled")["lacks"]
        assert mend in lack
    for made in ("pooled", "train"):
        prefect.delete(f"deployments/{deployment(prefect, made)['id']}")


def test_a_deployment_of_another_project_with_the_same_name_is_left_alone(prefect: Api, there: Client) -> None:
    ours = registered(there, hourly("shared", store="s3://team/a"))
    server = Server(lambda: hourly("shared", store="s3://team/b"), print)
    with pytest.raises(Refused, match="train/shared already, of another store, s3://team/a: take another --name"):
        server.run()
    flow = prefect.ask("flows/filter", {"flows": {"name": {"any_": ["train"]}}})[0]["id"]
    prefect.tell("deployments/", {"name": "theirs", "flow_id": flow, "entrypoint": "src/flows.py:train"})
    with pytest.raises(Refused, match=r"another project's, with the entrypoint 'src/flows.py:train'"):
        Server(lambda: hourly("theirs"), print).run()
    assert deployment(prefect, "theirs")["entrypoint"] == "src/flows.py:train"
    assert deployment(prefect, "shared")["parameters"]["store"] == "s3://team/a"
    for made in (ours, deployment(prefect, "theirs")["id"]):
        prefect.delete(f"deployments/{made}")


def test_a_server_that_is_busy_while_a_deployment_is_made_is_asked_again(prefect: Api) -> None:
    """Prefect hides the server's 503 in an error of its own; it ended the schedule as a bug."""
    answer = httpx.Response(503, request=httpx.Request("POST", prefect.server.api))

    class Busy:
        async def aapply(self) -> None:
            raise DeploymentApplyError("Error while applying deployment") from httpx.HTTPStatusError(
                "503", request=answer.request, response=answer
            )

    with Client.open(prefect.server.api) as client, pytest.raises(Gone, match="answers 503"):
        Deployments(client).register(Busy())


def test_a_deployment_collects_and_says_what_it_could_not(prefect: Api, tmp_path: Path) -> None:
    from prefect.logging import disable_run_logger

    url = (tmp_path / "store").as_uri()
    store = open_store(url)
    log = RunLog(store, RUN, writer="driver")
    store.create(index_key(RUN), b"")
    state = begin(log, log.fold(), {"checkpoint": {"keep": {"last": 2, "grace_s": 0.0}}})
    for step in (10, 20, 30):
        state = save(store, log, state, step)
    with Client.open(prefect.server.api, patience_s=60) as client:
        made = registered(client, collecting(url, "", cron_of("0 * * * *", "UTC"), "each hour"))
        told = deployment(prefect, "collect")
        assert told["entrypoint"] == COLLECT
        assert (told["parameters"], told["global_concurrency_limit"]["limit"]) == ({"store": url, "run": ""}, 1)
        prefect.delete(f"deployments/{made}")
    with disable_run_logger():
        assert collect_flow.fn(store=url, dry_run=True) == 0
        assert collect_flow.fn(store=url) == 0
        assert set(log.fold().buried) == {2}
        wait_for(lambda: collect_flow.fn(store=url) > 0, "the second of S3's times that a grace has at least")
        store.delete(run_key(RUN, manifest_name(30, state.epoch)))
        save(store, log, state, 40)
        with pytest.raises(RunFailed, match=f"not collected: {RUN}"):
            collect_flow.fn(store=url)
