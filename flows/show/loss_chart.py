"""The loss of a run over its steps, drawn as a report shows it: attempts, checkpoints and validation marked. Pure."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 1000, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 34, 40
LETTER = 6.6
"""Pixels of a letter of 12, on the safe side."""


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


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers between low and high."""
    span = max(high - low, 1e-9)
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class _Scale:
    """Where a step and a loss lie in the picture."""

    steps: tuple[int, int]
    losses: tuple[float, float]

    @classmethod
    def of(cls, steps: Sequence[int], losses: Sequence[float]) -> _Scale:
        low, high = min(losses), max(losses)
        pad = (high - low) * 0.06 or 0.1
        return cls((min(steps), max(steps)), (low - pad, high + pad))

    def x(self, step: float) -> float:
        first, last = self.steps
        return LEFT + (min(max(step, first), last) - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT)

    def y(self, loss: float) -> float:
        low, high = self.losses
        return TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def line(self, curve: Mapping[int, float], colour: str) -> str:
        points = " ".join(f"{self.x(step):.1f},{self.y(loss):.1f}" for step, loss in curve.items())
        return f'<polyline points="{points}" fill="none" stroke="var({colour})" stroke-width="1.8"/>'


def _axes(scale: _Scale) -> Iterator[str]:
    for tick in _ticks(*scale.losses, 6):
        y = scale.y(tick)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        yield f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    first, last = scale.steps
    for tick in _ticks(first, last, min(10, last - first)):
        yield f'<text x="{scale.x(tick):.1f}" y="{HEIGHT - BOTTOM + 21}" text-anchor="middle">{tick:,.0f}</text>'
    yield f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">optimizer step</text>'
    yield f'<text x="{LEFT - 8}" y="12" text-anchor="end">loss</text>'


def _checkpoints(scale: _Scale, steps: Sequence[int]) -> Iterator[str]:
    """A small mark each; of those that would lie on one another the first."""
    free = -math.inf
    for step in sorted(steps):
        x, y = scale.x(step), HEIGHT - BOTTOM
        if scale.steps[0] <= step <= scale.steps[1] and x >= free:
            title = f"<title>checkpoint at step {step}</title>"
            yield f'<path d="M{x:.1f} {y} l-4 8 h8 z" fill="var(--c)">{title}</path>'
            free = x + 8


def _attempts(scale: _Scale, attempts: Sequence[AttemptFact]) -> Iterator[str]:
    """A dashed line where each took over, with as many of its words as there is room for up to the lines beside it."""
    taken = attempts[1:]
    at = [scale.x(max(a.restore_step, 0) + a.lost_steps) for a in taken]  # how far the attempt before each came
    free = float(LEFT)
    for attempt, x, after in zip(taken, at, [*at[1:], WIDTH - RIGHT], strict=False):
        cause = attempt.cause or attempt.reason
        full = f"attempt {attempt.number}: {cause}"
        yield (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 14}" y2="{HEIGHT - BOTTOM}" stroke="var(--soft)" '
            f'stroke-dasharray="5 4"><title>{html.escape(full)}</title></line>'
        )
        for words in (textwrap.shorten(full, 72, placeholder=" …"), f"attempt {attempt.number}", str(attempt.number)):
            long = LETTER * len(words)
            before = x > WIDTH / 2 and x - 5 - long >= free  # the side of its words
            if before or x + 5 + long <= after:
                side = f'x="{x - 5:.1f}" text-anchor="end"' if before else f'x="{x + 5:.1f}"'
                yield f'<text {side} y="{TOP - 6}">{html.escape(words)}</text>'
                free = x if before else x + 5 + long
                break
        free = max(free, x)


def _key(validation: bool, checkpoints: bool, attempts: bool) -> str:
    marks = [
        ("--a", "━", "training", True),
        ("--b", "━", "on validation data", validation),
        ("--c", "▲", "checkpoint", checkpoints),
        ("--soft", "┆", "an attempt takes over", attempts),
    ]
    shown = [f'<span><b style="color:var({c})">{mark}</b> {what}</span>' for c, mark, what, there in marks if there]
    return f'<p class="soft key">{" ".join(shown)}</p>' if len(shown) > 1 else ""


def loss_chart(
    curve: Mapping[int, float],
    attempts: Sequence[AttemptFact],
    checkpoints: Sequence[int],
    validation: Mapping[int, float],
) -> str:
    """The loss over steps, and the one on validation data, with a key; of losses that are not finite their number."""
    finite = {step: loss for step, loss in curve.items() if math.isfinite(loss)}
    note = f"<p class=soft>Not finite, and not drawn: {len(curve) - len(finite)} of {len(curve)} losses.</p>"
    note = note if len(finite) < len(curve) else ""
    if len(finite) < 2:
        only = "".join(f"<p class=soft>One step: loss {loss:.4f} at step {step}.</p>" for step, loss in finite.items())
        return only + note or "<p class=soft>No steps were recorded.</p>"
    first, last = min(curve), max(curve)
    held = {s: loss for s, loss in validation.items() if math.isfinite(loss) and first <= s <= last}
    scale = _Scale.of(list(curve), [*finite.values(), *held.values()])
    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over steps">', *_axes(scale)]
    out += [*_attempts(scale, attempts), scale.line(finite, "--a")]
    if held:
        out.append(scale.line(held, "--b"))
    out += [
        f'<circle cx="{scale.x(s):.1f}" cy="{scale.y(v):.1f}" r="3" fill="var(--b)">'
        f"<title>validation loss {v:.4f} at step {s}</title></circle>"
        for s, v in held.items()
    ]
    out += _checkpoints(scale, checkpoints)
    return "".join(out) + "</svg>" + _key(bool(held), bool(checkpoints), len(attempts) > 1) + note
