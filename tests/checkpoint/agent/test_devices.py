"""What ranks run on: the spec's word and HOTSTAGE_DEVICES against what the engine found."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.agent.devices import (
    ON_CPU,
    Devices,
    Found,
    NoDevice,
    asked_kind,
    choose,
    from_map,
    read_devices,
    same_kind,
    to_map,
)

H100 = "NVIDIA H100 80GB HBM3"


def line(count: int = 2, **more: Any) -> bytes:
    devices = [
        {"index": i, "name": H100, "uuid": f"GPU-{i}aaa-bbbb", "capability": 90, "memory": 80 << 30}
        for i in range(count)
    ]
    return json.dumps({"devices": devices, "why": "", "driver": True, "chosen": None, **more}).encode()


def gpus(count: int = 2, chosen: str | None = None) -> Found:
    return read_devices(line(count, chosen=chosen))


@pytest.mark.parametrize(
    ("device", "path", "asked"),
    [
        ("auto", "auto", "auto"),
        ("auto", "avx2", "cpu"),
        ("auto", "cuda", "cuda"),
        ("auto", "cuda-exact", "cuda"),
        ("cpu", "auto", "cpu"),
        ("cuda", "cuda-exact", "cuda"),
    ],
)
def test_what_is_asked_for(device: str, path: str, asked: str) -> None:
    assert asked_kind(device, path) == asked


def test_kernels_of_another_device_are_refused() -> None:
    """Also where no spec stood before them: a record of another version."""
    with pytest.raises(NoDevice) as error:
        asked_kind("cuda", "avx512")
    assert str(error.value) == (
        "launch.kernel_path 'avx512' does not run on parallel.device 'cuda': take kernel_path 'auto' or one of "
        "cuda-exact, cuda, or device 'cpu'"
    )
    with pytest.raises(NoDevice, match=r"'cuda' does not run on parallel.device 'cpu': take kernel_path 'auto', or"):
        asked_kind("cpu", "cuda")
    with pytest.raises(NoDevice, match=r"parallel.device 'tpu' is unknown; take 'auto', 'cpu' or 'cuda'"):
        asked_kind("tpu", "auto")


def test_a_rank_a_device_in_order() -> None:
    assert choose("cuda", 2, gpus(4)).of_rank == (0, 1)
    assert choose("auto", 2, gpus(4, "3, 1")).of_rank == (3, 1)
    assert choose("cuda", 2, gpus(2)).told == f"on {H100} (CUDA device 0, 1)"
    assert choose("cpu", 2, gpus(2)) == ON_CPU


def test_nodes_that_share_a_machine_take_devices_in_turn() -> None:
    assert choose("cuda", 2, gpus(4), first=2, others=2).of_rank == (2, 3)
    shared = choose("cuda", 2, gpus(3), first=2, others=2)
    assert shared.of_rank == (2, 0)
    assert shared.note.startswith("4 ranks share 3 devices")
    assert shared.told.startswith(f"on {H100} (CUDA device 2, 0); ")


@pytest.mark.parametrize("word", ["GPU-1aaa", "gpu-1AAA-bbbb", "MIG-1aaa", "mig-1aaa-bbbb"])
def test_a_device_by_its_uuid(word: str) -> None:
    """Whole or its beginning, in either case of letters; of a slice (MIG) too, which nvidia-smi names with another word
    before CUDA's number."""
    assert choose("cuda", 1, gpus(2, word)).of_rank == (1,)


def test_more_ranks_than_devices_share_them_and_that_is_said() -> None:
    found = choose("cuda", 5, gpus(2))
    assert found.of_rank == (0, 1, 0, 1, 0)
    assert found.note.startswith("5 ranks share 2 devices (round robin): their messages go through shared memory")
    assert found.note in found.told


