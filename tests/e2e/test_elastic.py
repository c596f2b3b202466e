"""Fewer machines than a run was asked for: it goes on in a smaller layout of its spec's list, then as asked for."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from checkpoint.log import RunLog
from checkpoint.store import open_store
from flows.drive.begin import prepare_run
from flows.drive.events import Event, Sinks
from flows.drive.loop import Driver
from flows.drive.run import Prepared
from flows.drive.train import launch_for
from flows.show.facts import details
from flows.show.lines import Lines
from tests.support.chaos import standing_still
from tests.support.place import LONG, LONG_STEPS, TEXT
from trainer.failures import Failure
from trainer.launch import Finding, Launch, LaunchedNode, LaunchView
from trainer.local_launch import LocalLauncher
from trainer.spec import load_spec

pytestmark = pytest.mark.long_run
ASKED = ("parallel.stages=2", "parallel.replicas=2", "launch.nodes=2")
LOSS = Finding(Failure.INFRA, "a machine is gone")
SMALLER = ("recovery.layouts=[{ replicas = 1 }]", "recovery.capacity_s=0.3")


class Machines(LocalLauncher):
    """A launcher of so many machines, ``room``, each of which takes one node: the others wait, as pods would."""

    room = 2
    waits = gone = ""

    def ensure(self, launch: Launch) -> None:
        if launch.launch_id == self.gone:
            return
        self.waits = launch.launch_id if launch.nodes > self.room else ""
        if not self.waits:
            super().ensure(launch)

    def observe(self, launch_id: str) -> LaunchView:
        if launch_id == self.waits:
            placed = tuple(LaunchedNode(n, None, None, None, "", None, f"machine{n}") for n in range(self.room))
            return LaunchView(launch_id, "waiting", placed, "no machine fits")
        view = super().observe(launch_id)
        return replace(view, state="lost", loss=LOSS) if launch_id == self.gone else view

    def lose(self, launch_id: str, node: int, room: int) -> None:
        """A node's machine goes, with all that runs on it; what is left has so much room."""
        lost, self.gone, self.room = super().observe(launch_id).nodes[node], launch_id, room
        for pid in (lost.agent_pid, lost.supervisor_pid):
            assert pid is not None
            os.killpg(pid, signal.SIGKILL)

    def kill_rank(self, launch_id: str, node: int) -> None:
        """One of a node's ranks dies; its machine is well."""
        pid = super().observe(launch_id).nodes[node].supervisor_pid
        os.kill(int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1]), signal.SIGKILL)


@dataclass
class Losing:
    """When the attempt of this number has saved something: a rank dies (None), or a machine goes and leaves so much
    room."""

    machines: Machines
    log: RunLog
    room_after: dict[int, int | None]
    attempt: int = 0
    told: list[str] = field(default_factory=list)

    def tell(self, event: Event) -> None:
        if event.kind == "attempt":
            self.attempt = event.facts["number"]
        elif event.kind == "checkpoint" and self.attempt in self.room_after and event.facts["step"] < LONG_STEPS:
            newest = self.log.fold().attempts[-1]
            if event.facts["epoch"] == newest.epoch:
                room, last = self.room_after.pop(self.attempt), newest.nodes - 1
                if room is None:
                    self.machines.kill_rank(newest.launch, last)
                else:
                    self.machines.lose(newest.launch, last, room)


def test_a_run_goes_down_with_its_machines_and_up_with_its_next_launch(
    tmp_path: Path, undisturbed: tuple[str, str]
) -> None:
    """2 x 2 on two machines, and again where a rank died; one is gone: 2 x 1 on the other; both are there: 2 x 2."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text(TEXT)
    (tmp_path / "spec.toml").write_text(LONG.replace("text:corpus", f"text:{tmp_path}/corpus"))
    store = open_store((tmp_path / "store").as_uri())
    prepared = prepare_run(load_spec(tmp_path / "spec.toml", [*ASKED, *SMALLER]), store)
    machines = Machines(tmp_path / "out")
    losing = Losing(machines, RunLog(store, prepared.run), {1: None, 2: 1, 4: 2})

    def launch(ready: Prepared, name: str, avoid: tuple[str, ...]) -> Launch:
        return launch_for(store.url, tmp_path / "out", ready, name, avoid)

    said: list[str] = []
    driver = Driver(prepared, store, machines, launch, sink=Sinks([losing, Lines(said.append, LONG_STEPS)]))
    with standing_still(tmp_path / "out", lambda: bool(losing.room_after)):
        outcome = driver.run()
    assert (prepared.run, outcome.state_digest) == undisturbed, outcome
    told = details(store, prepared.run)["attempts_list"]
    wide, few = "2 stages x 2 replicas on 2 nodes", "2 stages x 1 replica on 1 node"
    assert [a["layout"] for a in told] == [wide, wide, wide, few, wide], said
    assert [bool(a["fallback"]) for a in told] == [False, False, False, True, False]
    assert [a["from"] for a in told] == ["start", "memory", *["checkpoint"] * 3]
    assert any(f", now {few} (no machine fits)" in line for line in said)
    assert any(line.endswith(f", now {wide}; because a machine is gone") for line in said)
