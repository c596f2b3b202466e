"""A Kubernetes API server in the tests' own process, over real HTTP: as much of its contract as a launcher relies on.

Keeps objects by path; POST, server-side apply, DELETE with UID preconditions and owned objects, lists by label and
field selectors with pages, watches from a resource version with bookmarks. ``storms`` answer with an error instead,
``compact`` forgets the history (410), ``latency_s`` makes it slow, ``mute`` takes connections and says nothing. Every
request is counted by (method, kind of request, plural).
"""

from __future__ import annotations

import contextlib
import copy
import json
import ssl
import sys
import threading
import time
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from k8s.labels import AGENT, ENGINE, INDEX

Json = dict[str, Any]
HISTORY = 20_000


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client may be killed while it is answered
            super().handle_error(request, client_address)


class ApiServer:
    """``url`` is where it listens; ``with ApiServer() as server`` stops it."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.lock = threading.Condition()
        self.objects: dict[tuple[str, str], Json] = {}  # (collection path, name)
        self.history: list[tuple[int, str, str, Json]] = []  # version, collection, type, object
        self.version, self.oldest = 100, 100
        self.requests: Counter[tuple[str, str, str]] = Counter()
        self.bodies: list[tuple[str, str, Json]] = []
        self.storms: dict[str, tuple[int, str]] = {}  # "list", "watch" or "write" -> status, message
        self.denied: set[tuple[str, str]] = set()  # (verb, plural)
        self.refused: dict[str, str] = {}  # collection -> what admission says of whatever is made there
        self.expired = False  # whoever asks: unknown credentials
        self.tokens: set[str] | None = None  # that it knows; None: all
        self.heads: list[dict[str, list[str]]] = []  # of the requests, names in small letters
        self.warns = ""  # beside each answer
        self.used: set[tuple[str, str]] = set()  # rights that requests needed: (verb, resource)
        self.documents: dict[str, Json] = {}  # path -> what GET answers there
        self.latency_s, self.bookmark_s = 0.0, 0.2
        self.mute = self.closed = False
        handler = type("Handler", (_Handler,), {"server_state": self})
        self.http = _Http(("127.0.0.1", 0), handler)
        self.http.daemon_threads = True
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.http.server_address[1]}"
        if tls is not None:
            self.http.socket = tls.wrap_socket(self.http.socket, server_side=True)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> ApiServer:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        self.http.shutdown()
        self.http.server_close()

    # --- what tests do to it ------------------------------------------------------------------------------

    def put(self, collection: str, item: Json) -> Json:
        """Make or replace an object, as a controller would."""
        with self.lock:
            key = (collection, item["metadata"]["name"])
            kind = "MODIFIED" if key in self.objects else "ADDED"
            item = copy.deepcopy(item)
            meta = item["metadata"]
            known = self.objects.get(key, {}).get("metadata", {})
            meta.setdefault("uid", known.get("uid") or str(uuid.uuid4()))
            meta.setdefault("creationTimestamp", f"2026-01-01T00:00:{self.version % 60:02}Z")
            self._record(collection, kind, item)
            self.objects[key] = item
            return copy.deepcopy(item)

    def change(self, collection: str, name: str, **status: Any) -> None:
        """Set fields of an object's status."""
        with self.lock:
            item = copy.deepcopy(self.objects[collection, name])
            item.setdefault("status", {}).update(status)
            self.put(collection, item)

    def remove(self, collection: str, name: str) -> None:
        """Delete an object and what it owns."""
        with self.lock:
            item = self.objects.pop((collection, name), None)
            if item is None:
                return
            self._record(collection, "DELETED", item)
            uid = item["metadata"]["uid"]
            owned = [
                key
                for key, other in self.objects.items()
                if any(o.get("uid") == uid for o in other["metadata"].get("ownerReferences", ()))
            ]
            for path, child in owned:
                self.remove(path, child)

    def compact(self) -> None:
        """Forget the history: watches from before answer 410."""
        with self.lock:
            self.history.clear()
            self.version += 1
            self.oldest = self.version
            self.lock.notify_all()

    def named(self, plural: str) -> dict[str, Json]:
        with self.lock:
            return {n: copy.deepcopy(o) for (path, n), o in self.objects.items() if path.endswith("/" + plural)}

    def count(self, method: str, kind: str, plural: str) -> int:
        with self.lock:
            return self.requests[method, kind, plural]

    def make_pods(self, namespace: str, job: Json, **status: Any) -> list[str]:
        """What the Job controller and two kubelets do: a running pod an index."""
        names = []
        for index in range(job["spec"]["completions"]):
            name = f"{job['metadata']['name']}-{index}-{uuid.uuid4().hex[:5]}"
            self.put(f"/api/v1/namespaces/{namespace}/pods", pod(name, job, index, **status))
            names.append(name)
        return names

    def _record(self, collection: str, kind: str, item: Json) -> None:
        self.version += 1
        item["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, collection, kind, copy.deepcopy(item)))
        if len(self.history) > HISTORY:
            self.oldest = self.history.pop(0)[0]
        self.lock.notify_all()


def pod(name: str, job: Json, index: int, **status: Any) -> Json:
    meta = job["metadata"]
    running = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, "restartCount": 0}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {
                **meta.get("labels", {}),
                INDEX: str(index),
                "batch.kubernetes.io/controller-uid": meta["uid"],
                "batch.kubernetes.io/job-name": meta["name"],
            },
            "ownerReferences": [{"kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}],
        },
        "spec": {"nodeName": f"machine-{index % 2}"},
        "status": {
            "phase": "Running",
            "initContainerStatuses": [{"name": AGENT, **running}],
            "containerStatuses": [{"name": ENGINE, **running}],
            **status,
        },
    }


