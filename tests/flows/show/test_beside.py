"""A measured step beside the foretold one: ``hotstage plan --run``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from checkpoint.keys import trace_key
from checkpoint.log import RunLog
from checkpoint.store import open_store
from flows.cli.plan import plan as plan_command
from flows.drive.run import load_run
from flows.show.facts import beside
from tests.flows.conftest import Trained
from trainer.errors import PlanError
from trainer.plan.simulate import CostModel, from_plan, simulate
from trainer.plan.timeline import to_chrome

SLOW = CostModel(flops_per_s=1e8, memory_bytes_per_s=1e9, call_s=4e-6)


def test_a_run_s_step_lies_beside_the_foretold_one(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.place.folder / "store", tmp_path / "store")
    store = open_store(f"file://{tmp_path}/store")
    prepared = load_run(store, trained.run)
    with pytest.raises(PlanError, match=r"left no trace of a step; set launch\.trace = true"):
        beside(prepared.plan, prepared.spec, trained.run, str(tmp_path / "store"), [])
    compiled = prepared.plan
    traced = simulate(from_plan(compiled, SLOW), SLOW).timeline  # as a slow machine's rank would have written it
    (epoch,) = [a.epoch for a in RunLog(store, trained.run).fold().attempts]
    store.put(trace_key(trained.run, epoch, 0), to_chrome(traced).encode())

    command = [str(trained.place.folder / "spec.toml"), "--store", str(tmp_path / "store"), "--run", trained.run]
    command += ["--set", "parallel.stages=1", "--trace", str(tmp_path / "t.json"), "--svg", str(tmp_path / "t.svg")]
    done = CliRunner().invoke(plan_command, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    titles = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert titles == ["planned", "measured, step 0", "simulated with the measured programs' rates"]
    rows = [[e for e in events if e["ph"] == "X" and e["pid"] == pid] for pid in range(3)]
    assert [e["name"] for e in rows[0]] == [e["name"] for e in rows[1]] == [e["name"] for e in rows[2]]
    ends = [max(e["ts"] + e["dur"] for e in row) for row in rows]
    assert ends[2] == pytest.approx(ends[1], rel=0.02)  # the rates are those that made the measured times
    assert (tmp_path / "t.svg").read_text().count("font-weight") == 3

    def refusal(*options: str) -> str:
        begin = [word for word in command if not word.startswith(str(tmp_path / "t."))]
        begin = [word for word in begin if word not in ("--trace", "--svg")]
        done = CliRunner().invoke(plan_command, [*begin, *options])
        return str(done.exception) if done.exit_code == 1 else done.output

    svg = ("--svg", str(tmp_path / "t.svg"))
    assert "--run is drawn in --svg and --trace" in refusal()
    assert "its newest is of 1 stage x 1 replica on 1 node" in refusal("--set", "parallel.stages=2", *svg)
    assert "trains something else: model.width is " in refusal("--set", "model.width=16", *svg)
    assert "there is no run 'none-123456'" in refusal("--run", "none-123456", *svg)
