"""The demo, shortened, under real Prefect: every promise of its result, twice in one folder, and left by Ctrl-C."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import tomllib

import pytest
from safetensors.numpy import load_file

from tests.flows.conftest import Api
from tests.support.chaos import caught, rank_step
from tests.support.place import ROOT, Done, Place, finish
from tests.support.wait import wait_for
from trainer.presets import PRESETS

SHORT = [
    *("--set", "data.source='text:corpus/*.txt'", "--set", "data.vocab_size=300", "--set", "checkpoint.every=20"),
    *("--set", "model.layers=2", "--set", "train.sequence=64", "--set", "train.schedule.warmup=5"),
]
FIELDS = {"run", "attempts", "lost_steps", "recovery_s", "first_loss", "last_loss", "seconds"}
DIGESTS = {"digest", "digest_one_stage"}


def demonstrated(at: Place, *more: str) -> Done:
    """The shortened demo to its end. Past the halfway its ranks stand still until one is killed: the driver that tells
    of their steps looks each 2 s at least, in which they would be through.
    """
    process = at.start("demo", "--out", "demo", *SHORT, "--set", "train.steps=240", *more)

    def halfway() -> bool:
        return (rank_step(at.folder, 0) or 0) > 130 or process.poll() is not None

    assert process.stdout is not None
    said = ""
    with caught(at.folder, halfway, "the halfway", 120, step=120):
        while ">>> kill -9" not in said:
            line = process.stdout.readline().decode()
            assert line, said
            said += line
    done = finish(process)
    return Done(done.code, said + done.out, done.err)


def test_the_demo_keeps_its_promises_and_can_be_run_again(prefect: Api, hosted: Place) -> None:
    done = demonstrated(hosted)
    assert done.code == 0, done.out + done.err
    out = hosted.folder / "demo"
    result = json.loads((out / "result.json").read_text())
    assert set(result) == FIELDS | DIGESTS
    assert result["attempts"] >= 2
    assert result["lost_steps"] >= 0
    assert result["recovery_s"] > 0
    assert result["last_loss"] < result["first_loss"]
    assert result["digest"] == result["digest_one_stage"]
    assert len(result["digest"]) == 64
    assert ">>> kill -9" in done.out
    assert "rank 1 of 2 dies" in done.out
    page = (out / "report.html").read_text()
    assert result["digest"] in page
    assert "attempt 2: rank 1 was killed (signal 9)" in page
    assert page.count("<svg") >= 2  # the loss; the planned and the measured timeline
    assert "<h2>Pipeline: planned and measured</h2>" in page
    assert load_file(out / "model" / "model.safetensors")
    (flow_run,) = prefect.named(result["run"])
    assert flow_run["state_type"] == "COMPLETED"
    rows = json.loads(prefect.artifacts(flow_run["id"])[f"{result['run']}-attempts"]["data"])
    assert [row["attempt"] for row in rows] == list(range(1, result["attempts"] + 1))
    hosted.all_gone(20)

    done = demonstrated(hosted, "--no-prefect")  # the data are there, the run is a new one
    assert done.code == 0, done.out + done.err
    assert "already there" in done.out
    second = json.loads((out / "result.json").read_text())
    assert second["run"].startswith(result["run"] + "-")
    assert second["digest"] == result["digest"]


def test_a_demo_that_is_left_leaves_nothing_running(place: Place) -> None:
    process = place.start("demo", "--out", "demo", "--no-prefect", *SHORT, "--set", "train.steps=100000")
    wait_for(lambda: any(place.folder.glob("demo/store/runs/*/live/*/metrics/*")), "the first step", 60)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130, done.out + done.err
    place.all_gone(20)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="its stand-in holds the server back; util-linux has it")
def test_the_first_step_waits_for_no_page(place: Place) -> None:
    """The demo's own server is held back at its very start: all of the training goes on, and nothing is said of it."""
    held = place.folder / "bin" / "setpriv"
    held.parent.mkdir()
    held.write_text('#!/bin/sh\ntouch "$PWD/server-asked-for"\nexec sleep 600\n')
    held.chmod(0o755)
    place.env["PATH"] = f"{held.parent}:{place.env['PATH']}"
    process = place.start("demo", "--out", "demo", *SHORT, "--set", "train.steps=100000")
    wait_for(lambda: any(place.folder.glob("demo/store/runs/*/live/*/metrics/*")), "the first step", 60)
    assert (place.folder / "server-asked-for").exists()  # before the data were there: both begin side by side
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130, done.out + done.err
    assert "attempt 1: at step 0 from the start" in done.out
    assert "Prefect" not in done.out + done.err, done.out + done.err
    place.all_gone(20)


def test_a_prefect_that_is_named_and_not_there_is_a_refusal(place: Place) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound, never listening: connections are refused as long as the test lasts
        place.env["PREFECT_API_URL"] = f"http://127.0.0.1:{s.getsockname()[1]}/api"
        done = place.call("demo", "--out", "demo", *SHORT)
    assert done.code == 75, done.out + done.err
    assert "hotstage: nothing answers at http://127.0.0.1:" in done.err
    assert done.err.rstrip().endswith("mend that, unset it, or use --no-prefect")
    assert "attempt" not in done.out
    assert not list(place.folder.glob("demo/store/runs/*/log/*"))


def test_the_example_is_the_preset() -> None:
    assert (ROOT / "examples" / "demo.toml").read_text() == PRESETS["gpt2-demo"]
    spec = tomllib.loads(PRESETS["gpt2-demo"])
    assert (spec["data"]["source"], spec["parallel"]["stages"]) == ("python-stdlib", 2)
