"""What the executor gives a device that runs behind the host (``run/executor.c``, ``hazards.c``, ``spaces.c``): few
events and waits, each needed; snapshots that are copied while the next step runs. On the device of ``test_device.py``.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import engine_runs
from tests.engine.agent_end import agent_at
from tests.engine.engine_build import build_idle_device, build_preload, engine
from tests.engine.plans import GPT2, small_plan
from tests.engine.test_agent_link import slots
from tests.engine.test_device import (
    CHUNKS,
    COMPUTE,
    EVENTS,
    IN,
    ORDERS,
    OUT,
    SAVE,
    STREAMS,
    MakeRuns,
    emulated,
    library,
    runs,
)
from trainer import wire
from trainer.plan.compiled import Plan
from trainer.plan.devices import launches
from trainer.plan.memory import staging_bytes

__all__ = ["emulated", "engine", "library", "runs"]  # fixtures

LISTS, LINKS = 8, 56  # events of lists of actions: HS_EVENT_* of run/hazards.h
MOST_GRAPHS = 1024  # HS_LINKED_GRAPHS of run/linker.h


def steady(**more: Any) -> dict[str, Any]:
    return {"schedule": {"kind": "constant"}} | more


@pytest.mark.parametrize("stages", [1, 2])
def test_each_event_of_a_step_is_needed(runs: MakeRuns, stages: int) -> None:
    """The first of two steps, in which whatever comes too late or too early changes the second too."""
    some = runs(stages=stages, **steady(steps=2))
    sound = some.state("cuda")
    follows = np.reshape(some.counts("follows"), (STREAMS, EVENTS))[:, LISTS:LINKS]
    for stream, event in np.argwhere(follows).tolist():
        drop = f"{stream} {LISTS + event} 1"
        assert any(some.shows(sound, DROP=drop, ORDER=str(order)) for order in ORDERS), drop


def test_a_step_has_few_events_and_one_wait(runs: MakeRuns) -> None:
    """One stage: tokens, losses and norms, the control block. Dumps wait too, so their waits are in both numbers."""
    counts = []
    for steps in (2, 3):
        some = runs(**steady(steps=steps))
        some.state("cuda")
        follows = np.reshape(some.counts("follows"), (STREAMS, EVENTS))[:, LISTS:LINKS]
        counts.append((follows.sum(axis=1).tolist(), sum(some.counts("waits"))))
    (few, less), (more, waits) = counts
    per_step = [b - a for a, b in zip(few, more, strict=True)]
    assert (per_step[COMPUTE], per_step[IN], per_step[OUT], per_step[SAVE]) == (2, 0, 1, 0)
    dumps = 2 * len(small_plan().tensors)  # each of gradients and weights, by one window at a time
    assert waits - less == 1 + dumps


def test_a_message_waits_for_what_has_its_buffer_alone(runs: MakeRuns) -> None:
    """Of all that is received in a step: what comes into a buffer whose reader the host has not waited for."""
    some = runs(model=GPT2 | {"layers": 4}, parallel=CHUNKS, batch=8, **steady(steps=1))
    some.state("cuda")
    gradients = {n for n, c in enumerate(some.plan.channels) if c.kind in (wire.CH_FORWARD, wire.CH_BACKWARD)}
    received = max(sum(a.kind == wire.A_RECV and a.channel in gradients for a in p.step) for p in some.plan.positions)
    follows = np.reshape(some.counts("follows"), (STREAMS, EVENTS))[IN, LISTS:LINKS]
    assert 0 < follows.sum() < received // 2


def saved(engine: Path, device: str, folder: Path, plan: Plan, count: int, **emulated: str) -> dict[int, bytes]:
    """Steps to the data of the slots, as a rank with an agent left them; `count` of them were saved."""
    folder.mkdir()
    (folder / "plan").write_bytes(plan.to_bytes())
    attempt = engine_runs.attempt_bytes(plan, [0], folder.parent / "data", folder, device=device)
    (folder / "attempt").write_bytes(attempt)
    command = [str(engine), "rank", "--plan", f"{folder}/plan", "--attempt", f"{folder}/attempt", "--rank", "0"]
    command += ["--agent", f"{folder}/agent"]
    env = os.environ | {f"HS_EMULATED_{name}": value for name, value in emulated.items()}
    with (
        slots(count) as fds,
        agent_at(folder / "agent") as agent,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as rank,
    ):
        try:
            agent.hears("HELLO", 0)
            agent.tell("SLOTS", 0, a=len(fds), b=-1, fds=fds, epoch=1)
            agent.until(lambda: len(agent.of("READY")) == count, "every snapshot")
            agent.tell("COMMITTED", 0, a=agent.of("READY")[-1].b)
            said = rank.communicate(timeout=60)[1]
            assert rank.returncode == 0, said
        finally:
            rank.kill()
        found = {}
        for ready in agent.of("READY"):
            header = wire.SlotHeader.from_buffer_copy(os.pread(fds[ready.a], ctypes.sizeof(wire.SlotHeader), 0))
            assert (header.state, header.step, header.final) == (wire.SLOT_READY, ready.b, ready.c)
            found[ready.b] = os.pread(fds[ready.a], header.data_bytes, header.data_offset)
        return found


def test_a_snapshot_is_of_its_step_although_the_next_runs_on(engine: Path, tmp_path: Path) -> None:
    """The host begins to wait for the copies when the next step's optimizer has run: the fence alone keeps
    it from what is being copied, in any order; without it, it does not.
    """
    plan = small_plan(tmp_path, every=2, **steady(steps=4))
    sound = saved(engine, "cpu", tmp_path / "cpu", plan, 2)
    assert sorted(sound) == [2, 4]
    slow = {"SLOW": f"{SAVE} 1 2"}
    for order in (*ORDERS, 31):
        assert saved(engine, "cuda", tmp_path / f"{order}", plan, 2, ORDER=str(order), **slow) == sound, order
    unfenced = saved(engine, "cuda", tmp_path / "unfenced", plan, 2, ORDER="0", DROP=f"{COMPUTE} {SAVE} 1", **slow)
    assert unfenced[4] == sound[4]
    assert unfenced[2] != sound[2]


@pytest.mark.parametrize(
    "parallel",
    [{"stages": 1}, {"stages": 2}, CHUNKS, {"stages": 2, "optimizer": "optimistic"}, {"stages": 2, "replicas": 2}],
    ids=["1", "2", "2x2", "optimistic", "replicas"],
)
def test_pinned_memory_is_what_the_plan_says(runs: MakeRuns, parallel: dict[str, Any]) -> None:
    groups = parallel.get("replicas", 1)
    some = runs(
        model=GPT2 | {"layers": 4}, parallel=parallel, batch=8, **(steady(steps=1) | {"reduction_groups": groups})
    )
    some.state("cuda")
    plan, folder = some.plan, some.folder / f"run-{len(some.plan.ranks)}-{some.count}"
    for rank in plan.ranks.all:
        position = plan.positions[plan.ranks.position(rank)]
        lines = (json.loads(line) for line in (folder / f"stderr-{rank}").read_text().splitlines())
        (told,) = (line["staging_bytes"] for line in lines if line.get("event") == "started")
        assert told == staging_bytes(plan.config, position, plan.channels, len(plan.tensors))


def test_programs_become_graphs_in_the_second_step(runs: MakeRuns) -> None:
    """One by program, slot and microbatch, of calls that were launched once before (a module that is loaded inside of a
    capture may spoil it); from then on a step launches what has one call alone.
    """
    told = []
    for steps in (1, 2, 3, 4):
        some = runs(batch=8, **steady(steps=steps))
        some.state("cuda")
        told.append([some.count_of(name) for name in ("captures", "replays", "launches")])
    (position,) = some.plan.positions
    programs = [position.programs[str(a.program)].calls for a in position.step if a.kind == wire.A_RUN]
    graphs = sum(len(calls) > 1 for calls in programs)  # each action of this step has addresses of its own
    assert [captures for captures, _, _ in told] == [0, graphs, graphs, graphs]
    assert [replays for _, replays, _ in told] == [0, graphs, 2 * graphs, 3 * graphs]
    plain, captured, third, fourth = (launches for _, _, launches in told)
    assert captured - plain == sum(map(launches, programs))
    assert fourth - third == third - captured == len(programs) - graphs


def test_norms_and_updates_of_all_tensors_are_a_launch_each(runs: MakeRuns) -> None:
    """Also those that stand in a backward, behind the call that makes the gradient (a step's only microbatch)."""
    told = []
    for steps in (1, 2):
        some = runs(batch=2, microbatch=2, **steady(steps=steps))
        state = some.state("cuda")
        told.append(some.count_of("launches"))
    assert state == some.state("cpu")
    (position,) = some.plan.positions
    step = [call for a in position.step if a.kind == wire.A_RUN for call in position.programs[str(a.program)].calls]
    made = Counter(call.kernel for call in step)
    assert made["sumsq"] == made["adamw"] == len(some.plan.tensors)
    assert told[1] - told[0] == len(step) - made["sumsq"] - made["adamw"] + 2


def idle(monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
    monkeypatch.setenv("HOTSTAGE_CUDA", str(build_idle_device()))
    for name, value in more.items():
        monkeypatch.setenv(name, value)


def idle_calls(engine: Path, folder: Path, plan: Plan) -> dict[str, int]:
    """Of the device of each rank together."""
    engine_runs.train(plan, folder.parent / "data", folder, engine=engine, device="cuda", dump=False)
    last = [(folder / f"stderr-{r}").read_text().splitlines()[-1] for r in range(len(plan.positions))]
    return dict(sum((Counter(json.loads(line)["idle"]) for line in last), Counter()))


@pytest.mark.parametrize("stages", [1, 2])
def test_nothing_allocates_after_the_start(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: int
) -> None:
    """The engine itself, on a device apart; the device's graphs are its own, made in the second step."""
    idle(monkeypatch, LD_PRELOAD=str(build_preload()), HS_ALLOC_FORBID="1")
    plan = small_plan(tmp_path, stages=stages, steps=5)
    assert idle_calls(engine, tmp_path / "run", plan)["captured"] > 0
    if stages == 1:
        saving = small_plan(tmp_path, every=2, **steady(steps=4))
        assert sorted(saved(engine, "cuda", tmp_path / "saving", saving, 2)) == [2, 4]


def test_what_a_step_asks_of_a_device(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls of a step but the kernels' own: a handful, and one a program."""
    idle(monkeypatch)
    calls = []
    for steps in (3, 4):
        plan = small_plan(tmp_path, batch=8, steps=steps)
        calls.append(Counter(idle_calls(engine, tmp_path / f"{steps}", plan)))
    step = calls[1] - calls[0]
    programs = sum(a.kind == wire.A_RUN for a in plan.positions[0].step)
    rows = plan.config.microbatches  # tokens, targets and losses of each; norms, control
    assert step["replay"] + step["launch"] == programs
    assert (step["copy"], step["follow"], step["record"], step["wait"]) == (3 * rows + 2, 3, 4, 1)


def test_more_messages_than_events(runs: MakeRuns) -> None:
    """A step that records more than a stream has events for takes turns with them, and still every order is right."""
    some = runs(parallel={"stages": 2, "schedule": "gpipe"}, batch=64, **steady(steps=2))
    sound = some.state("cpu")
    for order in (13, 31):
        assert some.state("cuda", ORDER=str(order)) == sound, order
    follows = np.reshape(some.counts("follows"), (STREAMS, EVENTS))[:, LISTS:LINKS]
    assert follows[COMPUTE].max() > 2  # of two steps: an event that is followed more often has two owners


def test_what_is_beyond_the_most_graphs_is_launched(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle(monkeypatch)
    calls = []
    for steps in (3, 4):
        plan = small_plan(tmp_path, batch=1200, steps=steps)
        calls.append(Counter(idle_calls(engine, tmp_path / f"{steps}", plan)))
    assert calls[0]["captured"] == calls[1]["captured"] == MOST_GRAPHS
    step = calls[1] - calls[0]
    (position,) = plan.positions
    sizes = [len(position.programs[str(a.program)].calls) for a in position.step if a.kind == wire.A_RUN]
    assert len(sizes) > step["replay"] >= MOST_GRAPHS
    assert step["launch"] > len(sizes) - step["replay"]
