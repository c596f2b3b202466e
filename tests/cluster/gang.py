"""What tests of runs on the cluster share: a namespace with the launcher's Role and the store's Secret, the real
command against them with that account's rights and no others, and eyes and hands on the pods' processes.

Nodes of a cluster of our own are this machine, so pods' processes are found by their cgroup and killed like any other.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.log import RunLog, RunState
from checkpoint.store import open_store
from flows.drive.live import MetricsReader
from k8s.doctor import RIGHTS
from tests.cluster.cluster import ROOT, Cluster
from tests.support import chaos
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
cpu = "200m"
[launch.agent_resources]
cpu = "200m"
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
    reached_step: int = -1
    struck_at: float = 0.0
    slowed: list[tuple[Path, bool]] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        return [item for text in [f"launch.namespace={self.namespace}", *self.sets] for item in ("--set", text)]

    def start(self, *first: str) -> subprocess.Popen[bytes]:
        """A driver, attached to whatever runs; ``first``: options of the command itself."""
        return self.drive(*first, "train", "spec.toml", "--no-prefect", "--json", *self.arguments)

    def resume(self, run: str, *sets: str) -> subprocess.Popen[bytes]:
        """A driver of a run that had ended, with these overrides."""
        more = [item for text in sets for item in ("--set", text)]
        return self.drive("runs", "resume", run, "--no-prefect", "--json", *more)

    def drive(self, *args: str) -> subprocess.Popen[bytes]:
        """A command of the run's; what it says goes to a file, so that it never waits for a reader."""
        with open(self.place.folder / f"driver-{len(self.drivers)}.log", "wb") as log:
            driver = self.place.start(*args, err=log)
        self.drivers.append(driver)
        return driver

    def said(self, driver: subprocess.Popen[bytes]) -> str:
        return (self.place.folder / f"driver-{self.drivers.index(driver)}.log").read_text(errors="replace")

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
        return list(self.cluster.get("pods", n=self.namespace)["items"])

    def pod(self, index: int) -> dict[str, Any]:
        """The newest pod of an index that has not ended; its status may lag behind what its processes do."""
        mine = [
            p
            for p in self.pods()
            if p["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index") == str(index)
            and p["status"].get("phase") not in ("Succeeded", "Failed")
            and not p["metadata"].get("deletionTimestamp")
        ]
        assert mine, f"no pod of index {index}\n{self.picture()}"
        return max(mine, key=lambda p: str(p["metadata"]["creationTimestamp"]))

    def jobs(self) -> list[str]:
        return [j["metadata"]["name"] for j in self.cluster.get("jobs", n=self.namespace)["items"]]

    def processes(self, index: int) -> dict[int, list[str]]:
        """Processes of the pod of an index, by their numbers on this machine, with their arguments."""
        return self.processes_of(self.pod(index))

    def processes_of(self, pod: Mapping[str, Any]) -> dict[int, list[str]]:
        """The same, of this very pod."""
        uid = pod["metadata"]["uid"]
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

    def strike(self, fault: Callable[[Gang], object]) -> None:
        """Let it happen; what was reached and when is kept for ``recovery_s`` and ``lost_steps``."""
        pids = [pid for index in range(2) for pid, args in self.processes(index).items() if args[1:2] == ["rank"]]
        self.reached_step, self.struck_at = max(map(step_of, pids), default=0) - 1, time.time()
        fault(self)

    def slow(self) -> None:
        """Give each engine 2 ms of a processor in a second, so that training takes minutes."""
        self.slowed = [group_of(self.supervisor(index), "cpu") for index in range(2)]
        for group, first in self.slowed:
            if first:
                (group / "cpu.cfs_period_us").write_text("1000000")
                (group / "cpu.cfs_quota_us").write_text("2000")
            else:
                (group / "cpu.max").write_text("2000 1000000")

    def full_speed(self) -> None:
        """And all of it again."""
        for group, first in self.slowed:
            (group / ("cpu.cfs_quota_us" if first else "cpu.max")).write_text("-1" if first else "max")

    def lost_steps(self) -> int:
        """Steps that were done before it struck, and done again."""
        attempts = self.state().attempts
        if self.struck_at == 0.0 or len(attempts) < 2:
            return 0
        done = [int(line["step"]) for line in self.steps_of(attempts[-2].epoch)]
        return max(0, max([self.reached_step, *done]) - attempts[-1].step)

    def recovery_s(self) -> float | None:
        """From the strike to the end of the first step after it, both by this machine's clock."""
        attempts = self.state().attempts
        if self.struck_at == 0.0 or len(attempts) < 2:
            return None
        ends = [float(line["time"]) for line in self.steps_of(attempts[-1].epoch)]
        return round(min(ends) - self.struck_at, 2) if ends else None

    def steps_of(self, epoch: int) -> list[dict[str, Any]]:
        """The lines of metrics of an attempt."""
        with self.s3.identity("trainer"):
            lines = MetricsReader(open_store(self.store_url), self.state().run).poll([epoch])
        return [line for line in lines if line.get("event") == "step"]

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
        said = self.said(self.drivers[-1])[-2000:] if self.drivers else ""
        return self.kubectl("get", "pods,jobs", "-o", "wide", check=False) + said


