"""What a run's artifacts on Prefect's page say: its attempts as a table, and where its files are. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from checkpoint.keys import run_key
from checkpoint.log import RunState
from checkpoint.store import Store
from trainer.amounts import took

CHECKPOINTS_SHOWN = 20


def attempts_table(
    state: RunState, spans: Mapping[int, tuple[int, int]], back: Mapping[int, float]
) -> list[dict[str, Any]]:
    """A row an attempt: where it began, why, what was done twice, how long until steps came again.

    ``spans``: by epoch the first and last step; ``back``: by epoch the seconds that a recovery took.
    """
    rows: list[dict[str, Any]] = []
    reached = 0
    for number, attempt in enumerate(state.attempts, 1):
        span = spans.get(attempt.n)
        cause = attempt.body.get("cause") or {}
        rows.append(
            {
                "attempt": number,
                "began": datetime.fromtimestamp(attempt.time, UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
                "from step": max(attempt.step, 0),
                "steps": f"{span[0]}–{span[1]}" if span else "",
                "because": str(cause.get("text") or ("start" if number == 1 else attempt.reason)),
                "done twice": max(0, reached - max(attempt.step, 0)) if number > 1 and reached else 0,
                "back after": took(back[attempt.n]) if attempt.n in back else "",
            }
        )
        reached = max(reached, span[1] if span else 0)
    return rows


def files_markdown(run: str, store: Store, report: str, state: RunState | None) -> str:
    """Where report, output, weights and checkpoints are. ``report``: its path, where one is written."""
    behind = f"{run} --store {shlex.quote(store.url)}"
    lines = [
        f"# {run}",
        "",
        f"- store: `{store.url}`",
        f"- report: `{report or f'hotstage report {behind} -o report.html'}`",
        f"- what its ranks said: `hotstage logs {behind}`",
        f"- weights for transformers: `hotstage ckpt export {behind} -o model/`",
        "",
        f"Checkpoints in {store.describe()}, newest first:",
        "",
        "| step | manifest | state digest |",
        "|---|---|---|",
    ]
    checkpoints = state.listed() if state else []
    for c in reversed(checkpoints[-CHECKPOINTS_SHOWN:]):
        lines.append(f"| {c.step} | `{run_key(run, c.manifest)}` | `{c.state_digest}` |")
    if len(checkpoints) > CHECKPOINTS_SHOWN:
        lines.append(f"\n{len(checkpoints) - CHECKPOINTS_SHOWN} more: `hotstage ckpt ls {behind}`")
    return "\n".join(lines) + "\n"
