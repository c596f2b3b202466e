"""Agent and engine together, both real: whatever is killed on the way, the bits are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.log import CheckpointInfo
from tests.support.agents import Run, make_run, put_dataset, tiny_spec, wait_for
from tests.support.chaos import caught, rank_pid, rank_step, step_of
from tests.support.processes import stop
from tests.support.s3_server import S3Server
from trainer import wire
from trainer.launch import Launch
from trainer.local_launch import LocalLauncher
from trainer.spec import RunSpec

STEPS = 400


@contextmanager
def launched(run: Run, spec: RunSpec, root: Path) -> Iterator[tuple[LocalLauncher, Launch]]:
    """A launch that runs and is stopped at the end."""
    launch = Launch(run.name, run.launch, spec.launch.nodes, run.store.url, root)
    launcher = LocalLauncher(root)
    try:
        launcher.ensure(launch)
        yield launcher, launch
    finally:
        launcher.stop(launch.launch_id, 0)


def last(run: Run, step: int = STEPS) -> CheckpointInfo:
    return wait_for(
        lambda: next((c for c in run.fold().checkpoints if c.step == step), None), "the last checkpoint", 60
    )


def idle(run: Run, epoch: int, nodes: int = 1) -> list[dict[str, Any]]:
    """Every node's status once the attempt is over there."""

    def look() -> list[dict[str, Any]] | None:
        found = [s for node in range(nodes) if (s := run.status(node)) and (s["epoch"], s["phase"]) == (epoch, "idle")]
        return found if len(found) == nodes else None

    return wait_for(look, f"attempt {epoch} to be over", 60)


@contextmanager
def reached(run: Run, root: Path, step: int, *, saved: bool = False) -> Iterator[dict[str, Any]]:
    """The status of node 0 once its rank 0 is at this step (and a checkpoint is ``saved``). The rank stands still
    inside the block: a fast machine's run would be over before the test has read that, and acted.
    """

    def there() -> bool:
        return (rank_step(root, 0) or 0) >= step and bool(not saved or run.fold().checkpoints)

    def running() -> dict[str, Any] | None:
        found = run.status()
        pids = [ranked["pid"] for ranked in found["ranks"].values()] if found and found["phase"] == "running" else []
        return found if rank_pid(root, 0) in pids and all(pids) else None

    with caught(root, there, f"step {step}", step=step):
        yield wait_for(running, "the ranks", 60)


def spec_of(**changes: Any) -> RunSpec:
    return tiny_spec(**{"train__steps": STEPS, "checkpoint__every": 25, "parallel__threads": 1, **changes})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state digest of one stage that nobody disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    spec = spec_of()
    run, plan = make_run(root, spec)
    with launched(run, spec, root / "out"):
        run.attempt(spec, plan)
        return last(run).state_digest


def newest_in_slots(statuses: list[dict[str, Any]]) -> dict[str, int]:
    """The newest (step, epoch) that every node holds."""
    common = set.intersection(*({(s["step"], s["epoch"]) for s in status["slots"]} for status in statuses))
    step, epoch = max(common)
    return {"step": step, "epoch": epoch}


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_killed_rank_and_the_next_attempt_from_the_slots(tmp_path: Path, undisturbed: str, nodes: int) -> None:
    spec = spec_of(parallel__stages=2, launch__nodes=nodes)
    run, plan = make_run(tmp_path, spec)
    with launched(run, spec, tmp_path / "out"):
        first = run.attempt(spec, plan)
        with reached(run, tmp_path, 60) as status:
            os.kill(status["ranks"]["0"]["pid"], signal.SIGKILL)
        statuses = idle(run, first, nodes)
        assert statuses[0]["ranks"]["0"]["signal"] == signal.SIGKILL
        slots = newest_in_slots(statuses)
        assert slots["step"] >= 50
        assert slots["epoch"] == first
        checkpoint = run.fold().at_step()
        second = run.attempt(
            spec, plan, checkpoint=checkpoint.n if checkpoint else None, step=slots["step"], slots=slots
        )
        assert last(run).state_digest == undisturbed
        assert last(run).epoch == second
        assert {r["code"] for s in idle(run, second, nodes) for r in s["ranks"].values()} == {0}


def test_memory_and_store_have_cadences_of_their_own(tmp_path: Path, undisturbed: str) -> None:
    """Every 5 steps a snapshot, each tenth of them stored; what an attempt starts from in memory is stored too."""
    spec = spec_of(parallel__stages=2, checkpoint__snapshot_every=5, checkpoint__persist_every=50)
    run, plan = make_run(tmp_path, spec)
    with launched(run, spec, tmp_path / "out"):
        first = run.attempt(spec, plan)
        with reached(run, tmp_path, 60) as status:
            os.kill(status["ranks"]["1"]["pid"], signal.SIGKILL)
        slots = newest_in_slots(idle(run, first))
        assert slots["step"] % 5 == 0
        checkpoint = run.fold().at_step()
        run.attempt(spec, plan, checkpoint=checkpoint.n if checkpoint else None, step=slots["step"], slots=slots)
        assert last(run).state_digest == undisturbed
        stored = {c.step for c in run.fold().checkpoints}
    assert {step for step in stored if step % 50} <= {slots["step"]}