def step_of(pid: int) -> int:
    """The step that a rank's process is in; -1 where it is gone."""
    step = chaos.step_of(pid)
    return -1 if step is None else step


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
    cluster.put({"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": data})


def ended(driver: subprocess.Popen[bytes], seconds: float = 150.0) -> dict[str, Any]:
    """The driver's own outcome."""
    done = finish(driver, seconds)
    assert done.out.strip(), f"{driver.args} ended with {done.code}, without a result"
    return dict(json.loads(done.out))


@dataclass
class Table:
    """out/faults.json: the rows of this session, whichever of its processes they come from, and no others."""

    @staticmethod
    def begin(_: Path) -> bool:
        """Without what another session left."""
        FAULTS.unlink(missing_ok=True)
        return True

    def add(self, fault: str, diagnosis: str, one: Gang, result: Mapping[str, Any], digest: str) -> None:
        row = {
            "fault": fault,
            "diagnosis": diagnosis,
            "attempts": result["attempts"],
            "lost_steps": one.lost_steps(),
            "digest_equal": result["state_digest"] == digest,
            "recovery_s": one.recovery_s(),
        }
        FAULTS.parent.mkdir(parents=True, exist_ok=True)
        with FAULTS.with_suffix(".lock").open("w") as lock:  # other processes of the session write theirs
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = json.loads(FAULTS.read_text()) if FAULTS.exists() else []
            FAULTS.write_text(json.dumps([*rows, row], indent=1) + "\n")


def group_of(pid: int, controller: str) -> tuple[Path, bool]:
    """The control group of a process for a controller, and whether that is one of version 1."""
    rows = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    for _, controllers, name in rows:
        if controller in controllers.split(","):
            return Path("/sys/fs/cgroup") / controller / name.lstrip("/"), True
    name = next(name for _, controllers, name in rows if not controllers)
    return Path("/sys/fs/cgroup") / name.lstrip("/"), False


HOG = """
import os, re, sys
from pathlib import Path
group, events = Path(sys.argv[1]), sys.argv[2]
def kills():
    return int(re.search(r"^oom_kill (\\d+)", (group / events).read_text(), re.M)[1])
before, held = kills(), []
(group / "cgroup.procs").write_text(str(os.getpid()))
while kills() == before:
    held.append(bytearray(os.urandom(1)) * 16384)
"""


def fill_memory(pid: int) -> None:
    """Fill the container of this process until the kernel kills one of its processes, this one before others."""
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")
    group, first = group_of(pid, "memory")
    events = "memory.oom_control" if first else "memory.events"
    subprocess.run([sys.executable, "-c", HOG, str(group), events], check=True, timeout=60)


def send(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)
