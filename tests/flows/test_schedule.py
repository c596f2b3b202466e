"""`hotstage schedule` against a real Prefect server: new runs by themselves, one at a time, and an end on Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import httpx
import pytest
from prefect.deployments.runner import DeploymentApplyError

from checkpoint.keys import index_key, manifest_name, run_key
from checkpoint.log import RunLog
from checkpoint.store import open_store
from flows.prefect_api import Client, Gone
from flows.serve import COLLECT, cron_of, firings, zone_of
from tests.flows.conftest import Api
from tests.support.agents import wait_for
from tests.support.front import Front
from tests.support.place import ROOT, Place, finish
from tests.support.small_checkpoints import RUN, begin, save
from trainer.spec import load_spec


@pytest.fixture
def scheduling(hosted: Place) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Schedulers to be ended with the test, before what they started."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def door(prefect: Api) -> Iterator[Front]:
    made = Front(prefect.server.api)
    yield made
    made.close()


def deployment(api: Api, name: str) -> dict[str, Any]:
    (found,) = api.ask("deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    return found


def done_tasks(api: Api, flow_run: dict[str, Any]) -> list[str]:
    return [row["name"] for row in api.task_runs(flow_run["id"]) if row["state_type"] == "COMPLETED"]


def of(api: Api, name: str, *types: str) -> list[dict[str, Any]]:
    """A deployment's flow runs in these states."""
    found = api.ask("deployments/filter", {"deployments": {"name": {"any_": [name]}}})
    return (
        api.flow_runs(deployment_id={"any_": [found[0]["id"]]}, state={"type": {"any_": list(types)}}) if found else []
    )


def test_it_fires_three_times_and_each_is_a_new_run(
    prefect: Api, hosted: Place, scheduling: list[subprocess.Popen[bytes]]
) -> None:
    sets = ["--set", "name='often'", "--set", "train.steps=6", "--set", "parallel.stages=1"]
    process = hosted.start("schedule", "spec.toml", "--interval", "3", *sets)
    scheduling.append(process)
    wait_for(lambda: len(of(prefect, "often", "COMPLETED")) >= 3 or process.poll() is not None, "three runs", 150)
    process.send_signal(signal.SIGINT)
    done = finish(process, 60)
    assert done.code == 0, done.out + done.err
    completed = of(prefect, "often", "COMPLETED")
    assert len(completed) >= 3, done.out + done.err
    fires = re.findall(r"^  fires \w{3} (\S+ \S+) \+0000 \(UTC\)$", done.out, re.MULTILINE)
    assert len(fires) == 3
    for flow_run in completed:
        wait_for(lambda f=flow_run: len(done_tasks(prefect, f)) == 3, "its task runs", 20)
        assert sorted(done_tasks(prefect, flow_run)) == ["attempt 1", "compile plan", "prepare data"]
    assert not of(prefect, "often", "FAILED")

    runs = {row["run"]: row for row in json.loads(hosted.run("runs", "ls", "--json"))}
    for flow_run in completed:
        at = re.sub(r"[-:]", "", flow_run["expected_start_time"].partition(".")[0]).lower()
        assert flow_run["name"].endswith(at[:15]), flow_run["name"]
        (name,) = [r for r in runs if r.startswith("often-") and r.endswith(flow_run["name"].rpartition("-")[2])]
        assert (runs[name]["state"], runs[name]["saved_step"]) == ("succeeded", 6)
    assert len({f["name"] for f in completed}) == len(completed)
    assert all(f["start_time"] >= f["expected_start_time"] for f in completed)  # none early
    spans = sorted((f["start_time"], f["end_time"]) for f in completed)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))  # never two at once


def test_overlap_is_skipped_an_outage_ends_nothing_and_ctrl_c_leaves_the_run_alone(
    prefect: Api, hosted: Place, scheduling: list[subprocess.Popen[bytes]], door: Front
) -> None:
    hosted.env["PREFECT_API_URL"] = door.api
    sets = ["--set", "name='long'", "--set", "train.steps=1000000", "--set", "checkpoint.every=50"]
    process = hosted.start("schedule", "spec.toml", "--interval", "2", *sets)
    scheduling.append(process)
    log = hosted.folder / "store" / "runs"

    def skipped() -> list[dict[str, Any]]:
        return of(prefect, "long", "CANCELLED")

    wait_for(lambda: any(log.glob("long-*/live/*/metrics/*")) or process.poll() is not None, "the first step", 120)
    before = len(skipped())
    wait_for(lambda: len(skipped()) >= before + 2, "two more skipped firings", 60)
    assert len(of(prefect, "long", "RUNNING")) == 1
    assert not of(prefect, "long", "COMPLETED", "FAILED", "CRASHED")
    (run,) = {path.parts[len(log.parts)] for path in log.glob("long-*/log/*")}

    door.shut()  # Prefect's own runner ends after three failures in a row, and its flows with it
    last = newest(log / run)
    said = until(process, "Prefect is away")
    wait_for(lambda: newest(log / run) > last, "the gang to train on", 60)
    before = len(skipped())
    door.open()
    said += until(process, "Prefect is back")
    wait_for(lambda: len(skipped()) > before, "a firing after the outage", 60)
    (flow_run,) = of(prefect, "long", "RUNNING")

    process.send_signal(signal.SIGINT)
    done = finish(process, 60)
    assert done.code == 0, said + done.out + done.err
    assert "1 run(s) go on" in done.out
    assert deployment(prefect, "long")["paused"] is False
    last = newest(log / run)
    wait_for(lambda: newest(log / run) > last, "the gang to go on by itself", 60)
    assert any("hotstage-engine" in line for line in hosted.left().values())
    hosted.run("runs", "cancel", run)  # its driver is there, and tells Prefect
    wait_for(lambda: prefect.flow_runs(id={"any_": [flow_run["id"]]})[0]["state_type"] == "CANCELLED", "its end", 60)
    hosted.all_gone(30)


