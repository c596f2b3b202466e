"""A run's layout (how many nodes, stages, replicas) as the How half of its spec says it, and the others that it allows.

Pure, on Hows as plain values (``how_map``, a log's records): one of an older version may lack keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEYS = ("stages", "replicas", "chunks", "schedule")


def other_hows(how: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The Hows that ``recovery.layouts`` (or ``allowed_stages``) makes of this one, best first; unchecked."""
    recovery, parallel, launch = how.get("recovery") or {}, how["parallel"], how["launch"]
    rows = [*(recovery.get("layouts") or ()), *({"stages": s} for s in recovery.get("allowed_stages") or ())]
    nodes = int(launch.get("nodes", 1))
    per_node = max(1, how_ranks(how) // nodes)
    found = []
    for row in rows:
        made = {**how, "parallel": {**parallel, **{k: row[k] for k in _KEYS if row.get(k) is not None}}}
        filled = row["nodes"] if row.get("nodes") is not None else -(-how_ranks(made) // per_node)
        found.append({**made, "launch": {**launch, "nodes": filled}})
    return found


def how_ranks(how: Mapping[str, Any]) -> int:
    """Processes of a gang of this How."""
    parallel = how["parallel"]
    return -(-int(parallel.get("stages", 1)) // int(parallel.get("chunks", 1))) * int(parallel.get("replicas", 1))


def layout_words(how: Mapping[str, Any]) -> str:
    """A How's layout for people: ``2 stages x 2 replicas on 2 nodes``."""
    parallel, nodes = how["parallel"], int(how["launch"].get("nodes", 1))
    stages, replicas = int(parallel.get("stages", 1)), int(parallel.get("replicas", 1))
    words = [f"{stages} stage{'s' * (stages != 1)}"]
    if int(parallel.get("chunks", 1)) > 1:
        words.append(f"{parallel['chunks']} a rank")
    across = f"{', '.join(words)} x {replicas} replica{'s' * (replicas != 1)}"
    return f"{across} on {nodes} node{'s' * (nodes != 1)}"


def same_layout(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two Hows have one layout."""

    def of(how: Mapping[str, Any]) -> tuple[Any, ...]:
        parallel, nodes = how.get("parallel") or {}, (how.get("launch") or {}).get("nodes", 1)
        defaults = {"stages": 1, "replicas": 1, "chunks": 1, "schedule": "1f1b", "vocab_stages": 0}
        return nodes, *(parallel.get(key, default) for key, default in defaults.items())

    return of(one) == of(other)
