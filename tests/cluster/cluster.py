"""A real Kubernetes of two nodes on this machine, or the one that HOTSTAGE_KUBECONFIG names.

    with cluster() as kube:             # up where none stands, taken down again by whom it was brought up
        kube.load_image(archive)
        with kube.namespace("faults") as name:
            kube.kubectl("-n", name, "get", "pods")

Order of the calls in ``up``: sweep what a crash left, network, containerds with the pause image, etcd and API server,
the rest of the control plane, kubelets; Ready is waited for. A guard process takes the cluster down where its owner is
killed before it could.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import os
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from k8s.api import Api
from k8s.errors import Missing
from tests.cluster import control, node, pause, preflight
from tests.cluster.build import binary, say
from tests.cluster.host import (
    MARK,
    ClusterError,
    Ledger,
    Part,
    Started,
    call,
    install_packages,
    locked,
    myself,
    sweep,
    wait_for,
)
from tests.support.go import cache
from trainer.errors import LaunchError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Cluster:
    """A cluster that answers. ``own`` is False of one that HOTSTAGE_KUBECONFIG names: its parts cannot be stopped."""

    kubeconfig: Path
    own: bool
    scratch: Path
    nodes: tuple[str, ...]
    program: tuple[str, ...] = field(repr=False)  # kubectl

    def told(self) -> dict[str, Any]:
        """The cluster as JSON keeps it, for another process; ``again`` makes a Cluster of it."""
        paths = {"kubeconfig": str(self.kubeconfig), "scratch": str(self.scratch)}
        return {**paths, "own": self.own, "nodes": list(self.nodes), "program": list(self.program)}

    @classmethod
    def again(cls, told: Mapping[str, Any]) -> Cluster:
        paths = Path(told["kubeconfig"]), told["own"], Path(told["scratch"])
        return cls(*paths, tuple(told["nodes"]), tuple(told["program"]))

    def kubectl(self, *args: str, stdin: str | None = None, check: bool = True, seconds: float = 120) -> str:
        """kubectl's output; ClusterError with its words where it fails and ``check``."""
        done = subprocess.run(
            [*self.program, *args],
            env=self.environment(),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if check and done.returncode != 0:
            raise ClusterError(f"kubectl {' '.join(args)}: code {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    @functools.cached_property
    def api(self) -> Api:
        """The administrator's own connection: a call takes milliseconds, a kubectl half a second."""
        with past_proxies(self.kubeconfig):
            return Api.load(str(self.kubeconfig))

    def get(self, kind: str, name: str = "", *, n: str = "", labels: str = "") -> Any:
        """One object of a kind (its plural), or the list of them, in namespace ``n`` where the kind has any."""
        query = {"labelSelector": labels} if labels else None
        try:
            return self.api.get(_path(kind, n, name), query)
        except LaunchError as error:
            raise ClusterError(str(error)) from error

    def put(self, *objects: Mapping[str, Any]) -> None:
        """Make these objects, or change them to this."""
        for item in objects:
            meta, kind = item["metadata"], PLURALS[item["kind"]]
            try:
                self.api.apply(_path(kind, meta.get("namespace", ""), meta["name"]), dict(item), force=True)
            except LaunchError as error:
                raise ClusterError(str(error)) from error

    def delete(self, kind: str, name: str, *, n: str = "", grace_s: int | None = None) -> None:
        """Delete an object, if it is there; its end is not waited for."""
        with contextlib.suppress(Missing):
            self.api.delete(_path(kind, n, name), grace_s=grace_s)

    def apply(self, *objects: Mapping[str, Any], args: Sequence[str] = ()) -> str:
        """Server-side apply of these objects."""
        listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        return self.kubectl("apply", "--server-side", *args, "-f", "-", stdin=listed)

    def environment(self, kubeconfig: Path | None = None) -> dict[str, str]:
        """What a process has in its environment to talk to this cluster, past any proxy; it ends with a cluster of our
        own.
        """
        home = self.scratch if self.own else Path.home()
        past = ",".join(filter(None, [os.environ.get("NO_PROXY"), control.HOST, "127.0.0.1"]))
        chosen = str(kubeconfig or self.kubeconfig)
        return {
            **os.environ,
            **({MARK: str(self.scratch)} if self.own else {}),
            "HOME": str(home),
            "KUBECONFIG": chosen,
            "HOTSTAGE_KUBECONFIG": chosen,
            "NO_PROXY": past,
            "no_proxy": past,
        }

    @contextlib.contextmanager
    def namespace(self, prefix: str = "test", level: str = "restricted") -> Iterator[str]:
        """A namespace of its own that enforces this Pod Security level; deleted when the block ends."""
        name = f"{prefix}-{secrets.token_hex(3)}"
        marks = {f"pod-security.kubernetes.io/{mode}": level for mode in ("enforce", "warn")}
        self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": marks}})
        try:
            # pods are refused until the namespace's own account is there
            self.until(lambda: bool(self.get("serviceaccounts", n=name)["items"]), f"account of {name}")
            yield name
        finally:
            # the room of its pods is needed; the namespace itself goes when its controller gets to it
            with contextlib.suppress(ClusterError, LaunchError):  # whatever ended the block is what is told
                for kind in ("jobs", "pods"):
                    for item in self.get(kind, n=name)["items"]:
                        self.delete(kind, item["metadata"]["name"], n=name, grace_s=1)
                self.until(lambda: not self.get("pods", n=name)["items"], f"the pods of {name} to go", 30)
            with contextlib.suppress(ClusterError, LaunchError):
                self.delete("namespaces", name)

    def until(self, ready: Callable[[], bool], what: str, seconds: float = 60, detail: Callable[[], str] = str) -> None:
        """Poll until ``ready``; ClusterError at the deadline."""
        wait_for(ready, what, seconds, detail)

    @functools.cached_property
    def config(self) -> Any:
        """The administrator's kubeconfig, with the files that it names inside it."""
        return json.loads(self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))

    def account(self, namespace: str, name: str, rules: Sequence[Mapping[str, Any]]) -> Path:
        """A kubeconfig of a service account in this namespace that has a Role of these rules, and nothing else."""
        meta = {"name": name, "namespace": namespace}
        group = "rbac.authorization.k8s.io"
        self.put(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
            {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": meta, "rules": [dict(rule) for rule in rules]},
            {
                "apiVersion": f"{group}/v1",
                "kind": "RoleBinding",
                "metadata": meta,
                "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
                "subjects": [{"kind": "ServiceAccount", **meta}],
            },
        )
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": 7200},
        }
        token = self.api.create(f"{_path('serviceaccounts', namespace, name)}/token", request)["status"]["token"]
        value = copy.deepcopy(self.config)
        value["users"] = [{"name": name, "user": {"token": token}}]
        value["contexts"][0]["context"].update(user=name, namespace=namespace)
        path = self.scratch / "accounts" / f"{namespace}-{name}.kubeconfig"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
        path.chmod(0o600)
        return path

    def load_image(self, archive: Path) -> None:
        """Bring an image archive (docker-archive or OCI) to every node; the names are those inside it.

        For a cluster of the user's own HOTSTAGE_LOAD_IMAGE is a command that takes the archive's path as its last
        argument, for example ``kind load image-archive``.
        """
        if self.own:
            at = archive.stat()
            there = self.scratch / "loaded" / f"{archive.name}-{at.st_ino}-{at.st_size}-{at.st_mtime_ns}"
            if not there.exists():
                with ThreadPoolExecutor() as pool:
                    list(pool.map(lambda each: each.ctr("images", "import", str(archive)), node.NODES))
                there.parent.mkdir(exist_ok=True)
                there.touch()
            return
        command = os.environ.get("HOTSTAGE_LOAD_IMAGE")
        if not command:
            raise ClusterError(
                "HOTSTAGE_KUBECONFIG names a cluster, but not how images get to its nodes: set HOTSTAGE_LOAD_IMAGE, "
                "for example to 'kind load image-archive'"
            )
        call(*shlex.split(command), str(archive))

    # --- parts of a cluster of our own --------------------------------------------------------------------

    def part(self, name: str) -> Part:
        """One of etcd, apiserver, controller-manager, scheduler, coredns, containerd-node1, kubelet-node1, …"""
        ledger = Ledger.load()
        if not self.own or ledger is None or name not in ledger.parts:
            known = ", ".join(sorted(ledger.parts)) if ledger and self.own else "none: the cluster is not ours"
            raise ClusterError(f"no part {name!r} of the cluster to work on; there are: {known}")
        return ledger.parts[name]

    def stop(self, name: str) -> None:
        """Kill a part; its containers stay as they are."""
        process = self.part(name).process
        process.send(signal.SIGKILL)
        wait_for(lambda: not process.alive(), f"{name} to end", 20)

    def start(self, name: str) -> None:
        """Start a stopped part again, as it was."""
        with locked():
            part = self.part(name)
            ledger = Ledger.load()
            if ledger is not None and not part.process.alive():
                ledger.start(name, part.command)

    def restart(self, *names: str) -> None:
        """Stop and start these parts; the API server answers before."""
        files = control.Files(self.scratch / "files")
        wait_for(lambda: control.rest(files, "/readyz") == "ok", "the API server to answer", 60)
        for name in names:
            self.stop(name)
            self.start(name)

    @contextlib.contextmanager
    def away(self, name: str) -> Iterator[None]:
        """The part is stopped inside the block."""
        self.stop(name)
        try:
            yield
        finally:
            self.start(name)

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        """The part is there inside the block, but does not answer."""
        process = self.part(name).process
        process.send(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send(signal.SIGCONT)


PLURALS = {
    "Namespace": "namespaces",
    "ServiceAccount": "serviceaccounts",
    "Role": "roles",
    "RoleBinding": "rolebindings",
    "Secret": "secrets",
    "ResourceQuota": "resourcequotas",
    "LimitRange": "limitranges",
    "PriorityClass": "priorityclasses",
    "Job": "jobs",
    "Pod": "pods",
}
_GROUPS = {
    "jobs": "batch",
    **dict.fromkeys(("roles", "rolebindings"), "rbac.authorization.k8s.io"),
    "priorityclasses": "scheduling.k8s.io",
}


def _path(kind: str, namespace: str, name: str) -> str:
    root = f"/apis/{_GROUPS[kind]}/v1" if kind in _GROUPS else "/api/v1"
    return "/".join(filter(None, [root, f"namespaces/{namespace}" if namespace else "", kind, name]))


@contextlib.contextmanager
def past_proxies(kubeconfig: Path) -> Iterator[None]:
    """The environment, with what this kubeconfig's server needs to be reached without a proxy."""
    before = os.environ.get("NO_PROXY")
    os.environ["NO_PROXY"] = ",".join(filter(None, [before, control.HOST, "127.0.0.1"]))
    try:
        yield
    finally:
        os.environ.pop("NO_PROXY")
        if before is not None:
            os.environ["NO_PROXY"] = before


def given() -> Cluster | None:
    """The cluster that HOTSTAGE_KUBECONFIG names, if it does."""
    path = os.environ.get("HOTSTAGE_KUBECONFIG")
    if not path:
        return None
    if not Path(path).exists():
        raise ClusterError(
            f"HOTSTAGE_KUBECONFIG = {path!r}: there is no such file; unset it to bring up a cluster here"
        )
    found = shutil.which("kubectl")
    program = (found,) if found else (str(binary()), "kubectl")
    folder = cache() / "given-cluster"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    cluster = Cluster(Path(path), False, folder, (), program)
    names = [item["metadata"]["name"] for item in cluster.get("nodes")["items"]]
    return Cluster(Path(path), False, folder, tuple(names), program)


def standing() -> Cluster | None:
    """The cluster that stands on this machine and answers with all its nodes, if there is one."""
    ledger = Ledger.load()
    if ledger is None or not ledger.ready or not all(part.process.alive() for part in ledger.parts.values()):
        return None
    files = control.Files(ledger.scratch / "files")
    return _handle(ledger, binary()) if _ready_nodes(files) == set(control.NODES) else None


def is_owned() -> bool:
    """Whether the cluster that stands here goes with a process."""
    ledger = Ledger.load()
    return ledger is not None and ledger.owner is not None


def prepare() -> tuple[Path, Path]:
    """What a cluster on this machine is made of: its binary and the pause image's archive, built where the cache lacks
    them. Raises ClusterError where this machine cannot carry one.
    """
    lacks = preflight.lacks()
    if lacks:
        raise ClusterError("this machine cannot carry a test cluster. It lacks:\n  " + "\n  ".join(lacks))
    install_packages(say)
    return binary(), pause.archive()


def up(*, owned: bool = False) -> Cluster:
    """Bring a cluster up, after sweeping what is left of another; it stays until ``down``.

    ``owned``: it goes with this process, even where that is killed. Raises ClusterError where it cannot be had.
    """
    kube, archive = prepare()
    with locked():
        before = Ledger.load()
        if before and before.owner and before.owner.alive() and before.owner != myself():
            raise ClusterError(
                f"process {before.owner.pid} uses the test cluster of this machine; wait for it, or end it"
            )
        _sweep()
        ledger = Ledger(cache() / "cluster", myself() if owned else None)
        ledger.save()
        guard = _guard() if owned else None
        try:
            return _up(ledger, kube, archive)
        except BaseException:
            say("taking down what was started")
            sweep()
            if guard:
                guard.kill()
                guard.wait()
            raise


def _up(ledger: Ledger, kube: Path, archive: Path) -> Cluster:
    ledger.scratch.mkdir(mode=0o700, parents=True)
    say(f"starting etcd, API server, CoreDNS and two nodes under {ledger.scratch}")
    node.make_network(ledger)
    files = control.write_files(ledger.scratch / "files")
    for each in node.NODES:
        node.start_containerd(ledger, each)
    with ThreadPoolExecutor() as pool:
        imports = [pool.submit(each.ctr, "images", "import", str(archive)) for each in node.NODES]
        control.start_api(ledger, kube, files)
        for done in imports:
            done.result()
    for each in node.NODES:
        node.start_kubelet(ledger, kube, files, each)
        node.start_proxy(ledger, kube, files, each)
    control.start_rest(ledger, kube, files)
    names = [f"{part}-{each.name}" for each in node.NODES for part in ("kubelet", "containerd")]
    wait_for(
        lambda: _ready_nodes(files) == set(control.NODES), "two nodes to be Ready", 120, lambda: ledger.tail(*names)
    )
    ended = [part.name for part in ledger.parts.values() if not part.process.alive()]
    if ended:
        raise ClusterError(f"these parts have ended: {', '.join(ended)}\n{ledger.tail(*ended)}")
    ledger.ready = True
    ledger.save()
    say(f"two nodes are Ready; KUBECONFIG={files.admin}")
    return _handle(ledger, kube)


def down() -> None:
    """Take down the cluster on this machine, whoever brought it up; nothing where there is none."""
    if os.geteuid() != 0:
        raise ClusterError("a test cluster of this machine belongs to root: run as root")
    with locked():
        _sweep()


def _sweep() -> None:
    found = sweep()
    if found:
        say(f"took down: {', '.join(found)}")


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """The cluster that HOTSTAGE_KUBECONFIG names, the one that stands here, or one brought up for the block."""
    there = given() or (standing() if os.geteuid() == 0 and not is_owned() else None)
    if there is not None:
        say(f"using the cluster of {there.kubeconfig}")
        yield there
        return
    with _signals():
        made = up(owned=True)
        try:
            yield made
        finally:
            say("taking the cluster down")
            with locked():
                ledger = Ledger.load()
                if ledger is None or ledger.owner == myself():  # else it was taken down, and another one stands
                    sweep()


def _handle(ledger: Ledger, kube: Path) -> Cluster:
    files = control.Files(ledger.scratch / "files")
    return Cluster(files.admin, True, ledger.scratch, control.NODES, (str(kube), "kubectl"))


def _ready_nodes(files: control.Files) -> set[str]:
    answer = control.rest(files, "/api/v1/nodes")
    ready = set()
    for item in answer["items"] if isinstance(answer, dict) and "items" in answer else ():
        for condition in item["status"].get("conditions", ()):
            if condition["type"] == "Ready" and condition["status"] == "True":
                ready.add(item["metadata"]["name"])
    return ready


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what was started is stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _guard() -> subprocess.Popen[bytes]:
    """A process that takes the cluster down when this one has ended without doing so."""
    me = myself()
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cluster", "guard", str(me.pid), str(me.start)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def guard(owner: Started) -> None:
    """Wait for the owner's end; then, where its cluster still stands, take it down."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(owner.pid)
        if owner.alive():
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            poll.poll()
    with locked():
        ledger = Ledger.load()
        if ledger is not None and ledger.owner == owner:
            say("the process that used the cluster is gone")
            _sweep()
