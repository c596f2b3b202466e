"""One self-contained HTML page about a run: loss with the attempts marked, pipeline planned beside measured,
checkpoints, time lost to failures. ``render`` is pure (facts in, page out); no script, no request leaves the page.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_CSS = """
:root { color-scheme: light dark; --ink: #16202b; --soft: #5c6b7a; --line: #d5dce3; --page: #fbfcfd; --card: #ffffff;
  --a: #2563eb; --b: #c2410c; --c: #0f766e; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa7b4; --line: #303a45; --page: #10161d;
  --card: #171f28; --a: #60a5fa; --b: #fb923c; --c: #2dd4bf; --bad: #f87171; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px }
h1 { font-size: 25px; margin: 0 0 2px } h2 { font-size: 17px; margin: 34px 0 10px }
p { margin: 6px 0 } .soft { color: var(--soft) } code, pre { font: 13px/1.45 ui-monospace, monospace }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0 }
.fact { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px }
.fact b { display: block; font-size: 19px; font-weight: 600 } .fact span { color: var(--soft); font-size: 13px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th, td { text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 500 } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; margin: 0 } pre.table, td.n { white-space: pre }
svg { width: 100%; min-width: 640px; height: auto } svg text { fill: var(--ink); font: 12px system-ui, sans-serif }
.good { color: var(--c) } .bad { color: var(--bad) }
"""


@dataclass(frozen=True)
class AttemptFact:
    """One attempt, as the report shows it. Times are seconds since the run's first record."""

    number: int
    epoch: int
    began_s: float
    restore_step: int
    cause: str
    first_step: int | None = None
    last_step: int | None = None
    lost_steps: int = 0
    recovery_s: float | None = None
    """Until steps came again, where a failure caused it."""
    layout: str = ""
    reason: str = ""
    """Where no failure caused it: the order that did, or the start."""


@dataclass(frozen=True)
class ReportFacts:
    """All that the page shows."""

    run: str
    outcome: str
    steps: int
    curve: Mapping[int, float]
    attempts: Sequence[AttemptFact]
    checkpoints: Sequence[Mapping[str, Any]]
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


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers between low and high."""
    span = max(high - low, 1e-9)
    raw = span / max(count, 1)
    power = 10.0 ** len(str(int(raw))) / 10 if raw >= 1 else 1.0
    while power > raw:
        power /= 10
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = -(-low // step) * step
    return [round(first + i * step, 10) for i in range(int((high - first) / step) + 1)]


def loss_svg(
    curve: Mapping[int, float],
    attempts: Sequence[AttemptFact],
    checkpoints: Sequence[int],
    validation: Mapping[int, float] | None = None,
) -> str:
    """The loss over steps, and the one on validation data; a dashed line where an attempt took over, a small mark at
    each durable checkpoint.
    """
    held = {step: loss for step, loss in (validation or {}).items() if math.isfinite(loss)}
    if len(curve) < 2:
        return '<p class="soft">No steps were recorded.</p>'
    width, height, left, right, top, bottom = 1000, 340, 56, 16, 26, 40
    steps, losses = list(curve), list(curve.values())
    x0, x1 = min(steps), max(steps)
    y0, y1 = min([*losses, *held.values()]), max([*losses, *held.values()])
    pad = (y1 - y0) * 0.06 or 0.1
    y0, y1 = y0 - pad, y1 + pad

    def px(step: float) -> float:
        return left + (step - x0) / max(x1 - x0, 1) * (width - left - right)

    def py(loss: float) -> float:
        return top + (y1 - loss) / (y1 - y0) * (height - top - bottom)

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss over steps">']
    for tick in _ticks(y0, y1, 6):
        y = py(tick)
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(x0, x1, min(10, x1 - x0)):
        out.append(f'<text x="{px(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">optimizer step</text>')
    points = " ".join(f"{px(s):.1f},{py(v):.1f}" for s, v in curve.items())
    out.append(f'<polyline points="{points}" fill="none" stroke="var(--a)" stroke-width="1.8"/>')
    if held:
        points = " ".join(f"{px(s):.1f},{py(v):.1f}" for s, v in held.items() if x0 <= s <= x1)
        out.append(f'<polyline points="{points}" fill="none" stroke="var(--b)" stroke-width="1.8"/>')
        out += [
            f'<circle cx="{px(s):.1f}" cy="{py(v):.1f}" r="3" fill="var(--b)"><title>validation loss {v:.4f} at step '
            f"{s}</title></circle>"
            for s, v in held.items()
            if x0 <= s <= x1
        ]
        out.append(f'<text x="{width - right}" y="{top + 4}" text-anchor="end">training, and on validation data</text>')
    for step in checkpoints:
        if x0 <= step <= x1:
            y = height - bottom
            title = f"<title>checkpoint at step {step}</title>"
            out.append(f'<path d="M{px(step):.1f} {y} l-4 8 h8 z" fill="var(--c)">{title}</path>')
    for attempt in attempts[1:]:
        step = max(attempt.restore_step, 0) + attempt.lost_steps  # how far the attempt before it came
        x = px(min(max(step, x0), x1))
        side = f'x="{x + 5:.1f}"' if x <= width / 2 else f'x="{x - 5:.1f}" text-anchor="end"'  # where there is room
        out.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 6}" y2="{height - bottom}" stroke="var(--b)" '
            f'stroke-dasharray="5 4"/><text {side} y="{top + 4}">attempt {attempt.number}: '
            f"{html.escape(textwrap.shorten(attempt.cause or attempt.reason, 60, placeholder=' …'))}</text>"
        )
    out.append("</svg>")
    return "".join(out)


def _loss(value: float) -> str:
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
        (str(sum(a.lost_steps for a in facts.attempts)), "steps done twice"),
        (f"{sum(recoveries):.1f} s" if recoveries else "0 s", "time lost to failures"),
    ]
    if facts.tokens_per_s:
        cards.append((f"{facts.tokens_per_s:,.0f}", "tokens a second"))
    if facts.mfu:
        cards.append((f"{facts.mfu:.0%}", "of the measured peak (MFU)"))
    if facts.parameters:
        cards.append((f"{facts.parameters / 1e6:.2f} M", "parameters"))
    if facts.seconds:
        cards.append((f"{facts.seconds:.0f} s", "from start to end"))
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
            f"{a.began_s:.1f} s",
            "start" if a.restore_step < 0 else str(a.restore_step),
            f"{a.first_step}–{a.last_step}" if a.first_step is not None else "–",
            str(a.lost_steps),
            f"{a.recovery_s:.2f} s" if a.recovery_s is not None else "–",
            a.layout or "–",
            a.cause or a.reason or "first",
        ]
        for a in attempts
    ]
    return _section("Attempts", _table(head, rows, numeric=(1, 2, 4, 5)))


def _checkpoints(checkpoints: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            str(c["step"]),
            str(c.get("attempt") or "–"),
            f"{int(c['bytes']) / 1e6:.1f} MB" if c.get("bytes") else "–",
            str(c.get("state_digest", "")),
        ]
        for c in checkpoints
    ]
    return _section("Checkpoints", _table(["step", "attempt", "size", "state digest"], rows, numeric=(0, 1, 2)))


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
    parts.append(_section("Loss", loss_svg(facts.curve, facts.attempts, saved, facts.validation)))
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
        parts.append(_checkpoints(facts.checkpoints))
    if facts.sample:
        parts.append(_section("A sample", f"<pre>{html.escape(facts.sample)}</pre>"))
    parts += [f"<p class=soft>{html.escape(note)}</p>" for note in facts.notes]
    parts.append("</main></body></html>")
    return "\n".join(parts)
