"""What watching a gang of 1,000 pods costs: CPU time of the watching process alone, the API server in another one.

The launcher is asked as often as a driver ever asks it; while all is well that is more seldom
(flows/drive/loop.py). ``python -m tests.bench watch``.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from kubernetes.client import Configuration

from flows.drive.loop import POLL_S
from k8s.api import JOBS, PODS, Api
from k8s.kubeconfig import Access
from k8s.launcher import KubernetesLauncher
from k8s.watch import PACE
from tests.k8s.api_server import ApiServer, pod
from tests.k8s.test_launcher import launch_named
from trainer.launch import Launch

PODS_OF_THE_GANG = 1000
STEADY_S, STORM_S = 20.0, 60.0
SPACE = "train"
STORMS: dict[str, dict[str, tuple[int, str]]] = {
    "steady": {},
    "under a storm of 410s": {"watch": (410, "too old")},
    "under a storm of 500s": dict.fromkeys(("list", "watch", "get", "write"), (500, "etcd is away")),
}


@dataclass
class Server:
    """The API server's process."""

    url: str
    pipe: Connection

    def ask(self, what: str, *args: Any) -> Any:
        self.pipe.send((what, *args))
        return self.pipe.recv()


@contextmanager
def server() -> Iterator[Server]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    try:
        yield Server(here.recv(), here)
    finally:
        process.terminate()
        process.join()


def _serve(pipe: Connection) -> None:
    with ApiServer() as made:
        made.bookmark_s = 1.0
        pipe.send(made.url)
        while True:
            match pipe.recv():
                case ("run", count):
                    (job,) = made.named("jobs").values()
                    job["spec"]["completions"] = job["spec"]["parallelism"] = count
                    made.put(JOBS.path(SPACE), job)
                    for index in range(count):
                        item = pod(f"{job['metadata']['name']}-{index}-xxxxx", job, index)
                        # as much to read as a pod of a real server has
                        item["spec"] |= job["spec"]["template"]["spec"]
                        item["metadata"]["managedFields"] = [{"fieldsV1": {"f:spec": item["spec"]}}]
                        made.put(PODS.path(SPACE), item)
                    pipe.send(None)
                case ("storm", storms):
                    made.storms = dict(storms)
                    made.compact()  # ends the watches that stand
                    pipe.send(None)
                case ("requests",):
                    pipe.send(sum(made.requests.values()))


def measure() -> dict[str, tuple[float, float]]:
    """By weather: CPU seconds a second of this process, and requests a second that the API server got.

    Steady includes the share of the whole list that is read anew each ``PACE.relist_s``.
    """
    found = {}
    launch: Launch = launch_named()
    with server() as api:
        configuration = Configuration()
        configuration.host = api.url
        launcher = KubernetesLauncher(Api(Access(configuration)), SPACE)
        try:
            launcher.ensure(launch)
            api.ask("run", PODS_OF_THE_GANG)
            _whole(launcher, launch.launch_id)
            listing = _cost_of_listing(api.url)
            for weather, storms in STORMS.items():
                window_s = STORM_S if storms else STEADY_S
                if storms:
                    api.ask("storm", storms)
                before, asked = time.process_time(), api.ask("requests")
                end = time.monotonic() + window_s
                while time.monotonic() < end:
                    launcher.observe(launch.launch_id)
                    time.sleep(POLL_S)
                used = (time.process_time() - before) / window_s
                requests = (api.ask("requests") - asked) / window_s
                found[weather] = (used + (0.0 if storms else listing / PACE.relist_s), requests)
        finally:
            launcher.close()
    return found


def _whole(launcher: KubernetesLauncher, name: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while (view := launcher.observe(name)).state != "running" or len(view.nodes) != PODS_OF_THE_GANG:
        if time.monotonic() > deadline:
            raise SystemExit(f"the gang is not seen as a whole: {view.state}, {view.detail}")
        time.sleep(POLL_S)


def _cost_of_listing(url: str) -> float:
    """CPU seconds of one whole list."""
    configuration = Configuration()
    configuration.host = url
    other = KubernetesLauncher(Api(Access(configuration)), SPACE)
    before = time.process_time()
    _whole(other, launch_named().launch_id)
    other.close()
    return time.process_time() - before


if __name__ == "__main__":
    for name, (used, requests) in measure().items():
        print(f"{name:<24} {100 * used:6.2f} % of a core, {requests:.2f} requests a second")
