"""The alert rules' expressions, read by Prometheus' own parser; their names: tests/checkpoint/agent/test_metrics.py."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import yaml

from tests.support.go import cache, go

SOURCE = Path(__file__).resolve().parent / "promql"
RULES = Path(__file__).resolve().parents[2] / "k8s" / "components" / "monitoring" / "monitoring.yaml"


def checker() -> Path:
    """The program, built once into the cache (a minute of CPU), keyed by what it is made of."""
    made_of = b"".join((SOURCE / name).read_bytes() for name in ("go.mod", "go.sum", "main.go"))
    program = cache() / "promql" / hashlib.sha256(made_of).hexdigest()[:16]
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        scratch = program.with_name(f".{program.name}-{os.getpid()}")
        env = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=readonly", "GOWORK": "off"}
        subprocess.run([go(), "build", "-o", str(scratch), "."], cwd=SOURCE, env=env, check=True)
        os.replace(scratch, program)
    return program


def read(expressions: list[str]) -> tuple[int, str]:
    done = subprocess.run([checker()], input="\n".join(expressions), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_every_alert_is_promql() -> None:
    documents = [d for d in yaml.safe_load_all(RULES.read_text()) if d]
    rules = [r for d in documents if d["kind"] == "PrometheusRule" for g in d["spec"]["groups"] for r in g["rules"]]
    expressions = [" ".join(rule["expr"].split()) for rule in rules]
    assert len(expressions) >= 10
    assert read(expressions) == (0, "")
    assert len({rule["alert"] for rule in rules}) == len(rules)
    assert all({"summary", "mend"} <= set(rule["annotations"]) for rule in rules)


def test_a_mistake_would_be_seen() -> None:
    code, said = read(["sum by (run (hotstage_agent_failing) > 0"])
    assert code == 1
    assert "sum by" in said
