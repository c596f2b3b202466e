"""What Prometheus is told by drivers, as its own parser reads it; and that dashboard and alerts ask for that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from checkpoint.agent.metrics import Gauge, page_text
from flows.drive.events import Event
from flows.tracking.prometheus import PREFIX, DriverPage, RunFigures, families, figures_of, shared_folder
from tests.flows.tracking.world import RUN, line
from tests.support.promql import refused
from tests.support.wait import wait_for

FOLDER = Path(__file__).resolve().parents[3] / "k8s" / "components" / "monitoring"
SCRAPED = {"namespace", "pod", "instance", "job"}
"""Labels that whoever scrapes gives to every sample."""


def told(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation.endswith("."), family.name
        for sample in family.samples:
            own = [value for key, value in sample.labels.items() if key != "run"]
            assert sample.labels["run"] == RUN
            found[" ".join([sample.name.removeprefix(f"{PREFIX}_"), *own])] = sample.value
    return found


def whole(figures: RunFigures) -> RunFigures:
    """Everything that a run may have been told of."""
    cause = {"text": "rank 1 was killed", "class": "infra"}
    events: list[tuple[str, dict[str, Any]]] = [
        ("attempt", {"number": 1, "epoch": 1, "steps": 100, "step": 0, "from": "start", "cause": None, "back": False}),
        ("step", line(7, 1)),
        ("checkpoint", {"n": 2, "step": 5, "epoch": 1}),
        (
            "attempt",
            {"number": 2, "epoch": 3, "steps": 100, "step": 5, "from": "memory", "cause": cause, "back": False},
        ),
        ("recovered", {"epoch": 3, "step": 6, "seconds": 1.5}),
        ("step", line(8, 3)),
        (
            "evaluated",
            {"step": 5, "numbers": {"validation/loss": 2.5, "eval/a/acc": 0.25}, "failed": {"b": "it broke"}},
        ),
        ("evaluated", {"found": "none", "text": "no validation where this driver runs"}),
        ("replay", {"found": "differs", "text": "step 6"}),
        ("health", {"finding": "slow", "over": False, "text": "5 tokens a second"}),
        ("health", {"finding": "slow", "over": True, "text": "9 tokens a second again"}),
        ("ended", {"outcome": "succeeded", "reason": "", "step": 8, "digest": None}),
    ]
    for kind, facts in events:
        figures.tell(Event(kind, facts))
    return figures


def test_figures_of_a_run() -> None:
    found = told(page_text(PREFIX, families([whole(RunFigures(RUN))]), {}))
    assert (found["step"], found["steps"], found["saved_step"], found["attempts"]) == (8, 100, 5, 2)
    assert (found["loss"], found["tokens_per_second"], found["step_seconds"]) == (1.25, 1000, 0.002)
    assert (found["failures_total infra"], found["recoveries_total"], found["recovery_seconds_total"]) == (1, 1, 1.5)
    assert (found["validation_loss"], found["evaluation eval/a/acc"], found["evaluated_step"]) == (2.5, 0.25, 5)
    assert (found["evaluation_failures_total b"], found["differing_replays_total"]) == (1, 1)
    assert found["symptoms_total slow"] == 1
    assert found["ended succeeded"] == 1


def test_a_run_that_has_said_nothing_has_no_loss() -> None:
    found = told(page_text(PREFIX, families([RunFigures(RUN)]), {}))
    assert (found["step"], found["saved_step"]) == (0, -1)
    assert not {"loss", "validation_loss", "steps"} & set(found)


def test_nobody_listens_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOTSTAGE_METRICS", raising=False)
    assert figures_of(RUN, DriverPage()) == (None, "")
    monkeypatch.setenv("HOTSTAGE_METRICS", "7391")
    figures, why = figures_of(RUN, DriverPage())
    assert figures is None
    assert why.startswith("HOTSTAGE_METRICS: '7391' is not an address and a port")


OTHER = """
import sys, time
from flows.drive.events import Event
from flows.tracking.prometheus import PAGE, figures_of
figures, why = figures_of("other-0a1b2c")
figures.tell(Event("checkpoint", {"n": 2, "step": 33, "epoch": 1}))
PAGE.leave(figures)
print("left", flush=True)
sys.stdin.read()
"""


def test_several_drivers_of_a_machine_are_on_one_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever is first answers; the others leave their figures beside it, until they end."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    page = DriverPage()
    port = page.serve(("127.0.0.1", 0))
    whole(page.of(RUN))

    def runs() -> set[str]:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {s.labels["run"] for f in text_string_to_metric_families(text) for s in f.samples}

    assert runs() == {RUN}
    (shared_folder(port) / "1-broken.json").write_text("{")
    env = os.environ | {"HOTSTAGE_METRICS": f"127.0.0.1:{port}", "TMPDIR": str(tmp_path)}
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "left\n"
        assert runs() == {RUN, "other-0a1b2c"}
        other.communicate()
        assert other.returncode == 0
        wait_for(lambda: runs() == {RUN}, "what a dead process left to go")
    finally:
        other.kill()
        other.wait()


def kinds() -> dict[str, tuple[str, set[str]]]:
    """Of every name that drivers and agents tell its kind, and its labels."""
    gauge = Gauge()
    gauge.tell(epoch=1, step=2, held=1, committed=0, slots={"ready": 2}, retries={"SlowDown": 4})
    text = gauge.text({"run": RUN, "launch": "l1", "node": "0"})
    text += page_text(PREFIX, families([whole(RunFigures(RUN))]), {})
    found: dict[str, tuple[str, set[str]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = family.type, set(sample.labels) | SCRAPED
    return found


def dashboard() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "dashboard.json").read_text()))


def queries() -> Iterator[tuple[str, str]]:
    """Of the dashboard and the rules: where each stands, and what it asks."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']}", target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            yield f"variable {variable['name']}", f"count by ({asked[2]}) ({asked[1]})"
    for document in yaml.safe_load_all((FOLDER / "monitoring.yaml").read_text()):
        if document and document["kind"] == "PrometheusRule":
            for rule in (rule for group in document["spec"]["groups"] for rule in group["rules"]):
                yield f"alert {rule['alert']}", " ".join(rule["expr"].split())


