"""What this machine can train on, for `hotstage doctor`: the engine, its CUDA backend, NVIDIA's driver, devices and
libraries; each finding with its mend. Programs are called with a limit of time, and of what is read of them.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoint.agent.devices import Found, NoDevice, choose, read_devices
from checkpoint.agent.kernel_log import kernel_lines, xids
from checkpoint.hashes import UNFIT
from k8s.doctor import Check
from trainer.engine_path import CUDA_NAME, cuda_environment, cuda_folders, cuda_library, engine_binary
from trainer.errors import LaunchError
from trainer.failures import of_xid, xid_text

OLDEST_DRIVER = 580  # what CUDA 13 needs
LIBRARIES: Mapping[str, tuple[str, str]] = {
    "libcublasLt.so.13": ("nvidia-cublas", "products on tensor cores"),
    "libnccl.so.2": ("nvidia-nccl-cu13", "messages between nodes by NCCL; without it they go through TCP"),
}
"""What the backend opens: the wheel that brings it, what it is for."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
_PROGRAM_S = 30.0
_MOST_BYTES = 1 << 20
_MOST_DEVICES = 1024
_FIELDS = (
    "index", "name", "uuid", "driver_version", "memory.total", "memory.used", "persistence_mode",
    "ecc.errors.uncorrected.volatile.total",
)  # fmt: skip
_USED_MIB = 1024  # of a device: more is another program's


@dataclass(frozen=True)
class Gpu:
    """A row of nvidia-smi; None: it does not say."""

    index: int
    name: str
    uuid: str
    driver: str
    total_mib: int | None
    used_mib: int | None
    persistent: bool | None
    uncorrected: int | None


def examine_machine(kmsg: str = "/dev/kmsg") -> list[Check]:
    """Every check, in the order in which a person mends them."""
    found, engine = _engine()
    driver = _driver()
    library = cuda_library()
    found += driver
    if library is None:
        mend = "in a source tree `make cuda` builds it; HOTSTAGE_CUDA may name it"
        found.append(Check("backend", "warn" if driver else "ok", f"no {CUDA_NAME}: ranks run on the CPU", mend))
        return [*found, *_gpus(), *_kernel(kmsg)] if driver else found
    found.append(Check("backend", "ok", str(library)))
    devices = _devices(engine) if engine is not None else []
    if not driver and all(check.verdict == "bad" for check in devices):  # no machine for it: `auto` is the CPU here
        return [*found, *(Check(check.name, "warn", check.text, check.mend) for check in devices)]
    return [*found, *devices, *_gpus(), *_libraries(), *_kernel(kmsg)]


