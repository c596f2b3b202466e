"""What an agent's machine makes of a node's devices: looked for, given to ranks, refused, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.adopt import found_devices
from checkpoint.agent.attempt import NodePhase
from checkpoint.agent.devices import ON_CPU, Devices
from tests.checkpoint.agent.walk import Walk
from trainer import wire


def devices_line(count: int, why: str = "") -> bytes:
    one = {"name": "GPU", "uuid": "GPU-1", "capability": 90, "memory": 1}
    devices = [{"index": index, **one} for index in range(count)]
    return json.dumps({"devices": devices, "why": why, "driver": True, "chosen": None}).encode()


def test_devices_are_looked_for_and_the_ranks_get_theirs() -> None:
    walk = Walk().to(NodePhase.PREPARE)
    *_, send = walk.on(ev.Provided(1, {0: 1, 1: 2}, 4, (4, 1)))
    assert (send.name, send.a) == ("PREPARE", 1)
    (meet,) = walk.on(ev.Ports(1, 1, b"\1\0\2\0" + devices_line(2)))
    assert isinstance(meet, do.Meet), "also alone: what the run has of algorithms is fetched meanwhile"
    (mark,) = walk.on(ev.Met(1, {0: meet.address}))
    assert (mark.nodes[0].ports, mark.nodes[0].devices.kind, mark.nodes[0].devices.of_rank) == ((1, 2), "cuda", (0, 1))


def test_a_node_that_cannot_run_what_was_asked_for_refuses_the_attempt() -> None:
    walk = Walk(how={"parallel": {"device": "cuda"}}).to(NodePhase.PORTS)
    assert walk.names(ev.Ports(1, 1, b"\1\0\2\0" + devices_line(0, "no driver"))) == ["Cancel", "Remember"]
    said = walk.machine.attempt.ranks[0]
    assert (said.code, said.words) == (
        78, "node 0: parallel.device 'cuda': no driver; mend that, or take parallel.device = 'cpu'",
    )  # fmt: skip
    cpu = Walk(how={"parallel": {"device": "cpu"}}).to(NodePhase.PREPARE)
    *_, send = cpu.on(ev.Provided(1, {0: 1, 1: 2}, 4, (4, 1)))
    assert (send.name, send.a) == ("PREPARE", 0), "nobody looks for devices that nobody wants"
    both = Walk(how={"parallel": {"device": "cpu"}, "launch": {"kernel_path": "cuda"}}).to(NodePhase.PREPARE)
    assert both.names(ev.Provided(1, {0: 1, 1: 2}, 4, (4, 1))) == ["Use", "Cancel", "Remember"]


def test_a_gang_of_two_kinds_does_not_start() -> None:
    walk = Walk(nodes=2).to(NodePhase.PORTS)
    (meet,) = walk.on(ev.Ports(1, 1, b"\1\0\2\0" + devices_line(2)))
    other = ev.Address("i", [3, 4])
    assert walk.names(ev.Met(1, {0: meet.address, 1: other})) == ["Cancel", "Remember"]
    said = walk.machine.attempt.ranks[0]
    assert said.code == 78
    assert "node 0 has CUDA (GPU), node 1 the CPU" in said.words


def test_what_the_driver_said_of_a_ranks_device_is_told_with_its_end() -> None:
    line = json.loads(devices_line(2))
    for index, device in enumerate(line["devices"]):
        device["bus"] = f"0000:3{index}:00"
    walk = Walk().to(NodePhase.PORTS)
    (meet,) = walk.on(ev.Ports(1, 1, b"\1\0\2\0" + json.dumps(line).encode()))
    walk.on(ev.Met(1, {0: meet.address}))
    walk.now = 50.0
    walk.on(ev.Marked(1))
    *_, ask = walk.on(ev.RankExit(1, 1, 1, 86, 9, wire.ENDED_ITSELF, 0))
    assert ask == do.AskKernel(1, 1, 50.0, ["0000:31:00"])
    walk.on(ev.KernelSaid(1, 1, 79, "NVRM: …"))
    assert (walk.machine.attempt.ranks[1].xid, walk.machine.attempt.ranks[1].kernel) == (79, "NVRM: …")
    killed = walk.names(ev.RankExit(1, 1, 0, -9, 9, wire.ENDED_BY_SUPERVISOR, 0))
    assert "AskKernel" not in killed, "it was killed because of the other"


def test_the_driver_is_asked_for_ranks_that_an_agent_before_started() -> None:
    walk = Walk()
    walk.log(1)
    walk.now = 9.0
    walk.on(ev.Recalled(1, True, devices=Devices("cuda", (2, 3))))
    walk.now = 50.0
    walk.on(ev.SupervisorHello(1, 100, 1, 2))
    *_, ask = walk.on(ev.RankExit(1, 1, 1, 88, 9, wire.ENDED_ITSELF, 0))
    assert ask == do.AskKernel(1, 1, 9.0, [""])


def test_devices_of_an_attempt_are_found_in_its_file(tmp_path: Path) -> None:
    assert found_devices(tmp_path, 3, range(2, 4)) == ON_CPU
    head = wire.Attempt()
    head.version, head.device_kind = wire.ATTEMPT_VERSION, wire.DEVICES["cuda"]
    ranks = b"".join(bytes(wire.AttemptRank(b"h", 1, 0, 5 + rank)) for rank in range(4))
    (tmp_path / "attempt-3").write_bytes(bytes(head) + ranks)
    assert found_devices(tmp_path, 3, range(2, 4)) == Devices("cuda", (7, 8))
    assert found_devices(tmp_path, 3, range(2, 9)) == ON_CPU
    head.device_kind = wire.DEVICES["cpu"]
    (tmp_path / "attempt-3").write_bytes(bytes(head) + ranks)
    assert found_devices(tmp_path, 3, range(2, 4)) == ON_CPU
