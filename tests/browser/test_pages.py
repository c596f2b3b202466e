"""What a person reads on Prefect's pages of a run and of a schedule, and in report.html, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.browser.browser import Browser
from tests.browser.conftest import Shown, report_of
from tests.flows.conftest import Api

Picture = Callable[[str], Path]


def artifact(prefect: Api, shown: Shown, name: str) -> str:
    """The id of a run's artifact."""
    return str(prefect.artifacts(shown.flow_run["id"])[name]["id"])


def test_the_server_s_page_works_whatever_its_port(prefect: Api, browser: Browser) -> None:
    for where in (prefect.server.page, f"{prefect.server.page}/v2/dashboard"):
        browser.open(where)
        text = browser.wait_for("Dashboard", "Deployments")
        assert "Can't connect" not in text
        assert ":4200" not in text


def test_the_address_that_the_demo_prints_shows_its_run(
    prefect: Api, browser: Browser, demo: Shown, picture: Picture
) -> None:
    (address,) = re.findall(r"Prefect's page of this run: (\S+)", demo.said)
    assert address.startswith(prefect.server.page)
    browser.open(address)
    text = browser.wait_for(demo.run, "Completed", "4 Task runs")
    assert "did not generate any task or subflow runs" not in text
    browser.click("Logs")
    browser.wait_for("attempt 1: at step 0 from the start")
    picture("prefect-run")
    browser.click("Task Runs")
    text = browser.wait_for("prepare data", "compile plan", "attempt 1: rank 1 was killed (signal 9)", "attempt 2")
    assert len(re.findall(r"^Crashed$", text, re.MULTILINE)) == 1
    assert len(re.findall(r"^Completed$", text, re.MULTILINE)) >= 3
    picture("prefect-task-runs")
    browser.click("Artifacts")
    browser.wait_for(demo.run, f"{demo.run}-loss", f"{demo.run}-attempts", f"{demo.run}-files", "step 240 saved")


def test_the_old_page_shows_it_too(prefect: Api, browser: Browser, demo: Shown) -> None:
    browser.open(f"{prefect.server.page}/runs/flow-run/{demo.flow_run['id']}")
    browser.wait_for(demo.run, "Completed", "4 Task runs", "attempt 1: at step 0 from the start")


def test_the_loss_is_a_curve_that_is_drawn(
    prefect: Api, browser: Browser, demo: Shown, page: str, picture: Picture
) -> None:
    browser.open(f"{page}/artifacts/artifact/{artifact(prefect, demo, demo.run + '-loss')}")
    browser.wait_for("at step 240", "loss")
    line = (
        "const p = [...document.querySelectorAll('svg .line-plot-0 path, svg g.plot path')][0];"
        "if (!p) return null; const box = p.getBoundingClientRect();"
        "return [getComputedStyle(p).stroke, box.width, box.height]"
    )
    browser.wait(lambda: browser.run(line), "the curve")
    colour, width, height = browser.run(line)
    assert colour == "rgb(37, 99, 235)"  # not the default, which cannot be seen on this page
    assert width > 200
    assert height > 50
    assert "xychart" not in browser.text()
    picture("prefect-loss")


def test_the_old_page_draws_the_loss_as_a_picture(prefect: Api, browser: Browser, demo: Shown) -> None:
    browser.open(f"{prefect.server.page}/artifacts/artifact/{artifact(prefect, demo, demo.run + '-curve')}")
    drawn = (
        "return [...document.images].some(i => "
        "i.src.startsWith('data:image/svg') && i.complete && i.naturalWidth > 100)"
    )
    browser.wait(lambda: browser.run(drawn), "the picture")
    wide = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wide <= 0  # its address is wrapped, not laid over the page


def test_attempts_and_checkpoints_can_be_read(prefect: Api, browser: Browser, demo: Shown, page: str) -> None:
    browser.open(f"{page}/artifacts/artifact/{artifact(prefect, demo, demo.run + '-attempts')}")
    browser.wait_for("rank 1 was killed (signal 9)", "from step", "back after")
    browser.open(f"{page}/artifacts/artifact/{artifact(prefect, demo, demo.run + '-files')}")
    text = browser.wait_for("state digest", f"runs/{demo.run}/manifests/")
    assert str(report_of(demo)) in text
    result = json.loads((demo.place.folder / "demo" / "result.json").read_text())
    assert result["digest"] in text


def test_a_schedule_and_its_runs_can_be_read(
    prefect: Api, browser: Browser, schedule: Shown, page: str, picture: Picture
) -> None:
    (deployment,) = prefect.ask("deployments/filter", {"deployments": {"name": {"any_": ["nightly"]}}})
    browser.open(f"{page}/deployments/deployment/{deployment['id']}")
    browser.wait_for("nightly", "At 02:30 AM", "Next Run")
    browser.click("Description")
    browser.wait_for("30 2 * * *", "Europe/Berlin")
    assert "30 2 * * *" in schedule.said
    picture("prefect-schedule")
    browser.open(f"{page}/runs/flow-run/{schedule.flow_run['id']}")
    browser.wait_for(schedule.run, "Completed", "3 Task runs", "nightly")
    browser.click("Logs")
    browser.wait_for("attempt 1: at step 0 from the start", "succeeded: step 40")
    browser.click("Task Runs")
    browser.wait_for("prepare data", "compile plan", "attempt 1")
    browser.click("Artifacts")
    browser.wait_for("step 40 of 40", "loss")


def test_a_sweep_s_table_can_be_read_and_an_ended_schedule_fires_no_more(
    prefect: Api, browser: Browser, swept: dict[str, Any], page: str, picture: Picture
) -> None:
    (table,) = [a for key, a in prefect.artifacts(swept["id"]).items() if key.endswith("-sweep")]
    browser.open(f"{page}/artifacts/artifact/{table['id']}")
    text = browser.wait_for("train.optimizer.lr", "1e-3", "1e-2", "(least)", "2 of 2 runs succeeded")
    assert len(re.findall("succeeded", text)) >= 3
    picture("prefect-sweep")
    browser.open(f"{page}/runs/flow-run/{swept['id']}")
    browser.wait_for("Logs", "Artifacts")
    browser.click("Logs")
    browser.wait_for("2 of 2 runs succeeded; the least loss", "train.optimizer.lr")
    browser.open(f"{page}/deployments/deployment/{swept['deployment_id']}")
    browser.wait_for("sweeps", "Every 4 seconds")
    browser.click("Upcoming")
    text = browser.wait_for("No runs found")  # none planned, none late
    assert "Late" not in text


def test_the_report_can_be_read(browser: Browser, demo: Shown, picture: Picture) -> None:
    browser.open(report_of(demo).as_uri())
    result = json.loads((demo.place.folder / "demo" / "result.json").read_text())
    text = browser.wait_for(demo.run, "succeeded", "The same bits", "Loss", "Attempts", "Checkpoints")
    for words in (result["digest"], "equal", "rank 1 was killed (signal 9)", "planned", "measured", "A sample"):
        assert words in text
    picture("report")
    for width in (1280, 400):
        browser.size(width, 1000)
        over = browser.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert over <= 0, f"{over} pixels too wide at {width}"
    hidden = browser.run(
        "return [...document.querySelectorAll('svg text')].filter(t => {"
        "const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();"
        "return a.right > b.right + 1 || a.left < b.left - 1}).map(t => t.textContent)"
    )
    browser.size(browser.width, browser.height)
    assert hidden == []  # no label is cut off at the edge of its picture
