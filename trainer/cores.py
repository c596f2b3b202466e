"""What this process may use: CPUs, by affinity, cpuset and its control group's quota, as the engine reads it; memory.

The engine's own is ``trainer/engine/run/cgroup.c``; a test gives both the same trees. Decides nothing about training.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SELF, MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def cpu_milli(self: Path = SELF, mount: Path = MOUNT) -> int:
    """Thousandths of a CPU that the control group may use, least of it and its parents; 0: no limit."""
    found = []
    for folder, first in _groups("cpu", self, mount):
        if first:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        else:
            quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
        found.append(_milli(quota, period))
    return min((value for value in found if value), default=0)


def usable_cpus() -> int:
    """Whole CPUs that this process may use, at least 1: 2.5 are two, because a third thread would be throttled."""
    cpus, milli = len(os.sched_getaffinity(0)), cpu_milli()
    return max(1, min(cpus, milli // 1000) if milli else cpus)


def free_bytes(self: Path = SELF, mount: Path = MOUNT, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory that is free for this process, by the machine and by its control group and that one's parents: the least.

    What the kernel caches of files counts as free: it makes room.
    """
    found = _kib("MemAvailable:", meminfo)
    for folder, first in _groups("memory", self, mount):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        limit, used = (_text(folder / name).strip() for name in names)
        stats = (line.split() for line in _text(folder / "memory.stat").splitlines())
        cached = next((w[1] for w in stats if w[:1] == ["total_inactive_file" if first else "inactive_file"]), "0")
        if limit.isdigit() and used.isdigit() and cached.isdigit():
            found.append(max(0, int(limit) - int(used) + int(cached)))
    return min(found, default=1 << 62)


def swap_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Of the machine, free to be swapped to."""
    return sum(_kib("SwapFree:", meminfo))


def _kib(name: str, meminfo: Path) -> list[int]:
    """The bytes of a line of meminfo; none where it has no such line."""
    words = [line.split() for line in _text(meminfo).splitlines() if line.startswith(name)]
    return [int(w[1]) << 10 for w in words if len(w) > 1 and w[1].isdigit()]


def _milli(quota: str, period: str) -> int:
    try:
        if int(quota) <= 0 or int(period) <= 0:
            return 0
        return max(1, int(quota) * 1000 // int(period))
    except ValueError:  # "max"
        return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _groups(controller: str, self: Path, mount: Path) -> Iterator[tuple[Path, bool]]:
    """The group's folder and its parents', up to the mount's root; whether they are of version 1."""
    name, controllers = None, ""
    for line in _text(self).splitlines():
        _, colon, rest = line.partition(":")
        words, second, group = rest.partition(":")
        if not colon or not second:
            continue
        if controller in words.split(","):
            name, controllers = group, words
            break
        if not words:
            name = group
    if name is None:
        return
    for hierarchy in (controllers, controller) if controllers else ("",):
        root = mount / hierarchy
        for group in (name, ""):
            folder = root / group.lstrip("/")
            if ".." not in group and folder.is_dir():
                yield folder, bool(controllers)
                while folder != root:
                    folder = folder.parent
                    yield folder, bool(controllers)
                return
