"""One file with everything that explains a run, and nothing that opens a door: ``hotstage debug-dump RUN``.

From the store: the log's records, status hints, the kept end of every rank's output, the last metrics; from the
cluster, where the run is on one and it answers: objects (never Secrets), events, the containers' last lines. Values of
variables that hold credentials, and whatever looks like a key, are struck out of every file.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checkpoint.codec import unpack_hint
from checkpoint.errors import CheckpointError
from checkpoint.keys import metrics_prefix, statuses_prefix
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from flows.drive.live import SEGMENT_CAP, STATUS_CAP, read_output
from flows.show.facts import details
from trainer.cores import usable_cpus
from trainer.errors import LaunchError, OutputError, TrainerError
from trainer.wire.files import kept_where

REDACTED = "[struck out]"
METRICS_SEGMENTS, EPOCHS = 20, 8
_SECRET_NAME = re.compile(r"(secret|token|password|passwd|credential|access_key|api_key|authorization)", re.I)
_SECRET_TEXT = (
    (re.compile(rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), b""),
    (re.compile(rb"(?i)(bearer\s+)[-._~+/0-9a-z]{16,}=*"), rb"\1"),
    (
        re.compile(
            rb"(?i)(\"?(?:\w*secret(?:_?access)?_?key|\w*(?:session|access|id|auth|api)_?token|\w*password|"
            rb"\w*access_key(?:_id)?|launch\.key)\"?\s*[:=]\s*\"?)[^\s\",}]{8,}"
        ),
        rb"\1",
    ),
    (re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----", re.S), b""),
)


def redacted(data: bytes) -> bytes:
    """The bytes without credentials: those of this process's environment, and what looks like one."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 8:
            data = data.replace(value.encode(), REDACTED.encode())
    for pattern, keep in _SECRET_TEXT:
        data = pattern.sub(keep + REDACTED.encode(), data)
    return data


def dump(
    store: Store, run: str, path: Path, *, cluster: Callable[[RunState], Iterator[tuple[str, bytes]]] | None
) -> int:
    """Write the file; gives its size. What cannot be read is said in ``problems.txt``, never fatal.

    Raises OutputError where the file cannot be written.
    """
    try:
        _write(store, run, path, cluster)
        return path.stat().st_size
    except OSError as error:  # of the file: those of reading are problems
        raise OutputError(path, error) from error


def _write(
    store: Store, run: str, path: Path, cluster: Callable[[RunState], Iterator[tuple[str, bytes]]] | None
) -> None:
    problems: list[str] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with kept_where(path) as out, tarfile.open(fileobj=out, mode="w:gz") as archive:

        def add(name: str, data: bytes) -> None:
            data = redacted(data)
            info = tarfile.TarInfo(f"{run}/{name}")
            info.size, info.mtime = len(data), int(time.time())
            archive.addfile(info, io.BytesIO(data))

        state = _read(problems, "log", lambda: RunLog(store, run).fold())
        parts: list[tuple[str, Callable[[], Iterator[tuple[str, bytes]]]]] = [
            ("about", lambda: _about(store)),
            ("run", lambda: iter([("run.json", _json(details(store, run)))])),
            ("log", lambda: _records(store, run)),
            ("status", lambda: _statuses(store, run)),
        ]
        if state is not None:
            parts.append(("output", lambda: _outputs(store, run, state)))
            parts.append(("metrics", lambda: _metrics(store, run, state)))
            if cluster is not None:
                parts.append(("cluster", lambda: cluster(state)))
        for name, part in parts:
            try:
                for file, data in part():
                    add(file, data)
            except (CheckpointError, TrainerError, OSError, ValueError, KeyError) as error:
                problems.append(f"{name}: {error}")
        add("problems.txt", ("\n".join(problems) or "none").encode())


