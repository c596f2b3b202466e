"""A cluster of our own leaves nothing behind: not after its end, not when interrupted, not when killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import cluster as room
from tests.cluster import host
from tests.cluster.conftest import holding
from tests.cluster.host import BRIDGES, CGROUPS, NAMESPACE, STATE, UPLINKS, Ledger, wait_for
from tests.support.go import cache

USER = """
import subprocess, sys
from tests.cluster.cluster import cluster
with cluster() as made:
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    subprocess.Popen(["sleep", "1000"], env=made.environment(), start_new_session=True, **quiet)  # it goes too
    print("up", flush=True)
    sys.stdin.read()
"""


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(scope="module", autouse=True)
def _machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No process of the session may bring its cluster up meanwhile."""
    with holding(tmp_path_factory, "machine", alone=True):
        yield


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """These need the machine to themselves."""
    if os.environ.get("HOTSTAGE_KUBECONFIG") or os.geteuid() != 0:
        pytest.skip("about clusters that are brought up here")
    if Ledger.load() is not None:
        pytest.skip("a cluster stands here that is not ours to take down (make cluster-down)")
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()
    room.down()


READ_ONLY = 'for m in /sys/fs/cgroup /sys/fs/cgroup/*; do mount -o bind,remount,ro $m 2>/dev/null; done; exec "$@"'
PREFLIGHT = (sys.executable, "-m", "tests.cluster", "preflight")


@pytest.mark.parametrize(
    ("within", "lack"),
    [
        (("setpriv", "--bounding-set=-sys_admin,-net_admin", "--inh-caps=-all"), "network namespaces and bridges"),
        (("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all"), "mounts of overlayfs"),
        (("unshare", "-m", "sh", "-c", READ_ONLY, "-"), "writable cgroups"),
        (("env", "PATH=/nowhere"), "containerd"),
        ((), ""),
    ],
)
def test_a_machine_that_cannot_carry_one_says_what_it_lacks(within: tuple[str, ...], lack: str) -> None:
    done = subprocess.run([*within, *PREFLIGHT], cwd=room.ROOT, capture_output=True, text=True)
    assert done.returncode == (69 if lack else 0), done.stderr
    assert lack in done.stderr


def traces() -> list[str]:
    """Whatever of a cluster is on this machine."""
    found = [f"process {pid}: {line}" for pid, line in host.marked().items()]
    found += [name for name in (*BRIDGES, *UPLINKS) if Path(f"/sys/class/net/{name}").exists()]
    places = [STATE, cache() / "cluster", Path("/run/netns") / NAMESPACE, Path("/run/containerd/s")]
    found += [str(path) for path in places if path.exists()]
    found += [str(path) for name in CGROUPS for path in Path("/sys/fs/cgroup").glob(f"*/{name}")]
    found += [line for line in host.call("nft", "list", "tables").splitlines() if "kube-proxy" in line]
    found += [
        line
        for line in Path("/proc/mounts").read_text().splitlines()
        if "hotstage-cluster" in line or str(cache() / "cluster") in line
    ]
    return found


def user() -> subprocess.Popen[str]:
    """A process that has a cluster until it is told otherwise, or its test ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", USER],
        cwd=room.ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def until_up(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    if process.stdout.readline() != "up\n":
        raise AssertionError(process.stderr.read())


def test_nothing_is_left_after_its_end() -> None:
    before = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    process = user()
    until_up(process)
    assert {"etcd", "apiserver", "kubelet-node2"} <= set((Ledger.load() or Ledger(Path())).parts)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert traces() == []
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("part", ["containerd-node1", "kubelet-node1"])
def test_nothing_is_left_where_it_is_interrupted_while_it_comes_up(number: signal.Signals, part: str) -> None:
    process = user()

    def begun() -> bool:
        ledger = Ledger.load()
        return ledger is not None and part in ledger.parts

    wait_for(begun, part, 120)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert traces() == []


def test_a_guard_takes_it_down_where_its_user_is_killed() -> None:
    process = user()
    until_up(process)
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not traces(), "the guard to clean up", 60, lambda: "\n".join(traces()))


def test_the_next_one_cleans_up_where_the_guard_is_killed_too() -> None:
    process = user()
    until_up(process)
    for pid in guards():
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate(timeout=60)
    assert traces() != []
    with room.cluster() as after:
        assert {n["metadata"]["name"] for n in after.get("nodes")["items"]} == set(after.nodes)
        assert after.get("namespaces", "default")["metadata"]["name"] == "default"
    assert traces() == []


def test_only_one_process_at_a_time_has_it() -> None:
    process = user()
    until_up(process)
    ledger = Ledger.load()
    assert ledger is not None
    with pytest.raises(host.ClusterError, match=f"process {process.pid} uses the test cluster"):
        room.up()
    process.communicate(timeout=60)


def guards() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"tests.cluster" in line and b"guard" in line:
                found.append(int(entry.name))
    return found
