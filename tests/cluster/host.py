"""What the cluster takes from the machine, and how all of it is given back.

Everything that outlives a process is found again without a memory of the run that made it:

- processes carry MARK in their environment (a containerd shim inherits it) and stand in the ledger, where a number
  counts only together with the process's start time; containers are in the cgroups ``/hotstage-node*``;
- mounts lie below the scratch folder or below STATE; bridges, the second node's namespace and cgroups have fixed names;
- what the machine's own settings were before stands in the ledger.

So ``sweep`` undoes a cluster that crashed at any point. One cluster on a machine at a time: the names are fixed.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.support.go import cache

STATE = Path("/run/hotstage-cluster")  # of the machine, not of a user: so are the names below
LOCK = Path("/run/hotstage-cluster.lock")
MARK = "HOTSTAGE_TEST_CLUSTER"
BRIDGES = ("hs-k0", "hs-k1")
UPLINKS = ("hs-u0", "hs-u1")
NAMESPACE = "hotstage-node2"
CGROUPS = ("hotstage-node1", "hotstage-node2")
PACKAGES = {  # what is looked for -> the Debian package that has it
    "containerd": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
    "buildah": "buildah",
    "iptables": "iptables",
    "nft": "nftables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "sysctl": "procps",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "gcc": "gcc",
}


class ClusterError(Exception):
    """The cluster cannot be had here; the text says what is wrong and the mend."""


def wait_for(ready: Callable[[], bool], what: str, seconds: float, detail: Callable[[], str] = str) -> None:
    """Poll until ``ready``; ClusterError with ``detail`` at the deadline."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:.0f} s for {what} in vain\n{detail()}".rstrip())
        time.sleep(0.05)  # between two looks at the condition


