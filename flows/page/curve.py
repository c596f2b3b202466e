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
    low, high = min(values), max(values)
    pad = (high - low) * 0.05 or 0.1
    return low - pad, high + pad


def loss_markdown(run: str, curve: Mapping[int, float]) -> str:
    """The curve as a Mermaid chart in Markdown."""
    finite = {step: value for step, value in curve.items() if value - value == 0}
    if len(finite) < 2:
        return f"# {run}\n\nno steps yet\n"
    some = thinned(finite, POINTS)
    first, last, values = min(some), max(some), list(some.values())
    low, high = _range(values)
    return (
        f"# {run}\n\nloss {finite[min(finite)]:.4f} → {finite[last]:.4f} at step {last}\n\n"
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
    low, high = _range(list(some.values()))
    points = " ".join(
        f"{40 + (step - first) / max(last - first, 1) * 550:.0f},{10 + (high - value) / (high - low) * 250:.0f}"
        for step, value in some.items()
    )
    text = (
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 600 290' font-family='sans-serif' font-size='12'>"
        "<rect width='600' height='290' fill='white'/><path d='M40 10 V260 H590' fill='none' stroke='gray'/>"
        f"<polyline points='{points}' fill='none' stroke='blue' stroke-width='2'/>"
        f"<text x='36' y='20' text-anchor='end'>{high:.2f}</text>"
        f"<text x='36' y='260' text-anchor='end'>{low:.2f}</text>"
        f"<text x='40' y='276'>{first}</text><text x='590' y='276' text-anchor='end'>{last}</text>"
        "<text x='310' y='276' text-anchor='middle'>loss over steps</text></svg>"
    )
    return f"data:image/svg+xml;utf8,{text}"
