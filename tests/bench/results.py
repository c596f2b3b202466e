"""Rows of out/bench.json: [{name, value, unit, peer, peer_value, ratio}], and what else a row has to tell."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATH = Path("out") / "bench.json"
PEERS = ("torch", "jax", "calibrated-peak")
"""Of the rows that `make bench-peers` makes."""


def say(text: str) -> None:
    print(text, flush=True)


def entry(name: str, value: float, unit: str, peer: str, peer_value: float) -> dict[str, Any]:
    """A row, and a line for who looks on."""
    say(f"  {name:<58} {value:>10.3f} {unit:<10} {peer}: {peer_value:.3f}")
    ratio = value / peer_value if peer_value else None
    return {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio}


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """New rows take the place of those with their name and peer."""
    made = {(row["name"], row["peer"]) for row in new}
    return [row for row in old if (row["name"], row["peer"]) not in made] + list(new)


def write(rows: Sequence[dict[str, Any]], whole: bool = False) -> None:
    """``whole``: what `make bench` made before is not kept."""
    old = json.loads(PATH.read_text()) if PATH.exists() else []
    PATH.parent.mkdir(exist_ok=True)
    kept = [row for row in old if not whole or row["peer"] in PEERS]
    PATH.write_text(json.dumps(merged(kept, rows), indent=1) + "\n")
    say(f"written: {PATH}")
