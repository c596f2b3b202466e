"""Who computed a step that differs: ranks, nodes and machines; fewer where what differs is some ranks' alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint.claims import MAX_BYTES, Place
from checkpoint.diff import differing_blocks
from checkpoint.digest import BLOCK_ELEMENTS
from checkpoint.errors import Damaged, NotFound
from checkpoint.keys import node_key, plan_key
from checkpoint.layout import PlanLayout, PlanRefused, read_plan
from checkpoint.log import AttemptInfo, CheckpointInfo
from checkpoint.manifest import Manifest
from checkpoint.read import load_manifest
from checkpoint.store import Store
from flows.replay.compare import Difference, Suspects
from flows.replay.recorded import StepLine
from trainer.wire import NONE64, PlanPosition
from trainer.wire.plan import parse

MAX_PLAN_BYTES = 1 << 30


@dataclass(frozen=True)
class Evidence:
    """``found`` at a step: what was recorded of that step, and what computing it again in the run's own layout said;
    of the state after the last step the recorded checkpoint, and the manifest of what was computed.
    """

    found: Difference
    recorded: StepLine | None
    again: StepLine | None
    checkpoint: CheckpointInfo | None
    manifest: Manifest


def suspects_of(store: Store, run: str, attempt: AttemptInfo, evidence: Evidence) -> Suspects:
    """The ranks that computed the step, fewer where what differs points to some."""
    everybody, why, found = tuple(range(attempt.ranks)), "", evidence.found
    ranks = everybody
    try:
        data = store.get(plan_key(run, attempt.plan), max_bytes=MAX_PLAN_BYTES)
        layout = read_plan(data)
        if shares_head(data):
            pass  # what a rank owns others compute too, and each one's messages go to all
        elif found.what == "state digest":
            if evidence.checkpoint is not None:
                ranks, why = _by_state(layout, load_manifest(store, run, evidence.checkpoint), evidence.manifest)
        elif evidence.recorded is not None and evidence.again is not None:
            one_stage_a_rank = attempt.how.get("parallel", {}).get("chunks", 1) == 1
            ranks, why = by_step(layout, evidence.recorded, evidence.again, messages=one_stage_a_rank)
    except (NotFound, Damaged, PlanRefused):
        pass  # what would narrow it down is gone
    if not ranks or len(ranks) == len(everybody):
        ranks, why = everybody, ""
    nodes = tuple(sorted({rank * attempt.nodes // attempt.ranks for rank in ranks}))
    return Suspects(attempt.epoch, ranks, nodes, _places(store, run, attempt, nodes), why)


def shares_head(plan: bytes) -> bool:
    """Whether several positions of a plan, whose bytes were read before, compute parts of the head."""
    positions = parse(plan).records("positions", PlanPosition)
    return len([p for p in positions if p.targets_offset != NONE64]) > 1


def by_step(layout: PlanLayout, was: StepLine, now: StepLine, *, messages: bool) -> tuple[tuple[int, ...], str]:
    """The ranks that a step's messages and gradients point to, and why; nobody where they point to none.

    A position whose messages are other ones, though what it got is the same, is where it went wrong: going forward the
    first that sent something else, on the way back the one nearest to the loss. What nobody sends (the loss, gradients
    of weights) is of the one that has it. Messages are told of the first replica alone: the others are never ruled out.
    ``messages``: they may be compared: both had one layout, of a stage a rank.
    """
    positions, others = len(layout.positions), tuple(range(len(layout.positions), layout.ranks))
    told = messages and len(was.sent) == len(now.sent) == 16 * positions
    forward, backward = ([p for p in range(positions) if _differs(was, now, p, way)] if told else [] for way in (0, 1))
    if forward:
        got = "got the same from the rank before it" if forward[0] else "is the first"
        return (forward[0],), f"it {got}, and sent something else on"
    if was.loss != now.loss:
        head = "what the ranks before it sent on is the same" if told or positions == 1 else ""
        return ((positions - 1, *others), head) if head else ((), "")
    if backward:
        got = "got the same from the rank behind it" if backward[-1] < positions - 1 else "is the last"
        return (backward[-1],), f"it {got}, and sent another gradient back"
    tensors = _differing_tensors(layout, was.sums, now.sums, last_alone=not told)
    kept = [{state.tensor for state in layout.rank(rank).states} for rank in range(layout.ranks)]
    ranks = tuple(rank for rank in range(layout.ranks) if kept[rank] & set(tensors))
    names = _some([layout.tensors[t].name for t in tensors])
    if told or positions == 1:
        return ranks, f"the gradient of {names} is another one, and all messages are the same"
    return ranks, f"nearest to the loss it is the gradient of {names} that is another one"


def _differs(was: StepLine, now: StepLine, position: int, way: int) -> bool:
    at = 16 * position + 8 * way
    return was.sent[at : at + 8] != now.sent[at : at + 8]


def _differing_tensors(layout: PlanLayout, was: str, now: str, *, last_alone: bool) -> list[int]:
    """Numbers of the tensors in the groups whose sums differ; of the last such group alone, which is nearest to the
    loss.
    """
    if len(was) != len(now) or len(was) % 8 or not was:
        return []
    groups, count = len(was) // 8, len(layout.tensors)
    wrong = [g for g in range(groups) if was[8 * g : 8 * g + 8] != now[8 * g : 8 * g + 8]]
    wanted = set(wrong[-1:] if last_alone else wrong)
    return [t for t in range(count) if t * groups // count in wanted]


def _by_state(layout: PlanLayout, theirs: Manifest, ours: Manifest) -> tuple[tuple[int, ...], str]:
    """The ranks that keep the blocks which differ."""
    ranks, names = set(), []
    for number, tensor in enumerate(layout.tensors):
        blocks = {
            n
            for kind in range(theirs.tensor(tensor.name).kinds)
            for n in differing_blocks(theirs, ours, tensor.name, kind)
        }
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
