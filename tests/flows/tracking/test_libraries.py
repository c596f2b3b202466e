"""W&B offline and MLflow on files, each by its own library, through a fork that is gone on with and sent back."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.drive.events import Event
from flows.tracking.mlflow_run import MlflowWriter
from flows.tracking.tracker import Tracker
from flows.tracking.wandb_run import WandbWriter
from flows.tracking.writers import Writer, check_trackers, missing
from tests.flows.tracking.world import RUN, World, tells
from tests.support.wait import wait_for
from trainer.errors import SpecError
from trainer.spec_watch import TrackSpec

CONFIG = {"model.layers": 2, "train.precision": "fp32"}


def live(world: World, writer: Writer, events: list[Event], outcome: str = "") -> None:
    """One driver's life."""
    tells(Tracker(world.store, RUN, writer, CONFIG), events, outcome)


def story(writer: Any) -> World:
    """Two drivers, a gap between them, evaluations, an order back; the last of them ends the run."""
    world = World().fork_of("old-0a1b2c", 100)
    first = [world.attempt(100), *world.steps(101, 104)]
    world.save(104)
    live(world, writer(), [*first, world.evaluated(104, loss=2.5, sample="a b")])
    world.steps(105, 106)
    live(world, writer(), world.steps(107, 108))
    again = [world.back_to(104), *world.steps(105, 106)]
    live(world, writer(), again, "succeeded")
    return world


def records(path: Path) -> Iterator[Any]:
    """Of a W&B file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header: the block's rest is padding
            at += 32768 - at % 32768
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def read_wandb(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each id: rows of its history in order, and its config."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        one: dict[str, Any] | None = None
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                one = found.setdefault(record.run.run_id, {"rows": [], "config": {}, "group": record.run.run_group})
                one["config"] |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            elif kind == "history":
                assert one is not None
                row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                one["rows"].append(row)
            elif kind == "exit":
                assert one is not None
                one["ended"] = one.get("ended", 0) + 1
    return found


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    world = story(lambda: WandbWriter("people/project"))
    wait_for(lambda: sum(one.get("ended", 0) for one in read_wandb(tmp_path).values()) == 3, "W&B's process to write")
    found = read_wandb(tmp_path)
    assert set(found) == {RUN, f"{RUN}-{world.branch}"}
    first, second = found[RUN], found[f"{RUN}-{world.branch}"]
    steps = [row["step"] for row in first["rows"] if "train/loss" in row]
    assert steps == [101, 102, 103, 104, 105, 106, 107, 108]
    (evaluated,) = [row for row in first["rows"] if "validation/loss" in row]
    assert (evaluated["validation/loss"], evaluated["step"]) == (2.5, 104)
    assert [row["sample"] for row in first["rows"] if "sample" in row] == ["a b"]
    assert (first["config"]["hotstage/parent"], first["config"]["hotstage/parent_step"]) == ("old-0a1b2c", 100)
    assert first["config"]["model.layers"] == 2
    assert [row["step"] for row in second["rows"] if "train/loss" in row] == [105, 106]
    assert (second["config"]["hotstage/parent"], second["config"]["hotstage/parent_step"]) == (RUN, 104)
    assert first["group"] == second["group"] == RUN
    whole = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"0123456789" * 4 not in whole  # its key is in none of its files


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    world = story(lambda: MlflowWriter("nights"))
    client = MlflowClient()
    experiment = client.get_experiment_by_name("nights")
    assert experiment is not None
    runs = {r.data.tags["hotstage.branch"]: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"0", str(world.branch)}
    first, second = runs["0"], runs[str(world.branch)]

    def points(run: Any, name: str) -> list[tuple[int, float]]:
        return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))

    assert [step for step, _ in points(first, "train/loss")] == list(range(101, 109))
    assert points(first, "validation/loss") == [(104, 2.5)]
    assert [step for step, _ in points(second, "train/loss")] == [105, 106]
    assert (first.data.tags["hotstage.parent"], first.data.tags["hotstage.parent_step"]) == ("old-0a1b2c", "100")
    assert second.data.tags["mlflow.parentRunId"] == first.info.run_id
    assert (second.data.tags["hotstage.parent"], second.data.tags["hotstage.parent_step"]) == (RUN, "104")
    assert (first.data.params["model.layers"], second.info.status) == ("2", "FINISHED")
    texts = [p.read_text() for p in tmp_path.rglob("step-*.txt")]
    assert texts == ["a b"]


def test_a_library_that_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    assert missing(TrackSpec(tensorboard="tb", mlflow="e")) == ""
    with pytest.raises(SpecError, match=r"track\.wandb needs wandb: pip install 'hotstage\[track\]'"):
        check_trackers(TrackSpec(wandb="p"))


def test_no_library_is_imported_before_a_spec_names_it() -> None:
    program = (
        "import sys, flows.drive.train, flows.tracking.tracker; "
        "sys.exit(', '.join(sorted({'tensorboard', 'wandb', 'mlflow'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