def test_with_the_agent_stopped_and_every_slot_held_training_goes_on(tmp_path: Path, undisturbed: str) -> None:
    """No save waits, once for each of some 300 steps: all are skipped, and counted."""
    spec = spec_of(parallel__stages=2, checkpoint__every=1, checkpoint__slots=2)
    run, plan = make_run(tmp_path, spec)
    with launched(run, spec, tmp_path / "out"):
        epoch = run.attempt(spec, plan)
        with reached(run, tmp_path, 1) as status:
            agent, rank = status["pid"], status["ranks"]["0"]["pid"]
            stop(rank)
            stop(agent)
            hold_slots(agent, True)
            began = (step_of(rank) or 0) + 2
        try:
            wait_for(lambda: (step_of(rank) or 0) >= STEPS - 10, "nearly the last step", 60)
            hold_slots(agent, False)
        finally:
            os.kill(agent, signal.SIGCONT)
        assert last(run).state_digest == undisturbed
        assert last(run).epoch == epoch
        steps = wait_for(lambda: (found := steps_told(run, epoch)) and found[-1]["step"] == STEPS and found, "metrics")
        skipped = {line["step"]: line["skipped"] for line in steps}
        assert skipped[STEPS - 12] - skipped[began] == STEPS - 12 - began > 0
        words = b"".join(
            run.store.get(found.key)[8:] for found in run.store.list(keys.output_prefix(run.name, epoch, 0))
        )
        assert b"snapshot skipped: a rank has no free slot" in words
        assert {line["snapshot"] for line in steps if began < line["step"] <= STEPS - 12} == {0}


def steps_told(run: Run, epoch: int) -> list[dict[str, Any]]:
    """The metrics of an attempt's steps, as far as its agent has written them."""
    lines = b"".join(run.store.get(found.key) for found in run.store.list(keys.metrics_prefix(run.name, epoch)))
    told = (json.loads(line) for line in lines.splitlines())
    return [line for line in told if line["event"] == "step"]


def slots_of(agent: int) -> dict[int, Path]:
    """Descriptors of the slots of two ranks, once all are there; by inode."""
    fds = list(Path(f"/proc/{agent}/fd").iterdir())
    found = {entry.stat().st_ino: entry for entry in fds if "memfd:hotstage-slot" in os.readlink(entry)}
    return found if len(found) == 4 else {}


def hold_slots(agent: int, held: bool) -> None:
    """As an agent would that reads every slot of its ranks; it is stopped meanwhile."""
    slots = slots_of(agent)
    assert slots
    for entry in slots.values():
        with entry.open("r+b", buffering=0) as slot:
            os.pwrite(slot.fileno(), bytes([held]), wire.SlotHeader.hold.offset)


@pytest.mark.parametrize("stages", [1, 3])
def test_resume_from_the_store_on_another_number_of_stages(tmp_path: Path, undisturbed: str, stages: int) -> None:
    spec = spec_of(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    with launched(run, spec, tmp_path / "out"):
        first = run.attempt(spec, plan)
        with reached(run, tmp_path, 60, saved=True) as status:
            os.kill(status["ranks"]["1"]["pid"], signal.SIGKILL)
        idle(run, first)
        other = spec_of(parallel__stages=stages)
        info = run.fold().restore_candidates()[0]
        run.attempt(other, run.add_plan(other, put_dataset(run.store)), checkpoint=info.n, step=info.step)
        assert last(run).state_digest == undisturbed


def _kill_agent(status: dict[str, Any]) -> None:
    os.kill(status["pid"], signal.SIGKILL)


def test_a_killed_agent_costs_nothing(tmp_path: Path, undisturbed: str) -> None:
    """The engine goes on; the agent that is started anew gets the slots back and goes on committing."""
    spec = spec_of(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    with launched(run, spec, tmp_path / "out") as (launcher, launch):
        epoch = run.attempt(spec, plan)
        with reached(run, tmp_path, 60) as before:
            _kill_agent(before)
        wait_for(lambda: launcher.observe(launch.launch_id).state == "partial", "the agent's death to be seen")
        launcher.ensure(launch)
        found = last(run)
        assert found.state_digest == undisturbed
        assert found.epoch == epoch
        (after,) = idle(run, epoch)
        assert after["incarnation"] != before["incarnation"]
        assert after["supervisor"] == before["supervisor"]
        assert {r["code"] for r in after["ranks"].values()} == {0}


def test_a_killed_supervisor_ends_the_attempt_and_the_next_one_starts_in_place(
    tmp_path: Path, undisturbed: str
) -> None:
    spec = spec_of(parallel__stages=2)
    run, plan = make_run(tmp_path, spec)
    with launched(run, spec, tmp_path / "out") as (launcher, launch):
        first = run.attempt(spec, plan)
        with reached(run, tmp_path, 60) as status:
            os.kill(status["supervisor"], signal.SIGKILL)
        (status,) = idle(run, first)
        assert {r["code"] for r in status["ranks"].values()} == {75}
        slots = newest_in_slots([status])
        launcher.ensure(launch)
        checkpoint = run.fold().at_step()
        run.attempt(spec, plan, checkpoint=checkpoint.n if checkpoint else None, step=slots["step"], slots=slots)
        assert last(run).state_digest == undisturbed


def test_on_s3(tmp_path: Path, undisturbed: str, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, plan, chunks, log and hints on a real S3 server, under an identity that cannot delete."""
    for name, value in server.environment("trainer").items():
        monkeypatch.setenv(name, value)
    spec = spec_of(parallel__stages=2, checkpoint__every=100)
    run, plan = make_run(tmp_path, spec, server.url("agent-engine"))
    with launched(run, spec, tmp_path / "out"):
        first = run.attempt(spec, plan)
        with reached(run, tmp_path, 100, saved=True) as status:
            os.kill(status["ranks"]["1"]["pid"], signal.SIGKILL)
        idle(run, first)
        info = run.fold().restore_candidates()[0]
        run.attempt(spec, plan, checkpoint=info.n, step=info.step)
        assert last(run).state_digest == undisturbed
