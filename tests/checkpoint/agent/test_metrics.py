"""What Prometheus is told by an agent: right figures, in a form that its own parser reads; and the alerts on them."""

from __future__ import annotations

import http.client
import json
import re
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from checkpoint.agent.metrics import TYPE, Gauge, MetricsServer, address_of
from checkpoint.store import open_store
from k8s.render import METRICS_PORT
from tests.checkpoint.agent.started import committed, fill_all, start
from tests.support.hostile_s3 import hostile_s3
from tests.support.wait import wait_for

LABELS = {"run": 'demo-"0a1b2c"', "launch": "l1\\", "node": "0"}
RULES = Path(__file__).resolve().parents[3] / "k8s" / "components" / "monitoring" / "monitoring.yaml"


def told(text: str) -> dict[str, float]:
    """Samples by name and by the labels that are not all samples' own."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith("."), family.name
        for sample in family.samples:
            own = {key: value for key, value in sample.labels.items() if key not in LABELS}
            found[" ".join([sample.name.removeprefix("hotstage_agent_"), *own.values()])] = sample.value
    return found


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def line(step: int, stall_us: int, skipped: int, epoch: int = 3) -> bytes:
    return json.dumps({"epoch": epoch, "step": step, "us": {"snapshot": stall_us}, "skipped": skipped}).encode()


def test_the_lag_begins_when_there_is_a_step_that_the_store_has_not() -> None:
    clock = Clock()
    gauge = Gauge(clock, lambda: 1e9 + clock.now)

    def at(seconds: float, **seen: Any) -> dict[str, float]:
        clock.now = 100.0 + seconds
        gauge.tell(**{"epoch": 3, "step": 0, "held": -1, "committed": -1, **seen})
        return told(gauge.text(LABELS))

    assert at(0)["lag_seconds"] == 0
    at(10, step=1)
    assert (at(25, step=6, held=5)["lag_seconds"], at(25, step=6, held=5)["lag_steps"]) == (15, 6)
    found = at(30, step=7, held=5, committed=5)  # the steps since are as old as that commit
    assert (found["lag_seconds"], found["lag_steps"], found["committed_step"]) == (0, 2, 5)
    assert found["committed_timestamp_seconds"] == 1e9 + 130
    assert at(40, step=9, held=5, committed=5)["lag_seconds"] == 10
    assert at(50, step=9, held=9, committed=9)["lag_seconds"] == 0
    assert at(500, step=9, held=9, committed=9)["lag_seconds"] == 0  # idle, and all is stored
    assert at(510, epoch=8, step=2, held=9, committed=9)["lag_steps"] == 0  # rolled back to before that


def test_stalls_and_skipped_saves_of_several_attempts_add_up_whatever_a_rank_writes() -> None:
    gauge = Gauge()
    lines = [line(1, 1500, 0), line(2, 0, 1), line(3, 500, 1), line(4, 0, 1, epoch=9), line(5, 0, 3, epoch=9)]
    hostile = [b"", b"{}", b"[1]", b"\xff", b'{"epoch":9,"us":7,"skipped":1}', line(1, -5, 0), line(1, 1 << 60, 0)]
    hostile += [b'{"epoch":true,"us":{"snapshot":1},"skipped":1}', b"[" * 100_000]
    for payload in (*lines, *hostile):
        gauge.line(payload)
    found = told(gauge.text(LABELS))
    assert (found["snapshot_stall_seconds_total"], found["skipped_snapshots_total"]) == (0.002, 4)


def test_only_metrics_are_told_and_a_bad_request_costs_nothing() -> None:
    gauge = Gauge()
    gauge.tell(epoch=1, step=2, held=1, committed=0, slots={"ready": 2, "empty": 1}, retries={"SlowDown": 4})
    server = MetricsServer(("127.0.0.1", 0), lambda: gauge.text(LABELS), request_s=0.2)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port)) as rude:
        rude.sendall(b"\x00\xff" * 40 + b"\r\n\r\n")
        while rude.recv(4096):
            pass
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"GET /metrics HTTP/1.0\r\nX-Drip: ")  # and nothing more: it is cut off, and the next one is heard
        for path, status in (("/", 404), ("/metrics/../x", 404), ("/metrics?a=b", 200), ("/metrics", 200)):
            asked = http.client.HTTPConnection("127.0.0.1", server.port)
            asked.request("GET", path)
            answer = asked.getresponse()
            text = answer.read().decode()
            assert answer.status == status
            asked.close()
    assert answer.getheader("Content-Type") == TYPE
    found = told(text)
    assert (found["slots ready"], found["retries_total SlowDown"], found["memory_step"]) == (2, 4, 1)
    (family,) = [f for f in text_string_to_metric_families(text) if f.name == "hotstage_agent_step"]
    assert family.samples[0].labels == LABELS


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.0.0.1:0", ("127.0.0.1", 0)), ("fd00::7:7390", ("fd00::7", 7390)), ("[::1]:80", ("::1", 80))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert address_of(text) == address
    for bad in ("", "7390", ":1", "h:x", "h:65536", "h:-1"):
        with pytest.raises(ValueError, match="is not an address and a port"):
            address_of(bad)


def test_an_agent_tells_what_it_stores(tmp_path: Path) -> None:
    """The real one: on loopback, unless it is told otherwise."""
    with ExitStack() as stack:
        one = start(tmp_path, 1, stack)
        url = (one.agents[0].work / "agent.metrics").read_text().strip()
        assert url.startswith("http://127.0.0.1:")

        def look() -> dict[str, float]:
            with urlopen(url, timeout=10) as answer:
                return told(answer.read().decode())

        one.ranks[0].link.send("METRICS", rank=0, epoch=one.epoch, payload=line(2, 2500, 1, one.epoch))
        fill_all(one.nodes[0], one.run, one.plan, 2)
        committed(one.run, 2)
        found = wait_for(lambda: now if (now := look())["committed_step"] == 2 else None, "the metrics of step 2")
        assert (found["attempt"], found["step"], found["memory_step"], found["lag_steps"]) == (one.epoch, 2, 2, 0)
        assert (found["snapshot_stall_seconds_total"], found["skipped_snapshots_total"]) == (0.0025, 1)
        assert (found["stored_parts_total"], found["failing"], found["given_up_uploads_total"]) == (1, 0, 0)
        chunks = sum(i.bytes for i in one.run.store.list(f"runs/{one.run.name}/chunks/"))
        assert found["stored_bytes_total"] == chunks > 0
        assert found["slots ready"] == 1
        assert sum(found[f"slots {state}"] for state in ("ready", "filling", "empty")) == one.layout.slots


def test_retries_are_counted_by_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    with hostile_s3() as peer:
        store = open_store(peer.url())
        peer.faults.extend(["500", "reset", "503"])
        assert store.create("runs/r/spec", b"x")
        assert store.get("runs/r/spec") == b"x"
        assert sum(store.retries.values()) == 3
        assert {"connection"} < set(store.retries) < {"connection", "500", "503", "InternalError", "SlowDown"}


def rules() -> list[dict[str, Any]]:
    documents = [d for d in yaml.safe_load_all(RULES.read_text()) if d]
    (found,) = [d for d in documents if d["kind"] == "PrometheusRule"]
    return [rule for group in found["spec"]["groups"] for rule in group["rules"]]


def test_alerts_ask_for_what_agents_tell() -> None:
    """Each name of ours in a rule is on the page, a counter where a rate is asked for, with all labels."""
    gauge = Gauge()
    gauge.tell(epoch=1, step=2, held=1, committed=0, slots={"ready": 2}, retries={"SlowDown": 4})
    kinds: dict[str, str] = {}
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(gauge.text(LABELS)):
        for sample in family.samples:
            kinds[sample.name], labels[sample.name] = family.type, {*sample.labels, "namespace", "pod"}
    asked: set[str] = set()
    for rule in rules():
        for name in re.findall(r"hotstage_agent_\w+", rule["expr"]):
            asked.add(name)
            counted = bool(re.search(rf"(rate|increase)\({name}\b", rule["expr"]))
            assert kinds[name] == ("counter" if counted else "gauge"), rule["alert"]
            grouped = set(re.findall(r"\w+", re.search(r"by \(([^)]*)\)", rule["expr"])[1]))  # type: ignore[index]
            assert grouped <= labels[name], rule["alert"]
            said = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
            assert said <= grouped, rule["alert"]
    assert len(asked) >= 6


def test_the_monitors_find_the_agents_port() -> None:
    documents = [d for d in yaml.safe_load_all(RULES.read_text()) if d]
    (monitor,) = [d for d in documents if d["kind"] == "PodMonitor" and d["metadata"]["name"] == "agents"]
    (policy,) = [d for d in documents if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "prometheus-agents"]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": METRICS_PORT}]
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]
