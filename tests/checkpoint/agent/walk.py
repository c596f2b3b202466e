"""The machine of an agent, walked from event to event."""

from __future__ import annotations

from typing import Any

from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.attempt import NodePhase
from checkpoint.agent.machine import Machine
from checkpoint.log import EndedInfo, RunState
from tests.support.agent_world import HERE, attempt_info, options


class Walk:
    """A machine, driven by hand; ``busy``: uploads are under way."""

    def __init__(self, nodes: int = 1, how: dict[str, Any] | None = None) -> None:
        self.machine, self.nodes, self.now, self.how = Machine(options(nodes)), nodes, 0.0, how
        self.busy = False

    def on(self, event: ev.Event) -> list[Any]:
        effects = list(self.machine.on(self.now, event))
        for effect in list(effects):
            if isinstance(effect, do.AskDrained):
                effects += self.on(ev.Drained(not self.busy))
        return effects

    def names(self, event: ev.Event) -> list[str]:
        return [e.name if isinstance(e, do.Send) else type(e).__name__ for e in self.on(event)]

    def later(self, seconds: float) -> list[str]:
        self.now += seconds
        return [name for timer in self.machine.due(self.now) for name in self.names(ev.Due(timer))]

    def log(self, *attempts: int, n: int = 0, ended: str = "", launch: str = "", **more: Any) -> list[str]:
        infos = [attempt_info(a, self.nodes, how=self.how) for a in attempts]
        if launch:
            infos.append(attempt_info(max(attempts) + 1, self.nodes, launch))
        n = n or max([0, *(info.n for info in infos)])
        if ended:
            n, more["ended"] = n + 1, EndedInfo(n + 1, n, 0.0, ended, "", 0, None)
        return self.names(ev.LogRead(RunState("run", n, tuple(infos), **more)))

    @property
    def phase(self) -> NodePhase:
        assert self.machine.attempt is not None
        return self.machine.attempt.phase

    def to(self, phase: NodePhase, epoch: int = 1) -> Walk:
        """From a machine that knows nothing to this phase of an attempt, its supervisor there."""
        if phase is NodePhase.ADOPT:
            self.log(epoch)
            self.on(ev.Recalled(epoch, True))
            return self
        older = 5 if phase is NodePhase.KILL else 0
        self.on(ev.LogRead(RunState("run")))
        self.on(ev.SupervisorHello(1, 100, older, 2 if older else 0))
        self.log(epoch)
        if phase is NodePhase.RECALL:
            return self
        self.on(ev.Recalled(epoch, False))
        self.on(ev.Claimed(epoch, HERE))
        if phase in (NodePhase.KILL, NodePhase.PREPARE):
            return self
        self.on(ev.Provided(epoch, {0: 1, 1: 2}, 4, (4, 1)))
        if phase is NodePhase.PORTS:
            return self
        self.on(ev.Ports(1, epoch, b"\1\0\2\0"))
        if phase is NodePhase.PEERS:
            return self
        if self.nodes > 1:
            self.on(ev.Met(epoch, {0: ev.Address("h", [1, 2]), 1: ev.Address("i", [3, 4])}))
        self.on(ev.Marked(epoch))
        if phase is NodePhase.IDLE:
            self.on(ev.EngineIdle(1, epoch))
        return self