def call(*args: str, check: bool = True, stdin: str | None = None, seconds: float = 300) -> str:
    """Run a program of the host to its end; ClusterError with its own words where it fails and ``check``."""
    done = subprocess.run(args, capture_output=True, text=True, input=stdin, timeout=seconds)
    if check and done.returncode != 0:
        raise ClusterError(f"{' '.join(args)}: code {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def missing_packages() -> list[str]:
    """The Debian packages of what is looked for and not here."""
    return sorted({p for what, p in PACKAGES.items() if not (Path(what).exists() or shutil.which(what))})


def install_packages(say: Callable[[str], None]) -> None:
    """Install what Debian packages this machine lacks."""
    missing = missing_packages()
    if not missing:
        return
    say(f"installing Debian packages: {' '.join(missing)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "-q", *command], env=env, capture_output=True, text=True)
        if done.returncode != 0:
            words = (done.stdout + done.stderr)[-2000:]
            raise ClusterError(f"apt-get {' '.join(command)} failed; install the packages yourself:\n{words}")


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One process at a time makes or unmakes the cluster."""
    with open(LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- processes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """A process that cannot be mistaken for another: its number and its start, in clock ticks since boot."""

    pid: int
    start: int

    def alive(self) -> bool:
        return start_of(self.pid) == self.start

    def send(self, number: signal.Signals) -> None:
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start_of(pid: int) -> int | None:
    """Start time of a process that runs; None of one that is gone or only waits to be reaped."""
    with contextlib.suppress(ChildProcessError, OSError):
        os.waitpid(pid, os.WNOHANG)  # where it was this process's own child
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def myself() -> Started:
    pid = os.getpid()
    return Started(pid, start_of(pid) or 0)


def marked() -> dict[int, str]:
    """Processes of a cluster (this one's or a crashed one's) by their command lines."""
    found = {}
    mark = f"{MARK}=".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if any(item.startswith(mark) for item in (entry / "environ").read_bytes().split(b"\0")):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return {pid: line for pid, line in found.items() if start_of(pid) is not None}


# --- the ledger -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A process of the cluster and how it is started, so that a test may stop it and start it again."""

    name: str
    command: tuple[str, ...]
    log: str
    process: Started


@dataclass
class Ledger:
    """What stands: kept in ``STATE/ledger.json`` from before the first thing is made."""

    scratch: Path
    owner: Started | None = None  # whose end ends the cluster; None: it stays until `down`
    ready: bool = False
    parts: dict[str, Part] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)  # as they were
    rules: list[list[str]] = field(default_factory=list)  # of iptables' FORWARD chain, added

    FILE = STATE / "ledger.json"

    def save(self) -> None:
        STATE.mkdir(mode=0o700, parents=True, exist_ok=True)
        value = {
            "scratch": str(self.scratch),
            "owner": asdict(self.owner) if self.owner else None,
            "ready": self.ready,
            "parts": [asdict(part) for part in self.parts.values()],
            "sysctls": self.sysctls,
            "rules": self.rules,
        }
        partial = self.FILE.with_suffix(".new")
        partial.write_text(json.dumps(value, indent=1))
        os.replace(partial, self.FILE)

    @classmethod
    def load(cls) -> Ledger | None:
        """What was made last; None where nothing was."""
        try:
            value = json.loads(cls.FILE.read_text())
        except (OSError, ValueError):
            return None
        parts = [
            Part(p["name"], tuple(p["command"]), p["log"], Started(p["process"]["pid"], p["process"]["start"]))
            for p in value["parts"]
        ]
        owner = Started(**value["owner"]) if value["owner"] else None
        return cls(
            Path(value["scratch"]), owner, value["ready"], {p.name: p for p in parts}, value["sysctls"], value["rules"]
        )

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None) -> Part:
        """Start a part in a session of its own, its words appended to ``logs/<name>.log``; it outlives this process.

        It comes before what is trained in the cluster: a kubelet that is not heard of in time loses its pods. What a
        containerd starts has its priority, so that one is like any other.
        """
        log = self.scratch / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # nothing of the user's environment: a proxy for one would swallow the talk with the API server
        clean = {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin", "HOME": str(self.scratch)}
        first = () if name.startswith("containerd") else ("nice", "-n", "-10")
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [*first, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.scratch,
                env={**clean, **(env or {}), MARK: str(self.scratch)},
                start_new_session=True,
            )
        part = Part(name, tuple(command), str(log), Started(process.pid, start_of(process.pid) or 0))
        self.parts[name] = part
        self.save()
        return part

    def tail(self, *names: str, lines: int = 12) -> str:
        """The last words of these parts."""
        text = []
        for name in names:
            with contextlib.suppress(OSError, KeyError):
                last = Path(self.parts[name].log).read_text(errors="replace").splitlines()[-lines:]
                state = "runs" if self.parts[name].process.alive() else "HAS ENDED"
                text += [f"--- {name} ({state}), {self.parts[name].log}", *last]
        return "\n".join(text)

    def sysctl(self, key: str, value: str) -> None:
        """Set a setting of the machine; ``sweep`` sets it back."""
        path = Path("/proc/sys") / key.replace(".", "/")
        before = path.read_text().strip()
        if before != value:
            self.sysctls.setdefault(key, before)
            self.save()
            path.write_text(value)


# --- cgroups ----------------------------------------------------------------------------------------------


def cgroup_mounts() -> list[tuple[Path, bool]]:
    """Where cgroups are mounted; True for version 2, which beside version 1 has no controllers."""
    rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [(Path(row[1]), row[2] == "cgroup2") for row in rows if row[2] in ("cgroup", "cgroup2")]


def make_cgroup(name: str) -> None:
    """A cgroup of this name under every controller, fit for children of its own."""
    for mount, unified in cgroup_mounts():
        group = mount / name
        group.mkdir(exist_ok=True)
        if unified and (mount / "cgroup.controllers").read_text().strip():
            enable = " ".join(f"+{c}" for c in (mount / "cgroup.controllers").read_text().split())
            for folder in (mount, group):
                (folder / "cgroup.subtree_control").write_text(enable)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # version 1 starts with none
            if not unified and (group / setting).exists():
                (group / setting).write_text((mount / setting).read_text())


def cgroup_processes(name: str) -> set[int]:
    """Every process in the cgroup or below it."""
    found: set[int] = set()
    for mount, _ in cgroup_mounts():
        for file in (mount / name).glob("**/cgroup.procs"):
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in file.read_text().split()}
    return {pid for pid in found if start_of(pid) is not None}


def _is_empty(name: str) -> bool:
    return not cgroup_processes(name)


def _remove_cgroup(name: str) -> None:
    for mount, _ in cgroup_mounts():
        folders = [Path(folder) for folder, _, _ in os.walk(mount / name, topdown=False)]
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()


# --- undoing ----------------------------------------------------------------------------------------------


