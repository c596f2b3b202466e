"""A chain of runs over growing data, and a sweep: our flows, as a real Prefect server sees them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from checkpoint.log import RunLog
from checkpoint.store import open_store
from flows.drive.begin import prepare_run
from flows.drive.run import load_what, run_names
from flows.recurring.chain import lengthened, scheduled_runs, unfinished
from flows.recurring.sweep import last_loss
from tests.flows.conftest import Api
from tests.support.place import ROOT, Place
from tests.support.shared import once
from trainer.errors import SpecError
from trainer.spec import load_spec, parse_spec

STEPS = 30
PROGRAM = """
import json, sys
from pathlib import Path
from flows.flow import sweep_flow, train_flow
from trainer.spec import load_spec

def state_of(flow, *args, **kwargs):
    state = flow(*args, **kwargs, return_state=True)
    return state.name, state.message

spec = load_spec("spec.toml", json.loads(sys.argv[1]))
store = str(Path("store").absolute())
said = []
for number in range(3):
    Path(f"corpus/{number}.txt").write_text(f"On day {number} the lazy dog and the quick brown fox met again. " * 150)
    said.append(state_of(train_flow, spec=spec, store=store, fresh=True, mode="continue"))
said.append(state_of(train_flow, spec=spec, store=store, fresh=True, mode="continue"))
Path("corpus/9.txt").write_text("A text that came last: the fox is gone, and the dog is as lazy as before. " * 150)
said.append(state_of(train_flow, spec=spec, store=store, fresh=True, mode="continue", lr_schedule="restart"))
few = load_spec("spec.toml", [*json.loads(sys.argv[1]), "name='swept'", "train.steps=6"])
points = [[f"train.optimizer.lr={lr}", f"train.seed={seed}"] for lr in ("1e-3", "1e-2") for seed in (1, 2)]
said.append(state_of(sweep_flow, spec=few, points=points, at_once=2, store=store))
json.dump(said, open("said.json", "w"))
"""


@pytest.fixture(scope="module")
def chained(prefect: Api, tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, list[tuple[str, str]]]:
    """The place where five firings of a chain and a sweep of four have ended, and the states of the flow runs."""

    def make(folder: Path) -> dict[str, Any]:
        place = Place(folder / "p", env={**prefect.server.environment(), "PREFECT_HOME": str(folder / "prefect")})
        sets = ["name='grows'", f"train.steps={STEPS}", "parallel.stages=1", "train.optimizer.lr=3e-3",
                "train.schedule.warmup=5", "checkpoint.every=10"]  # fmt: skip
        try:
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, json.dumps(sets)],
                cwd=place.folder, env=place.env | {"PYTHONPATH": str(ROOT), "PREFECT_LOGGING_LEVEL": "WARNING"},
                capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        finally:
            place.stop_all()
        return {"folder": str(place.folder), "said": json.loads((place.folder / "said.json").read_text())}

    told = once(tmp_path_factory, "chained", make)
    return Place.again(Path(told["folder"])), [tuple(row) for row in told["said"]]


def test_three_runs_over_growing_data_learn_on_and_nothing_new_ends_at_once(
    chained: tuple[Place, list[tuple[str, str]]],
) -> None:
    place, said = chained
    assert [name for name, _ in said[:4]] == ["Completed"] * 4
    store = open_store(f"file://{place.folder}/store")
    names = list(reversed(list(scheduled_runs(store, "grows", ""))))
    assert len(names) == 4  # three, none for the firing without news, and the one whose schedule was restarted
    states = [RunLog(store, name).fold() for name in names]
    whats = [load_what(store, name) for name in names]
    assert [what["train"]["steps"] for what in whats] == [STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS]
    assert len({what["data"]["digest"] for what in whats}) == 4  # each on the data as they were then
    for before, name, state in zip(names[:-1], names[1:], states[1:], strict=True):
        parent = state.parent
        assert parent is not None, name
        assert (parent["run"], parent["step"]) == (before, int(load_what(store, before)["train"]["steps"]))
    losses = [last_loss(store, name) or 0.0 for name in names]
    assert losses[0] > losses[1] > losses[2]
    digest = whats[2]["data"]["digest"]
    assert said[3][1] == (
        f"nothing new: the data are those of run {names[2]} (dataset {digest[:12]}), which ended at step {3 * STEPS}; "
        "no run was started"
    )


def test_the_rate_goes_on_or_begins_again(chained: tuple[Place, list[tuple[str, str]]]) -> None:
    place, said = chained
    assert said[4][0] == "Completed"
    store = open_store(f"file://{place.folder}/store")
    names = list(reversed(list(scheduled_runs(store, "grows", ""))))
    starts = [load_what(store, name)["train"]["schedule"].get("start", 0) for name in names]
    assert starts == [0, 0, 0, 3 * STEPS]
    rates = [first_rate(place, name) for name in names]
    peak = 3e-3
    assert rates[0] == rates[3] == pytest.approx(peak / 5)  # warm-up
    assert peak > rates[1] > rates[2] > peak / 4  # a cosine over 60 steps at step 31, over 90 at 61


def first_rate(place: Place, run: str) -> float:
    lines = [
        line for path in sorted(place.run_folder(run).glob("live/*/metrics/*")) for line in path.read_text().split("\n")
    ]
    rows = [json.loads(line) for line in lines if '"lr"' in line]
    return float(min(rows, key=lambda row: row["step"])["lr"])


def test_a_sweep_of_four_two_at_once_has_a_table(prefect: Api, chained: tuple[Place, list[tuple[str, str]]]) -> None:
    place, said = chained
    name, words = said[5]
    assert (name, words.partition(";")[0]) == ("Completed", "4 of 4 runs succeeded")
    rows = json.loads(place.said("runs", "ls", "--json"))
    swept = {row["run"] for row in rows if row["run"].startswith("swept-")}
    assert len(swept) == 4
    (flow_run,) = [f for f in prefect.named("swept") if f["parameters"].get("points")]
    (table,) = [a for key, a in prefect.artifacts(flow_run["id"]).items() if key == "swept-sweep"]
    shown = json.loads(table["data"])
    assert [row["train.optimizer.lr"] for row in shown] == ["1e-3", "1e-3", "1e-2", "1e-2"]
    assert {row["run"] for row in shown} == swept
    assert sum("(least)" in row["loss"] for row in shown) == 1
    for run in swept:  # each has a page of its own
        assert prefect.named(run)[0]["state_type"] == "COMPLETED"


def test_an_older_run_that_has_not_ended_is_found_and_one_that_never_began_is_not(tmp_path: Path) -> None:
    place = Place(tmp_path / "p")
    store = open_store(f"file://{place.folder}/store")
    sets = [f"data.source='text:{place.folder}/corpus/*.txt'", "parallel.stages=1"]
    spec = load_spec(place.folder / "spec.toml", sets)
    first = prepare_run(spec, store, suffix="20260301t020000", schedule="nightly")
    assert unfinished(store, "chaos", "nightly") is None  # no record: its driver was killed before it began
    RunLog(store, first.run).transact(
        lambda s: ("intervention", {"kind": "parent", "run": "x", "step": 0, "checkpoint": 1})
    )
    assert unfinished(store, "chaos", "nightly") == first.run
    assert unfinished(store, "chaos", "weekly") is None  # another schedule's
    assert unfinished(store, "cha", "nightly") is None
    assert list(run_names(store)) == [first.run]


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (
            ["train.schedule.decay=20"],
            "the learning rate of train.schedule is 0 from step 20 on .*--lr-schedule restart",
        ),
        (["train.schedule.decay=20", "train.optimizer.min_lr=1e-5"], None),
        (["train.schedule.kind='constant'"], None),
        (["train.schedule.kind='wsd'", "train.schedule.decay=10"], None),
    ],
)
def test_a_curve_that_has_ended_is_not_extended(sets: list[str], words: str | None) -> None:
    spec = load_spec(
        ROOT / "examples" / "demo.toml",
        ["train.steps=30", "train.schedule.warmup=0", "train.optimizer.min_lr=0.0", *sets],
    )
    assert lengthened(spec, 60, 0, "restart").train.schedule.start == 60
    if words is None:
        assert lengthened(spec, 60, 0, "extend").train.steps == 90
        return
    with pytest.raises(SpecError, match=words):
        lengthened(spec, 60, 0, "extend")


def test_a_run_of_its_own_has_no_schedule_that_begins_later(tmp_path: Path) -> None:
    place = Place(tmp_path / "p")
    spec = load_spec(place.folder / "spec.toml", ["train.schedule.start=10"])
    with pytest.raises(SpecError, match=r"train.schedule.start 10: this run begins at step 0"):
        prepare_run(spec, open_store(f"file://{place.folder}/store"))
    with pytest.raises(SpecError, match=r"schedule.start 60 is not before the last step 60"):
        parse_spec(spec.model_dump(mode="json"), ["train.schedule.start=60"])
