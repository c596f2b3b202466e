"""Attempts that run under real agents, and what the tests of agents ask of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.layout import PlanLayout
from tests.support.agents import (
    AgentProcess,
    NodePeer,
    RankPeer,
    Run,
    agent,
    make_run,
    state_bytes,
    tiny_spec,
    wait_for,
)
from trainer.spec import RunSpec


@dataclass
class Started:
    """An attempt that runs: a rank a node, each node's agent real, its engine's side in Python."""

    run: Run
    spec: RunSpec
    plan: str
    epoch: int
    agents: list[AgentProcess]
    nodes: list[NodePeer]

    @property
    def layout(self) -> PlanLayout:
        return self.run.layouts[self.plan]

    @property
    def ranks(self) -> list[RankPeer]:
        return [rank for node in self.nodes for rank in node.ranks]


def start(folder: Path, nodes: int, stack: ExitStack) -> Started:
    spec = tiny_spec(parallel__stages=nodes, launch__nodes=nodes)
    run, plan = make_run(folder, spec)
    agents = [stack.enter_context(agent(run, folder, node, nodes)) for node in range(nodes)]
    peers = [NodePeer(process.work) for process in agents]
    for peer in peers:
        stack.callback(peer.close)
    epoch = run.attempt(spec, plan)
    with ThreadPoolExecutor(nodes) as pool:  # a node starts when all have said their addresses
        list(pool.map(NodePeer.start, peers))
    return Started(run, spec, plan, epoch, agents, peers)


def fill_all(node: NodePeer, run: Run, plan: str, step: int, *, final: bool = False) -> None:
    layout = run.layouts[plan]
    for rank in node.ranks:
        rank.fill(step, state_bytes(layout, rank.rank, step), final=final)


def committed(run: Run, step: int) -> object:
    return wait_for(
        lambda: next((c for c in run.fold().checkpoints if c.step == step), None), f"a checkpoint of step {step}"
    )


def idle(run: Run, epoch: int) -> dict[str, Any]:
    """The node's status once this attempt is over there; before its first attempt a node is idle too."""

    def look() -> dict[str, Any] | None:
        status = run.status()
        return status if status and (status["epoch"], status["phase"]) == (epoch, "idle") else None

    return wait_for(look, f"attempt {epoch} to be over on the node")
