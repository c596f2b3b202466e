"""A run's recorded steps and the same computed again, side by side. Pure.

Two computations that differ do not say which one is wrong. So where the first differs from what was recorded there is a
second one, on the same machine: two that agree outvote what was recorded, unless the machine is always wrong; two that
disagree say that this machine is the unreliable one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from flows.replay.recorded import StepLine, bits


class Verdict(StrEnum):
    SAME = "same"
    RUN = "run"
    """Computed twice here, with one result: what the run's machines gave is another."""
    HERE = "here"
    """The second time this machine gave what the run recorded."""
    UNCLEAR = "unclear"
    """Three computations, three results: this machine at least is not to be trusted."""


@dataclass(frozen=True)
class Difference:
    """The first thing that differs.

    ``recorded`` and ``again``: as bits, in hex; ``values``: as numbers, where it is one. ``same_before``: steps before
    it that were compared and are the same.
    """

    step: int
    what: str
    recorded: str
    again: str
    values: tuple[float, float] | None
    same_before: int


@dataclass(frozen=True)
class Suspects:
    """Who computed what differs: ranks of the attempt with their nodes and, where they are known, the nodes' machines.

    ``why``: what narrows them down; empty: nothing does, they are all of the gang.
    """

    epoch: int
    ranks: tuple[int, ...]
    nodes: tuple[int, ...]
    places: Mapping[int, str]
    why: str = ""


def first_difference(
    recorded: Mapping[int, StepLine],
    again: Mapping[int, StepLine],
    last: int,
    recorded_digest: str | None = None,
    again_digest: str | None = None,
) -> Difference | None:
    """In order of step: the loss, the gradient norm, the gradient as its groups of tensors tell it; after step ``last``
    the state digest, where both have one.
    """
    same = 0
    for step in sorted(recorded.keys() & again.keys()):
        for what, mine, theirs in (
            ("loss", recorded[step].loss, again[step].loss),
            ("gradient norm", recorded[step].norm, again[step].norm),
        ):
            if bits(mine) != bits(theirs):
                return Difference(step, what, bits(mine), bits(theirs), (mine, theirs), same)
        if (sums := recorded[step].sums) and (others := again[step].sums) and sums != others:
            return Difference(step, "gradient", sums, others, None, same)
        same += 1
    if recorded_digest is not None and again_digest is not None and recorded_digest != again_digest:
        return Difference(last, "state digest", recorded_digest, again_digest, None, same)
    return None


def verdict(first: Difference | None, second: Difference | None, between: Difference | None) -> Verdict:
    """``first``, ``second``: how the two computations differ from what was recorded; ``between``: from each other, up
    to that step.
    """
    if first is None:
        return Verdict.SAME
    if between is None:
        return Verdict.RUN
    return Verdict.HERE if second is None else Verdict.UNCLEAR


def numbers(found: Iterable[int]) -> str:
    """Numbers as ranges, for people.

    >>> numbers([0, 1, 2, 5, 7, 8])
    '0 to 2, 5, 7, 8'
    """
    parts: list[str] = []
    run: list[int] = []
    for n in [*sorted(set(found)), None]:
        if run and n != run[-1] + 1:
            parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
            run = []
        if n is not None:
            run.append(n)
    return ", ".join(parts)


def whom(suspects: Suspects, attempt: int) -> str:
    """The suspects as a person reads them."""
    places = [f"node {n}" + (f" ({suspects.places[n]})" if n in suspects.places else "") for n in suspects.nodes[:8]]
    more = f" and {len(suspects.nodes) - 8} more" if len(suspects.nodes) > 8 else ""
    word = "rank" if len(suspects.ranks) == 1 else "ranks"
    text = f"{word} {numbers(suspects.ranks)} on {', '.join(places)}{more}, attempt {attempt}"
    if not suspects.why:
        return f"computed by {text}" + ("" if len(suspects.ranks) == 1 else "; which of them cannot be told")
    return f"it was {text}: {suspects.why}"
