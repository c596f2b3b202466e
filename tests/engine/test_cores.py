"""The CPU time that a control group allows, as the engine and the planner read it: both versions, nested, fractions."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.engine.native import build_program
from tests.engine.plans import small_plan
from tests.support.agents import tiny_spec
from trainer.cores import cpu_milli, free_bytes, usable_cpus
from trainer.errors import PlanError
from trainer.plan.memory import (
    WORKSPACE_BYTES_PER_THREAD,
    check_budget,
    more_threads_bytes,
    rank_threads,
    workspace_bytes,
)

V1 = "9:name=systemd:/\n4:cpu,cpuacct:/pods/a/b\n3:cpuset:/\n0::/pods/unified\n"
V2 = "0::/pods/a/b\n"


def both(tmp_path: Path, group: str, files: dict[str, str]) -> int:
    """What the engine says, which is what the planner says."""
    mount = tmp_path / "mount"
    mount.mkdir()
    for name, text in files.items():
        path = mount / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "self").write_text(group)
    command = [build_program("oom_drive"), tmp_path / "self", mount, "limits"]
    said = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    assert cpu_milli(tmp_path / "self", mount) == said
    return said


def quota(folder: str, quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": f"{quota_us}\n", f"{folder}/cpu.cfs_period_us": f"{period_us}\n"}


@pytest.mark.parametrize(
    ("group", "files", "milli"),
    [
        (V2, {"pods/a/b/cpu.max": "200000 100000\n"}, 2000),
        (V2, {"pods/a/b/cpu.max": "150000 100000\n"}, 1500),
        (V2, {"pods/a/b/cpu.max": "50000 50000\n"}, 1000),
        (V2, {"pods/a/b/cpu.max": "10 1000000\n"}, 1),
        (V2, {"pods/a/b/cpu.max": "max 100000\n"}, 0),
        (V2, {"pods/a/b/cpu.max": "max 100000\n", "pods/cpu.max": "300000 100000\n"}, 3000),  # a parent's holds
        (V2, {"pods/a/b/cpu.max": "400000 100000\n", "pods/a/cpu.max": "250000 100000\n"}, 2500),
        (V2, {"pods/a/b/x": "", "pods/cpu.max": "100000 100000\n"}, 1000),  # no controller in the group itself
        (V2, {"cpu.max": "200000 100000\n"}, 2000),  # a container: its group is the mount's root
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2000),
        ("0::/../../other\n", {"cpu.max": "200000 100000\n"}, 2000),
        (V2, {"pods/a/b/cpu.max": "nonsense\n"}, 0),
        (V2, {"pods/a/b/cpu.max": ""}, 0),
        (V2, {}, 0),
        ("", {"cpu.max": "200000 100000\n"}, 0),
        (V1, quota("cpu,cpuacct/pods/a/b", 400_000), 4000),
        (V1, quota("cpu/pods/a/b", 400_000), 4000),
        (V1, quota("cpu,cpuacct", 250_000), 2500),
        (V1, quota("cpu,cpuacct/pods/a/b", -1), 0),
        (V1, quota("cpu,cpuacct/pods/a/b", -1) | quota("cpu,cpuacct/pods", 20_000, 10_000), 2000),
        (V1, quota("cpu,cpuacct/pods/a/b", 100_000, 0), 0),
        (V1, {"pods/unified/cpu.max": "200000 100000\n"}, 0),  # the controller is version 1's there
    ],
)
def test_the_quota(tmp_path: Path, group: str, files: dict[str, str], milli: int) -> None:
    assert both(tmp_path, group, files) == milli


def test_the_own_quota_on_this_machine() -> None:
    command = [build_program("oom_drive"), "/proc/self/cgroup", "/sys/fs/cgroup", "limits"]
    said = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    assert cpu_milli() == said
    assert 1 <= usable_cpus() <= len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("asked", "ranks", "cpus", "milli", "limit", "needs", "threads"),
    [
        (0, 1, 64, 0, 0, 0, 64),
        (0, 2, 64, 0, 0, 0, 32),
        (0, 3, 2, 0, 0, 0, 1),
        (0, 1, 64, 4000, 0, 0, 4),
        (0, 2, 64, 4000, 0, 0, 2),
        (0, 1, 64, 2500, 0, 0, 2),
        (0, 1, 64, 500, 0, 0, 1),
        (0, 1, 2, 16000, 0, 0, 2),
        (7, 1, 2, 1000, 1, 1 << 30, 7),  # what the spec says is done
        (1024, 1, 2, 0, 0, 0, 256),
        (0, 1, 1000, 0, 0, 0, 256),
        (0, 1, 64, 0, 256 << 20, 128 << 20, 2 + (64 << 20) // 5_681_664),  # half of what the memory limit leaves
        (0, 1, 64, 0, 128 << 20, 128 << 20, 2),
        (0, 1, 64, 0, 1 << 20, 128 << 20, 2),
        (0, 2, 64, 0, 512 << 20, 128 << 20, 2 + (64 << 20) // 5_681_664),
        (0, 1, 8, 0, 4 << 30, 128 << 20, 8),
    ],
)
def test_the_threads_of_a_rank(
    asked: int, ranks: int, cpus: int, milli: int, limit: int, needs: int, threads: int
) -> None:
    """parallel.threads, local ranks, CPUs, quota, memory limit of the group, bytes that the plan counts of a rank."""
    words = [str(word) for word in (asked, ranks, cpus, milli, limit, needs)]
    done = subprocess.run([build_program("threads_drive"), *words], capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads


@pytest.mark.parametrize("asked", [0, 1, 2, 3, 24, 256, 300, 1024])
@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("cpus", [1, 2, 2.5, 3, 64, 1000])
def test_the_memory_table_counts_the_threads_that_the_engine_starts(asked: int, stages: int, cpus: float) -> None:
    spec = tiny_spec(parallel__threads=asked, parallel__stages=stages)
    words = [str(word) for word in (asked, stages, int(cpus), 0, 0, 0)]
    done = subprocess.run([build_program("threads_drive"), *words], capture_output=True, text=True, check=True)
    threads = rank_threads(spec, cpus)
    assert threads == int(done.stdout)
    assert workspace_bytes(asked) + more_threads_bytes(spec, cpus) == threads * WORKSPACE_BYTES_PER_THREAD


def test_a_budget_counts_the_threads_of_this_machine() -> None:
    """A plan that fits with the two threads that it counts, and not with one a CPU, is refused with the mend."""
    spec = tiny_spec(parallel__threads=0)
    plan = small_plan()
    more = more_threads_bytes(spec, 64)
    assert more == 62 * WORKSPACE_BYTES_PER_THREAD
    budget = plan.positions[0].total_bytes + more
    check_budget(plan.positions, 1, budget, more)
    with pytest.raises(
        PlanError, match=r"62 threads a rank more, for this machine's CPUs, take .*; see parallel\.threads"
    ):
        check_budget(plan.positions, 1, budget - 1, more)


@pytest.mark.parametrize(
    ("group", "files", "free"),
    [
        (V2, {}, 4 << 30),
        (V2, {"pods/a/b/memory.max": "max\n", "pods/a/b/memory.current": "7\n"}, 4 << 30),
        (V2, {"pods/a/b/memory.max": "1000\n", "pods/a/b/memory.current": "400\n"}, 600),
        (
            V2,
            {
                "pods/memory.max": "1000\n",
                "pods/memory.current": "900\n",
                "pods/memory.stat": "anon 600\ninactive_file 250\n",
            },
            350,
        ),
        (V2, {"memory.max": "1000\n", "memory.current": "1200\n"}, 0),
        (
            "4:memory:/pods/a\n",
            {
                "memory/pods/a/memory.limit_in_bytes": "5000\n",
                "memory/pods/a/memory.usage_in_bytes": "4000\n",
                "memory/pods/a/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
            },
            1100,
        ),
    ],
)
def test_memory_that_is_free(tmp_path: Path, group: str, files: dict[str, str], free: int) -> None:
    mount = tmp_path / "mount"
    for name, text in {"pods/a/b/x": "", **files}.items():
        path = mount / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "self").write_text(group)
    (tmp_path / "meminfo").write_text("MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n")
    assert free_bytes(tmp_path / "self", mount, tmp_path / "meminfo") == free
