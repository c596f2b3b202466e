"""Whether this machine can carry a cluster: tried within a second, with nothing left behind.

``lacks()`` says what is missing, each with its mend. What cannot be known without minutes (that Go modules and Debian
packages can be fetched) is left to the build, which says so itself.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.cluster.build import is_built
from tests.cluster.control import ETCD_PORTS
from tests.cluster.host import STATE, Ledger, cgroup_mounts, missing_packages
from tests.support.go import cache

GIB = 1 << 30
MEMORY = 3 * GIB
DISK, DISK_TO_BUILD = 5 * GIB, 14 * GIB  # with the binary in the cache, without
CLONE_NEWNS, CLONE_NEWNET = 0x20000, 0x40000000
SIOCBRADDBR = 0x89A0
ELSEWHERE = "or set HOTSTAGE_KUBECONFIG to the kubeconfig of a cluster that you have (kind, k3s, a real one)"


def lacks() -> list[str]:
    """What a cluster needs and this machine does not give; empty where one can be brought up."""
    if os.geteuid() != 0:
        return [f"root, for bridges, namespaces, cgroups and containerd: run as root, {ELSEWHERE}"]
    checks = (_node_already, _network, _mounts, _cgroups, _memory, _disk, _packages, _ports)
    return [missing for check in checks if (missing := check())]


def _node_already() -> str:
    if STATE.exists():
        return ""  # a kubelet of a test cluster, which stands or is swept
    with socket.socket(socket.AF_UNIX) as asked:
        try:
            asked.connect("/var/lib/kubelet/device-plugins/kubelet.sock")
        except OSError:
            return ""
    return f"a machine of its own: a kubelet runs here already; use another machine, {ELSEWHERE}"


def _network() -> str:
    def bridge() -> None:
        _unshare(CLONE_NEWNET)
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as asked:
            fcntl.ioctl(asked, SIOCBRADDBR, b"hs-probe\0")  # gone with this child's namespace

    why = _fails(bridge)
    return (
        f"network namespaces and bridges ({why}): run on the machine itself, or in a privileged container"
        if why
        else ""
    )


def _mounts() -> str:
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        parts = {name: Path(folder) / name for name in ("lower", "upper", "work", "merged")}
        for part in parts.values():
            part.mkdir()
        layers = f"lowerdir={parts['lower']},upperdir={parts['upper']},workdir={parts['work']}"

        def mount() -> None:
            _unshare(CLONE_NEWNS)
            _mount("none", "/", "", 0x4000 | 0x40000, "")  # MS_REC | MS_PRIVATE: it is seen nowhere else
            _mount("overlay", str(parts["merged"]), "overlay", 0, layers)

        why = _fails(mount)
    return (
        f"mounts of overlayfs in {cache()} ({why}): run in a privileged container, or put XDG_CACHE_HOME on a disk"
        if why
        else ""
    )


def _cgroups() -> str:
    wanted, found = {"cpu", "memory", "cpuset"}, set()
    for mount, unified in cgroup_mounts():
        probe = mount / f"hotstage-probe-{os.getpid()}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            return f"writable cgroups ({error}): run in a privileged container that mounts /sys/fs/cgroup for writing"
        if not unified:
            found |= wanted & set(mount.name.split(","))
            continue
        offered = set((mount / "cgroup.controllers").read_text().split())
        given = set((mount / "cgroup.subtree_control").read_text().split())
        inner = (mount / "cgroup.type").exists() and bool((mount / "cgroup.procs").read_text().strip())
        if wanted & offered - given and inner:
            return (
                f"a cgroup without processes of its own: {mount} is a container's, and its processes keep controllers "
                "from its children; start the container with --cgroupns=host"
            )
        found |= wanted & offered
    lack = ", ".join(sorted(wanted - found))
    return f"the cgroup controllers {lack}: mount them below /sys/fs/cgroup" if lack else ""


def _memory() -> str:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(rows["MemAvailable"].split()[0]) << 10
    return _too_little("memory", free, MEMORY, "end what else runs, or use a bigger machine")


def _disk() -> str:
    need = DISK if is_built() else DISK_TO_BUILD
    return _too_little(
        f"disk below {cache()}", shutil.disk_usage(cache()).free, need, "make room, or set XDG_CACHE_HOME"
    )


def _packages() -> str:
    missing = missing_packages()
    if not missing or shutil.which("apt-get"):
        return ""
    return f"these programs' packages: {' '.join(missing)}; there is no apt-get here to install them: do it yourself"


def _ports() -> str:
    if Ledger.load() is not None:
        return ""  # a cluster's own, which stands or is swept
    for port in ETCD_PORTS:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind(("127.0.0.1", port))
            except OSError as error:
                return f"port {port} of loopback, for etcd ({error}): stop what listens there"
    return ""


def _too_little(what: str, free: int, need: int, mend: str) -> str:
    if free >= need:
        return ""
    return f"{what}: {free / GIB:.1f} GiB are free, {need / GIB:.0f} GiB are needed; {mend}"


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = [text.encode() for text in (source, target, kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), data.encode()) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _fails(trial: Callable[[], None]) -> str:
    """Why a trial fails in a child of its own, which takes what it made along; empty where it does not."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            trial()
        except OSError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as words:
        why = words.read().decode()
    os.waitpid(child, 0)
    return why
