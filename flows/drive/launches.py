"""Launches as the driver's loop sees them: which one to use, and what its launcher says of it as the driver's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from checkpoint.log import AttemptInfo, RunState
from flows.drive.decide import launch_to_use
from flows.drive.run import Prepared, fold_view
from flows.drive.views import Cause, LogView, NodeView, RunLayout
from trainer.failures import Failure
from trainer.launch import Launcher, LaunchView
from trainer.spec import how_map


def launch_of(state: RunState, prepared: Prepared, launcher: Launcher) -> str:
    """The launch to use: the newest attempt's where its layout fits and it has not ended for good, else a new one."""
    newest = state.newest_attempt
    seen = launcher.observe(newest.launch) if newest is not None else None
    return choose_launch(fold_view(state), state, prepared, launcher, seen)


def choose_launch(
    log: LogView, state: RunState, prepared: Prepared, launcher: Launcher, seen: LaunchView | None
) -> str:
    """As `launch_of`, by what is known already: ``seen`` is the newest attempt's launch."""
    wanted = RunLayout(prepared.nodes, prepared.ranks, how_map(prepared.spec))
    over = seen is not None and seen.state == "done"
    found = launch_to_use(log, wanted, detaches=launcher.detaches, over=over)
    return found or next_launch(state, prepared)


def was_stopped(seen: LaunchView | None) -> bool:
    """Whether a node of the launch was asked to stop, by whoever it was."""
    return seen is not None and any(n.done == "stopped" for n in seen.nodes)


def still_stops(seen: LaunchView | None) -> bool:
    """Whether a node of the launch was asked to stop and has not left yet."""
    return seen is not None and any(n.done == "stopped" and (n.agent_pid or n.supervisor_pid) for n in seen.nodes)


def next_launch(state: RunState, prepared: Prepared) -> str:
    """A launch's name that no attempt has used: ``<run>-<l or k><number>`` (local, kubernetes); unique in a store."""
    launches = {a.launch for a in state.attempts}
    return f"{prepared.run}-{prepared.spec.launch.target[0]}{len(launches) + 1}"


def placed(nodes: list[NodeView], view: LaunchView, before: Sequence[NodeView]) -> list[NodeView]:
    """The nodes with the names of their machines, where the launcher knows them. While it does not answer, as they were
    ``before``, in the last look at this launch: a failure then is that machine's all the same. What a node of which
    nothing lives had in its memory is gone with it, whatever it said last.
    """
    places = {n.node: n.place for n in (before if view.state == "unknown" else view.nodes)}
    lost = {n.node for n in view.nodes if n.alive is False and n.agent_pid is None}
    kept = (replace(n, slots=frozenset()) if n.node in lost else n for n in nodes)
    return [replace(n, place=places.get(n.node, "")) for n in kept]


def loss_of(
    view: LaunchView,
    nodes: list[NodeView],
    state: RunState,
    launcher: Launcher,
    runs_here: Callable[[AttemptInfo], bool],
) -> Cause | None:
    """Why the launch cannot be made whole in place; None where it can, or where nobody knows. ``runs_here``: whether
    nodes of this version run an attempt's plan.
    """
    if view.loss is not None:
        return Cause(view.loss.cls, view.loss.text, view.loss.mend, None, place=view.loss.place, code=view.loss.code)
    newest = state.newest_attempt
    left = view.state == "absent" and launcher.detaches and newest is not None and not state.ended
    if left and newest is not None and any(n.epoch == newest.epoch for n in nodes):
        return Cause(Failure.INFRA, f"launch {view.launch_id} was running and is gone")
    if newest is None or state.ended or view.state != "absent" or view.launch_id != newest.launch:
        return None
    # of nodes that would be started for this attempt nothing is there: they would begin where it began
    if state.checkpoints.steps_of(newest.epoch):
        return Cause(Failure.INFRA, f"launch {view.launch_id} has saved checkpoints and is gone")
    if not runs_here(newest):
        return Cause(Failure.INFRA, f"launch {view.launch_id} is not there, and its plan is another version's")
    return None


def alive_nodes(view: LaunchView) -> dict[int, bool | None]:
    """Node -> running, known to be gone, or unknown."""
    if view.state in ("unknown", "absent"):
        return {}
    return {node.node: node.alive for node in view.nodes}
