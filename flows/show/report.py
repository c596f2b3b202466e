"""One self-contained HTML page about a run: loss with the attempts marked, pipeline planned beside measured,
checkpoints, time lost to failures. ``render`` is pure (facts in, page out); no script, no request leaves the page.
"""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.show.loss_chart import AttemptFact, loss_chart
from trainer.amounts import count_text, gigabytes, took

_CSS = """
:root { color-scheme: light dark; --ink: #16202b; --soft: #5c6b7a; --line: #d5dce3; --page: #fbfcfd; --card: #ffffff;
  --a: #2563eb; --b: #c2410c; --c: #0f766e; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa7b4; --line: #303a45; --page: #10161d;
  --card: #171f28; --a: #60a5fa; --b: #fb923c; --c: #2dd4bf; --bad: #f87171; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 25px; margin: 0 0 2px } h2 { font-size: 17px; margin: 34px 0 10px }
p { margin: 6px 0 } .soft { color: var(--soft) }
code, pre { font: 13px/1.45 ui-monospace, monospace; overflow-wrap: anywhere }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0 }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px }
.fact b { display: block; font-size: 19px; font-weight: 600 } .fact span { color: var(--soft); font-size: 13px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto }
table { border-collapse: collapse; width: 100%; min-width: 720px; font-size: 14px }
th, td { text-align: left; padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 500 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; margin: 0 } pre.table, td.n { white-space: pre }
svg { width: 100%; min-width: 640px; height: auto } svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
.key span { margin-right: 16px; white-space: nowrap } .good { color: var(--c) } .bad { color: var(--bad) }
"""


CHECKPOINTS_SHOWN = 50


@dataclass(frozen=True)
class ReportFacts:
    """All that the page shows."""

    run: str
    outcome: str
    steps: int
    curve: Mapping[int, float]
    attempts: Sequence[AttemptFact]
    checkpoints: Sequence[Mapping[str, Any]]
    store: str = ""
    """Its address."""
    tokens_per_s: float | None = None
    digest: str | None = None
    digest_one_stage: str | None = None
    parameters: int | None = None
    stages: int = 1
    seconds: float | None = None
    mfu: float | None = None
    memory_text: str = ""
    timeline_svg: str = ""
    """A step as it was planned and, where ``measured``, as the ranks traced one, on one scale."""
    measured: bool = False
    evaluations: Sequence[Mapping[str, str]] = field(default_factory=tuple)
    """Rows with the same columns, newest first."""
    validation: Mapping[int, float] = field(default_factory=dict)
    sample: str = ""
    data_note: str = ""
    reason: str = ""
    """Of a run that ended without success."""
    notes: Sequence[str] = field(default_factory=tuple)


def _loss(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.2f}" if abs(value) < 1e4 else f"{value:.3g}"


