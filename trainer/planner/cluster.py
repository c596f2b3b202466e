"""The sheet of a cluster: nodes, devices, links, failures. Owns how one is read and what it may say.

A sheet is a TOML file of its own, or the table ``[cluster]`` of a spec; a spec may also name a file beside it with
``cluster = "FILE"``. It is no part of a spec's two halves: it says what machines there are, not what is trained or how,
so neither a run's bits nor its records know of it.

Units stand in the names: ``_gb`` 10^9 bytes, ``_gbyte_s`` 10^9 bytes a second one way, ``_gbit_s`` 10^9 bits a second.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.errors import SpecError
from trainer.plan.devices import SHEETS, DeviceSheet
from trainer.spec import CLUSTER_KEY, explain, read_toml

NETWORK_LATENCY_S, LINK_LATENCY_S = 10e-6, 3e-6
SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "DGX H100": {"device": "H100", "devices_per_node": 8, "nic_gbit_s": 400},
    "DGX B200": {"device": "B200", "devices_per_node": 8, "nic_gbit_s": 400},
    "GB200 NVL72": {"device": "GB200", "devices_per_node": 4, "rack_nodes": 18, "nic_gbit_s": 400},
    "GB300 NVL72": {"device": "GB300", "devices_per_node": 4, "rack_nodes": 18, "nic_gbit_s": 800},
    "2-CORE LAPTOP": {"device": "LAPTOP", "devices_per_node": 2},
}
"""Nodes that a sheet's ``device`` may name whole; what the sheet says itself goes before."""
FAILURES_NODE_DAY = 3.8e-3
"""Of a node of 8 GPUs: 419 interruptions that nobody planned, in 54 days of 2,048 nodes (Llama 3, arXiv 2407.21783)."""


