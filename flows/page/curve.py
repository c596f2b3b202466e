"""The loss curve as Prefect's pages draw it. Pure: a mapping of step to loss in, text out.

The new page draws Mermaid in Markdown, the old one shows its source; both draw an image, and print its address below,
so that the image is kept small and its address can be wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping

POINTS = 60
_COLOURS = (  # one line for Mermaid, whose own colour of a line is nearly white
    '%%{init: {"theme": "base", "themeVariables": {"xyChart": '
    '{"plotColorPalette": "#2563eb", "backgroundColor": "#ffffff"}}}}%%'
)


def thinned(curve: Mapping[int, float], points: int) -> dict[int, float]:
    """About so many points of the curve, evenly taken; the first and the last are kept."""
    steps = sorted(curve)
    picked = steps[:: max(1, -(-len(steps) // points))]
    if picked and picked[-1] != steps[-1]:
        picked.append(steps[-1])
    return {step: curve[step] for step in picked}


def _range(values: list[float]) -> tuple[float, float]:
    """Of the axis: some room around the values, and none below zero where they are above it."""
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or 0.1
    return (max(0.0, low - pad) if low >= 0 else low - pad), high + pad


def loss_words(curve: Mapping[int, float]) -> str:
    """The first and the newest loss in a line."""
    first, last = min(curve), max(curve)
    before = f"{_number(curve[first])} → " if first < last else ""
    return f"loss {before}{_number(curve[last])} at step {last}"


def _number(loss: float) -> str:
    return f"{loss:.4f}" if abs(loss) < 1e5 else f"{loss:.4g}"


def loss_markdown(run: str, curve: Mapping[int, float]) -> str:
    """The curve as a Mermaid chart in Markdown."""
    finite = {step: value for step, value in curve.items() if value - value == 0}
    if len(finite) < 2:
        return f"# {run}\n\n{loss_words(curve) if curve else 'no steps yet'}\n"
    some = thinned(finite, POINTS)
    first, last, values = min(some), max(some), list(some.values())
    low, high = _range(values)
    return (
        f"# {run}\n\n{loss_words(curve)}\n\n"
        f"```mermaid\n{_COLOURS}\nxychart-beta\n"
        f'    x-axis "step" {first} --> {last}\n'
        f'    y-axis "loss" {low:.4f} --> {high:.4f}\n'
        f"    line [{', '.join(f'{v:.4f}' for v in values)}]\n```\n"
    )


def loss_image(curve: Mapping[int, float]) -> str:
    """The curve as an SVG in a data address, with spaces where it may be wrapped."""
    some = thinned({step: value for step, value in curve.items() if value - value == 0}, POINTS)
    if not some:
        some = {0: 0.0}
    first, last = min(some), max(some)
    least, most = min(some.values()), max(some.values())
    low, high = _range([least, most])

    def y(value: float) -> float:
        return 10 + (high - value) / (high - low) * 250

    points = " ".join(
        f"{54 + (step - first) / max(last - first, 1) * 530:.0f},{y(value):.0f}" for step, value in some.items()
    )
    text = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 600 290' font-family='sans-serif' font-size='12'>"
        "<rect width='600' height='290' fill='white'/><path d='M54 10 V260 H584' fill='none' stroke='gray'/>"
        f"<polyline points='{points}' fill='none' stroke='blue' stroke-width='2'/>"
        f"<text x='50' y='{y(most) + 4:.0f}' text-anchor='end'>{most:.3g}</text>"
        f"<text x='50' y='{y(least) + 4:.0f}' text-anchor='end'>{least:.3g}</text>"
        f"<text x='54' y='276'>{first}</text><text x='584' y='276' text-anchor='end'>{last}</text>"
        "<text x='319' y='276' text-anchor='middle'>loss over steps</text></svg>"
    )
    return f"data:image/svg+xml;utf8,{text}"