def until(process: subprocess.Popen[bytes], words: str) -> str:
    """What a scheduler says, to the line with these words."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line.decode()
        if words in said:
            return said
    raise AssertionError(f"it never said {words!r}:\n{said}")


def newest(run: Path) -> str:
    return max(path.name for path in run.glob("live/*/metrics/*"))


def test_it_needs_a_server_and_a_time_that_comes(place: Place) -> None:
    done = place.call("schedule", "spec.toml", "--interval", "3")
    assert (done.code, "PREFECT_API_URL is not set" in done.err) == (78, True), done.err
    place.env["PREFECT_API_URL"] = "http://127.0.0.1:9/api"
    done = place.call("schedule", "spec.toml", "--cron", "30 2 * * *", "--timezone", "europe/berlin")
    assert (done.code, "near ones: Europe/Berlin" in done.err) == (2, True), done.err
    done = place.call("schedule", "spec.toml", "--interval", "3")
    assert (done.code, "nothing answers" in done.err) == (78, True), done.err
    assert place.call("schedule", "spec.toml").code == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("every day", "is no cron line"),
        ("0 2 * * 8", "is no cron line"),
        ("60 * * * *", "is no cron line"),
        ("@reboot", "is no cron line"),
        ("H 2 * * *", "is no cron line"),
        ("", "is no cron line"),
        ("*/5 * * * * *", "has 6 fields"),
        ("0 0 31 2 *", "never fires"),
        ("0 0 30 feb *", "never fires"),
        ("0 0 31 4,6,9,11 *", "never fires"),
    ],
)
def test_a_cron_line_that_is_none_or_never_fires(line: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cron_of(line, "UTC")


@pytest.mark.parametrize(
    "line", ["0 2 * * *", "@daily", "@hourly", "0 2 * * mon", "0 0 29 2 *", "0 0 * jan-mar *", "0 0 13 * 5"]
)
def test_cron_lines_that_are_taken(line: str) -> None:
    assert cron_of(line, "Europe/Berlin").timezone == "Europe/Berlin"
    assert cron_of(line, "UTC", day_or=False).day_or is False


@pytest.mark.parametrize(
    ("name", "near"),
    [("Europe/Berln", "Europe/Berlin"), ("Berlin", "Europe/Berlin"), ("new york", "America/New_York"), ("CEST", "C")],
)
def test_a_zone_that_is_none_names_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=near):
        zone_of(name)
    assert zone_of(near if "/" in near else "UTC")
    assert zone_of(None) == "UTC"


def test_a_server_that_is_busy_while_a_deployment_is_made_is_asked_again(prefect: Api) -> None:
    """Prefect hides the server's 503 in an error of its own; it ended the schedule as a bug."""
    answer = httpx.Response(503, request=httpx.Request("POST", prefect.server.api))

    class Busy:
        async def aapply(self) -> None:
            raise DeploymentApplyError("Error while applying deployment") from httpx.HTTPStatusError(
                "503", request=answer.request, response=answer
            )

    with Client.open(prefect.server.api) as client, pytest.raises(Gone, match="answers 503"):
        client.register(Busy())


def registered(client: Client, flow: Any) -> UUID:
    """As the schedule's process does it: a server that is busy (503) is asked again."""
    found: list[UUID] = []

    def ask() -> bool:
        with contextlib.suppress(Gone):
            found.append(client.register(flow))
        return bool(found)

    wait_for(ask, "the deployment", 60)
    return found[0]


