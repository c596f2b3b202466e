"""Who is near whom: where each rank of a layout is, in closed form, and what its messages pass over.

Ranks are numbered with the innermost axis first: tensor, context, then positions and replicas (or replicas and
positions, whichever is faster). Devices are numbered along nodes, nodes along racks. A rank's device is its number, but
for devices that are left idle at the end of each rack where a group does not divide it. So the whole placement is a few
strides, however many replicas there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.planner.cluster import ClusterSpec
from trainer.planner.layouts import Arrangement

LINKS = ("node", "rack", "network")


def _nic(devices: int, nics: int) -> str:
    """The formula of a device's NIC in its node."""
    return f"device % {devices}" if nics == devices else f"(device % {devices}) * {nics} // {devices}"


@dataclass(frozen=True)
class Axis:
    """One way in which ranks are neighbours."""

    name: str
    size: int
    stride: int
    """Devices between neighbours."""
    in_node: int
    """Of its ranks, how many are in one node."""
    in_rack: int
    worst: str = "node"
    """The slowest link that neighbours meet anywhere."""

    def shares(self) -> dict[str, float]:
        """By link class, the share of a rank's peers that it reaches over it."""
        others = max(1, self.size - 1)
        return {
            "node": (self.in_node - 1) / others,
            "rack": (self.in_rack - self.in_node) / others,
            "network": (self.size - self.in_rack) / others,
        }


@dataclass(frozen=True)
class Placed:
    """A layout on a cluster."""

    cluster: ClusterSpec
    layout: Arrangement

    @property
    def group(self) -> int:
        """Devices that stay together: one rank's tensor and context pieces, or the tensor pieces alone."""
        return self.layout.tensor * (1 if self.layout.packed else self.layout.context)

    @cached_property
    def rack_used(self) -> int:
        """Devices of a rack that are used: as many whole groups as it holds."""
        domain = self.cluster.domain
        return domain // self.group * self.group if self.group <= domain else domain

    @property
    def racks(self) -> int:
        """Racks that are used."""
        return -(-self.layout.devices // self.rack_used)

    @property
    def capacity(self) -> int:
        """Devices of the cluster that layouts of such groups can use."""
        cluster = self.cluster
        whole, rest = divmod(cluster.nodes, cluster.rack_nodes)
        over = rest * cluster.devices_per_node
        return whole * self.rack_used + (over // self.group * self.group if self.group <= cluster.domain else over)

    @property
    def nodes(self) -> int:
        """Nodes that are used."""
        last = self.layout.devices - (self.racks - 1) * self.rack_used
        return (self.racks - 1) * self.cluster.rack_nodes + -(-last // self.cluster.devices_per_node)

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """By name."""
        a = self.layout
        sizes = [("tensor", a.tensor), ("context", a.context)]
        outer = [("pipeline", a.positions), ("data", a.replicas)]
        found, stride = {}, 1
        for name, size in (*sizes, *(outer if a.pipeline_first else outer[::-1])):
            in_node = max(1, min(size, self.cluster.devices_per_node // stride))
            in_rack = max(in_node, min(size, self.rack_used // stride))
            if name == "context" and a.packed:  # where a group lies across two racks, all may be
                in_node = in_rack = 1
            # whole groups of an axis lie in a node or a rack only where these hold no part of another group
            span = stride * size
            worst = "node"
            scattered = name == "context" and a.packed
            if size > 1 and (scattered or self.cluster.devices_per_node % span):
                worst = "rack"
                if self.racks > 1 and (scattered or self.rack_used % span):
                    worst = "network"
            found[name] = Axis(name, size, stride, in_node, in_rack, worst)
            stride *= size
        return found

    def bytes_s(self, link: str) -> float:
        """What a device gets of a link of a class."""
        cluster = self.cluster
        found = {"node": cluster.link_bytes_s, "rack": cluster.rack_bytes_s, "network": cluster.network_bytes_s}
        return cluster.link_share * found[link]

    def latency(self, link: str) -> float:
        """Of a message."""
        return self.cluster.network_latency_s if link == "network" else self.cluster.link_latency_s

    def collective(self, axis: str, size: float) -> float:
        """Seconds in which each rank of an axis gives every other its part of ``size`` bytes, or gets it."""
        a = self.axes[axis]
        if a.size == 1:
            return 0.0
        moved = size * (a.size - 1) / a.size
        shares = {link: share for link, share in a.shares().items() if share > 0}
        slowest = max(moved * share / self.bytes_s(link) for link, share in shares.items())
        return slowest + (a.size - 1) * sum(share * self.latency(link) for link, share in shares.items())

    def hop(self, size: float) -> float:
        """Seconds of a message to a neighbour of the pipeline."""
        link = self.axes["pipeline"].worst
        return self.latency(link) + size / self.bytes_s(link)

    def traffic(self, axis: str, size: float) -> dict[str, float]:
        """``size`` bytes that a rank sends along an axis, by the links that they pass."""
        a = self.axes[axis]
        if a.size == 1:
            return {}
        if axis == "pipeline":  # of the neighbours of all ranks
            hops = a.size - 1
            far, near = -(-a.size // a.in_rack) - 1, -(-a.size // a.in_node) - 1
            parts = {"network": far / hops, "rack": (near - far) / hops, "node": 1 - near / hops}
        else:
            parts = a.shares()
        return {link: size * share for link, share in parts.items() if share > 0}

    def to_json(self) -> dict[str, Any]:
        """The whole placement: strides, and the devices that are left out."""
        cluster, idle = self.cluster, self.cluster.domain - self.rack_used
        order = list(self.axes)
        return {
            "rank": {name: axis.stride for name, axis in self.axes.items() if axis.size > 1} or {"data": 1},
            "order": order,
            "device": f"rank + {idle} * (rank // {self.rack_used})" if idle else "rank",
            "node": f"device // {cluster.devices_per_node}",
            "rack": f"node // {cluster.rack_nodes}",
            "nic": _nic(cluster.devices_per_node, cluster.nics),
            "neighbours": {name: axis.worst for name, axis in self.axes.items() if axis.size > 1},
            "devices": self.layout.devices,
            "nodes": self.nodes,
            "racks": self.racks,
            "idle_devices": cluster.devices - self.layout.devices,
        }

    def device(self, rank: int) -> int:
        """The device of a rank, among all of the cluster."""
        return rank + (self.cluster.domain - self.rack_used) * (rank // self.rack_used)

    def place(self, replica: int, position: int, context: int = 0, tensor: int = 0) -> tuple[int, int, int]:
        """The node, the device in it, and its NIC, of one rank."""
        at = {"data": replica, "pipeline": position, "context": context, "tensor": tensor}
        rank = sum(self.axes[name].stride * number for name, number in at.items())
        node, local = divmod(self.device(rank), self.cluster.devices_per_node)
        return node, local, local * self.cluster.nics // self.cluster.devices_per_node