def plain(expression: str) -> str:
    """As Grafana asks it, its own variables filled in."""
    filled = expression.replace("$__rate_interval", "2m").replace("$__range", "6h")
    return re.sub(r"\$\w+", ".*", filled)


def test_every_query_is_one_by_prometheus_own_parser() -> None:
    asked = [plain(expression) for _, expression in queries()]
    assert len(asked) > 35
    assert refused(asked) == (0, "")


def test_every_name_is_told_with_its_labels_and_counters_are_asked_for_rates() -> None:
    known = kinds()
    asked = set()
    for where, expression in queries():
        for name in re.findall(r"\bhotstage_\w+", expression):
            asked.add(name)
            assert name in known, f"{where} asks for {name}, which nobody tells"
            kind, labels = known[name]
            counted = bool(re.search(rf"(rate|increase)\({name}\b", expression))
            assert counted == (kind == "counter") or (kind == "counter" and where.endswith("differ")), (where, name)
            for grouped in re.findall(r"by \(([^)]*)\)", expression):
                assert set(re.findall(r"\w+", grouped)) <= labels, (where, name, grouped)
            for matched in re.findall(rf"{name}{{([^}}]*)}}", expression):
                assert set(re.findall(r"(\w+)\s*=~?", matched)) <= labels, (where, name)
    told_by_drivers = {name for name in known if name.startswith(PREFIX)}
    assert told_by_drivers - asked <= {f"{PREFIX}_ended_total"}, "a figure that nobody looks at"


def test_a_panel_says_what_it_draws() -> None:
    """As a person sees it: titles once, a place of its own, series with names."""
    panels = dashboard()["panels"]
    assert len({p["id"] for p in panels}) == len({p["title"] for p in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & places, panel["title"]
        assert at["x"] + at["w"] <= 24
        places |= cells
        for target in panel.get("targets", ()):
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            grouped = {w for g in re.findall(r"by \(([^)]*)\)", target["expr"]) for w in re.findall(r"\w+", g)}
            assert legend <= grouped, panel["title"]


def test_the_monitor_finds_the_drivers_port() -> None:
    documents = [d for d in yaml.safe_load_all((FOLDER / "monitoring.yaml").read_text()) if d]
    (monitor,) = [d for d in documents if d["kind"] == "PodMonitor" and d["metadata"]["name"] == "drivers"]
    (policy,) = [d for d in documents if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "prometheus-drivers"]
    (flows,) = [d for d in yaml.safe_load_all((FOLDER.parents[1] / "base" / "flows.yaml").read_text()) if d]
    (patch,) = [d for d in yaml.safe_load_all((FOLDER / "flows-metrics.yaml").read_text()) if d]
    assert patch["metadata"]["name"] == flows["metadata"]["name"]
    ((container,), (base,)) = (d["spec"]["template"]["spec"]["containers"] for d in (patch, flows))
    assert container["name"] == base["name"]
    assert "ports" not in base, "nobody asks where there is no Prometheus: nothing listens"
    (port,) = container["ports"]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == port["name"] == "metrics"
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]
    assert {"name": "HOTSTAGE_METRICS", "value": f"0.0.0.0:{port['containerPort']}"} in container["env"]
    assert monitor["spec"]["selector"] == policy["spec"]["podSelector"]
    assert flows["spec"]["template"]["metadata"]["labels"] == monitor["spec"]["selector"]["matchLabels"]
