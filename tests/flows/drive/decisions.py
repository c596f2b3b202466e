"""What tests of decisions are made of: a policy, attempts, and nodes as a driver sees them."""

from __future__ import annotations

from dataclasses import replace

from flows.drive.views import (
    AttemptView,
    Cause,
    CheckpointView,
    Decision,
    LogView,
    NodeView,
    Policy,
    RankView,
    RunLayout,
    StartAttempt,
)

POLICY = Policy(steps=100, launch="l", nodes=2, ranks=2, stall_s=10.0)


def attempt(epoch: int = 1, **change: object) -> AttemptView:
    base = AttemptView(epoch, "l", 2, 2, "p", 0, None, None, (), None)
    return replace(base, **change)  # type: ignore[arg-type]


def running(epoch: int = 1, step: int = 5) -> list[NodeView]:
    return [NodeView(n, True, epoch, "running", (RankView(n, 100 + n, step=step),)) for n in range(2)]


def ended(node: int, *, epoch: int = 1, step: int = 5, slots: object = frozenset(), **rank: object) -> NodeView:
    view = replace(RankView(node, 100 + node, step=step), **rank)  # type: ignore[arg-type]
    return NodeView(node, True, epoch, "ended", (view,), slots)  # type: ignore[arg-type]


def log(*attempts: AttemptView, saved: tuple[CheckpointView, ...] = (), end: str | None = None) -> LogView:
    return LogView(attempts or (attempt(),), saved, tuple(reversed(saved)), end)


def nodes_of(epoch: int, nodes: list[NodeView]) -> list[NodeView]:
    return [replace(n, epoch=epoch) for n in nodes]


def started(decision: Decision) -> StartAttempt:
    assert isinstance(decision, StartAttempt), decision
    return decision


LOST = Cause("infra", "pod x-1 on b was deleted", "", None, place="b")


def layout(nodes: int, stages: int = 2, replicas: int | None = None) -> RunLayout:
    """A layout of as many replicas as nodes, if nothing else is said."""
    count = nodes if replicas is None else replicas
    return RunLayout(
        nodes, stages * count, {"parallel": {"stages": stages, "replicas": count}, "launch": {"nodes": nodes}}
    )


# --- history fades ------------------------------------------------------------------------------------------


def steps(*records: tuple[int, int]) -> tuple[CheckpointView, ...]:
    return tuple(CheckpointView(n, step, 1) for n, step in records)