def test_the_nights_when_the_clocks_change_fire_once(prefect: Api) -> None:
    """As the server itself plans them: 02:30 that does not exist, and 02:30 that exists twice."""
    from flows.flow import scheduled

    spec = load_spec(ROOT / "examples" / "demo.toml", [])
    with Client.open(prefect.server.api) as client:
        when = cron_of("30 2 * * *", "Europe/Berlin")
        made = registered(client, scheduled(spec, "file:///nowhere", "out", when, "nights"))
        for month in ("03-26", "10-29"):
            first = f"2027-{month}T12:00:00+00:00"
            client.plan_firings(made, 5, first, str(datetime.fromisoformat(first) + timedelta(days=5)))
        rows = of(prefect, "nights", "SCHEDULED")
        prefect.delete(f"deployments/{made}")
    zone = ZoneInfo("Europe/Berlin")
    at = [datetime.fromisoformat(row["expected_start_time"].replace("Z", "+00:00")).astimezone(zone) for row in rows]
    nights = [t.date().isoformat() for t in at if t.year == 2027]
    for month, days in (("2027-03", (27, 28, 29, 30)), ("2027-10", (30, 31))):
        for day in days:
            assert nights.count(f"{month}-{day}") == 1


def test_a_deployment_collects_and_says_what_it_could_not(prefect: Api, tmp_path: Path) -> None:
    from prefect.logging import disable_run_logger

    from flows.flow import RunFailed, collect_flow, collecting

    url = (tmp_path / "store").as_uri()
    store = open_store(url)
    log = RunLog(store, RUN, writer="driver")
    store.create(index_key(RUN), b"")
    state = begin(log, log.fold(), {"checkpoint": {"keep": {"last": 2, "grace_s": 0.0}}})
    for step in (10, 20, 30):
        state = save(store, log, state, step)
    with Client.open(prefect.server.api) as client:
        made = registered(client, collecting(url, "", cron_of("0 * * * *", "UTC"), "each hour"))
        told = deployment(prefect, "collect")
        assert told["entrypoint"] == COLLECT
        assert (told["parameters"], told["global_concurrency_limit"]["limit"]) == ({"store": url, "run": ""}, 1)
        prefect.delete(f"deployments/{made}")
    with disable_run_logger():
        assert collect_flow.fn(store=url, dry_run=True) == 0
        assert collect_flow.fn(store=url) == 0
        assert set(log.fold().buried) == {2}
        wait_for(lambda: collect_flow.fn(store=url) > 0, "the second of S3's times that a grace has at least", 20)
        store.delete(run_key(RUN, manifest_name(30, state.epoch)))
        save(store, log, state, 40)
        with pytest.raises(RunFailed, match=f"not collected: {RUN}"):
            collect_flow.fn(store=url)


def test_where_prefect_is_may_be_said_in_every_place_that_prefect_reads(tmp_path: Path) -> None:
    """profiles.toml, .env, prefect.toml and pyproject.toml, and the key of `prefect cloud login`."""
    program = (
        "from flows.prefect_api import configured, PrefectSettingsError\n"
        "try: print(configured())\nexcept PrefectSettingsError as e: print('REFUSED', e)"
    )
    url = "http://prefect.example:4200/api"
    cases = {
        "profile": (
            "home/profiles.toml",
            f'active = "team"\n[profiles.team]\nPREFECT_API_URL = "{url}"\nPREFECT_API_KEY = "k"\n',
        ),
        "env": (".env", f"PREFECT_API_URL={url}\n"),
        "toml": ("prefect.toml", f'[api]\nurl = "{url}"\n'),
        "pyproject": ("pyproject.toml", f'[tool.prefect.api]\nurl = "{url}"\n'),
        "nothing": ("other.toml", ""),
        "broken": ("home/profiles.toml", "active = [\n"),
    }
    running = {}
    for name, (path, text) in cases.items():
        folder = tmp_path / name
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
        env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
        env |= {"PREFECT_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
        running[name] = subprocess.Popen(
            [sys.executable, "-c", program], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    said = {name: finish(process, 120) for name, process in running.items()}
    for name, source in (
        ("profile", "the Prefect profile 'team'"),
        ("env", ".env"),
        ("toml", "prefect.toml"),
        ("pyproject", "pyproject.toml"),
    ):
        assert url in said[name].out, said[name]
        assert source in said[name].out
    assert said["nothing"].out.strip() == "None"
    assert said["broken"].code == 0, said["broken"].err


def test_firings_that_the_server_is_still_planning_are_asked_for_again() -> None:
    """Its own planner may hold the same ones: the answer then has fewer, for a moment."""
    asked = []

    class Planning:
        def plan_firings(self, deployment: UUID, count: int) -> list[datetime]:
            asked.append(deployment)
            day = datetime.now(UTC) + timedelta(days=1)
            return [day + timedelta(days=k) for k in range(min(len(asked), count))]

    found = firings(Planning(), uuid4())  # type: ignore[arg-type]
    assert (len(found), len(asked)) == (3, 3)
