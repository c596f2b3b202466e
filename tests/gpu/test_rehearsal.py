"""A whole session on the emulated library, as `make gpu-session` runs it on a GPU, with small sizes: every stage that a
device can do is done and passes, what needs a real one or what is not installed here says so; calls go on where the
last one ended, and the results read well. Nothing is timed: what comes out as a figure is none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.engine import cuda_lib
from tests.engine.engine_build import engine
from tests.gpu import under_pytest
from tests.gpu.box import module_version
from tests.gpu.build import Builder, build_way_to_device
from tests.gpu.session import MORE
from tests.gpu.stages import stages

__all__ = ["engine"]

REAL = ["timeline-gpt2-124m", "memcheck", "racecheck", "initcheck", "synccheck"]  # these alone need a real device
PEERS = ["torch-gpt2-124m", "torch-llama-1b", "torch-gpt2-1.5b", "jax-gpt2-124m", "jax-llama-1b", "jax-gpt2-1.5b"]

# by day a stage of each kind, once: the second kernel path and the other models of a kind are nightly's
BY_DAY = ["probe", "facts", "train-gpt2-124m", "train-llama-1b", "kernels-exact", "models-cuda", "roofline-gpt2-124m",
          "channels", "large-cuda", "snapshot", "fp8", "timeline", "memcheck", "torch-gpt2-124m"]  # fmt: skip


def call(folder: Path, engine: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HOTSTAGE_CUDA": str(cuda_lib.build()),
        "HOTSTAGE_ENGINE": str(engine),
        "HOTSTAGE_GPU_TINY": "1",
        "HOTSTAGE_GPU_BUILD": str(folder / "build"),
        "OUT": str(folder / "back"),
    }
    command = [sys.executable, "-m", "tests.gpu", "session", "--folder", str(folder / "gpu"), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["by day", "whole"])
def test_a_session(engine: Path, tmp_path: Path, whole: bool) -> None:
    (tmp_path / "back").mkdir()
    only = [] if whole else ["--only", ",".join(BY_DAY)]
    first = call(tmp_path, engine, "--budget", "8", *only)
    assert first.returncode == MORE, first.stdout + first.stderr
    assert "there is more to do" in first.stdout
    done = call(tmp_path, engine, *only)
    log = (tmp_path / "gpu" / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log[-4000:]}"

    state = json.loads((tmp_path / "gpu" / "session.json").read_text())
    assert state["key"]["device"] == "emulated"
    of_stages = state["stages"]
    listed = [stage.name for stage in stages() if whole or stage.name.startswith(("build", *BY_DAY))]
    assert sorted(of_stages) == sorted(listed)
    skipped = {name: told["why"] for name, told in of_stages.items() if told["outcome"] == "skipped"}
    missing = [name for name in PEERS if module_version(name.partition("-")[0]) is None]
    assert sorted(skipped) == sorted(name for name in REAL + missing if name in listed)
    assert {skipped[name] for name in REAL if name in listed} == {"the device is emulated"}
    assert all(told["outcome"] == "passed" for name, told in of_stages.items() if name not in skipped)

    tests = json.loads((tmp_path / "gpu" / "test.json").read_text())
    assert {test["outcome"] for test in tests} == {"passed", "skipped"}
    for stage in ("kernels-exact", "kernels-cuda") if whole else ("kernels-exact",):
        assert len([test for test in tests if test["stage"] == stage]) > 50
    rows = json.loads((tmp_path / "gpu" / "bench.json").read_text())
    assert {"name", "value", "unit", "peer", "peer_value", "ratio", "limit", "met"} <= set.intersection(*map(set, rows))
    names = {row["name"] for row in rows}
    assert {"train/gpt2-124m/bf16/t16", "train/llama-1b/fp8/t16", "start/llama-1b", "kernel/attention_igrad"} <= names
    assert ("start/gpt2-1.5b" in names) == whole
    assert {name for name in names if name.startswith("snapshot/")}
    assert all(row["emulated"] for row in rows)
    roofs = json.loads((tmp_path / "gpu" / "rooflines.json").read_text())
    assert sorted(roofs) == (["gpt2-124m", "llama-1b"] if whole else ["gpt2-124m"])
    summary = (tmp_path / "gpu" / "summary.txt").read_text()
    assert "probe: rounding: fma.rn.ftz finds denormal numbers after rounding, as x86" in summary
    assert "NOT AS HOPED" not in summary
    assert f"{len(of_stages) - len(skipped)} passed, {len(skipped)} skipped" in summary
    assert "$ HOTSTAGE_GPU_PATH=cuda " in log
    back = {p.name for p in (tmp_path / "back").iterdir()}
    assert back == {"session.json", "log.txt", "summary.txt", "test.json", "bench.json", "rooflines.json"}
    assert len(back) <= 8, "a lent machine gives no more files back"


def test_a_lost_device_costs_the_test_that_lost_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a bad access CUDA gives a process no device any more: the rest is done in another one."""
    monkeypatch.setenv("HOTSTAGE_CUDA", str(cuda_lib.build()))
    monkeypatch.setenv("HOTSTAGE_GPU_WAY", str(build_way_to_device(Builder(tmp_path))))
    monkeypatch.setenv("HS_EMULATED_FAIL", "120 700")  # the 120th kernel of each process
    monkeypatch.setattr(under_pytest, "PROCESSES", 50)  # enough that all is done, however many kernels there come to be
    ended, codes = under_pytest._ended, list[int | None]()

    def counted(*arguments: Any) -> int | None:
        codes.append(ended(*arguments))
        return codes[-1]

    monkeypatch.setattr(under_pytest, "_ended", counted)
    told = under_pytest.under_pytest("device_kernels.py", "cuda-exact", {"HOTSTAGE_GPU_CASES": "one"})
    assert told["failed"]
    failed = [test for test in told["tests"] if test["outcome"] == "failed"]
    assert len(codes) > 1, "the rest was not done in another process"
    assert len(failed) == sum(code != 0 for code in codes), "a process lost more than the test that lost its device"
    assert all("illegal memory access" in test["why"] for test in failed)
    counted = Counter(test["outcome"] for test in told["tests"])
    assert counted == {"failed": len(failed), "passed": len({test["name"] for test in told["tests"]}) - len(failed)}
    assert counted["passed"] > 50
