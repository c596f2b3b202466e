"""What the ranks of a node run on: ``parallel.device`` and ``launch.kernel_path`` against the devices that are there.

The engine says what is there (``hotstage-engine devices``, by the supervisor, in the container that has the devices), a
JSON object of one line:

    devices    [{index, name, uuid, bus, capability, memory}]: capability 90 is sm_90, memory in bytes
    why        why there are none, for people; "" where there are some
    driver     whether NVIDIA's driver is loaded: then it is worth a word that it is not used
    chosen     HOTSTAGE_DEVICES as the engine's environment has it, or null

Local rank i gets the i-th of the chosen devices, round robin where ranks are more. All nodes of an attempt run on the
same kind (`same_kind`): a gang's bits are those of one family of kernels. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.wire import CUDA_PATHS

MAX_DEVICES = 1024
_SHOWN = 300
_CHOICE_MEND = "write numbers or UUIDs with commas between them, or unset it for all"


class NoDevice(Exception):
    """This node cannot run what was asked for; the text is for people, with the mend."""


@dataclass(frozen=True)
class Device:
    """One of the node's devices."""

    index: int
    name: str
    uuid: str
    bus: str
    capability: int
    memory: int


@dataclass(frozen=True)
class Found:
    """What the engine says is there."""

    devices: tuple[Device, ...] = ()
    why: str = "the engine said nothing of devices: it is of an older release"
    driver: bool = False
    chosen: str | None = None


@dataclass(frozen=True)
class Devices:
    """What this node's ranks run on: ``kind`` (a name of ``wire.DEVICES``), and by local rank the device's number.

    ``note``: what people should be told once: why ``auto`` is the CPU, what is shared; empty where nothing is to say.
    """

    kind: str = "cpu"
    of_rank: tuple[int, ...] = ()
    note: str = ""
    names: tuple[str, ...] = ()
    """Of the devices that are used, a device one name."""
    buses: tuple[str, ...] = ()
    """By local rank, the place of its device on the bus; "" where the engine does not say it."""
    told: str = ""
    """What a person who watches the run should see; a machine without GPUs is not worth a word."""

    def device(self, local: int) -> int:
        """The number of a local rank's device; of the CPU 0."""
        return self.of_rank[local] if self.of_rank else 0

    def bus(self, local: int) -> str:
        """Where it is; "" where nobody knows."""
        return self.buses[local] if 0 <= local < len(self.buses) else ""


ON_CPU = Devices()


def asked_kind(device: str, kernel_path: str) -> str:
    """What is asked for: ``cpu``, ``cuda`` or ``auto``; a family of kernels that only one of them has decides ``auto``.

    >>> asked_kind("auto", "cuda-exact"), asked_kind("auto", "avx2"), asked_kind("auto", "auto")
    ('cuda', 'cpu', 'auto')
    """
    if device not in ("auto", "cpu", "cuda"):
        raise NoDevice(f"parallel.device {device!r} is unknown; take 'auto', 'cpu' or 'cuda'")
    needs = "auto" if kernel_path == "auto" else "cuda" if kernel_path in CUDA_PATHS else "cpu"
    if "auto" in (device, needs):
        return needs if device == "auto" else device
    if device != needs:
        takes = f"'auto' or one of {', '.join(CUDA_PATHS)}" if device == "cuda" else "'auto'"
        raise NoDevice(
            f"launch.kernel_path {kernel_path!r} does not run on parallel.device {device!r}: take kernel_path {takes}, "
            f"or device {needs!r}"
        )
    return device