def test_without_a_device() -> None:
    """auto: the CPU, with the reason; a person hears of it only where a driver is there. cuda: refused."""
    none = read_devices(line(0, why="no driver", driver=False))
    assert choose("auto", 2, none) == Devices(note="on the CPU: no driver")
    assert choose("auto", 2, read_devices(line(0, why="no library"))).told == "on the CPU: no library"
    with pytest.raises(NoDevice) as error:
        choose("cuda", 2, none)
    assert str(error.value) == "parallel.device 'cuda': no driver; mend that, or take parallel.device = 'cpu'"
    assert "of an older release" in choose("auto", 1, read_devices(b"")).note


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ("", "HOTSTAGE_DEVICES is empty and names no device; this node has 2 devices, 0 to 1: write numbers or UUIDs"),
        ("  ", "HOTSTAGE_DEVICES is empty"),
        ("0,", "HOTSTAGE_DEVICES '0,' has nothing between two commas"),
        ("0,,1", "has nothing between two commas"),
        ("0,2", "HOTSTAGE_DEVICES '0,2': there is no device 2; this node has 2 devices, 0 to 1"),
        ("99999999999999999999999999", "there is no device 9999"),
        ("1,1", "HOTSTAGE_DEVICES '1,1' names device 1 twice; name each once"),
        ("1,GPU-1aaa", "names device 1 twice"),
        ("-1", "'-1' is neither a number nor a UUID (GPU-…)"),
        ("all", "'all' is neither a number nor a UUID"),
        ("²", "is neither a number nor a UUID"),
        ("GPU-", "'GPU-' is the beginning of 2 UUIDs; write more of it"),
        ("GPU-7", "there is no device GPU-7"),
    ],
)
def test_a_wrong_hotstage_devices_is_refused_by_name(chosen: str, words: str) -> None:
    for asked in ("auto", "cuda"):
        with pytest.raises(NoDevice) as error:
            choose(asked, 1, gpus(2, chosen))
        assert words in str(error.value)


def test_a_gang_of_two_kinds_is_refused_with_a_node_of_each() -> None:
    cuda, cpu = choose("auto", 1, gpus(1)), choose("auto", 1, read_devices(line(0, why="no driver")))
    same_kind({0: cuda, 1: cuda})
    same_kind({0: cpu, 1: ON_CPU})
    with pytest.raises(NoDevice) as error:
        same_kind({0: cuda, 1: cuda, 2: cpu, 3: cpu})
    assert str(error.value) == (
        f"the nodes of this attempt would not run on the same kind of device: node 0 has CUDA ({H100}), node 2 the CPU "
        "(no driver); mend node 2, or take parallel.device = 'cpu' for all"
    )


def test_what_a_node_tells_the_others_comes_back() -> None:
    for devices in (ON_CPU, choose("auto", 3, gpus(2)), choose("auto", 3, read_devices(line(0, why="w" * 1000)))):
        again = from_map(to_map(devices), 3)
        assert (again.kind, again.of_rank, again.names) == (devices.kind, devices.of_rank, devices.names)
        assert from_map(to_map(again), 3) == again
    for bad in ({"kind": "cuda", "of_rank": [0], "note": "", "names": []}, {"kind": "x"}, [], {}):
        with pytest.raises((ValueError, KeyError, TypeError)):
            from_map({"devices": bad}, 3)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8) | st.binary())
def test_what_the_engine_says_is_not_trusted(value: object) -> None:
    """Any bytes, and any JSON in any of the places, are read or refused."""
    texts = [value] if isinstance(value, bytes) else [json.dumps(value).encode()]
    if not isinstance(value, bytes):
        whole = json.loads(line())
        texts += [json.dumps({**whole, key: value}).encode() for key in whole]
        texts += [json.dumps({**whole, "devices": [{**whole["devices"][0], key: value}]}).encode() for key in
                  whole["devices"][0]]  # fmt: skip
    for text in texts:
        with contextlib.suppress(NoDevice):
            choose("cuda", 2, read_devices(text))
