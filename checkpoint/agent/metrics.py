"""What Prometheus asks of an agent: ``GET /metrics`` in the text format (version 0.0.4), nothing else.

It listens on loopback, on a port of the kernel's choice that stands in ``agent.metrics`` of the node's folder, unless
it is told another address (``--metrics``; in pods the renderer's). One connection at a time, two seconds for each:
whoever asks slowly costs others that long and the agent nothing. Figures are the loop's, as of its last beat (1 s).

Written by hand, since the format is a few lines and the agent's image holds boto3 and msgpack alone; the tests read it
with Prometheus' own parser. Rank 0 tells steps, stalls and skipped saves, so that its node's agent has them; the others
know the steps of their snapshots. Alerts on these names: ``k8s/components/monitoring``, whose names a test compares.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socket import AF_INET6, SHUT_RDWR
from socketserver import TCPServer

from trainer.wire.files import write_file

log = logging.getLogger(__name__)

METRICS_FILE = "agent.metrics"
"""In the node's folder, while the agent lives: the address of its page."""
TYPE = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_S = 2.0
_CAUSES = 32


@dataclass(frozen=True, slots=True)
class Figures:
    """What is told, at one moment. Counts are since this agent began."""

    epoch: int = 0
    step: int = 0  # newest that is known
    held: int = -1  # newest step that every rank of the node holds in memory
    committed: int = -1  # step of the newest checkpoint in the store
    committed_at: float | None = None  # Unix seconds, when this agent heard of it
    behind_since: float | None = None  # of the monotonic clock; None: the store has the newest step
    stall_us: int = 0  # of rank 0, by copies into slots
    skipped: int = 0
    slots: Mapping[str, int] = field(default_factory=dict)  # state -> of all ranks of the node
    stored_bytes: int = 0
    stored_parts: int = 0
    given_up: int = 0  # uploads
    retries: Mapping[str, int] = field(default_factory=dict)
    failing: bool = False
    data_fetched: int = 0  # bytes of the attempt's data
    data_held: int = 0


Family = tuple[str, str, str, Iterable[tuple[dict[str, str], float]]]
"""A name, its kind, what it is, and its samples by their own labels."""


def page_text(prefix: str, table: Iterable[Family], labels: Mapping[str, str]) -> str:
    """A page in Prometheus' text format, every sample with these labels."""
    out: list[str] = []
    for name, kind, told, samples in table:
        full = f"{prefix}_{name}"
        out += [f"# HELP {full} {told}", f"# TYPE {full} {kind}"]
        out += [f"{full}{_labels({**labels, **own})} {_number(value)}" for own, value in samples]
    return "\n".join(out) + "\n"


