"""What evaluations gave of the checkpoints on a run's own line, as rows that people read."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint.evaluated import Evaluation
from checkpoint.log import RunState
from checkpoint.store import Store
from flows.drive.live import load_evaluations


def line_evaluations(store: Store, state: RunState) -> list[Evaluation]:
    """By step; without those that an order left behind."""
    line = state.lineage()
    return load_evaluations(store, state.run).of(zip(line.column("step"), line.column("epoch"), strict=True))


def score_table(rows: Sequence[Evaluation], most: int = 50) -> list[dict[str, str]]:
    """The newest ``most`` of them, newest first, each with every column."""
    shown = list(rows)[-most:][::-1]
    names = list(dict.fromkeys(name for row in shown for name in row.numbers()))
    table = []
    for row in shown:
        numbers = row.numbers()
        cells = {name.removeprefix("eval/"): f"{numbers[name]:.6g}" if name in numbers else "" for name in names}
        failed = "; ".join(f"{name}: {ran.why}" for name, ran in row.commands.items() if ran.why)
        table.append({"step": str(row.step), **cells, "failed": failed})
    if not any(row["failed"] for row in table):
        for cells in table:
            del cells["failed"]
    return table


def score_markdown(rows: Sequence[Evaluation], most: int = 50) -> str:
    """The table, and the newest sample."""
    table = score_table(rows, most)
    if not table:
        return ""
    names = list(table[0])

    def cell(text: str) -> str:
        return "".join(c if c.isprintable() else " " for c in text).replace("|", "\\|")[:400]

    lines = ["| " + " | ".join(map(cell, names)) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in table]
    sample = next((row for row in reversed(rows) if row.sample), None)
    if sample is not None:
        quoted = "\n".join(f"    {line}" for line in sample.sample.splitlines())
        lines += ["", f"Sample at step {sample.step}:", "", quoted]
    return "\n".join(lines) + "\n"
