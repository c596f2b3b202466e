"""A driver of a world: the shipped loop with all that it calls, in a thread of the world's; its launcher is the world.

What it hears of steps is the world's (`Lines`): hints, some of which are lost.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.errors import StoreError
from checkpoint.log import RunLog
from flows.drive.events import Outcome
from flows.drive.loop import Driver as Shipped
from flows.drive.run import Prepared, load_run
from flows.drive.train import launch_for
from tests.support.protocol.gate import Gate
from tests.support.protocol.hub import Process
from trainer.failures import Failure
from trainer.launch import Finding, Launch, LaunchedNode, LaunchView, nothing

if TYPE_CHECKING:
    from tests.support.protocol.world import Host, World

LOOK_S, SOON_S = 1.0, 0.1
LINES_LOST = 0.1


class Driver(Process):
    """``prepared``: with which it was started, whatever the log says; None: it takes the run as it is in the store."""

    def __init__(self, world: World, prepared: Prepared | None) -> None:
        super().__init__(world.hub, "driver", f"driver {world.hub.number()} of {world.run}")
        self.world, self.gate = world, Gate(world.place, self, world)
        self.hub.spawn(self, "loop", lambda: self._drive(prepared))

    def _drive(self, prepared: Prepared | None) -> None:
        while prepared is None:
            try:
                prepared = load_run(self.gate, self.world.run)
            except StoreError:
                self.hub.sleep(1.0)
        driver = Shipped(
            prepared, self.gate, Launcher(self), partial(launch_for, "memory:", Path("out")),
            clock=self.hub.clock, sleep=self.hub.sleep,
        )  # fmt: skip
        driver._log = RunLog(self.gate, self.world.run, writer="driver", clock=self.hub.clock, token=self.hub.token)
        driver._metrics = Lines(self.world)  # type: ignore[assignment]
        driver._teller.clock = self.hub.clock
        while not isinstance(found := driver.round(lambda look: look()), Outcome):
            self.hub.sleep(LOOK_S if found else SOON_S)
        self.kill()
        self.world.left(found)


class Lines:
    """What the ranks say of their steps, as ``MetricsReader`` gives it: from the newest on, and not all of it (but what
    is high: which step was so first decides where to go back to).
    """

    def __init__(self, world: World) -> None:
        self.attach, self._world = True, world
        self._places: dict[int, int] = {}

    def poll(self, epochs: list[int], *, last: bool = False) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for epoch in epochs:
            said = self._world.lines.get(epoch, [])
            place = self._places.get(epoch, max(0, len(said) - 2) if self.attach else 0)
            found += [
                line for line in said[place:] if line["loss"] > 50.0 or self._world.hub.rng.random() >= LINES_LOST
            ]
            self._places[epoch] = len(said)
        self.attach = False
        return found


class Launcher:
    """As ``LocalLauncher``: nodes of this machine, which its driver does not outlive."""

    detaches = False

    def __init__(self, driver: Driver) -> None:
        self._world, self._hub = driver.world, driver.hub

    def ensure(self, launch: Launch) -> None:
        self._world.ensure(launch.launch_id, launch.nodes)

    def observe(self, launch_id: str) -> LaunchView:
        hosts = self._hosts(launch_id)
        if not hosts:
            return LaunchView(launch_id, "absent")
        nodes = tuple(_seen(host) for host in hosts)
        gone = next((host for host in self._hosts(launch_id, twins=True) if host.gone), None)
        if gone is not None:
            return LaunchView(launch_id, "lost", nodes, loss=Finding(Failure.INFRA, f"{gone.name} is gone"))
        up = [node.agent_pid is not None and node.supervisor_pid is not None for node in nodes]
        some = any(node.agent_pid is not None or node.supervisor_pid is not None for node in nodes)
        if all(node.done is not None for node in nodes) and not some:
            return LaunchView(launch_id, "done", nodes)
        return LaunchView(launch_id, "running" if all(up) else "partial" if some else "gone", nodes)

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        hosts = self._hosts(launch_id, twins=True)
        for host in hosts:
            host.left = host.left or "stopped"
            if grace_s:
                host.terminate()
        asked()
        until = self._hub.now + grace_s
        while self._hub.now < until and any(host.processes() for host in hosts):
            self._hub.sleep(1.0)
        for process in [p for host in hosts for p in host.processes()]:
            process.kill()

    def _hosts(self, launch_id: str, *, twins: bool = False) -> list[Host]:
        hosts = self._world.hosts.get(launch_id, [])
        return hosts if twins else hosts[: hosts[0].nodes if hosts else 0]


def _seen(host: Host) -> LaunchedNode:
    agent, engine = host.agent, host.engine
    lives = engine is not None and engine.alive
    return LaunchedNode(
        host.node, 1 if agent is not None and agent.alive else None, 1 if lives else None, host.left, "",
        False if host.gone else lives or None,
    )  # fmt: skip
