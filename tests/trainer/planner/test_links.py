"""Placement in closed form: every rank has a device of its own, and neighbours are as near as it says."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from trainer.plan.places import Position, Ranks, Replica
from trainer.planner.cluster import parse_cluster
from trainer.planner.layouts import Arrangement
from trainer.planner.links import Placed

BASE = Arrangement(positions=3, chunks=1, replicas=4, schedule="1f1b", microbatch=1, microbatches=4)


def placed(cluster: dict[str, Any], **change: Any) -> Placed:
    return Placed(parse_cluster({"device": "GB300", "devices_per_node": 4, **cluster}, "x"), replace(BASE, **change))


@pytest.mark.parametrize(
    ("cluster", "change"),
    [
        ({"nodes": 3}, {}),
        ({"nodes": 18, "rack_nodes": 9}, {"tensor": 4}),
        ({"nodes": 27, "rack_nodes": 9}, {"tensor": 4, "context": 2}),  # a rack of 36 holds 4 groups of 8
        ({"nodes": 24, "rack_nodes": 9}, {"tensor": 4, "context": 2, "packed": True}),
        ({"nodes": 32, "rack_nodes": 16}, {"tensor": 8, "pipeline_first": False}),
    ],
)
def test_every_rank_has_a_device_and_neighbours_are_where_it_says(
    cluster: dict[str, Any], change: dict[str, Any]
) -> None:
    p = placed(cluster, **change)
    a = p.layout
    assert a.devices <= p.capacity
    at = {
        (r, s, c, t): p.place(r, s, c, t)
        for r, s, c, t in product(range(a.replicas), range(a.positions), range(a.context), range(a.tensor))
    }
    places = {(node, local) for node, local, _ in at.values()}
    assert len(places) == a.devices
    assert max(node for node, _ in places) < p.cluster.nodes
    assert all(0 <= nic < p.cluster.nics for _, _, nic in at.values())
    for name, index, size in (("tensor", 3, a.tensor), ("context", 2, a.context), ("pipeline", 1, a.positions)):
        worst = "node"
        for key, (node, _, _) in at.items():
            other = list(key)
            other[index] = (key[index] + 1) % size
            far = at[tuple(other)][0]  # type: ignore[index]
            link = (
                "node"
                if far == node
                else "rack"
                if far // p.cluster.rack_nodes == node // p.cluster.rack_nodes
                else "network"
            )
            worst = max(worst, link, key=["node", "rack", "network"].index)
        said = p.axes[name].worst
        assert ["node", "rack", "network"].index(worst) <= ["node", "rack", "network"].index(said), name
    if not a.packed and a.tensor * a.context <= p.cluster.domain:
        assert p.axes["tensor"].worst != "network"


def test_what_this_engine_runs_is_placed_as_a_launch_places_it() -> None:
    p = placed({"nodes": 3})
    ranks = Ranks(3, 4)
    for node in range(3):
        for rank in ranks.on_node(node, 3):
            assert p.place(Replica(ranks.replica(rank)), Position(ranks.position(rank)))[0] == node


def test_traffic_is_shared_out_over_links() -> None:
    p = placed({"nodes": 18, "rack_nodes": 9}, replicas=16)
    for axis in ("data", "pipeline"):
        shared = p.traffic(axis, 1000.0)
        assert sum(shared.values()) == pytest.approx(1000.0)
        assert set(shared) <= {"node", "rack", "network"}
    assert p.traffic("tensor", 1000.0) == {}
    assert p.collective("tensor", 1e9) == 0.0
    assert p.collective("data", 2e9) > p.collective("data", 1e9) > 0


def test_the_description_does_not_grow_with_replicas() -> None:
    sizes = [len(str(placed({"nodes": 65_536}, replicas=1 << n).to_json())) for n in (4, 8, 12, 16)]
    assert max(sizes) - min(sizes) < 40
