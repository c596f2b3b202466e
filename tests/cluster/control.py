"""The control plane: etcd, API server, controller manager, scheduler, CoreDNS, and the kubeconfigs that reach it.

The API server listens on the first bridge; a pod reaches it by the service `kubernetes` too, through kube-proxy. Names
are answered by CoreDNS there.
"""

from __future__ import annotations

import base64
import json
import secrets
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.host import Ledger, call, wait_for

HOST = "198.18.0.1"  # the machine on its own bridge: node 1, the name server, and where a test's servers listen
PORT = 6443
PODS, SERVICES = "198.18.0.0/16", "198.19.0.0/24"
FIRST_SERVICE = "198.19.0.1"  # what the service `kubernetes` gets
DOMAIN = "cluster.local"
ETCD_PORTS = (22379, 22380)
READY_PORT = 28181
NODES = ("node1", "node2")


@dataclass(frozen=True)
class Files:
    """What the control plane leaves in the scratch folder for the nodes and for people."""

    folder: Path

    @property
    def ca(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def admin(self) -> Path:
        return self.folder / "admin.kubeconfig"

    def kubeconfig(self, user: str) -> Path:
        return self.folder / f"{user}.kubeconfig"


def write_files(folder: Path) -> Files:
    """Certificates, keys, tokens and a kubeconfig for each that talks to the API server."""
    folder.mkdir(mode=0o700, parents=True)
    files = Files(folder)
    _certificates(folder)
    groups = {
        "admin": ("admin", "system:masters"),
        "controller-manager": ("system:kube-controller-manager", ""),
        "scheduler": ("system:kube-scheduler", ""),
        "coredns": ("system:coredns", "system:masters"),
        "proxy": ("system:kube-proxy", ""),
        **{node: (f"system:node:{node}", "system:nodes") for node in NODES},
    }
    rows = []
    for user, (name, group) in groups.items():
        token = secrets.token_hex(16)
        rows.append(f'{token},{name},{name},"{group}"')
        write_kubeconfig(files.kubeconfig(user), files.ca, token, user)
    (folder / "tokens.csv").write_text("\n".join(rows) + "\n")
    return files


def write_kubeconfig(path: Path, ca: Path, token: str, user: str, namespace: str = "default") -> None:
    """A kubeconfig with the authority's certificate inside; JSON is YAML."""
    authority = base64.b64encode(ca.read_bytes()).decode()
    value = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "hotstage-test",
                "cluster": {"server": f"https://{HOST}:{PORT}", "certificate-authority-data": authority},
            }
        ],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [
            {"name": user, "context": {"cluster": "hotstage-test", "user": user, "namespace": namespace}},
        ],
        "current-context": user,
    }
    path.write_text(json.dumps(value, indent=1))
    path.chmod(0o600)


def _certificates(folder: Path) -> None:
    def key(name: str) -> None:
        call("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(folder / f"{name}.key"))

    def signed(name: str, subject: str, extensions: str) -> None:
        key(name)
        at = {end: str(folder / f"{name}.{end}") for end in ("key", "csr", "crt", "ext")}
        Path(at["ext"]).write_text(extensions)
        call("openssl", "req", "-new", "-key", at["key"], "-subj", subject, "-out", at["csr"])
        authority = ("-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key"), "-CAcreateserial")
        call(
            "openssl",
            "x509",
            "-req",
            "-in",
            at["csr"],
            *authority,
            "-days",
            "30",
            "-extfile",
            at["ext"],
            "-out",
            at["crt"],
        )

    key("ca")
    authority = str(folder / "ca.crt")
    call(
        "openssl",
        "req",
        "-x509",
        "-key",
        str(folder / "ca.key"),
        "-subj",
        "/CN=hotstage-test",
        "-days",
        "30",
        "-out",
        authority,
    )
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        f"kubernetes.default.svc.{DOMAIN}",
        "localhost",
    ]
    also = ",".join([*(f"DNS:{name}" for name in names), f"IP:{FIRST_SERVICE}", f"IP:{HOST}", "IP:127.0.0.1"])
    signed("apiserver", "/CN=kube-apiserver", f"subjectAltName={also}\nextendedKeyUsage=serverAuth\n")
    signed("kubelet-client", "/O=system:masters/CN=apiserver-kubelet-client", "extendedKeyUsage=clientAuth\n")
    key("accounts")


