"""Pieces as mapped tasks of Prefect, in one process and on a real Dask cluster of two workers, and what is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from checkpoint.store import Store, open_store
from flows.data import prepare, validation_of
from flows.preparing import task_runner
from tests.flows.conftest import Api
from tests.flows.data.test_prepare import objects
from tests.support.place import ROOT, Place
from tests.support.wait import wait_for
from trainer.errors import SpecError
from trainer.spec import RunSpec, load_spec

PROGRAM = (
    "import json, sys; from flows.flow import prepare_flow; from trainer.spec import RunSpec; "
    "print(json.dumps(prepare_flow(RunSpec.model_validate_json(sys.argv[1]), sys.argv[2], sys.argv[3])))"
)


@pytest.fixture
def corpus(hosted: Place) -> Path:
    """Some 2 MB of JSON lines whose words are few, some of them twice."""
    dice = random.Random(3)
    words = ["".join(dice.choices("abcdefghij", k=dice.randrange(2, 9))) for _ in range(600)]
    path = hosted.folder / "corpus" / "a.jsonl"
    with path.open("w") as file:
        for number in range(900):
            text = f"{number % 800} " + " ".join(random.Random(number % 800).choices(words, k=400))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture
def spec(hosted: Place, corpus: Path) -> RunSpec:
    sets = [f"data.source=jsonl:{corpus}", "data.piece_mib=1", "data.validation=0.1", "data.dedupe.exact=true"]
    return load_spec(hosted.folder / "spec.toml", sets)


@pytest.fixture
def good(spec: RunSpec, tmp_path: Path) -> Store:
    """What it comes to without Prefect, in one piece."""
    store = open_store("memory:")
    data = spec.data.model_copy(update={"piece_mib": 64})
    assert validation_of(store, prepare(data, store)) is not None
    return store


@pytest.fixture
def running(hosted: Place) -> Iterator[list[subprocess.Popen[str]]]:
    made: list[subprocess.Popen[str]] = []
    yield made
    for process in made:
        process.kill()
        process.wait()


def begin(hosted: Place, spec: RunSpec, dask: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, spec.model_dump_json(), store_of(hosted).url, dask]
    env = {**hosted.env, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=hosted.folder, env=env, stdout=subprocess.PIPE, text=True)


def store_of(hosted: Place) -> Store:
    return open_store(f"file://{hosted.folder / 'store'}")


def pieces_done(store: Store) -> int:
    return sum(1 for _ in store.list("data/work/"))


def test_a_killed_flow_goes_on_with_what_its_tasks_have_stored(
    hosted: Place, prefect: Api, spec: RunSpec, good: Store, running: list[subprocess.Popen[str]]
) -> None:
    store = store_of(hosted)
    first = begin(hosted, spec, "")
    running.append(first)
    wait_for(lambda: first.poll() is not None or pieces_done(store) > 3, "pieces that are done", 120)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    assert not list(store.list("data/inputs/"))
    second = begin(hosted, spec, "")
    running.append(second)
    told, _ = second.communicate(timeout=180)
    assert second.returncode == 0
    assert objects(store) == objects(good)
    flows = prefect.flow_runs(name={"like_": ""}, parent_task_run_id={"is_null_": False})
    states = {
        (run["name"], run["state_name"])
        for flow in flows
        for run in prefect.task_runs(flow["id"])
        if run["name"].startswith(("read-", "encode-"))
    }
    assert ("read-0", "Cached") in states
    assert ("encode-1", "Completed") in states
    assert json.loads(told.splitlines()[-1])["digest"] in {i.key.split("/")[1] for i in store.list("data/")}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_workers_of_dask_are_killed(
    hosted: Place, spec: RunSpec, good: Store, running: list[subprocess.Popen[str]], seed: int
) -> None:
    """Two workers; one of them is killed at a seeded moment, and another one comes in its place."""
    store, dice = store_of(hosted), random.Random(seed)
    process = begin(hosted, spec, "2")
    running.append(process)
    moment = dice.randrange(0, 18)
    wait_for(lambda: process.poll() is not None or pieces_done(store) > moment, "the moment of the kill", 180)
    workers = children(process.pid)
    if process.poll() is None:
        assert workers
        kill(dice.choice(workers))
    assert process.communicate(timeout=240) is not None
    assert process.returncode == 0
    assert objects(store) == objects(good)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_who_drives_a_dask_cluster_is_killed(
    hosted: Place, spec: RunSpec, good: Store, running: list[subprocess.Popen[str]], seed: int
) -> None:
    """Its workers leave, and another one goes on with what they have stored."""
    store = store_of(hosted)
    first = begin(hosted, spec, "2")
    running.append(first)
    moment = random.Random(seed).randrange(0, 18)
    wait_for(lambda: first.poll() is not None or pieces_done(store) > moment, "the moment of the kill", 180)
    workers = children(first.pid)
    first.kill()
    first.wait()
    wait_for(lambda: not any(alive(pid) for pid in workers), "the workers to leave", 60)
    second = begin(hosted, spec, "2")
    running.append(second)
    assert second.communicate(timeout=240) is not None
    assert second.returncode == 0
    assert objects(store) == objects(good)


def alive(pid: int) -> bool:
    try:
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Workers that a process has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if int(stat[1]) == pid and b"spawn_main" in command:
            found.append(int(entry.name))
    return found


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("dask", ["two", "0", "-1"])
def test_what_is_no_cluster_is_refused(dask: str) -> None:
    with pytest.raises(SpecError, match="neither a number of workers nor an address"):
        task_runner(dask)