def _said(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Exit code and the beginning of what a program says; -1 where it cannot be called or does not end in time."""
    with tempfile.TemporaryFile() as out:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=_PROGRAM_S, env=env
            )
        except OSError as error:
            return -1, str(error).encode()
        except subprocess.TimeoutExpired:
            return -1, f"no answer within {_PROGRAM_S:.0f} s".encode()
        out.seek(0)
        return done.returncode, out.read(_MOST_BYTES)


def _words(said: bytes) -> str:
    return " ".join(said[:400].decode(errors="replace").split()) or "nothing"


def _engine() -> tuple[list[Check], Path | None]:
    try:
        engine = engine_binary()
    except LaunchError as error:
        return [Check("engine", "bad", str(error), "run `make setup`")], None
    code, said = _said([str(engine), "version"])
    if code != 0:
        return [Check("engine", "bad", f"{engine} does not run: {_words(said)}", "build it again: `make setup`")], None
    found = [Check("engine", "ok", f"{_words(said)}, {engine}")]
    if UNFIT:
        found.append(
            Check("hashes", "warn", f"{UNFIT}: checkpoints take longer to hash", "build it again: `make setup`")
        )
    return found, engine


def driver_version(text: str) -> str | None:
    """Of /proc/driver/nvidia/version.

    >>> driver_version("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:12:00 UTC 2025")
    '580.65.06'
    """
    m = re.search(r"^NVRM version:.{0,200}?\s(\d{1,6}(?:\.\d{1,6}){1,3})\s", text[:4096] + "\n", re.MULTILINE)
    return m[1] if m else None


def _driver() -> list[Check]:
    """Nothing where there is none: most machines have no GPU."""
    try:
        text = DRIVER_FILE.read_text(errors="replace")
    except OSError:
        return []
    version = driver_version(text)
    if version is None:
        return [Check("driver", "unknown", f"{DRIVER_FILE} names no version")]
    if int(version.partition(".")[0]) < OLDEST_DRIVER:
        mend = f"install a driver {OLDEST_DRIVER} or later on this machine"
        return [
            Check(
                "driver", "bad", f"NVIDIA's driver {version} is older than {OLDEST_DRIVER}, which CUDA 13 needs", mend
            )
        ]
    return [Check("driver", "ok", f"NVIDIA's driver {version}")]


def _devices(engine: Path) -> list[Check]:
    """What the engine finds, in the environment that the launcher gives it."""
    code, said = _said([str(engine), "devices"], {**os.environ, **cuda_environment()})
    if code != 0:
        mend = "`nvidia-smi` and the kernel's log say more; a driver that hangs needs a restart of the machine"
        return [Check("devices", "bad", f"the engine cannot list devices ({code}): {_words(said)}", mend)]
    try:
        found: Found = read_devices(said)
        if not found.devices:
            return [Check("devices", "bad", found.why)]
        used = choose("cuda", 1, found)
    except NoDevice as error:
        return [Check("devices", "bad", str(error))]
    text = ", ".join(
        f"{d.index}: {d.name} (sm_{d.capability}, {d.memory / (1 << 30):.0f} GiB)" for d in found.devices[:16]
    )
    first = "" if found.chosen is None else f"; HOTSTAGE_DEVICES gives the first rank device {used.device(0)}"
    return [Check("devices", "ok", f"{len(found.devices)} found: {text}{first}")]


def gpus_of(text: str) -> list[Gpu]:
    """The rows that nvidia-smi printed; any text is taken, rows that do not hold are left out."""
    found = []
    lines = "".join(c if c.isprintable() or c == "\n" else " " for c in text).splitlines()
    for row in csv.reader(line for line in lines[:_MOST_DEVICES] if len(line) < 2000):
        cells = [cell.strip()[:200] for cell in row]
        index = _count(cells[0]) if len(cells) == len(_FIELDS) else None
        if index is None:
            continue
        persistent = {"Enabled": True, "Disabled": False}.get(cells[6])
        numbers = (_count(cells[4]), _count(cells[5]))
        found.append(Gpu(index, cells[1], cells[2], cells[3], *numbers, persistent, _count(cells[7])))
    return found


def _count(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


def _gpus() -> list[Check]:
    """What nvidia-smi says of every device of the machine."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [Check("health", "unknown", "no nvidia-smi here: nobody says how the devices are")]
    code, said = _said([program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"])
    if code != 0:
        mend = "what it says is NVIDIA's; a device that has fallen off the bus needs a restart of the machine"
        return [Check("health", "bad", f"nvidia-smi ended with {code}: {_words(said)}", mend)]
    rows = gpus_of(said.decode(errors="replace"))
    if not rows:
        return [Check("health", "unknown", f"nvidia-smi names no device: {_words(said)}")]
    found = [check for row in rows for check in _health(row)]
    return found or [Check("health", "ok", f"nvidia-smi finds nothing wrong with {len(rows)} device(s)")]


def _health(gpu: Gpu) -> list[Check]:
    found, name = [], f"device {gpu.index} ({gpu.name})"
    if gpu.uncorrected:
        mend = f"reset it when it is idle (`nvidia-smi -r -i {gpu.index}`) or restart; where it comes again, replace it"
        text = f"{name} has {gpu.uncorrected} uncorrectable memory errors since its driver was loaded"
        found.append(Check("health", "bad", text, mend))
    if gpu.used_mib is not None and gpu.used_mib > _USED_MIB:
        text = f"{name}: {gpu.used_mib} of {gpu.total_mib or '?'} MiB are another program's"
        found.append(Check("health", "warn", text, "`nvidia-smi` names it; a plan that needs the room is refused"))
    if gpu.persistent is False:
        text = f"{name}: its driver is unloaded between programs, so that each start takes seconds more"
        found.append(Check("health", "warn", text, "`nvidia-smi -pm 1`, or the service nvidia-persistenced"))
    return found


def _libraries() -> list[Check]:
    folders, found = cuda_folders(), []
    for name, (wheel, purpose) in LIBRARIES.items():
        place = next((folder / name for folder in folders if (folder / name).exists()), None)
        if place is not None:
            found.append(Check("libraries", "ok", str(place)))
            continue
        mend = (
            f"pip install 'hotstage[cuda]' (or {wheel}); HOTSTAGE_CUDA_LIBRARIES may name folders, with colons between"
        )
        verdict = "warn" if "without it" in purpose else "bad"
        text = f"no {name} ({purpose}) in {':'.join(map(str, folders)) or 'this environment'}"
        found.append(Check("libraries", "bad" if verdict == "bad" else "warn", text, mend))
    return found


def _kernel(kmsg: str) -> list[Check]:
    """What the driver wrote since the machine's start, each fault of a device once."""
    try:
        said = xids(kernel_lines(kmsg))
    except OSError as error:
        return [Check("kernel", "unknown", f"the kernel's log may not be read ({error.strerror}): try as root")]
    kinds = {(x.bus, x.number): x for x in said}
    return [
        Check(
            "kernel",
            "bad" if of_xid(x.number) else "warn",
            f"device {x.bus}, {xid_text(x.number)}: {x.line}",
            "https://docs.nvidia.com/deploy/xid-errors explains each number",
        )
        for x in list(kinds.values())[-16:]
    ] or [Check("kernel", "ok", "NVIDIA's driver wrote of no fault since the machine started")]