class _Handler(BaseHTTPRequestHandler):
    server_state: ApiServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        return

    def _answer(self, status: int, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if self.server_state.warns:
            self.send_header("Warning", f'299 - "{self.server_state.warns}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, message: str) -> None:
        self._answer(status, {"kind": "Status", "status": "Failure", "code": status, "message": message})

    def _begin(self) -> tuple[str, str, dict[str, str], Json]:
        """(collection, name, query, body) of the request, or ('', …) where it was answered already."""
        state, parts = self.server_state, urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else {}
        path = parts.path.split("/")
        at = path.index("namespaces") + 3 if "namespaces" in path else len(path)
        collection, name = "/".join(path[:at]), "/".join(path[at:])
        plural = path[min(at, len(path)) - 1]
        itself = at > len(path)  # a namespace, not something in it
        plural = "namespaces" if itself else plural
        verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(
            self.command, "get" if name or itself else "list"
        )
        verb = "watch" if query.get("watch") else verb
        with state.lock:
            state.heads.append({n.lower(): self.headers.get_all(n) or [] for n in self.headers})
            kind = verb if verb in ("watch", "list", "get") else "write"
            state.requests[self.command, kind, plural] += 1
            if plural != "selfsubjectaccessreviews":  # which everybody may ask
                state.used.add((verb, f"{plural}/{name.split('/')[1]}" if "/" in name else plural))
            if body:
                state.bodies.append((self.command, parts.path, body))
            storm = state.storms.get(kind)
            while state.mute and not state.closed:
                state.lock.wait(0.1)
        if state.latency_s:
            time.sleep(state.latency_s)
        token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
        if state.expired or (state.tokens is not None and token not in state.tokens):
            self._fail(401, "Unauthorized")
            return "", "", {}, {}
        if (verb, plural) in state.denied:
            self._fail(403, f'{plural} is forbidden: User "u" cannot {verb} resource "{plural}"')
            return "", "", {}, {}
        if storm is not None:
            self._fail(*storm)
            return "", "", {}, {}
        return collection, name, query, body

    def do_GET(self) -> None:
        collection, name, query, _ = self._begin()
        if not collection:
            return
        state = self.server_state
        document = state.documents.get(f"{collection}/{name}" if name else collection)
        if document is not None:
            self._answer(200, document)
            return
        if collection.startswith("/apis/") and collection.count("/") == 2:  # a group of the API that nobody serves
            self._fail(404, "the server could not find the requested resource")
            return
        if query.get("watch"):
            self._watch(collection, query)
            return
        with state.lock:
            if name:
                item = state.objects.get((collection, name))
                found = copy.deepcopy(item) if item else None
            else:
                items = [o for (path, _), o in sorted(state.objects.items()) if path == collection and _fits(o, query)]
                first, limit = int(query.get("continue") or 0), int(query.get("limit") or len(items) or 1)
                more = str(first + limit) if first + limit < len(items) else ""
                found = {
                    "kind": "List",
                    "metadata": {"resourceVersion": str(state.version), "continue": more},
                    "items": copy.deepcopy(items[first : first + limit]) or None,  # as a real server may
                }
        if found is None:
            self._fail(404, f"{name} not found")
        else:
            self._answer(200, found)

    def _watch(self, collection: str, query: dict[str, str]) -> None:
        state = self.server_state
        at, deadline = int(query["resourceVersion"]), time.monotonic() + float(query["timeoutSeconds"])
        with state.lock:
            expired = at < state.oldest
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._stream(collection, query, at, deadline, expired)
        with contextlib.suppress(OSError):
            self.wfile.write(b"0\r\n\r\n")

    def _stream(self, collection: str, query: dict[str, str], at: int, deadline: float, expired: bool) -> None:
        state = self.server_state
        if expired:
            self._event("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
            return
        beat = time.monotonic() + state.bookmark_s
        while time.monotonic() < deadline and not state.closed:
            with state.lock:
                if at < state.oldest and not any(v > at for v, *_ in state.history):
                    self._event("ERROR", {"kind": "Status", "code": 410, "message": "too old resource version"})
                    return
                fresh = [(v, k, o) for v, path, k, o in state.history if v > at and path == collection]
                newest = state.version
                if not fresh:
                    state.lock.wait(0.05)
            for _, kind, item in fresh:
                if _fits(item, query) and not self._event(kind, item):
                    return
            at = max(at, newest if not fresh else fresh[-1][0])
            if time.monotonic() > beat:
                beat = time.monotonic() + state.bookmark_s
                if not self._event("BOOKMARK", {"metadata": {"resourceVersion": str(at)}}):
                    return

    def _event(self, kind: str, item: Json) -> bool:
        try:
            line = json.dumps({"type": kind, "object": item}).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
        except OSError:
            return False
        return True

    def do_POST(self) -> None:
        collection, _, query, body = self._begin()
        if not collection:
            return
        state = self.server_state
        if collection.endswith("selfsubjectaccessreviews"):
            asked = body["spec"]["resourceAttributes"]
            resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
            self._answer(201, {**body, "status": {"allowed": (asked["verb"], resource) not in state.denied}})
            return
        with state.lock:
            if collection in state.refused:
                self._fail(403, state.refused[collection])
                return
            if (collection, body["metadata"]["name"]) in state.objects:
                self._fail(409, f"{body['metadata']['name']} already exists")
                return
            made = body if query.get("dryRun") else state.put(collection, body)
        self._answer(201, made)

    def do_PATCH(self) -> None:
        collection, name, query, body = self._begin()
        if not collection:
            return
        state = self.server_state
        with state.lock:
            known = state.objects.get((collection, name))
            plural = collection.rsplit("/", 1)[1]
            if known is None and ("create", plural) in state.denied:  # what makes an object asks for both rights
                self._fail(403, f'{plural} is forbidden: User "u" cannot create resource "{plural}"')
                return
            if known is not None:
                body = {**known, **body, "metadata": {**known["metadata"], **body["metadata"]}}
            made = body if query.get("dryRun") else state.put(collection, body)
        self._answer(200, made)

    def do_DELETE(self) -> None:
        collection, name, _, body = self._begin()
        if not collection:
            return
        state = self.server_state
        with state.lock:
            item = state.objects.get((collection, name))
            wanted = (body.get("preconditions") or {}).get("uid")
            if item is None:
                self._fail(404, f"{name} not found")
                return
            if wanted and item["metadata"]["uid"] != wanted:
                self._fail(409, f"the UID in the precondition ({wanted}) does not match")
                return
            state.remove(collection, name)
        self._answer(200, {"kind": "Status", "status": "Success"})


def _fits(item: Json, query: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels", {})
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.partition("=")
        if labels.get(key) != value:
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = part.partition("=")
        at: Any = item
        for step in key.split("."):
            at = (at or {}).get(step)
        if at != value:
            return False
    return True