def sweep() -> list[str]:
    """Undo whatever of a cluster stands on this machine, however it came to be left; what was found, in words.

    Safe to repeat. Only what carries the cluster's mark or names is touched.
    """
    ledger = Ledger.load()
    found: list[str] = []
    # the ledger goes last: a sweep that fails is repeated with it
    scratch = [*([ledger.scratch] if ledger else []), cache() / "cluster", STATE]
    # nobody may start or repair anything while the rest is taken away: kubelets, then containers, shims, and all others
    killed = _kill(lambda: [pid for pid, line in marked().items() if " kubelet " in f" {line} "], "kubelets")
    killed += _kill(lambda: [pid for name in CGROUPS for pid in cgroup_processes(name)], "containers")
    killed += _kill(lambda: [pid for pid, line in marked().items() if "containerd-shim" in line], "shims")
    killed += _kill(lambda: list(marked()), "the cluster's processes")
    if killed:
        found.append(f"{killed} processes")
    _remove_shim_sockets(scratch)
    mounts = _mounts_below(scratch)
    for point in mounts:
        call("umount", "-l", point, check=False)
    if mounts:
        found.append(f"{len(mounts)} mounts")
    for name in (*UPLINKS, *BRIDGES):
        if Path(f"/sys/class/net/{name}").exists():
            call("ip", "link", "delete", name, check=False)
            found.append(f"interface {name}")
    if Path(f"/run/netns/{NAMESPACE}").exists():
        call("ip", "netns", "delete", NAMESPACE)
        found.append(f"namespace {NAMESPACE}")
    if shutil.which("nft"):  # kube-proxy's; those of node 2 went with its namespace
        for family in ("ip", "ip6"):
            call("nft", "delete", "table", family, "kube-proxy", check=False)
    for name in CGROUPS:
        if any((mount / name).exists() for mount, _ in cgroup_mounts()):
            wait_for(functools.partial(_is_empty, name), f"the cgroup {name} to empty", 10)
            _remove_cgroup(name)
            found.append(f"cgroup {name}")
    if ledger:
        for rule in ledger.rules:
            call("iptables", "-w", "-D", "FORWARD", *rule, check=False)
        for key, value in ledger.sysctls.items():
            (Path("/proc/sys") / key.replace(".", "/")).write_text(value)
    _remove_log_links(scratch)
    # kubelet has one place for these, whatever its root; before STATE goes, which says whose they are
    for name in ("kubelet.sock", "kubelet_internal_checkpoint"):
        (Path("/var/lib/kubelet/device-plugins") / name).unlink(missing_ok=True)
    left = _mounts_below(scratch)
    if left:  # a folder is not removed through a mount
        raise ClusterError(
            f"these mounts of the cluster cannot be taken away: {' '.join(left)}; unmount them, then again"
        )
    for folder in scratch:
        wait_for(functools.partial(_removed, folder), f"{folder} to be removed", 20)
    for place in ("/var/lib/kubelet/device-plugins", "/var/lib/kubelet", "/var/log/containers", "/var/log/pods"):
        with contextlib.suppress(OSError):  # only where it is empty: the cluster made it
            Path(place).rmdir()
    return found


def _kill(which: Callable[[], list[int]], what: str) -> int:
    """SIGKILL them, and what they start meanwhile, until there is none."""
    killed: set[int] = set()

    def none_left() -> bool:
        pids = which()
        for pid in pids:
            killed.add(pid)
            for number in (signal.SIGKILL, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        return not pids

    wait_for(none_left, f"{what} to end", 20, lambda: str(which()))
    return len(killed)


def _mounts_below(folders: Sequence[Path]) -> list[str]:
    """Mount points below these folders, the newest first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")  # a space is \040
        if any(Path(point).is_relative_to(folder) for folder in folders):
            points.append(point)
    return points[::-1]


def _removed(folder: Path) -> bool:
    """Again, where something was still written there meanwhile."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def _remove_shim_sockets(folders: Sequence[Path]) -> None:
    """containerd's shims listen below /run/containerd, wherever the daemon's folders are; a bundle names its socket."""
    for folder in folders:
        for file in folder.glob("*/containerd/io.containerd.runtime.v2.task/*/*/address"):
            with contextlib.suppress(OSError):
                Path(file.read_text().strip().removeprefix("unix://")).unlink(missing_ok=True)
    for path in Path("/run/containerd/s").glob("*"):  # of a shim that was killed before its bundle named its socket
        if _is_dead_socket(path):
            path.unlink(missing_ok=True)
    for name in ("/run/containerd/s", "/run/containerd"):
        with contextlib.suppress(OSError):
            Path(name).rmdir()


def _is_dead_socket(path: Path) -> bool:
    """Nobody listens there, in whatever network namespace; another containerd's live ones are not touched."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(1)
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _remove_log_links(folders: Sequence[Path]) -> None:
    """kubelet links each container's log from /var/log/containers."""
    place = Path("/var/log/containers")
    for link in place.iterdir() if place.exists() else ():
        if link.is_symlink() and any(Path(os.readlink(link)).is_relative_to(folder) for folder in folders):
            link.unlink()
