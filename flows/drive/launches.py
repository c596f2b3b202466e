"""Launches as the driver's loop sees them: which one to use, and what its launcher says of it as the driver's data."""

from __future__ import annotations

from dataclasses import replace

from checkpoint.log import RunState
from flows.drive.run import Prepared, is_superseded
from flows.drive.views import Cause, NodeView
from trainer.failures import Failure
from trainer.launch import Launcher, LaunchView
from trainer.spec import how_map


def launch_of(state: RunState, prepared: Prepared, launcher: Launcher) -> str:
    """The launch to use: the newest attempt's where its layout fits and it has not ended for good, else a new one."""
    newest = state.newest_attempt
    if newest is None or (newest.nodes, newest.ranks) != (prepared.nodes, prepared.ranks):
        return next_launch(state, prepared)
    if launcher.detaches and is_superseded(
        state
    ):  # what a cluster was told of its pods may not be what they must be now
        how = how_map(prepared.spec)
        if any(how[part] != newest.how.get(part) for part in ("launch", "parallel")):
            return next_launch(state, prepared)
    same_place = newest.launch.startswith(f"{prepared.run}-{prepared.spec.launch.target[0]}")
    if same_place and (state.ended or launcher.observe(newest.launch).state != "done"):
        return newest.launch
    return next_launch(state, prepared)


def next_launch(state: RunState, prepared: Prepared) -> str:
    """A launch's name that no attempt has used: ``<run>-<l or k><number>`` (local, kubernetes); unique in a store."""
    launches = {a.launch for a in state.attempts}
    return f"{prepared.run}-{prepared.spec.launch.target[0]}{len(launches) + 1}"


def placed(nodes: list[NodeView], view: LaunchView) -> list[NodeView]:
    """The nodes with the names of their machines, where the launcher knows them."""
    places = {n.node: n.place for n in view.nodes}
    return [replace(n, place=places.get(n.node, "")) for n in nodes]


def loss_of(view: LaunchView, nodes: list[NodeView], state: RunState, launcher: Launcher) -> Cause | None:
    """Why the launch cannot be made whole in place; None where it can, or where nobody knows."""
    if view.loss is not None:
        return Cause(view.loss.cls, view.loss.text, view.loss.mend, None, place=view.loss.place, code=view.loss.code)
    newest = state.newest_attempt
    left = view.state == "absent" and launcher.detaches and newest is not None and not state.ended
    if left and newest is not None and any(n.epoch == newest.epoch for n in nodes):
        return Cause(Failure.INFRA, f"launch {view.launch_id} ran and is not there any more")
    return None


def alive_nodes(view: LaunchView) -> dict[int, bool | None]:
    """Node -> running, known to be gone, or unknown."""
    if view.state in ("unknown", "absent"):
        return {}
    return {node.node: node.alive for node in view.nodes}
