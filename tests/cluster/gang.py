"""What tests of runs on the cluster share: a namespace with the launcher's Role and the store's Secret, the real
command against them with that account's rights and no others, and eyes and hands on the pods' processes.

Nodes of a cluster of our own are this machine, so pods' processes are found by their cgroup and killed like any other.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.log import RunLog, RunState
from checkpoint.store import open_store
from k8s.doctor import RIGHTS
from tests.cluster.cluster import ROOT, Cluster
from tests.support.chaos import _PAGE, _page_of
from tests.support.place import TEXT, Done, Place, finish
from tests.support.s3_server import S3Server

STEPS = 600
SPEC = f"""
name = "gang"
[model]
family = "gpt2"
layers = 4
width = 32
heads = 4
context = 32
[data]
source = "text:corpus/*.txt"
vocab_size = 300
[train]
steps = {STEPS}
batch = 8
microbatch = 2
sequence = 32
seed = 3
[parallel]
stages = 4
threads = 1
[checkpoint]
every = 20
commit_s = 20.0
[launch]
target = "kubernetes"
nodes = 2
store_secret = "store"
stall_s = 15.0
connect_s = 40.0
toleration_s = 2
[launch.resources]
cpu = "400m"
[launch.agent_resources]
cpu = "400m"
[recovery]
backoff_s = 0.05
"""
RULES = [{"apiGroups": [group], "resources": [resource], "verbs": list(verbs)} for group, resource, verbs in RIGHTS]
FAULTS = ROOT / "out" / "faults.json"
assert TEXT


def until(true: Callable[[], object], what: str, seconds: float = 60.0, detail: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}\n{detail()}"
        time.sleep(0.05)


@dataclass
class Gang:
    """One run in a namespace of its own. ``sets`` are --set of every command."""

    cluster: Cluster
    place: Place
    namespace: str
    s3: S3Server
    sets: list[str] = field(default_factory=list)
    drivers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        return [item for text in [f"launch.namespace={self.namespace}", *self.sets] for item in ("--set", text)]

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """A driver, attached to whatever runs."""
        driver = self.place.start("train", "spec.toml", "--no-prefect", "--json", *self.arguments, *more)
        self.drivers.append(driver)
        return driver

    def call(self, *args: str, seconds: float = 120.0) -> Done:
        return self.place.call(*args, seconds=seconds)

    def state(self) -> RunState:
        with self.s3.identity("trainer"):
            store = open_store(self.store_url)
        names = [info.key.removeprefix("index/") for info in store.list("index/")]
        return RunLog(store, names[0]).fold() if names else RunState(run="")

    @property
    def store_url(self) -> str:
        return self.place.env["HOTSTAGE_STORE"]

    def attempts(self) -> int:
        return len(self.state().attempts)

    # --- pods and their processes -------------------------------------------------------------------------

    def kubectl(self, *args: str, **more: Any) -> str:
        return self.cluster.kubectl("-n", self.namespace, *args, **more)

    def pods(self) -> list[dict[str, Any]]:
        return list(self.cluster.get("-n", self.namespace, "pods")["items"])

    def pod(self, index: int) -> dict[str, Any]:
        """The newest running pod of an index."""
        mine = [
            p
            for p in self.pods()
            if p["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index") == str(index)
            and p["status"].get("phase") == "Running"
            and not p["metadata"].get("deletionTimestamp")
        ]
        return max(mine, key=lambda p: str(p["metadata"]["creationTimestamp"]))

    def jobs(self) -> list[str]:
        return [j["metadata"]["name"] for j in self.cluster.get("-n", self.namespace, "jobs")["items"]]

    def processes(self, index: int) -> dict[int, list[str]]:
        """Processes of a pod, by their numbers on this machine, with their arguments."""
        uid = self.pod(index)["metadata"]["uid"]
        marks = (f"pod{uid}", f"pod{uid.replace('-', '_')}")
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if any(mark in (entry / "cgroup").read_text() for mark in marks):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
        return found

    def rank(self, number: int) -> int:
        """The process of a rank."""
        for pid, args in self.processes(number // 2).items():
            if args[1:2] == ["rank"] and "--rank" in args and args[args.index("--rank") + 1] == str(number):
                return pid
        raise AssertionError(f"rank {number} does not run")

    def supervisor(self, index: int) -> int:
        return next(pid for pid, args in self.processes(index).items() if args[1:2] == ["node"])

    def agent(self, index: int) -> int:
        return next(pid for pid, args in self.processes(index).items() if "checkpoint.agent" in args)

    def step(self, number: int = 0) -> int:
        """The step that a rank is in, from its own page; -1 where it does not run."""
        try:
            return step_of(self.rank(number))
        except (AssertionError, ValueError):
            return -1

    def reached(self, step: int, seconds: float = 90.0) -> None:
        until(lambda: self.step() >= step, f"step {step}", seconds, self.picture)

    def picture(self) -> str:
        """What a person would look at first."""
        driver = self.drivers[-1] if self.drivers else None
        said = ""
        if driver is not None and driver.poll() is not None:
            said = (driver.stderr.read() if driver.stderr else b"").decode()[-2000:]
        return self.kubectl("get", "pods,jobs", "-o", "wide", check=False) + said


def step_of(pid: int) -> int:
    """The step that a rank's process is in; -1 where it is gone."""
    page = _page_of(pid)
    if page is None:
        return -1
    try:
        return int(_PAGE.unpack(os.pread(page, _PAGE.size, 0))[1])
    except OSError:
        return -1
    finally:
        os.close(page)