class _Sheet(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class DeviceNumbers(_Sheet):
    """A device that has no sheet: what its maker says, and which shares of it programs reach."""

    name: str = Field("device", min_length=1, max_length=40)
    memory_gb: float = Field(gt=0, le=100_000)
    memory_gbyte_s: float = Field(gt=0, le=1_000_000)
    peak_tflops: dict[str, float] = Field(min_length=1, description="dense, by train.precision: fp32, bf16, fp8")
    product_share: float = Field(0.75, gt=0, le=1)
    attention_share: float = Field(0.45, gt=0, le=1)
    memory_share: float = Field(0.9, gt=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> DeviceNumbers:
        for name, peak in self.peak_tflops.items():
            if name not in ("fp32", "bf16", "fp8"):
                raise ValueError(f"peak_tflops.{name} is no precision of ours; take fp32, bf16 or fp8")
            if not 0 < peak <= 1e6:
                raise ValueError(f"peak_tflops.{name} {peak} must be above 0 and at most 1e6; correct it")
        return self


class ClusterSpec(_Sheet):
    """A cluster of like nodes."""

    name: str = Field("", max_length=80)
    nodes: int = Field(ge=1, le=1 << 20)
    devices_per_node: int = Field(1, ge=1, le=1024)
    device: str | DeviceNumbers
    link_gbyte_s: float | None = Field(None, gt=0, description="device to device of a node; unset: the device's sheet")
    rack_nodes: int = Field(1, ge=1, le=4096, description="nodes of one NVLink domain; 1: the domain is the node")
    rack_gbyte_s: float | None = Field(None, gt=0, description="between nodes of a domain; unset: link_gbyte_s")
    nics_per_node: int | None = Field(None, ge=1, le=1024, description="unset: one a device")
    nic_gbit_s: float | None = Field(None, gt=0, description="of each NIC; unset: the device's sheet")
    oversubscription: float = Field(1.0, ge=1, le=100, description="of the network: 2 halves what each NIC gets")
    link_share: float = Field(0.8, gt=0, le=1, description="of a link, what messages get")
    link_latency_s: float = Field(LINK_LATENCY_S, ge=0, le=1)
    network_latency_s: float = Field(NETWORK_LATENCY_S, ge=0, le=1)
    failures_node_day: float | None = Field(None, ge=0, le=100, description="that end an attempt; unset: by Llama 3")
    restart_s: float = Field(120.0, ge=0, le=86_400, description="from a failure to the next step, without lost steps")
    checkpoint_stall_s: float = Field(0.5, ge=0, le=86_400, description="that a snapshot holds the step back")
    checkpoint_every_s: float = Field(1.0, ge=0, le=86_400, description="least time between two: what the store takes")

    @model_validator(mode="before")
    @classmethod
    def _of_a_system(cls, value: Any) -> Any:
        name = value.get("device") if isinstance(value, Mapping) else None
        known = SYSTEMS.get(name.upper()) if isinstance(name, str) else None
        if known is None:
            return value
        filled = {**known, **value, "device": known["device"]}
        nodes = value.get("nodes")
        if "rack_nodes" not in value and isinstance(nodes, int) and "rack_nodes" in known:
            filled["rack_nodes"] = max(1, min(nodes, known["rack_nodes"]))
        return filled

    @model_validator(mode="after")
    def _check(self) -> ClusterSpec:
        sheet = self.sheet
        memory = sheet.memory_bytes_per_s / 1e9
        for key in ("link_gbyte_s", "rack_gbyte_s"):
            value = getattr(self, key)
            if value is not None and value > memory:
                raise ValueError(
                    f"{key} {value:g} is more than the memory of a {sheet.name} moves, {memory:g} GB/s, so no link can "
                    f"be that fast; write the bytes of one direction, at most {memory:g}"
                )
        if self.rack_nodes > 1 and self.rack_bytes_s > self.link_bytes_s:
            raise ValueError(
                f"rack_gbyte_s {self.rack_bytes_s / 1e9:g} is more than link_gbyte_s {self.link_bytes_s / 1e9:g}: "
                "nodes of a rack cannot be nearer than devices of a node; lower it, or make the rack one node"
            )
        if self.nic_gbit_s is not None and self.nic_gbit_s / 8 > memory:
            raise ValueError(
                f"nic_gbit_s {self.nic_gbit_s:g} is {self.nic_gbit_s / 8:g} GB/s, more than the memory of a "
                f"{sheet.name} moves, {memory:g} GB/s; write the Gbit/s of one NIC, one direction"
            )
        if self.devices_per_node > 1 and self.network_bytes_s > self.link_bytes_s:
            raise ValueError(
                f"nics_per_node {self.nics} x nic_gbit_s {self.nic_bytes_s * 8 / 1e9:g} is "
                f"{self.network_bytes_s / 1e9:g} GB/s a device, more than link_gbyte_s {self.link_bytes_s / 1e9:g}: "
                "a device of another node cannot be nearer than one of its own; lower the NICs or raise the link"
            )
        if self.rack_nodes > self.nodes:
            raise ValueError(f"rack_nodes {self.rack_nodes} is more than nodes {self.nodes}; take at most {self.nodes}")
        return self

    @cached_property
    def sheet(self) -> DeviceSheet:
        """The device's sheet: of its name, or made of the numbers that are given."""
        if isinstance(self.device, str):
            found = SHEETS.get(self.device.upper())
            if found is None:
                raise ValueError(
                    f"device {self.device[:80]!r} has no sheet; take one of {', '.join((*SHEETS, *SYSTEMS))}, or give "
                    "its numbers in a table: [cluster.device] with memory_gb, memory_gbyte_s and peak_tflops"
                )
            return found
        d = self.device
        peak = {name: 1e12 * value for name, value in d.peak_tflops.items()}
        link = 1e9 * self.link_gbyte_s if self.link_gbyte_s is not None else 0.0
        nic = 1e9 / 8 * self.nic_gbit_s if self.nic_gbit_s is not None else 0.0
        for key, value in (("link_gbyte_s", link), ("nic_gbit_s", nic)):
            needed = self.devices_per_node > 1 if key == "link_gbyte_s" else self.nodes > 1
            if needed and not value:
                raise ValueError(f"{key} is missing: a device without a sheet brings no links; add it")
        shares = dict.fromkeys(peak, d.product_share)
        memory, speed = int(d.memory_gb * 1e9), d.memory_gbyte_s * 1e9
        return DeviceSheet(
            d.name, memory, speed, peak, shares, d.attention_share, link or nic or speed, nic or link or speed,
            d.memory_share,
        )  # fmt: skip

    @cached_property
    def devices(self) -> int:
        """Of all nodes."""
        return self.nodes * self.devices_per_node

    @cached_property
    def domain(self) -> int:
        """Devices that the fastest links join: of a rack, or of a node."""
        return self.rack_nodes * self.devices_per_node

    @property
    def nics(self) -> int:
        """Of a node."""
        return self.nics_per_node if self.nics_per_node is not None else self.devices_per_node

    @cached_property
    def link_bytes_s(self) -> float:
        """Device to device of a node, as the sheet says."""
        return 1e9 * self.link_gbyte_s if self.link_gbyte_s is not None else self.sheet.link_bytes_per_s

    @cached_property
    def rack_bytes_s(self) -> float:
        """Between nodes of a rack."""
        return 1e9 * self.rack_gbyte_s if self.rack_gbyte_s is not None else self.link_bytes_s

    @cached_property
    def nic_bytes_s(self) -> float:
        """Of one NIC."""
        return 1e9 / 8 * self.nic_gbit_s if self.nic_gbit_s is not None else self.sheet.network_bytes_per_s

    @cached_property
    def network_bytes_s(self) -> float:
        """What a device has of its node's NICs."""
        return self.nic_bytes_s * self.nics / self.devices_per_node / self.oversubscription

    @property
    def failures_node_s(self) -> float:
        """Failures of a node a second."""
        day = self.failures_node_day
        return (FAILURES_NODE_DAY * self.devices_per_node / 8 if day is None else day) / 86_400


def parse_cluster(tree: Mapping[str, Any], origin: str) -> ClusterSpec:
    """A sheet from plain values; every problem becomes a line of the SpecError."""
    try:
        return ClusterSpec.model_validate(dict(tree))
    except ValidationError as error:
        lines = []
        for details in error.errors(include_url=False):
            place = tuple(part for part in details["loc"] if part != "str" and "DeviceNumbers" not in str(part))
            if details["loc"][-1:] == ("str",):
                continue  # of the two forms of a device, the table was meant
            details["loc"] = place
            if details["type"] == "extra_forbidden":
                known = DeviceNumbers if place[:1] == ("device",) else ClusterSpec
                name = ".".join(map(str, place))
                lines.append(f"{name} is an unknown key; remove it (known here: {', '.join(known.model_fields)})")
            else:
                lines += explain(details)
        raise SpecError([f"{origin}: {line}" for line in lines]) from error


def cluster_of(spec: str | Path, given: str | None, sets: Sequence[str] = ()) -> ClusterSpec | None:
    """The cluster that a command is about: the file that it names, else the one that the spec holds or names; None
    where there is none. ``sets``: ``cluster.nodes=4``, values over it."""
    path = Path(spec)
    tree: Mapping[str, Any]
    if given is not None:
        tree, origin = read_toml(Path(given), "a cluster sheet"), given
        tree = tree[CLUSTER_KEY] if isinstance(tree.get(CLUSTER_KEY), Mapping) else tree
    else:
        held = read_toml(path, "a spec").get(CLUSTER_KEY)
        if held is None and not sets:
            return None
        tree, origin = (held if isinstance(held, Mapping) else {}), f"{path}: {CLUSTER_KEY}"
        if isinstance(held, str):
            file = path.parent / held
            tree, origin = read_toml(file, "a cluster sheet"), str(file)
        elif held is not None and not isinstance(held, Mapping):
            raise SpecError(f"{path}: {CLUSTER_KEY} {held!r} is neither a table nor the path of a file; write one")
    values = dict(tree)
    for text in sets:
        key, _, raw = text.partition("=")
        _set(values, key.split(".")[1:], raw.strip())
    return parse_cluster(values, origin)


def _set(tree: dict[str, Any], path: Sequence[str], raw: str) -> None:
    *above, last = (part.strip() for part in path)
    for part in above:
        below = tree.get(part)
        tree[part] = dict(below) if isinstance(below, Mapping) else {}
        tree = tree[part]
    try:
        tree[last] = tomllib.loads(f"v = {raw}")["v"]
    except ValueError:
        tree[last] = raw
