"""Calls to a cluster's API server: verbs on paths, plain JSON objects, every failure as an error of ``k8s.errors``.

Credentials, certificates, proxies and token refresh are the Kubernetes client's (its ``Configuration``); requests go
out through urllib3 and answers stay plain maps, because the client's strict models refuse what a newer or an older
server may send (``items: null`` for one) and cost much on a thousand pods. Every call has socket time-outs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

import urllib3

from k8s.errors import ApiUnavailable, Unauthenticated, translate
from k8s.kubeconfig import load_cluster
from k8s.proxy import Proxy, proxy_for
from trainer.errors import LaunchRefused

FIELD_MANAGER = "hotstage"
CONNECT_S, READ_S = 5.0, 20.0

Json = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """A namespaced kind: where it lives and what it is called in rights and messages."""

    kind: str
    plural: str
    root: str

    def path(self, namespace: str, name: str = "", sub: str = "") -> str:
        parts = [self.root, "namespaces", namespace, self.plural, quote(name, safe=""), sub]
        return "/".join(p for p in parts if p)


JOBS = Resource("Job", "jobs", "/apis/batch/v1")
PODS = Resource("Pod", "pods", "/api/v1")
SERVICES = Resource("Service", "services", "/api/v1")
SECRETS = Resource("Secret", "secrets", "/api/v1")
EVENTS = Resource("Event", "events", "/api/v1")
QUOTAS = Resource("ResourceQuota", "resourcequotas", "/api/v1")
RANGES = Resource("LimitRange", "limitranges", "/api/v1")


class Api:
    """One cluster. Thread-safe: urllib3 keeps the connections. ``proxy_url`` is the kubeconfig's; without it the
    environment decides (``k8s.proxy``), not what the configuration took from there.
    """

    def __init__(self, configuration: Any, namespace: str | None = None, proxy_url: str = "") -> None:
        self._configuration = configuration
        self.host: str = str(configuration.host).rstrip("/")
        self.namespace = namespace
        self.proxy = proxy_for(self.host, os.environ, proxy_url)
        self._pool = _pool(configuration, self.proxy)

    @classmethod
    def load(cls, kubeconfig: str | None = None, context: str | None = None) -> Api:
        """From ``kubeconfig``, else HOTSTAGE_KUBECONFIG, KUBECONFIG, ~/.kube/config, else the pod's service account.

        Raises LaunchRefused where there is none, or where it does not hold.
        """
        configuration, namespace = load_cluster(kubeconfig or os.environ.get("HOTSTAGE_KUBECONFIG"), context)
        return cls(configuration, namespace, configuration.proxy or "")

    # --- verbs --------------------------------------------------------------------------------------------

    def get(self, path: str, query: Mapping[str, str] | None = None, read_s: float = READ_S) -> Json:
        return self._json("GET", path, query, read_s=read_s)

    def text(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """A body that is no JSON (a pod's log)."""
        return self._call("GET", path, query, None, None, READ_S).decode(errors="replace")

    def create(self, path: str, body: Json, *, dry_run: bool = False) -> Json:
        query = {"fieldManager": FIELD_MANAGER, **({"dryRun": "All"} if dry_run else {})}
        return self._json("POST", path, query, body, "application/json")

    def apply(self, path: str, body: Json, *, force: bool = False, dry_run: bool = False) -> Json:
        """Server-side apply: makes the object or takes over the fields that the body names; Exists on a conflict."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true" if force else "false"}
        if dry_run:
            query["dryRun"] = "All"
        return self._json("PATCH", path, query, body, "application/apply-patch+yaml")

    def delete(self, path: str, uid: str | None = None, grace_s: int | None = None) -> None:
        """Deletes the object and what it owns; with ``uid`` only that very one (Exists where it is another by now)."""
        body: Json = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        self._json("DELETE", path, None, body, "application/json")

    def watch(self, path: str, query: Mapping[str, str], timeout_s: int, idle_s: float) -> Iterator[Json]:
        """Watch events as they come, until the server ends the stream; ``idle_s`` without a byte is ApiUnavailable."""
        wanted = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_s)}
        what = f"watch {path}"
        response = self._send("GET", path, wanted, None, None, idle_s, what)
        try:
            if response.status != 200:
                raise _error(response, what)
            pending = b""
            for part in response.stream(1 << 16, decode_content=True):
                *lines, pending = (pending + part).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield json.loads(line)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise ApiUnavailable(f"{what}: the stream ended: {error}") from error
        finally:
            # a stream that was not read to its end cannot carry another request
            with contextlib.suppress(Exception):
                response.close()

    # --- inside -------------------------------------------------------------------------------------------

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str | None = None,
        read_s: float = READ_S,
    ) -> Json:
        data = self._call(method, path, query, body, content_type, read_s)
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ApiUnavailable(f"{method} {path}: the answer is not JSON: {data[:100]!r}") from error
        if not isinstance(value, dict):
            raise ApiUnavailable(f"{method} {path}: the answer is not a JSON object")
        return value

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Json | None,
        content_type: str | None,
        read_s: float,
    ) -> bytes:
        what = f"{method} {path}"
        response = self._send(method, path, query, body, content_type, read_s, what)
        try:
            data: bytes = response.read()
            if response.status >= 300:
                raise translate(response.status, data, what, response.headers.get("Retry-After"))
            return data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailable(f"{what}: the answer ended early: {error}") from error
        finally:
            response.release_conn()

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Json | None,
        content_type: str | None,
        read_s: float,
        what: str,
    ) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "application/json", "User-Agent": "hotstage"}
        try:
            for setting in self._configuration.auth_settings().values():
                if setting.get("in") == "header" and setting.get("value"):
                    headers[setting["key"]] = setting["value"]
        except Exception as error:  # the user's own credential program may fail in any way
            raise Unauthenticated(f"{what}: cannot get the kubeconfig's credentials: {error}; log in again") from error
        username, password = self._configuration.username, self._configuration.password
        if username and "authorization" not in {h.lower() for h in headers}:
            pair = base64.b64encode(f"{username}:{password}".encode()).decode()
            headers["authorization"] = f"Basic {pair}"
        if content_type:
            headers["Content-Type"] = content_type
        url = f"{self.host}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            return self._pool.request(
                method,
                url,
                headers=headers,
                body=json.dumps(body) if body is not None else None,
                timeout=urllib3.Timeout(connect=CONNECT_S, read=read_s),
                retries=False,
                preload_content=False,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            through = f" through {self.proxy}" if self.proxy else ""
            raise ApiUnavailable(f"{what}: {self.host} does not answer{through}: {error}") from error


def _error(response: urllib3.BaseHTTPResponse, what: str) -> Exception:
    return translate(response.status, response.read(), what, response.headers.get("Retry-After"))


def _pool(configuration: Any, proxy: Proxy | None) -> urllib3.PoolManager:
    """Connections with the configuration's certificates, through the proxy where there is one."""
    settings: dict[str, Any] = {
        "cert_reqs": ssl.CERT_REQUIRED if configuration.verify_ssl else ssl.CERT_NONE,
        "ca_certs": configuration.ssl_ca_cert,
        "ca_cert_data": getattr(configuration, "ca_cert_data", None),
        "cert_file": configuration.cert_file,
        "key_file": configuration.key_file,
        "maxsize": 8,
    }
    if configuration.assert_hostname is not None:
        settings["assert_hostname"] = configuration.assert_hostname
    if configuration.tls_server_name:
        settings["server_hostname"] = configuration.tls_server_name
    if not configuration.verify_ssl:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    if proxy is None:
        return urllib3.PoolManager(**settings)
    at = urlsplit(proxy.url)
    bare = f"{at.scheme.lower()}://{at.netloc.rpartition('@')[2]}"
    user, password = unquote(at.username or ""), unquote(at.password or "")
    if at.scheme.lower().startswith("socks"):
        try:
            from urllib3.contrib.socks import SOCKSProxyManager
        except ImportError as error:
            raise LaunchRefused(
                f"{proxy} needs the package PySocks: pip install PySocks, or take an http:// proxy"
            ) from error
        return SOCKSProxyManager(bare, username=user or None, password=password or None, **settings)
    headers = dict(configuration.proxy_headers or {})
    if user:
        headers |= urllib3.make_headers(proxy_basic_auth=f"{user}:{password}")
    # the proxy's own certificate is not one of the cluster's authority
    own = ssl.create_default_context() if at.scheme.lower() == "https" else None
    return urllib3.ProxyManager(bare, proxy_headers=headers, proxy_ssl_context=own, **settings)
