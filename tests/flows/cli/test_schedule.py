"""`hotstage schedule` against a real Prefect server: new runs by themselves, one at a time, and an end on Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import Api, deployment, of
from tests.support.front import Front
from tests.support.place import Place, finish
from tests.support.wait import wait_for


@pytest.fixture
def scheduling(hosted: Place) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Schedulers to be ended with the test, before what they started."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def done_tasks(api: Api, flow_run: dict[str, Any]) -> list[str]:
    return [row["name"] for row in api.task_runs(flow_run["id"]) if row["state_type"] == "COMPLETED"]


def test_each_firing_is_a_new_run(prefect: Api, hosted: Place, scheduling: list[subprocess.Popen[bytes]]) -> None:
    sets = ["--set", "name='often'", "--set", "train.steps=6", "--set", "parallel.stages=1"]
    hosted.hide_queue()
    process = hosted.start("schedule", "spec.toml", "--interval", "3", *sets)
    scheduling.append(process)
    wait_for(lambda: len(of(prefect, "often", "COMPLETED")) >= 2 or process.poll() is not None, "two runs", 150, 0.1)
    process.send_signal(signal.SIGINT)
    done = finish(process, 60)
    assert done.code == 0, done.out + done.err
    completed = of(prefect, "often", "COMPLETED")
    assert len(completed) >= 2, done.out + done.err
    fires = re.findall(r"^  fires \w{3} (\S+ \S+) \+0000 \(UTC\)$", done.out, re.MULTILINE)
    assert len(fires) == 3  # the next ones
    for flow_run in completed:
        wait_for(lambda f=flow_run: len(done_tasks(prefect, f)) == 3, "its task runs", 60, 0.1)
        assert sorted(done_tasks(prefect, flow_run)) == ["attempt 1", "compile plan", "prepare data"]
    assert not of(prefect, "often", "FAILED")

    runs = {row["run"]: row for row in json.loads(hosted.said("runs", "ls", "--json"))}
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
    prefect: Api, hosted: Place, scheduling: list[subprocess.Popen[bytes]], front: Front
) -> None:
    hosted.env["PREFECT_API_URL"] = front.api
    sets = ["--set", "name='long'", "--set", "train.steps=1000000", "--set", "checkpoint.every=50"]
    process = hosted.start("schedule", "spec.toml", "--interval", "2", *sets)
    scheduling.append(process)
    log = hosted.folder / "store" / "runs"

    def skipped() -> list[dict[str, Any]]:
        return of(prefect, "long", "CANCELLED")

    wait_for(lambda: any(log.glob("long-*/live/*/metrics/*")) or process.poll() is not None, "the first step", 120)
    before = len(skipped())
    wait_for(lambda: len(skipped()) >= before + 2, "two more skipped firings", 60, 0.1)
    assert len(of(prefect, "long", "RUNNING")) == 1
    assert not of(prefect, "long", "COMPLETED", "FAILED", "CRASHED")
    (run,) = {path.parts[len(log.parts)] for path in log.glob("long-*/log/*")}

    front.shut()  # Prefect's own runner ends after three failures in a row, and its flows with it
    last = newest(log / run)
    said = until(process, "Prefect is away")
    wait_for(lambda: newest(log / run) > last, "the gang to train on", 60)
    before = len(skipped())
    front.open()
    said += until(process, "Prefect is back")
    wait_for(lambda: len(skipped()) > before, "a firing after the outage", 60, 0.1)
    (flow_run,) = of(prefect, "long", "RUNNING")

    process.send_signal(signal.SIGINT)
    done = finish(process, 60)
    assert done.code == 0, said + done.out + done.err
    assert "1 run(s) go on" in done.out
    assert deployment(prefect, "long")["paused"] is False
    last = newest(log / run)
    wait_for(lambda: newest(log / run) > last, "the gang to go on by itself", 60)
    assert any("hotstage-engine" in line for line in hosted.left().values())
    hosted.said("runs", "cancel", run)  # its driver is there, and tells Prefect
    wait_for(
        lambda: prefect.flow_runs(id={"any_": [flow_run["id"]]})[0]["state_type"] == "CANCELLED", "its end", 60, 0.1
    )
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
    done = place.here("schedule", "spec.toml", "--cron", "30 2 * * *", "--timezone", "europe/berlin")
    assert (done.code, "near ones: Europe/Berlin" in done.err) == (2, True), done.err
    done = place.call("schedule", "spec.toml", "--interval", "3")
    assert (done.code, "nothing answers" in done.err) == (78, True), done.err
    assert place.here("schedule", "spec.toml").code == 2