@contextmanager
def gang(cluster: Cluster, folder: Path, s3: S3Server, sets: list[str] | None = None) -> Iterator[Gang]:
    """A fresh namespace, store prefix and place; everything is gone afterwards."""
    with cluster.namespace("gang") as namespace:
        config = cluster.account(namespace, "launcher", RULES)
        url = s3.url(namespace)
        env = {
            **{k: v for k, v in cluster.environment(config).items() if k != "HOME"},
            **s3.environment("trainer"),
        }
        place = Place(folder, SPEC, store=url, env=env)
        secret(cluster, namespace, "store", s3.environment("trainer"))
        made = Gang(cluster, place, namespace, s3, list(sets or ()))
        try:
            yield made
        finally:
            for driver in made.drivers:
                if driver.poll() is None:
                    driver.kill()
                    driver.wait()
            place.stop_all()


def secret(cluster: Cluster, namespace: str, name: str, values: dict[str, str]) -> None:
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    data = {key: base64.b64encode(values[key].encode()).decode() for key in keys}
    meta = {"name": name, "namespace": namespace}
    cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": data}, args=("--force-conflicts",))


def ended(driver: subprocess.Popen[bytes], seconds: float = 150.0) -> dict[str, Any]:
    """The driver's own outcome."""
    done = finish(driver, seconds)
    assert done.out.strip(), f"code {done.code}\n{done.err}"
    return dict(json.loads(done.out))


def record(fault: str, diagnosis: str, result: dict[str, Any], digest: str) -> None:
    """A row of out/faults.json."""
    rows = json.loads(FAULTS.read_text()) if FAULTS.exists() else []
    rows = [row for row in rows if row["fault"] != fault]
    rows.append(
        {
            "fault": fault,
            "diagnosis": diagnosis,
            "attempts": result["attempts"],
            "lost_steps": result["lost_steps"],
            "digest_equal": result["state_digest"] == digest,
            "recovery_s": result["recovery_s"],
        }
    )
    FAULTS.parent.mkdir(parents=True, exist_ok=True)
    FAULTS.write_text(json.dumps(sorted(rows, key=lambda row: str(row["fault"])), indent=1) + "\n")


def send(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)