def _read(problems: list[str], name: str, read: Callable[[], RunState]) -> RunState | None:
    try:
        return read()
    except CheckpointError as error:
        problems.append(f"{name}: {error}")
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return value.hex() if isinstance(value, bytes) else str(value)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, default=_plain).encode()


def _about(store: Store) -> Iterator[tuple[str, bytes]]:
    names = ("hotstage", "prefect", "kubernetes", "boto3")
    facts = {
        "versions": {name: version(name) for name in names},
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processors": os.cpu_count(),
        "usable_processors": usable_cpus(),
        "store": store.describe(),
        "time": time.time(),
    }
    yield "about.json", _json(facts)


def _records(store: Store, run: str) -> Iterator[tuple[str, bytes]]:
    for record in RunLog(store, run).records():
        yield f"log/{record.n:06}-{record.kind}.json", _json({f.name: getattr(record, f.name) for f in fields(record)})


def _statuses(store: Store, run: str) -> Iterator[tuple[str, bytes]]:
    prefix = statuses_prefix(run)
    for info in store.list(prefix):
        value = unpack_hint(store.get(info.key, max_bytes=STATUS_CAP), info.key, max_bytes=STATUS_CAP)
        yield f"status/{info.key.removeprefix(prefix)}.json", _json(value)


def _outputs(store: Store, run: str, state: RunState) -> Iterator[tuple[str, bytes]]:
    for attempt in state.attempts[-EPOCHS:]:
        for rank in range(attempt.ranks):
            data = read_output(store, run, attempt.n, rank)
            if data:
                yield f"output/{attempt.n}/rank-{rank}.log", data


def _metrics(store: Store, run: str, state: RunState) -> Iterator[tuple[str, bytes]]:
    for attempt in state.attempts[-EPOCHS:]:
        segments = [info.key for info in store.list(metrics_prefix(run, attempt.n))][-METRICS_SEGMENTS:]
        data = b"".join(store.get(key, max_bytes=SEGMENT_CAP) for key in segments)
        if data:
            yield f"metrics/{attempt.n}.jsonl", data


def cluster_files(api: Any, namespace: str, run: str) -> Iterator[tuple[str, bytes]]:
    """Objects of the run (no Secrets), their events, and the last lines of each container."""
    from k8s.api import EVENTS, JOBS, PODS, SERVICES
    from k8s.labels import RUN, label_value

    selector = {"labelSelector": f"{RUN}={label_value(run)}"}
    names: set[str] = set()
    pods: list[dict[str, Any]] = []
    for resource in (JOBS, PODS, SERVICES):
        try:
            items = api.get(resource.path(namespace), selector).get("items") or []
        except LaunchError as error:
            yield f"cluster/{resource.plural}.error.txt", str(error).encode()
            continue
        for item in items:
            names.add(item["metadata"]["name"])
            item["metadata"].pop("managedFields", None)
        pods = items if resource is PODS else pods
        yield f"cluster/{resource.plural}.json", _json(without_values(items))
    try:
        events = api.get(EVENTS.path(namespace)).get("items") or []
        mine = [e for e in events if (e.get("involvedObject") or {}).get("name") in names]
        yield "cluster/events.json", _json(mine)
    except LaunchError as error:
        yield "cluster/events.error.txt", str(error).encode()
    for pod in pods:
        name = pod["metadata"]["name"]
        for container in ("engine", "agent"):
            try:
                text = api.text(PODS.path(namespace, name, "log"), {"container": container, "tailLines": "2000"})
            except LaunchError as error:
                text = str(error)
            yield f"cluster/logs/{name}-{container}.log", text.encode()


def without_values(value: Any) -> Any:
    """Objects whose environment variables keep their names and, where these tell of secrets, lose their values."""
    if isinstance(value, list):
        return [without_values(v) for v in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("name"), str) and "value" in value and _SECRET_NAME.search(value["name"]):
        return {**value, "value": REDACTED}
    return {k: without_values(v) for k, v in value.items()}
