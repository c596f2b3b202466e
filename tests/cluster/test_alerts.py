"""The alert rules' expressions, read by Prometheus' own parser; their names: tests/checkpoint/agent/test_metrics.py."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.support.promql import refused

RULES = Path(__file__).resolve().parents[2] / "k8s" / "components" / "monitoring" / "monitoring.yaml"


def test_every_alert_is_promql() -> None:
    documents = [d for d in yaml.safe_load_all(RULES.read_text()) if d]
    rules = [r for d in documents if d["kind"] == "PrometheusRule" for g in d["spec"]["groups"] for r in g["rules"]]
    expressions = [" ".join(rule["expr"].split()) for rule in rules]
    assert len(expressions) >= 10
    assert refused(expressions) == (0, "")
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert all({"summary", "mend"} <= set(rule["annotations"]) for rule in rules)


def test_a_mistake_would_be_seen() -> None:
    code, said = refused(["sum by (run (hotstage_agent_failing) > 0"])
    assert code == 1
    assert "sum by" in said
