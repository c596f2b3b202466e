"""Calls to a cluster's API server: verbs on paths, plain JSON objects, every failure as an error of ``k8s.errors``.

Credentials, certificates, proxies and token refresh are the Kubernetes client's (its ``Configuration``); requests go
out through urllib3 and answers stay plain maps, because the client's strict models refuse what a newer or an older
server may send (``items: null`` for one) and cost much on a thousand pods. Every call has socket time-outs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

import urllib3

from k8s.errors import ApiUnavailable, Unauthenticated, translate, untrusted
from k8s.kubeconfig import Access, load_cluster
from k8s.proxy import Proxy, proxy_for
from trainer.errors import LaunchError, LaunchRefused

log = logging.getLogger(__name__)

FIELD_MANAGER = "hotstage"
CONNECT_S, READ_S = 5.0, 20.0
RENEW_S = 5.0
"""Credentials that the server does not know are looked for again at most so often."""
_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')

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
CLAIMS = Resource("PersistentVolumeClaim", "persistentvolumeclaims", "/api/v1")
CONFIGS = Resource("ConfigMap", "configmaps", "/api/v1")
QUOTAS = Resource("ResourceQuota", "resourcequotas", "/api/v1")
RANGES = Resource("LimitRange", "limitranges", "/api/v1")


@dataclass(frozen=True)
class _Request:
    """What the server is asked; as text what it is, for people."""

    method: str
    path: str
    query: Mapping[str, str] | None = None
    body: Json | None = None
    content_type: str = "application/json"
    read_s: float = READ_S

    def __str__(self) -> str:
        return f"{'watch' if 'watch' in (self.query or {}) else self.method} {self.path}"


@dataclass(frozen=True)
class _Way:
    """To the server, as whoever the credentials of now say."""

    access: Access
    proxy: Proxy | None
    pool: urllib3.PoolManager


class Api:
    """One cluster. Thread-safe: urllib3 keeps the connections. A proxy is the kubeconfig's, else what the environment
    says (``k8s.proxy``), not what the client took from there.

    ``again`` looks for the access once more where the server does not know its credentials: a token in a file, a
    certificate or what a program gives may be newer by now.
    """

    def __init__(self, access: Access, again: Callable[[], Access] | None = None) -> None:
        self.host: str = str(access.configuration.host).rstrip("/")
        self.namespace = access.namespace
        self._way, self._again = _way(access, self.host), again
        self._lock, self._renewed_at = threading.Lock(), -1e9
        self._warned: set[str] = set()

    @classmethod
    def load(cls, kubeconfig: str | None = None, context: str | None = None) -> Api:
        """From ``kubeconfig``, else HOTSTAGE_KUBECONFIG, KUBECONFIG, ~/.kube/config, else the pod's service account.

        Raises LaunchRefused where there is none, or where it does not hold.
        """
        given = kubeconfig or os.environ.get("HOTSTAGE_KUBECONFIG")
        access = load_cluster(given, context)
        return cls(access, lambda: load_cluster(given, access.context))  # the same one, whatever is current by then

    # --- verbs --------------------------------------------------------------------------------------------

    def get(self, path: str, query: Mapping[str, str] | None = None, read_s: float = READ_S) -> Json:
        return self._json(_Request("GET", path, query, read_s=read_s))

    def text(self, path: str, query: Mapping[str, str] | None = None) -> str:
        """A body that is no JSON (a pod's log)."""
        return self._call(_Request("GET", path, query)).decode(errors="replace")

    def create(self, path: str, body: Json, *, dry_run: bool = False) -> Json:
        query = {"fieldManager": FIELD_MANAGER, **({"dryRun": "All"} if dry_run else {})}
        return self._json(_Request("POST", path, query, body))

    def apply(self, path: str, body: Json, *, force: bool = False, dry_run: bool = False) -> Json:
        """Server-side apply: makes the object or takes over the fields that the body names; Exists on a conflict."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true" if force else "false"}
        if dry_run:
            query["dryRun"] = "All"
        return self._json(_Request("PATCH", path, query, body, "application/apply-patch+yaml"))

    def delete(self, path: str, uid: str | None = None, grace_s: int | None = None) -> None:
        """Deletes the object and what it owns; with ``uid`` only that very one (Exists where it is another by now)."""
        body: Json = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        self._json(_Request("DELETE", path, body=body))

    def watch(self, path: str, query: Mapping[str, str], timeout_s: int, idle_s: float) -> Iterator[Json]:
        """Watch events as they come, until the server ends the stream; ``idle_s`` without a byte is ApiUnavailable."""
        wanted = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(timeout_s)}
        request = _Request("GET", path, wanted, read_s=idle_s)
        response = self._send(request)
        try:
            if response.status != 200:
                raise _error(response, request)
            pending = b""
            for part in response.stream(1 << 16, decode_content=True):
                *lines, pending = (pending + part).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield json.loads(line)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise ApiUnavailable(f"{request}: the stream ended: {error}") from error
        finally:
            # a stream that was not read to its end cannot carry another request
            with contextlib.suppress(Exception):
                response.close()

    # --- inside -------------------------------------------------------------------------------------------

    def _renew(self, failed: _Way) -> bool:
        """Look for credentials again after the server did not know those of ``failed``; whether to ask once more."""
        with self._lock:
            if self._way is not failed:
                return True  # another thread has found them
            if self._again is None or time.monotonic() - self._renewed_at < RENEW_S:
                return False
            self._renewed_at = time.monotonic()
            try:
                found = self._again()
            except LaunchError as error:
                log.warning("looking for newer credentials of %s: %s", self.host, error)
                return False
            if str(found.configuration.host).rstrip("/") != self.host:
                log.warning(
                    "the kubeconfig now says %s; its credentials are not for %s", found.configuration.host, self.host
                )
                return False
            self._way = _way(found, self.host)
            return True

    def _json(self, request: _Request) -> Json:
        data = self._call(request)
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ApiUnavailable(f"{request}: the answer is not JSON: {data[:100]!r}") from error
        if not isinstance(value, dict):
            raise ApiUnavailable(f"{request}: the answer is not a JSON object")
        return value

    def _call(self, request: _Request) -> bytes:
        response = self._send(request)
        try:
            data: bytes = response.read()
            self._warn(response)
            if response.status >= 300:
                raise translate(response.status, data, str(request), response.headers.get("Retry-After"))
            return data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailable(f"{request}: the answer ended early: {error}") from error
        finally:
            response.release_conn()

    def _warn(self, response: urllib3.BaseHTTPResponse) -> None:
        """What the server warns of beside its answer (Pod Security, versions of its API that end), each once."""
        for text in _WARNING.findall(", ".join(response.headers.getlist("Warning"))):
            if text not in self._warned:
                self._warned.add(text)
                log.warning("the API server warns: %s", text.replace('\\"', '"'))

    def _send(self, request: _Request) -> urllib3.BaseHTTPResponse:
        """The answer; asked again where the server did not know the credentials and newer ones were found."""
        way = self._way
        response = self._sent(way, request)
        if response.status == 401 and self._renew(way):
            response.close()
            response = self._sent(self._way, request)
        return response

    def _sent(self, way: _Way, request: _Request) -> urllib3.BaseHTTPResponse:
        headers = urllib3.HTTPHeaderDict({"Accept": "application/json", "User-Agent": "hotstage"})
        for name, value in (*_credentials(way.access.configuration, request), *way.access.headers):
            value = " ".join(value.split())  # a file's last line ends, as kubectl knows
            if not (value.isascii() and value.isprintable()):
                raise Unauthenticated(
                    f"{request}: the kubeconfig's credentials hold what no header can (a letter beyond ASCII, a "
                    "control character): take it out of its token"
                )
            headers.add(name, value)
        if request.body is not None:
            headers["Content-Type"] = request.content_type
        url = f"{self.host}{request.path}" + (f"?{urlencode(request.query)}" if request.query else "")
        try:
            return way.pool.request(
                request.method,
                url,
                headers=headers,
                body=json.dumps(request.body) if request.body is not None else None,
                timeout=urllib3.Timeout(connect=CONNECT_S, read=request.read_s),
                retries=False,
                preload_content=False,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            through = f" through {way.proxy}" if way.proxy else ""
            if why := untrusted(error):
                raise LaunchRefused(f"{request}: {self.host}{through}: {error}; {why}") from error
            raise ApiUnavailable(f"{request}: {self.host} does not answer{through}: {error}") from error


def _credentials(configuration: Any, request: _Request) -> list[tuple[str, str]]:
    try:
        found = [
            (str(setting["key"]), str(setting["value"]))
            for setting in configuration.auth_settings().values()
            if setting.get("in") == "header" and setting.get("value")
        ]
    except Exception as error:  # the user's own credential program may fail in any way
        raise Unauthenticated(f"{request}: cannot get the kubeconfig's credentials: {error}; log in again") from error
    username, password = configuration.username, configuration.password
    if username and "authorization" not in {name.lower() for name, _ in found}:
        pair = base64.b64encode(f"{username}:{password}".encode()).decode()
        found.append(("authorization", f"Basic {pair}"))
    return found


def _error(response: urllib3.BaseHTTPResponse, request: _Request) -> Exception:
    return translate(response.status, response.read(), str(request), response.headers.get("Retry-After"))


def _way(access: Access, host: str) -> _Way:
    proxy = proxy_for(host, os.environ, access.proxy_url)
    return _Way(access, proxy, _pool(access.configuration, proxy))


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