def read_devices(text: bytes) -> Found:
    """What the engine wrote; NoDevice where it is not of the form above. Nothing in it is trusted."""
    if not text:
        return Found()
    try:
        value = json.loads(text)
        listed = value["devices"]
        if not isinstance(listed, list) or len(listed) > MAX_DEVICES:
            raise ValueError("devices is no list, or too long")
        devices = tuple(_device(item) for item in listed)
        why, driver, chosen = str(value["why"])[:_SHOWN], value["driver"] is True, value["chosen"]
        if chosen is not None and not isinstance(chosen, str):
            raise ValueError("chosen is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        shown = text[:100].decode(errors="replace")
        raise NoDevice(f"what the engine says of its devices cannot be read ({error}): {shown!r}") from error
    if not devices and not why:
        why = "there is no CUDA device"
    return Found(devices, why, driver, chosen)


def _device(value: Any) -> Device:
    numbers = [value[key] for key in ("index", "capability", "memory")]
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        raise ValueError("a device with a wrong number")
    return Device(
        numbers[0],
        str(value["name"])[:128],
        str(value["uuid"])[:64],
        str(value.get("bus", ""))[:32],
        numbers[1],
        numbers[2],
    )


def choose(asked: str, ranks: int, found: Found, *, first: int = 0, others: int = 0) -> Devices:
    """The devices of so many local ranks. NoDevice where ``asked`` (`asked_kind`) cannot be had, with the mend.

    ``first``: ranks of other nodes of this machine that come before these, ``others``: all of them, where nodes share a
    machine. ``auto`` is CUDA where the engine has a device, else the CPU; a wrong HOTSTAGE_DEVICES is refused by both.
    """
    if asked == "cpu":
        return ON_CPU
    if not found.devices:
        if asked == "auto":
            note = f"on the CPU: {found.why}"
            return Devices(note=note, told=note if found.driver else "")
        mend = "" if "parallel.device" in found.why else "; mend that, or take parallel.device = 'cpu'"
        raise NoDevice(f"parallel.device 'cuda': {found.why}{mend}")
    there = chosen(found.chosen, found.devices)
    mine = [there[(first + local) % len(there)] for local in range(ranks)]
    used = list(dict.fromkeys(mine))
    note = ""
    if ranks + others > len(there):
        note = (
            f"{ranks + others} ranks share {len(there)} device{'s' * (len(there) > 1)} (round robin): their messages "
            "go through shared memory of the device or TCP, never NCCL; a device for each rank is faster"
        )
    numbers = ", ".join(str(device.index) for device in used[:16])
    told = f"on {', '.join(dict.fromkeys(device.name for device in used))} (CUDA device {numbers})"
    return Devices(
        "cuda",
        tuple(device.index for device in mine),
        note,
        tuple(device.name for device in used),
        tuple(device.bus for device in mine),
        f"{told}; {note}" if note else told,
    )


def chosen(text: str | None, devices: Sequence[Device]) -> list[Device]:
    """The devices that HOTSTAGE_DEVICES names, in its order; all where it is not set. NoDevice for a wrong one."""
    if text is None:
        return list(devices)
    has = f"this node has {_listed(devices)}"
    words = [word.strip() for word in text.split(",")]
    shown = f"HOTSTAGE_DEVICES {text[:_SHOWN]!r}"
    if not text.strip():
        raise NoDevice(f"HOTSTAGE_DEVICES is empty and names no device; {has}: {_CHOICE_MEND}")
    found: list[Device] = []
    for word in words:
        if not word:
            raise NoDevice(f"{shown} has nothing between two commas; {_CHOICE_MEND}")
        if word.isascii() and word.isdigit():
            same = [device for device in devices if len(word) < 10 and device.index == int(word)]
        elif word.upper().startswith(("GPU-", "MIG-")):
            # CUDA's number is the same whatever it is of; nvidia-smi writes MIG- before that of a slice
            begin = word[4:].lower()
            same = [device for device in devices if device.uuid[4:].lower().startswith(begin)]
            if len(same) > 1:
                raise NoDevice(f"{shown}: {word[:80]!r} is the beginning of {len(same)} UUIDs; write more of it")
        else:
            raise NoDevice(f"{shown}: {word[:80]!r} is neither a number nor a UUID (GPU-…); {_CHOICE_MEND}")
        if not same:
            raise NoDevice(f"{shown}: there is no device {word[:80]}; {has}")
        if same[0] in found:
            raise NoDevice(f"{shown} names device {same[0].index} twice; name each once")
        found.append(same[0])
    return found


def _listed(devices: Sequence[Device]) -> str:
    if len(devices) == 1:
        return f"device {devices[0].index} ({devices[0].name}, {devices[0].uuid})"
    return f"{len(devices)} devices, {devices[0].index} to {devices[-1].index}"


def same_kind(nodes: Mapping[int, Devices]) -> None:
    """NoDevice where the nodes of an attempt would run on different kinds; it names one node of each."""
    first: dict[str, int] = {}
    for node in sorted(nodes):
        first.setdefault(nodes[node].kind, node)
    if len(first) < 2:
        return
    cuda, cpu = first["cuda"], first["cpu"]
    names = ", ".join(dict.fromkeys(nodes[cuda].names)) or "its devices"
    why = nodes[cpu].note.removeprefix("on the CPU: ") or "it does not say why"
    raise NoDevice(
        f"the nodes of this attempt would not run on the same kind of device: node {cuda} has CUDA ({names}), node "
        f"{cpu} the CPU ({why}); mend node {cpu}, or take parallel.device = 'cpu' for all"
    )


def to_map(devices: Devices) -> dict[str, Any]:
    """As a node tells it to the others (``meet.py``); empty for the CPU that was asked for."""
    if devices == ON_CPU:
        return {}
    told = {"kind": devices.kind, "of_rank": list(devices.of_rank), "note": devices.note[:_SHOWN]}
    return {"devices": {**told, "names": list(devices.names)[:8]}}


def from_map(value: Mapping[str, Any], ranks: int) -> Devices:
    """Of a node's hint; ValueError, KeyError, TypeError where it is not one."""
    told = value.get("devices")
    if told is None:
        return ON_CPU
    of_rank = tuple(told["of_rank"])
    if told["kind"] not in ("cpu", "cuda") or len(of_rank) != (ranks if told["kind"] == "cuda" else 0):
        raise ValueError(f"devices of {len(of_rank)} ranks for {ranks}")
    if not all(type(number) is int and 0 <= number < 1 << 32 for number in of_rank):
        raise ValueError("a device's number is none")
    names = tuple(str(name)[:128] for name in list(told["names"])[:8])
    return Devices(told["kind"], of_rank, str(told["note"])[:_SHOWN], names)