def _fact(value: str, label: str) -> str:
    return f'<div class="fact"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    cls = dict.fromkeys(numeric, ' class="n"')
    top = "".join(f"<th{cls.get(i, '')}>{html.escape(h)}</th>" for i, h in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{cls.get(i, '')}>{html.escape(c)}</td>" for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _section(title: str, *parts: str) -> str:
    return f"<h2>{title}</h2><div class=card>{''.join(parts)}</div>"


def _cards(facts: ReportFacts) -> str:
    losses = list(facts.curve.values())
    recoveries = [a.recovery_s for a in facts.attempts if a.recovery_s is not None]
    cards = [
        (facts.outcome, "outcome"),
        (f"{facts.steps:,}", "optimizer steps"),
        (f"{_loss(losses[0])} → {_loss(losses[-1])}" if losses else "–", "loss"),
        (str(len(facts.attempts)), "attempts"),
        (f"{sum(a.lost_steps for a in facts.attempts):,}", "steps done twice"),
        (took(sum(recoveries)), "time lost to failures"),
    ]
    if facts.tokens_per_s:
        cards.append((f"{facts.tokens_per_s:,.0f}", "tokens a second"))
    if facts.mfu:
        cards.append((f"{facts.mfu:.0%}", "of the measured peak (MFU)"))
    if facts.parameters:
        cards.append((count_text(facts.parameters), "parameters"))
    if facts.seconds:
        cards.append((took(facts.seconds), "from start to end"))
    return f'<div class="facts">{"".join(_fact(value, label) for value, label in cards)}</div>'


def _digests(digest: str, of_one_stage: str | None) -> str:
    parts = [f"<p>state digest <code>{html.escape(digest)}</code></p>"]
    if of_one_stage is not None:
        word, cls = ("equal", "good") if digest == of_one_stage else ("DIFFERENT", "bad")
        parts.append(
            f"<p>one stage, undisturbed, over the same last steps: <code>{html.escape(of_one_stage)}</code> "
            f'<b class="{cls}">{word}</b></p>'
        )
    return _section("The same bits", *parts)


def _attempts(attempts: Sequence[AttemptFact]) -> str:
    head = ["attempt", "began", "from step", "steps", "done twice", "back after", "layout", "why it was started"]
    rows = [
        [
            str(a.number),
            took(a.began_s),
            "start" if a.restore_step < 0 else str(a.restore_step),
            f"{a.first_step}–{a.last_step}" if a.first_step is not None else "–",
            str(a.lost_steps),
            took(a.recovery_s) if a.recovery_s is not None else "–",
            a.layout or "–",
            a.cause or a.reason or "first",
        ]
        for a in attempts
    ]
    return _section("Attempts", _table(head, rows, numeric=(1, 2, 3, 4, 5)))


def _checkpoints(run: str, store: str, checkpoints: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            str(c["step"]),
            str(c.get("attempt") or "–"),
            gigabytes(int(c["bytes"])) if c.get("bytes") else "–",
            str(c.get("state_digest", "")),
        ]
        for c in checkpoints[-CHECKPOINTS_SHOWN:]
    ]
    more = len(checkpoints) - len(rows)
    listed = html.escape(f"hotstage ckpt ls {run} --store {shlex.quote(store)}", quote=False)
    told = f"<p class=soft>{more:,} older ones: <code>{listed}</code></p>" if more else ""
    return _section("Checkpoints", told, _table(["step", "attempt", "size", "state digest"], rows, numeric=(0, 1, 2)))


def render(facts: ReportFacts) -> str:
    """The page, UTF-8 text, self-contained."""
    parts = [
        "<!doctype html><html lang=en><head><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(facts.run)} · hotstage</title><style>{_CSS}</style></head><body><main>",
        f"<h1>{html.escape(facts.run)}</h1><p class=soft>{html.escape(facts.data_note)}</p>",
        _cards(facts),
    ]
    if facts.reason:
        parts.append(f"<p>{html.escape(facts.reason)}</p>")
    if facts.digest:
        parts.append(_digests(facts.digest, facts.digest_one_stage))
    saved = [int(c["step"]) for c in facts.checkpoints]
    parts.append(_section("Loss", loss_chart(facts.curve, facts.attempts, saved, facts.validation)))
    if facts.evaluations:
        head = list(facts.evaluations[0])
        rows = [[row[name] for name in head] for row in facts.evaluations]
        numeric = [number for number, name in enumerate(head) if name != "failed"]
        parts.append(_section("Evaluations", _table(head, rows, numeric)))
    parts.append(_attempts(facts.attempts))
    if facts.timeline_svg:
        untold = "<p class=soft>no trace was recorded: launch.trace = true measures every step</p>"
        note = "" if facts.measured else untold
        parts.append(_section("Pipeline: planned and measured", facts.timeline_svg, note))
    if facts.memory_text:
        parts.append(
            _section("Memory that the plan foretold", f"<pre class=table>{html.escape(facts.memory_text)}</pre>")
        )
    if facts.checkpoints:
        parts.append(_checkpoints(facts.run, facts.store, facts.checkpoints))
    if facts.sample:
        parts.append(_section("A sample", f"<pre>{html.escape(facts.sample)}</pre>"))
    parts += [f"<p class=soft>{html.escape(note)}</p>" for note in facts.notes]
    parts.append("</main></body></html>")
    return "\n".join(parts)
