"""A live view of a run at a terminal, by rich: a bar, loss, tokens a second, MFU, ETA, the last durable step, attempts.

Facts of the run scroll by above it as lines. Where there is no terminal, or a dumb one, nobody makes one: see
`flows/show/lines.py` for lines.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import IO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flows.drive.events import Event
from flows.show.lines import Lines, Meter

NARROW = 64
SPARK = "▁▂▃▄▅▆▇█"


def wanted(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that can hold a live view."""
    try:
        terminal = stream.isatty()
    except ValueError:
        return False
    return terminal and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


@dataclass
class LiveView:
    """Start it, tell it events and lines, stop it; lines go above the view, also from other threads."""

    steps: int
    flops_per_token: float = 0.0
    peak_flops: float = 0.0
    console: Console = field(default_factory=lambda: Console(highlight=False))

    def __post_init__(self) -> None:
        self.meter = Meter(self.steps, self.flops_per_token, self.peak_flops)
        self._lines = Lines(self.say, self.steps, every_s=math.inf)
        self._curve: list[float] = []
        self._phase = "starting"
        self._live = Live(self, console=self.console, refresh_per_second=8, transient=True, redirect_stdout=False)
        self._on = False

    def start(self) -> LiveView:
        self._live.start()
        self._on = True
        return self

    def stop(self) -> None:
        """Take the view away; a last line says where the run stands. May be called again."""
        if self._on:
            self._on = False
            self._live.stop()
            if self.meter.step:
                self.say(self._facts_line())

    def say(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def tell(self, event: Event) -> None:
        self.meter.take(event)
        if event.kind == "step":
            self._phase = "training"
            if math.isfinite(self.meter.loss):
                self._curve.append(self.meter.loss)
                if len(self._curve) > 4096:
                    self._curve = self._curve[::2]
            return
        if event.kind == "phase":
            self._phase = str(event.facts["phase"])
        self._lines.tell(event)

    # --- drawing ------------------------------------------------------------------------------------------

    def _facts(self) -> list[str]:
        meter = self.meter
        return [
            f"loss {meter.loss:.4f}" if meter.step else "loss –",
            f"{meter.rate:,.0f} tok/s",
            *([f"MFU {meter.mfu:.0%}"] if meter.mfu is not None else []),
            f"ETA {meter.eta}" if meter.step else "ETA –",
            f"saved {meter.durable}" if meter.durable >= 0 else "nothing saved",
            f"attempt {max(meter.attempts, 1)}",
        ]

    def _facts_line(self) -> str:
        facts = [fact for fact in self._facts() if not fact.startswith("ETA")]
        return f"step {self.meter.step}/{self.meter.steps}  " + "  ".join(facts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        meter = self.meter
        head = f"{self._phase} {meter.step}/{self.meter.steps} {meter.step / max(self.meter.steps, 1):.0%} "
        row = Table.grid(expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_row(Text(head), ProgressBar(max(self.meter.steps, 1), meter.step))
        yield row
        facts = self._facts()
        if width >= NARROW:
            text = "  ".join(facts)
            room = width - len(text) - 3
            yield Text(text + (f"  {spark(self._curve, min(room, 24))}" if room >= 8 else ""), no_wrap=True)
        else:
            for part in (facts[:3], facts[3:]):
                yield Text("  ".join(part), no_wrap=True, overflow="crop")


def spark(curve: list[float], width: int) -> str:
    """A curve as block characters, at most so many."""
    if len(curve) < 2 or width < 1:
        return ""
    picked = [curve[i * (len(curve) - 1) // max(width - 1, 1)] for i in range(min(width, len(curve)))]
    if len(curve) <= width:
        picked = curve
    low, high = min(picked), max(picked)
    scale = (len(SPARK) - 1) / ((high - low) or 1.0)
    return "".join(SPARK[int((value - low) * scale)] for value in picked)