def rest(files: Files, path: str, seconds: float = 2.0) -> Any:
    """GET by the admin: the JSON answer, the text of one that is none, or None where there is no good answer."""
    config = json.loads(files.admin.read_text())
    context = ssl.create_default_context(cafile=str(files.ca))
    request = urllib.request.Request(
        f"https://{HOST}:{PORT}{path}", headers={"Authorization": f"Bearer {config['users'][0]['user']['token']}"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(request, timeout=seconds) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError, TimeoutError):
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text


def compact(key: str) -> int:
    """Write a key that nobody reads, so that there is a newer revision, and take etcd's history before it away for
    good; the revision.
    """
    encoded = base64.b64encode(key.encode()).decode()
    revision = int(_etcd("put", {"key": encoded, "value": encoded})["header"]["revision"])
    _etcd("compaction", {"revision": str(revision), "physical": True})
    return revision


def _etcd(call_: str, body: Any) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://127.0.0.1:{ETCD_PORTS[0]}/v3/kv/{call_}"
    with opener.open(urllib.request.Request(url, json.dumps(body).encode()), timeout=10) as answer:
        return json.loads(answer.read())


def _get(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def start_api(ledger: Ledger, kube: Path, files: Files) -> None:
    """etcd and the API server; returns when it is ready."""
    client, peer = (f"http://127.0.0.1:{port}" for port in ETCD_PORTS)
    ledger.start(
        "etcd",
        [
            *(str(kube), "etcd", "--name", "test", "--data-dir", str(ledger.scratch / "etcd")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"test={peer}"),
            *("--unsafe-no-fsync", "--log-level", "warn"),
        ],
    )
    wait_for(lambda: _get(f"{client}/health"), "etcd", 60, lambda: ledger.tail("etcd"))
    at = files.folder
    ledger.start(
        "apiserver",
        [
            *(str(kube), "apiserver", f"--etcd-servers={client}"),
            *(f"--bind-address={HOST}", f"--secure-port={PORT}", f"--advertise-address={HOST}"),
            f"--service-cluster-ip-range={SERVICES}",
            *(
                "--authorization-mode=Node,RBAC",
                f"--token-auth-file={at / 'tokens.csv'}",
                f"--client-ca-file={files.ca}",
            ),
            *(
                f"--cert-dir={at}",
                f"--tls-cert-file={at / 'apiserver.crt'}",
                f"--tls-private-key-file={at / 'apiserver.key'}",
            ),
            *(
                f"--kubelet-client-certificate={at / 'kubelet-client.crt'}",
                f"--kubelet-client-key={at / 'kubelet-client.key'}",
            ),
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}",
            *(
                f"--service-account-key-file={at}/accounts.key",
                f"--service-account-signing-key-file={at}/accounts.key",
            ),
            *("--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", "--profiling=false"),
        ],
    )
    wait_for(lambda: rest(files, "/readyz") == "ok", "the API server", 120, lambda: ledger.tail("apiserver", "etcd"))


def start_rest(ledger: Ledger, kube: Path, files: Files) -> None:
    """Controller manager, scheduler and the name server; returns when names are answered."""
    manager, scheduler = files.kubeconfig("controller-manager"), files.kubeconfig("scheduler")
    at = files.folder
    ledger.start(
        "controller-manager",
        [
            *(str(kube), "controller-manager", f"--kubeconfig={manager}", f"--authentication-kubeconfig={manager}"),
            *(f"--authorization-kubeconfig={manager}", "--authentication-skip-lookup=true", "--leader-elect=false"),
            *("--use-service-account-credentials", f"--service-account-private-key-file={at}/accounts.key"),
            *(f"--root-ca-file={files.ca}", f"--cert-dir={at}", "--bind-address=127.0.0.1", "--secure-port=0"),
            *("--node-monitor-period=1s", "--node-monitor-grace-period=10s", "--profiling=false"),
        ],
    )
    ledger.start(
        "scheduler",
        [
            *(str(kube), "scheduler", f"--kubeconfig={scheduler}", f"--authentication-kubeconfig={scheduler}"),
            *(f"--authorization-kubeconfig={scheduler}", "--authentication-skip-lookup=true", "--leader-elect=false"),
            *(f"--cert-dir={at}", "--bind-address=127.0.0.1", "--secure-port=0", "--profiling=false"),
        ],
    )
    corefile = ledger.scratch / "Corefile"
    corefile.write_text(
        f"{DOMAIN}:53 in-addr.arpa:53 {{\n"
        f"  bind {HOST}\n  errors\n  ready 127.0.0.1:{READY_PORT}\n"
        f"  kubernetes {DOMAIN} in-addr.arpa {{\n    kubeconfig {files.kubeconfig('coredns')}\n    ttl 1\n  }}\n}}\n"
    )
    ledger.start("coredns", [str(kube), "coredns", "-conf", str(corefile), "-quiet"])
    wait_for(
        lambda: _get(f"http://127.0.0.1:{READY_PORT}/ready"), "the name server", 60, lambda: ledger.tail("coredns")
    )
