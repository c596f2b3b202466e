"""Whole runs through the real command, killed at seeded places: they go on by themselves and end with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.agents import wait_for
from tests.support.chaos import PLACES, Fault, draw, unleashed

SEED = int(os.environ.get("HOTSTAGE_CHAOS_SEED", "20"))
STEPS = 60
TEXT = "the quick brown fox jumps over the lazy dog and then over the next one, which is as lazy as the first. " * 400

SPEC = f"""
name = "chaos"
[model]
family = "gpt2"
layers = 4
width = 64
heads = 4
context = 64
[data]
source = "text:corpus/*.txt"
vocab_size = 300
[train]
steps = {STEPS}
batch = 8
microbatch = 2
sequence = 64
seed = 3
[parallel]
stages = 2
threads = 1
[checkpoint]
every = 4
[launch]
stall_s = 20.0
connect_s = 20.0
[recovery]
backoff_s = 0.05
"""


class Place:
    """A folder with a spec and a corpus, and the command run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "corpus").mkdir(parents=True)
        (folder / "corpus" / "a.txt").write_text(TEXT)
        (folder / "spec.toml").write_text(SPEC)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")} | {
            "HOTSTAGE_STORE": str(folder / "store")
        }

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "flows.cli", *args]

    def start(self, *args: str) -> subprocess.Popen[bytes]:
        root = Path(__file__).resolve().parents[2]
        env = self.env | {"PYTHONPATH": str(root)}
        return subprocess.Popen(
            self.command(*args), cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *args: str, code: int = 0) -> str:
        process = self.start(*args)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, (out + err).decode()
        return out.decode()

    def train(self, *sets: str, code: int = 0) -> dict[str, Any]:
        args = [item for s in sets for item in ("--set", s)]
        return dict(json.loads(self.run("train", "spec.toml", "--no-prefect", "--json", *args, code=code)))

    def stop_all(self) -> None:
        """Whatever still works below the folder."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    inside = str(self.folder) in os.readlink(entry / "cwd")
                except OSError:
                    continue
                if inside:
                    os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture
def place(tmp_path: Path) -> Any:
    made = Place(tmp_path / "p")
    yield made
    made.stop_all()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(run, state digest) of the spec on one stage, without a fault."""
    place = Place(tmp_path_factory.mktemp("undisturbed") / "p")
    result = place.train("parallel.stages=1")
    place.stop_all()
    assert (result["outcome"], result["attempts"], result["step"]) == ("succeeded", 1, STEPS)
    return result["run"], result["state_digest"]


@pytest.mark.parametrize("fault", draw(SEED, PLACES, ranks=2, steps=range(9, STEPS - 20)), ids=str)
def test_a_kill_anywhere_ends_with_the_same_bits(place: Place, undisturbed: tuple[str, str], fault: Fault) -> None:
    run, digest = undisturbed
    with unleashed(fault, place.folder / "store" / "runs" / run, place.folder / "out") as watcher:
        result = place.train()
        assert watcher.wait(5) == 0, f"{fault}: the place was never seen"
    assert (result["run"], result["outcome"], result["step"]) == (run, "succeeded", STEPS)
    assert result["state_digest"] == digest
    if fault.place not in ("upload", "commit", "agent"):
        assert result["attempts"] > 1
    else:
        assert result["attempts"] == 1  # a lost agent costs no attempt


def test_a_driver_killed_again_and_again_loses_nothing(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    for _ in range(4):
        process = place.start("train", "spec.toml", "--no-prefect", "--json")
        log = place.folder / "store" / "runs" / run / "log"
        before = len(list(log.glob("*"))) if log.exists() else 0
        wait_for(lambda n=before: log.exists() and len(list(log.glob("*"))) > n, "a new log record", 60)  # type: ignore[misc]
        process.kill()
        process.communicate()
    result = place.train()
    assert (result["outcome"], result["attempts"], result["state_digest"]) == ("succeeded", 1, digest)


def test_stop_then_resume_on_other_layouts(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    saved: list[int] = []
    for stages, number in ((4, signal.SIGINT), (3, signal.SIGTERM)):
        process = place.start("train", "spec.toml", "--no-prefect", "--json", "--set", f"parallel.stages={stages}")
        store = place.folder / "store" / "runs" / run
        newest = saved[-1] if saved else 0
        wait_for(
            lambda n=newest: any(int(p.name.split("-")[0]) > n for p in (store / "manifests").glob("*")),  # type: ignore[misc]
            "a newer checkpoint",
            60,
        )
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 85, err.decode()
        saved.append(json.loads(out)["step"])
    assert saved[0] < saved[1] < STEPS
    told = json.loads(place.run("runs", "resume", run, "--no-prefect", "--json", "--set", "parallel.stages=1"))
    assert (told["outcome"], told["state_digest"]) == ("succeeded", digest)


def test_a_second_train_attaches(place: Place, undisturbed: tuple[str, str]) -> None:
    _, digest = undisturbed
    first, second = (place.start("train", "spec.toml", "--no-prefect", "--json") for _ in range(2))
    results = [json.loads(p.communicate(timeout=120)[0]) for p in (first, second)]
    assert [r["state_digest"] for r in results] == [digest, digest]
    assert [r["attempts"] for r in results] == [1, 1]


def test_cancel_ends_it_for_good_and_resume_opens_it_again(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    process = place.start("train", "spec.toml", "--no-prefect", "--json")
    manifests = place.folder / "store" / "runs" / run / "manifests"
    wait_for(lambda: any(manifests.glob("*/manifest")), "a checkpoint", 60)
    place.run("runs", "cancel", run)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)["outcome"]) == (1, "cancelled")
    assert json.loads(place.run("runs", "show", run, "--json"))["state"] == "cancelled"
    told = json.loads(place.run("runs", "resume", run, "--no-prefect", "--json"))
    assert (told["outcome"], told["state_digest"]) == ("succeeded", digest)


def test_a_fork_with_the_same_what_has_the_same_bits(place: Place, undisturbed: tuple[str, str]) -> None:
    run, digest = undisturbed
    place.train()
    steps = [c["step"] for c in json.loads(place.run("ckpt", "ls", run, "--json"))]
    out = place.run("runs", "fork", run, "--step", str(steps[1]), "--no-prefect", "--json",
                    "--set", "name=again", "--set", "parallel.stages=3")  # fmt: skip
    told = json.loads(out)
    assert (told["outcome"], told["state_digest"]) == ("succeeded", digest)
    shown = json.loads(place.run("runs", "show", told["run"], "--json"))
    assert shown["attempts_list"][0]["step"] == steps[1]  # it began there, not from the start


def test_output_is_kept_after_the_processes_are_gone(place: Place, undisturbed: tuple[str, str]) -> None:
    run, _ = undisturbed
    place.train()
    lines = place.run("logs", run, "--rank", "0", "--tail", "3").splitlines()
    assert json.loads(lines[-1])["event"] == "end"
    steps = [json.loads(line) for line in place.run("logs", run).splitlines() if '"event":"step"' in line]
    assert [s["step"] for s in steps] == list(range(1, STEPS + 1))


def test_nothing_is_left_running(place: Place) -> None:
    place.train("train.steps=4")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = [e for e in Path("/proc").iterdir() if e.name.isdigit() and _below(e, place.folder)]
        if not left:
            return
        time.sleep(0.02)  # between two looks
    raise AssertionError(f"still running: {left}")


def _below(entry: Path, folder: Path) -> bool:
    try:
        return str(folder) in os.readlink(entry / "cwd")
    except OSError:
        return False