class Gauge:
    """Keeps the figures. ``line`` and ``tell`` are of the loop's thread; ``figures`` may be read in any."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self.figures = Figures()
        self._clock, self._wall = clock, wall
        self._skipped: tuple[int, int] = 0, 0  # (epoch, what its rank 0 said last: since it began)

    def line(self, payload: bytes) -> None:
        """A rank's line of metrics; what is none costs nothing."""
        try:
            line = json.loads(payload)
            epoch, stalled, skipped = line["epoch"], line["us"]["snapshot"], line["skipped"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if not all(type(n) is int and 0 <= n < 1 << 53 for n in (epoch, stalled, skipped)):
            return
        before = self._skipped[1] if self._skipped[0] == epoch and self._skipped[1] <= skipped else 0
        self._skipped = epoch, skipped
        f = self.figures
        self.figures = replace(f, stall_us=f.stall_us + stalled, skipped=f.skipped + skipped - before)

    def tell(self, *, epoch: int, step: int, held: int, committed: int, **others: object) -> None:
        """What the loop sees at a beat; ``others``: fields of `Figures`."""
        f = self.figures
        step = max(step, held, 0)
        at = self._wall() if committed > f.committed or (f.committed_at is None and committed >= 0) else f.committed_at
        if step <= max(committed, 0):
            since = None
        elif f.behind_since is None or committed > f.committed or epoch != f.epoch:
            since = self._clock()
        else:
            since = f.behind_since
        more = {"committed_at": at, "behind_since": since}
        self.figures = replace(f, epoch=epoch, step=step, held=held, committed=committed, **more, **others)  # type: ignore[arg-type]

    def text(self, labels: Mapping[str, str]) -> str:
        """The page, every sample with these labels."""
        f = self.figures
        lag_s = 0.0 if f.behind_since is None else self._clock() - f.behind_since
        causes = dict(sorted(f.retries.items(), key=lambda item: -item[1])[:_CAUSES])
        table: list[Family] = [
            ("attempt", "gauge", "Epoch of the attempt that this node runs or ran last; 0: none.", one(f.epoch)),
            ("step", "gauge", "Newest training step that this agent knows of.", one(f.step)),
            ("memory_step", "gauge", "Newest step that all ranks of the node hold in memory; -1: none.", one(f.held)),
            ("committed_step", "gauge", "Step of the newest checkpoint in the store; -1: none.", one(f.committed)),
            (
                "committed_timestamp_seconds",
                "gauge",
                "When this agent heard of the newest checkpoint in the store, in Unix seconds; 0: of none.",
                one(f.committed_at or 0),
            ),
            ("lag_steps", "gauge", "Steps that are not in the store yet.", one(max(0, f.step - max(f.committed, 0)))),
            ("lag_seconds", "gauge", "For how long there have been steps that the store has not.", one(lag_s)),
            (
                "snapshot_stall_seconds_total",
                "counter",
                "Time that rank 0 was kept from training by copies of its state (its node alone).",
                one(f.stall_us / 1e6),
            ),
            (
                "skipped_snapshots_total",
                "counter",
                "Saves that the gang skipped, since a rank had no free slot (rank 0's node alone).",
                one(f.skipped),
            ),
            ("slots", "gauge", "Snapshot slots of the node's ranks, by what is in them.", by("state", f.slots)),
            ("stored_bytes_total", "counter", "Bytes of chunks that this agent stored.", one(f.stored_bytes)),
            ("stored_parts_total", "counter", "Checkpoints whose part of this node is stored.", one(f.stored_parts)),
            ("given_up_uploads_total", "counter", "Uploads that were given up at their deadline.", one(f.given_up)),
            ("retries_total", "counter", "Requests that the store was asked again, by cause.", by("cause", causes)),
            (
                "data_fetched_bytes_total",
                "counter",
                "Bytes of token shards that came from the store ahead of this attempt's ranks (data.cache_gib).",
                one(f.data_fetched),
            ),
            ("data_cache_bytes", "gauge", "Bytes of token shards that are kept here for them.", one(f.data_held)),
            ("failing", "gauge", "1 while the store or this machine refuses something.", one(int(f.failing))),
        ]
        return page_text("hotstage_agent", table, labels)


def one(value: float) -> Iterable[tuple[dict[str, str], float]]:
    return [({}, value)]


def by(label: str, values: Mapping[str, int]) -> Iterable[tuple[dict[str, str], float]]:
    return [({label: key}, value) for key, value in sorted(values.items())]


def _labels(labels: Mapping[str, str]) -> str:
    def quoted(text: str) -> str:
        return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')

    return "{" + ",".join(f'{name}="{quoted(text)}"' for name, text in labels.items()) + "}"


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else repr(float(value))


def address_of(text: str) -> tuple[str, int]:
    """``HOST:PORT``, also of IPv6 with or without brackets; ValueError for what is none."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ValueError(f"{text!r} is not an address and a port from 0 to 65535, as in 127.0.0.1:9464")
    return host.removeprefix("[").removesuffix("]"), int(port)


class MetricsServer(threading.Thread):
    """The thread that answers, as a server of this name. OSError where the address cannot be listened on."""

    def __init__(
        self,
        address: tuple[str, int],
        text: Callable[[], str],
        request_s: float = _REQUEST_S,
        name: str = "hotstage-agent",
    ) -> None:
        super().__init__(name="metrics", daemon=True)

        class Handler(BaseHTTPRequestHandler):
            server_version, sys_version = name, ""

            def setup(self) -> None:
                super().setup()
                self._end = threading.Timer(request_s, self._cut)  # also for who sends a byte now and then
                self._end.daemon = True
                self._end.start()

            def finish(self) -> None:
                self._end.cancel()
                super().finish()

            def _cut(self) -> None:
                with contextlib.suppress(OSError):
                    self.connection.shutdown(SHUT_RDWR)

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404)
                    return
                body = text().encode()
                self.send_response(200)
                self.send_header("Content-Type", TYPE)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                log.debug(format, *args)

        class Listener(HTTPServer):
            address_family = AF_INET6 if ":" in address[0] else HTTPServer.address_family

            def handle_error(self, request: object, client_address: object) -> None:
                log.debug("a request for metrics from %s was not answered", client_address, exc_info=True)

            def server_bind(self) -> None:  # HTTPServer's asks for the host's name, which may take seconds
                TCPServer.server_bind(self)
                self.server_name, self.server_port = address[0], self.server_address[1]

        self._listener = Listener(address, Handler)

    @property
    def port(self) -> int:
        return int(self._listener.server_port)

    def run(self) -> None:
        self._listener.serve_forever(poll_interval=3600)  # nobody ends it: it goes with the process


def serve(address: tuple[str, int], work: Path, text: Callable[[], str]) -> None:
    """Answer at this address, and say where in the node's folder; without metrics, with a word, where it cannot be."""
    try:
        server = MetricsServer(address, text)
    except OSError as error:
        log.warning("no metrics: %s port %d cannot be listened on: %s", *address, error)
        return
    server.start()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    write_file(work / METRICS_FILE, f"http://{host}:{server.port}/metrics\n".encode())
    log.info("metrics are at http://%s:%d/metrics", host, server.port)
