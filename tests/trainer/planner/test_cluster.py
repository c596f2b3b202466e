"""Sheets of clusters: how one is read, and what is refused with value, limit and mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.place import ROOT
from trainer.errors import SpecError
from trainer.plan.devices import SHEETS
from trainer.planner.cluster import ClusterSpec, cluster_of, parse_cluster
from trainer.spec import load_spec, parse_spec, what_bytes

H100: dict[str, Any] = {"nodes": 4, "devices_per_node": 8, "device": "H100", "nic_gbit_s": 400}


def test_a_sheet_brings_what_is_not_said() -> None:
    cluster = parse_cluster({"nodes": 2, "device": "gb300", "devices_per_node": 4}, "x")
    assert (cluster.devices, cluster.domain, cluster.nics) == (8, 4, 4)
    assert cluster.network_bytes_s == 100e9  # 800 Gb/s a GPU
    assert cluster.link_bytes_s == SHEETS["GB300"].link_bytes_per_s
    shared = parse_cluster({**H100, "nics_per_node": 4, "oversubscription": 2}, "x")
    assert shared.network_bytes_s == 50e9 / 2 / 2


def test_a_system_brings_its_nodes_and_racks() -> None:
    rack = parse_cluster({"nodes": 55_000, "device": "GB300 NVL72"}, "x")
    assert (rack.devices, rack.domain, rack.network_bytes_s) == (220_000, 72, 100e9)
    part = parse_cluster({"nodes": 4, "device": "gb200 nvl72", "nic_gbit_s": 200}, "x")
    assert (part.domain, part.network_bytes_s) == (16, 25e9)
    assert parse_cluster({"nodes": 1, "device": "2-core laptop"}, "x").devices == 2


def test_a_device_of_given_numbers() -> None:
    device = {"name": "own", "memory_gb": 64, "memory_gbyte_s": 1600, "peak_tflops": {"bf16": 400}}
    cluster = parse_cluster({**H100, "device": device, "link_gbyte_s": 200}, "x")
    assert (cluster.sheet.name, cluster.sheet.memory_bytes, cluster.sheet.peak["bf16"]) == ("own", 64 * 10**9, 400e12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": 0}, "nodes 0 must be at least 1; raise it"),
        ({"link_gbyte_s": 9000}, "link_gbyte_s 9000 is more than the memory of a H100 moves, 3350 GB/s"),
        ({"link_gbyte_s": -1}, "link_gbyte_s -1 must be above 0.0; raise it"),
        ({"link_gbyte_s": 40}, "50 GB/s a device, more than link_gbyte_s 40"),
        ({"nic_gbit_s": 400_000}, "nic_gbit_s 400000 is 50000 GB/s, more than the memory of a H100 moves"),
        ({"rack_nodes": 5}, "rack_nodes 5 is more than nodes 4; take at most 4"),
        ({"rack_nodes": 2, "rack_gbyte_s": 900}, "rack_gbyte_s 900 is more than link_gbyte_s 450"),
        ({"device": "A100"}, "device 'A100' has no sheet; take one of H100"),
        ({"device": {"memory_gb": 1, "memory_gbyte_s": 1, "peak_tflops": {"i8": 1}}}, "peak_tflops.i8 is no precision"),
        ({"device": {"memory_gb": 1, "memory_gbyte_s": 90, "peak_tflops": {"bf16": 1}}}, "link_gbyte_s is missing"),
        ({"device": {"memory_gb": 1}}, "device.memory_gbyte_s is missing"),
        ({"device": {"memory_gb": 1, "speed": 2}}, "device.speed is an unknown key"),
        ({"gpus": 8}, "gpus is an unknown key; remove it (known here: name, nodes"),
        ({"link_latency_s": float("nan")}, "is not a finite number; write a finite number of seconds"),
        ({"nic_gbit_s": float("inf")}, "nic_gbit_s inf is not a finite number; write a finite number of Gbit/s"),
        ({"nodes": "4"}, "nodes '4' is not a whole number; write 4"),
        ({"nodes": True}, "nodes True is not a whole number"),
        ({"failures_node_day": -0.1}, "failures_node_day -0.1 must be at least 0.0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse_cluster({**H100, **change}, "sheet.toml")
    assert said in str(refused.value)
    assert all(line.startswith("sheet.toml: ") for line in refused.value.problems)


def test_a_spec_holds_a_cluster_or_names_one(tmp_path: Path) -> None:
    """It is of neither half: a spec means the same with it and without."""
    bare = (ROOT / "examples" / "demo.toml").read_text()
    (tmp_path / "bare.toml").write_text(bare)
    (tmp_path / "held.toml").write_text(bare + '[cluster]\nnodes = 3\ndevice = "H100"\n')
    (tmp_path / "named.toml").write_text('cluster = "sheet.toml"\n' + bare)
    (tmp_path / "sheet.toml").write_text('nodes = 5\ndevice = "B200"\n')
    (tmp_path / "wrong.toml").write_text("cluster = 3\n" + bare)
    assert cluster_of(tmp_path / "bare.toml", None) is None
    found = [cluster_of(tmp_path / f"{name}.toml", None) for name in ("held", "named")]
    assert [(c.nodes, c.sheet.name) for c in found if isinstance(c, ClusterSpec)] == [(3, "H100"), (5, "B200")]
    given = cluster_of(tmp_path / "bare.toml", str(tmp_path / "sheet.toml"), ["cluster.nodes=7"])
    assert given is not None
    assert given.nodes == 7
    with pytest.raises(SpecError, match="cluster 3 is neither a table nor the path of a file"):
        cluster_of(tmp_path / "wrong.toml", None)
    with pytest.raises(SpecError, match="there is no such file; a cluster sheet is a TOML file"):
        cluster_of(tmp_path / "bare.toml", str(tmp_path / "absent.toml"))
    specs = [load_spec(tmp_path / f"{name}.toml") for name in ("bare", "held", "named")]
    assert specs[0] == specs[1] == specs[2]


def test_the_cap_of_a_batch_is_no_part_of_a_runs_identity() -> None:
    from flows.show.foretell import stand_in

    sizes = {"model": {"family": "gpt2", "layers": 1, "width": 8, "heads": 1, "context": 8, "vocab": 300}}
    train = {"steps": 1, "batch": 2, "microbatch": 1, "sequence": 8}
    caps: tuple[dict[str, int], ...] = ({}, {"max_batch_tokens": 16})
    free, capped = (parse_spec({"name": "x", **sizes, "train": {**train, **cap}}) for cap in caps)
    assert what_bytes(free, stand_in(free)) == what_bytes(capped, stand_in(free))
    with pytest.raises(SpecError, match="max_batch_tokens is 15: take batch = 1 or less, or raise it"):
        parse_spec({"name": "x", **sizes, "train": {**train, "max_batch_tokens": 15}})
