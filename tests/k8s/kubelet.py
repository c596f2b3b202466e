"""Job controller and kubelets of the in-process API server: pods of a Job become real processes of this machine.

A pod is a folder; its agent starts first (a sidecar: started again where it dies), its engine once the agent's socket
is there. The engine's end ends the pod, a failed pod ends its Job and the Job's other pods, as the rendered Job asks.
"""

from __future__ import annotations

import base64
import contextlib
import os
import signal
import subprocess
import sys
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k8s.labels import AGENT, ENGINE, INDEX
from k8s.render import KEY_FOLDER, METRICS_PORT, PORT_BASE, SOCKET, WORK
from tests.k8s.api_server import ApiServer, Json
from trainer.engine_path import engine_binary

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Pod:
    name: str
    index: int
    job: str
    collection: str
    folder: Path
    spec: Json
    agent: subprocess.Popen[bytes] | None = None
    engine: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    leaving: bool = False
    dead: bool = False
    """Its machine is gone: nobody starts, ends or says anything there."""
    status: Json = field(default_factory=dict)


class Kubelet:
    """``with Kubelet(server, folder)``: everything that it started is gone afterwards."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.pods: dict[str, Pod] = {}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)

    def __enter__(self) -> Kubelet:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for pod in self.pods.values():
            self.kill(pod)

    def of(self, index: int) -> Pod:
        """The running pod of an index."""
        return next(p for p in self.pods.values() if p.index == index and p.engine is not None and not p.leaving)

    def delete(self, pod: Pod) -> None:
        """What ``kubectl delete pod`` does."""
        with self.server.lock:
            item = self.server.objects[pod.collection, pod.name]
            self.server.put(
                pod.collection,
                {**item, "metadata": {**item["metadata"], "deletionTimestamp": "2026-01-01T00:05:00Z"}},
            )

    def kill(self, pod: Pod) -> None:
        """Its machine goes: every process at once, and its kubelet with them."""
        with self._lock:
            pod.dead = True
        for process in (pod.agent, pod.engine):
            if process is not None and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    # --- the loop -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(0.03):
            for name, job in self.server.named("jobs").items():
                self._job(name, job)
            there = self.server.named("pods")
            for pod in list(self.pods.values()):
                with self._lock:
                    self._pod(pod, there.get(pod.name))

    def _job(self, name: str, job: Json) -> None:
        conditions = {c["type"] for c in job.get("status", {}).get("conditions", ())}
        mine = {p.index: p for p in self.pods.values() if p.job == job["metadata"]["uid"]}
        path = f"/apis/batch/v1/namespaces/{job['metadata']['namespace']}/jobs"
        if job["spec"].get("suspend") or conditions:
            return
        pods = self.server.named("pods")
        phases = [pods.get(p.name, {}).get("status", {}).get("phase") for p in mine.values()]
        if "Failed" in phases or (mine and None in phases):
            self.server.change(path, name, conditions=[{"type": "FailureTarget", "status": "True", "reason": "x"}])
            for pod in mine.values():
                if (pods.get(pod.name, {}).get("status", {}).get("phase")) == "Running":
                    self.delete(pod)
            return
        if phases and all(phase == "Succeeded" for phase in phases) and len(phases) == job["spec"]["completions"]:
            self.server.change(path, name, conditions=[{"type": "Complete", "status": "True"}])
            return
        for index in range(job["spec"]["completions"]):
            if index not in mine:
                self._make(job, index)

    def _make(self, job: Json, index: int) -> None:
        meta = job["metadata"]
        collection = f"/api/v1/namespaces/{meta['namespace']}/pods"
        name = f"{meta['name']}-{index}-{uuid.uuid4().hex[:5]}"
        folder = self.folder / name
        (folder / "work").mkdir(parents=True)
        key = self.server.named("secrets")[f"{meta['name']}-key"]["data"]["launch.key"]
        (folder / "launch.key").write_bytes(base64.b64decode(key))
        labels = {**meta["labels"], INDEX: str(index), "batch.kubernetes.io/controller-uid": meta["uid"]}
        owner = {"kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}
        self.server.put(
            collection,
            {
                "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]},
                "spec": {"nodeName": f"machine-{index}"},
                "status": {"phase": "Pending"},
            },
        )
        self.pods[name] = Pod(name, index, meta["uid"], collection, folder, job["spec"]["template"]["spec"])

    def _pod(self, pod: Pod, item: Json | None) -> None:
        if pod.dead or pod.status.get("phase") in ("Failed", "Succeeded"):
            return
        if item is None or item["metadata"].get("deletionTimestamp"):
            self._leave(pod)
        if pod.agent is None or (pod.agent.poll() is not None and not pod.leaving):
            pod.restarts += pod.agent is not None
            pod.agent = self._start(pod, AGENT)
        if pod.engine is None and (pod.folder / "agent.sock").exists() and not pod.leaving:
            pod.engine = self._start(pod, ENGINE)
        ended = pod.engine is not None and pod.engine.poll() is not None
        if ended and pod.agent.poll() is None:
            pod.agent.terminate()
        self._tell(pod, ended and pod.agent.poll() is not None, item)

    def _leave(self, pod: Pod) -> None:
        if pod.leaving:
            return
        pod.leaving = True
        process = pod.engine or pod.agent
        if process is not None and process.poll() is None:
            process.terminate()

    def _tell(self, pod: Pod, over: bool, item: Json | None) -> None:
        agent = {
            "name": AGENT,
            "restartCount": pod.restarts,
            "state": {"running": {}} if not over else {"terminated": {}},
        }
        engine: Json = {"name": ENGINE, "restartCount": 0, "state": {"waiting": {"reason": "PodInitializing"}}}
        phase = "Pending"
        if pod.engine is not None:
            code = pod.engine.poll()
            phase = "Running"
            engine["state"] = {"running": {}}
            if code is not None:
                engine["state"] = {"terminated": {"exitCode": code if code >= 0 else 128 - code, "reason": "Error"}}
                phase = ("Succeeded" if code == 0 else "Failed") if over else "Running"
        status = {"phase": phase, "initContainerStatuses": [agent], "containerStatuses": [engine]}
        if status == pod.status or item is None:
            return
        pod.status = status
        with contextlib.suppress(KeyError):
            self.server.change(pod.collection, pod.name, **status)
        if phase in ("Succeeded", "Failed") and pod.leaving:
            self.server.remove(pod.collection, pod.name)

    def _start(self, pod: Pod, which: str) -> subprocess.Popen[bytes]:
        group = "initContainers" if which == AGENT else "containers"
        container = next(c for c in pod.spec[group] if c["name"] == which)
        words = {"$(JOB_COMPLETION_INDEX)": str(pod.index), "$(POD_IP)": "127.0.0.1", SOCKET: "agent.sock"}
        # these pods share the machine's one address
        words |= {
            str(PORT_BASE): "0",
            f"$(POD_IP):{METRICS_PORT}": "127.0.0.1:0",
            WORK: str(pod.folder / "work"),
            f"{KEY_FOLDER}/launch.key": str(pod.folder / "launch.key"),
        }
        args = [words.get(arg, arg) for arg in container["args"]]
        program = [sys.executable, "-m", "checkpoint.agent"] if which == AGENT else [str(engine_binary())]
        env: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(pod.folder / f"{which}.log", "ab") as log:
            return subprocess.Popen(
                [*program, *args], cwd=pod.folder, env=env, stdout=log, stderr=log, start_new_session=True
            )
