"""Who computed a step that differs: ranks, nodes and machines; fewer where what differs is some ranks' alone."""

from __future__ import annotations

from collections.abc import Sequence

from checkpoint.claims import MAX_BYTES, Place
from checkpoint.diff import differing_blocks
from checkpoint.digest import BLOCK_ELEMENTS, KINDS
from checkpoint.errors import Damaged, NotFound
from checkpoint.keys import node_key, plan_key
from checkpoint.layout import PlanLayout, PlanRefused, read_plan
from checkpoint.log import AttemptInfo, CheckpointInfo
from checkpoint.manifest import Manifest
from checkpoint.read import load_manifest
from checkpoint.store import Store
from flows.replay.again import Computed
from flows.replay.compare import Difference, Suspects

MAX_PLAN_BYTES = 1 << 30


def suspects_of(
    store: Store,
    run: str,
    attempt: AttemptInfo,
    found: Difference,
    recorded: CheckpointInfo | None,
    one: Computed,
) -> Suspects:
    """The ranks that computed the step, fewer where what differs is some ranks' alone."""
    everybody, why = tuple(range(attempt.ranks)), ""
    ranks = everybody
    try:
        layout = read_plan(store.get(plan_key(run, attempt.plan), max_bytes=MAX_PLAN_BYTES))
        if found.what == "state digest" and recorded is not None:
            ranks, why = _by_state(layout, load_manifest(store, run, recorded), one.manifest)
    except (NotFound, Damaged, PlanRefused):
        pass  # what would narrow it down is gone
    if not ranks or len(ranks) == len(everybody):
        ranks, why = everybody, ""
    nodes = tuple(sorted({rank * attempt.nodes // attempt.ranks for rank in ranks}))
    return Suspects(attempt.epoch, ranks, nodes, _places(store, run, attempt, nodes), why)


def _by_state(layout: PlanLayout, theirs: Manifest, ours: Manifest) -> tuple[tuple[int, ...], str]:
    """The ranks that keep the blocks which differ."""
    ranks, names = set(), []
    for number, tensor in enumerate(layout.tensors):
        blocks = {n for kind in range(len(KINDS)) for n in differing_blocks(theirs, ours, tensor.name, kind)}
        if blocks:
            names.append(tensor.name)
            ranks |= _keepers(layout, number, blocks)
    return tuple(sorted(ranks)), f"only what {'it keeps' if len(ranks) == 1 else 'they keep'} differs ({_some(names)})"


def _keepers(layout: PlanLayout, tensor: int, blocks: set[int]) -> set[int]:
    found = set()
    for rank in range(layout.ranks):
        for state in layout.rank(rank).states:
            if state.tensor == tensor and state.elements:
                first, last = state.first // BLOCK_ELEMENTS, (state.first + state.elements - 1) // BLOCK_ELEMENTS
                if any(first <= block <= last for block in blocks):
                    found.add(rank)
    return found


def _places(store: Store, run: str, attempt: AttemptInfo, nodes: Sequence[int]) -> dict[int, str]:
    """The machines of these nodes, as their claims name them."""
    found = {}
    for node in nodes[:64]:
        try:
            place = Place.parse(store.get(node_key(run, attempt.epoch, node), max_bytes=MAX_BYTES), "a node's claim")
        except (NotFound, Damaged):
            continue
        found[node] = f"host {place.host}" if place.host else place.describe()
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
