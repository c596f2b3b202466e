"""Draws timelines and tables: text for a terminal, SVG for a page. Planned and measured ones draw alike.

Pure functions from data to strings; ``timeline.to_chrome`` makes the Perfetto form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from trainer.amounts import bytes_text, seconds_text
from trainer.plan.timeline import COMPUTE_KINDS, KINDS, Span, Timeline

_FILL = {"F": "-", "I": "=", "W": "~", "B": "=", "O": "#", "other": ":"}
_LEGEND = {
    "F": "F- forward",
    "B": "B= backward",
    "I": "I= input gradient",
    "W": "W~ weight gradient",
    "O": "# optimizer",
    "other": ": data, reports, snapshot",
}
_DRAWN = 64
"""Ranks that are drawn as text, at most."""


def _cells(events: Sequence[Span], seconds: float, columns: int) -> str:
    """One rank's row: every column shows the event that fills most of it; messages and waits stay blank. A letter is
    small where several events share its column and waiting is more than half of it.
    """
    scale = columns / seconds if seconds > 0 else 0.0
    owner: list[Span | None] = [None] * columns
    share, busy, shared = [0.0] * columns, [0.0] * columns, [0] * columns
    for event in events:
        if event.kind in ("send", "recv"):
            continue
        first, last = event.start * scale, event.end * scale
        for column in range(int(first), min(columns, int(last) + 1)):
            covered = min(last, column + 1) - max(first, column)
            busy[column] += covered
            shared[column] += covered > 0
            if covered > share[column] and (covered >= 0.3 or event.kind in COMPUTE_KINDS):
                owner[column], share[column] = event, covered
    out: list[str] = []
    column = 0
    while column < columns:
        shown = owner[column]
        end = column + 1
        while end < columns and owner[end] is shown:
            end += 1
        width = end - column
        if shown is None:
            out.append(" " * width)
        else:
            label = shown.kind if shown.kind in COMPUTE_KINDS else ""
            if label and shown.microbatch is not None and len(f"{label}{shown.microbatch}") <= width:
                label += str(shown.microbatch)
            if width == 1 and shared[column] > 1 and busy[column] < 0.5:
                label = label.lower()
            out.append((label + _FILL[shown.kind] * width)[:width])
        column = end
    return "".join(out)


def timeline_text(timeline: Timeline, columns: int = 100, replicas: int = 1) -> str:
    """One row a rank on a common scale, at most ``columns`` wide, bubble at the end, legend below.

    ``F3---`` is the forward of microbatch 3; where a block is too narrow for the number, only ``F`` shows. Of
    ``replicas`` that look alike the first is drawn, and of many ranks the first and the last.
    """
    digits = max(2, len(str(timeline.ranks - 1)))
    margin = len("rank  |") + digits
    width = max(20, columns - margin - len("| 99.9%"))

    def row(rank: int) -> str:
        cells = _cells(timeline.rows[rank], timeline.seconds, width)
        return f"|{cells}|{timeline.bubble[rank] * 100:5.1f}%"

    ranks = timeline.ranks // replicas
    alike = all(
        row(rank) == row(other) for rank in _ends(ranks) for other in range(rank + ranks, timeline.ranks, ranks)
    )
    ranks = ranks if alike else timeline.ranks
    title = f"{timeline.title}: {seconds_text(timeline.seconds)} a step" if timeline.title else "a step"
    lines = [title.ljust(margin + width) + " bubble"]
    shown, drawn = _ends(ranks), ""
    for before, rank in zip([-1, *shown], shown, strict=False):
        if rank > before + 1:
            lines.append(f"        ranks {before + 1} to {rank - 1} are left out here")
        drawn += row(rank)
        lines.append(f"rank {rank:{digits}d} {row(rank)}")
    if ranks < timeline.ranks:
        others = "the other replica does" if replicas == 2 else f"the {replicas - 1} other replicas do"
        lines.append(f"        ranks {ranks} to {timeline.ranks - 1}: {others} the same at the same time")
    used = {event.kind for event in timeline.events if event.seconds > 0}
    legend = "   ".join(text for kind, text in _LEGEND.items() if kind in used)
    small = "   small letters: mostly waiting" if drawn != drawn.upper() else ""
    lines.append(f"        {legend}   blank: waiting{small}")
    return "\n".join(lines) + "\n"


def _ends(ranks: int) -> list[int]:
    """Of so many ranks those that are drawn as text: all, or the first and the last."""
    if ranks <= _DRAWN:
        return list(range(ranks))
    return [*range(_DRAWN // 2), *range(ranks - _DRAWN // 2, ranks)]


_STYLE = """
.hs-tl{font:12px system-ui,sans-serif;color-scheme:light dark;--ink:#1c1e21;--rule:#c9ccd1;--lane:#f1f2f4;--on:#fff;
--F:#2563c9;--I:#b4540a;--W:#a3267e;--B:#8a3d08;--O:#187a4b;--send:#7d5bb5;--recv:#c3c7cd;--other:#6b7280}
@media (prefers-color-scheme:dark){.hs-tl{--ink:#e6e8eb;--rule:#4a4f57;--lane:#22262b;--on:#10131a;
--F:#7db0ff;--I:#ffab66;--W:#f08fd0;--B:#e08a3c;--O:#62d39b;--send:#bda4ee;--recv:#454b54;--other:#9aa3ae}}
.hs-tl text{fill:var(--ink)}.hs-tl .on{fill:var(--on);pointer-events:none}
.hs-tl .lane{fill:var(--lane)}.hs-tl .rule{stroke:var(--rule);stroke-width:1}
"""
_STYLE += "".join(f".hs-tl .k-{kind}{{fill:var(--{kind})}}" for kind in KINDS)


def timeline_svg(timelines: Timeline | Sequence[Timeline], width: int = 960) -> str:
    """A self-contained SVG: one lane a rank, a legend, an axis, a tooltip on every block; several timelines are stacked
    on one scale, so that a planned and a measured step compare by eye. Follows the reader's light or dark setting.
    """
    many = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    longest = max((t.seconds for t in many), default=0.0) or 1.0
    left, right, lane, gap = 64, 64, 22, 5
    scale = (width - left - right) / longest
    body: list[str] = []
    y = 8
    for timeline in many:
        title = f"{timeline.title or 'step'}: {seconds_text(timeline.seconds)}"
        y += 14
        body.append(f'<text x="{left}" y="{y}" font-weight="600">{escape(title)}</text>')
        y += 8
        for rank, row in enumerate(timeline.rows):
            body.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">rank {rank}</text>')
            span = timeline.seconds * scale
            body.append(f'<rect class="lane" x="{left}" y="{y}" width="{span:.2f}" height="{lane}"/>')
            body.extend(_svg_block(event, left, y, lane, scale) for event in row)
            idle = f"{timeline.bubble[rank] * 100:.1f}%"
            tip = f"rank {rank}: {idle} of the step without computing (the bubble)"
            body.append(f'<text x="{left + span + 6:.2f}" y="{y + 15}">{idle}<title>{tip}</title></text>')
            y += lane + gap
        y += 6
    body.append(_svg_axis(longest, left, y, width - left - right))
    y += 34
    used = {event.kind for timeline in many for event in timeline.events}
    x = left
    for kind, name in KINDS.items():
        if kind in used:
            body.append(f'<rect class="k-{kind}" x="{x}" y="{y - 10}" width="11" height="11" rx="2"/>')
            body.append(f'<text x="{x + 16}" y="{y}">{escape(name)}</text>')
            x += 30 + 7 * len(name)
    height = y + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="hs-tl" viewBox="0 0 {width} {height}" width="100%" '
        f'style="max-width:{width}px" role="img" aria-label="pipeline timeline"><style>{_STYLE}</style>'
        + "".join(body)
        + "</svg>\n"
    )


def _svg_block(event: Span, left: int, y: int, lane: int, scale: float) -> str:
    x, wide = left + event.start * scale, event.seconds * scale
    thin = event.kind in ("send", "recv")
    top, high = (y + lane // 2 - 2, 4) if thin else (y, lane)
    took, began = seconds_text(event.seconds), seconds_text(event.start)
    tip = f"rank {event.rank} {event.action}: {KINDS[event.kind]}, {took} from {began}"
    block = (
        f'<rect class="k-{event.kind}" x="{x:.2f}" y="{top}" width="{max(wide - 0.5, 0.4):.2f}" height="{high}" '
        f'rx="{1 if thin else 2}"><title>{escape(tip)}</title></rect>'
    )
    label = "" if event.microbatch is None else str(event.microbatch)
    if not thin and label and wide >= 7 * len(label) + 3:
        block += f'<text class="on" x="{x + wide / 2:.2f}" y="{y + 15}" text-anchor="middle">{label}</text>'
    return block


def _svg_axis(longest: float, left: int, y: int, span: int) -> str:
    marks = []
    for tick in range(5):
        x = left + span * tick / 4
        marks.append(f'<line class="rule" x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 4}"/>')
        at = seconds_text(longest * tick / 4) if tick else "0"
        marks.append(f'<text x="{x:.1f}" y="{y + 17}" text-anchor="middle">{at}</text>')
    rule = f'<line class="rule" x1="{left}" y1="{y}" x2="{left + span}" y2="{y}"/>'
    return rule + "".join(marks)


def memory_text(by_position: Sequence[Mapping[str, int]], budget: int | None = None, replicas: int = 1) -> str:
    """The memory of every position by kind, aligned, with totals, of all replicas; over ``budget`` bytes a position is
    marked.

    >>> print(memory_text([{"weights": 2048, "slots": 900}, {"weights": 3 << 20, "slots": 0}], budget=2 << 20))
    position   weights     slots     total
           0   2.0 KiB     900 B   2.9 KiB
           1   3.0 MiB         0   3.0 MiB  over the budget of 2.0 MiB
         all   3.0 MiB     900 B   3.0 MiB
    <BLANKLINE>
    """
    kinds = list(dict.fromkeys(kind for row in by_position for kind in row))
    widths = [8, *(max(10, len(kind) + 2) for kind in kinds), 10]
    sums = {kind: replicas * sum(row.get(kind, 0) for row in by_position) for kind in kinds}
    every = "all" if replicas == 1 else f"all x {replicas}"
    lines = [["position", *kinds, "total"]]
    for name, row in [*((str(number), row) for number, row in enumerate(by_position)), (every, sums)]:
        lines.append([name, *(bytes_text(row.get(kind, 0)) for kind in kinds), bytes_text(sum(row.values()))])
    text = ["".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    for number, row in enumerate(by_position):
        if budget is not None and sum(row.values()) > budget:
            text[number + 1] += f"  over the budget of {bytes_text(budget)}"
    return "\n".join(text) + "\n"
