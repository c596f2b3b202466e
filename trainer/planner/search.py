"""All layouts of a model on a cluster: the best ones, and why the others lost.

Two kinds are searched: what this engine runs (stages, chunks, replicas, schedule, microbatch, recomputation), and with
the axes that are modelled only (tensor and sequence, context, sharded weights). The best of each kind by formula are
then played out by the simulator, from the schedule that the engine would run, and ranked again.

A layout is rejected for one of a few reasons; of each reason the count is kept, and the layout that came nearest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import isqrt

from trainer.errors import PlanError
from trainer.planner import shared_head
from trainer.planner.cluster import ClusterSpec
from trainer.planner.costs import ModelCosts, costs_of
from trainer.planner.estimate import Estimate, Planner
from trainer.planner.layouts import APART, RECOMPUTES, Arrangement
from trainer.planner.links import Placed
from trainer.planner.pipelines import played
from trainer.planner.times import DeviceTimes
from trainer.spec import MAX_MICROBATCHES, SCHEDULES, RunSpec

PLAYED = 8
"""Of each kind, how many are played out."""
HOPELESS = 0.95
"""A layout that could not reach this share of the best of its family, were messages free, is not looked at further."""
CLOSE = 0.02
"""Layouts that are no faster than this are not worth more devices."""
MAX_NODES = 4096
"""Of a launch (``launch.nodes``)."""
MAX_WIDE = 4096
"""Ranks of a stage in the plan's format."""


@dataclass
class Reason:
    """Why layouts were left out."""

    text: str
    count: int = 0
    nearest: Arrangement | None = None
    detail: str = ""
    _distance: float = field(default=float("inf"), repr=False)

    def add(self, a: Arrangement | None, distance: float, detail: Callable[[], str]) -> None:
        """One more; of all, the nearest is told."""
        self.count += 1
        if distance < self._distance:
            self._distance, self.nearest, self.detail = distance, a, detail()


@dataclass
class Advice:
    """What a search gives."""

    runnable: list[Estimate]
    """Best first."""
    modelled: list[Estimate]
    rejected: list[Reason]
    looked_at: int
    seconds: float
    costs: Mapping[int, ModelCosts]
    tightest: Estimate | None = None
    """Of what this engine runs, the layout that is nearest to fitting; of all, where it runs none."""
    families: list[tuple[Estimate, Estimate]] = field(default_factory=list)
    """The best of each schedule and kind that lost, beside what it lost to."""
    scaling: list[Estimate] = field(default_factory=list)
    """What this engine runs: the best layout of each doubling of devices."""
    own: Estimate | None = None
    """The spec's own layout, as it is written; None where its schedule is a file or its batch does not divide."""


@dataclass(frozen=True)
class Choices:
    """What a search may choose."""

    keep_numerics: bool = False
    """Microbatch, batch and reduction groups stay: the layouts that give a run's own bits."""
    modelled: bool = True
    fp8: bool = True
    """Modelled layouts may take FP8 where the spec says bf16 and the device has it."""
    max_batch_tokens: int = 0
    """0: the batch is the spec's; else it may be as large as this."""


def search(spec: RunSpec, cluster: ClusterSpec, limits: Choices, clock: Callable[[], float] = time.monotonic) -> Advice:
    """All layouts. PlanError where the cluster's device cannot compute the spec's precision."""
    begun = clock()
    planner = planner_for(spec, cluster, limits)
    seek = _Search(spec, cluster, limits, planner)
    kinds: dict[bool, list[Estimate]] = {False: [], True: []}
    best = seek.best
    for a in seek.candidates():
        found = seek.lightest(a)
        if found is None:
            continue
        kinds[found.layout.foreign].append(found)
        key = family_key(found.layout)
        if key not in best or _rank(found) > _rank(best[key]):
            best[key] = found
    ranked = {kind: _best_played(planner, found) for kind, found in kinds.items()}
    families = []
    for lost in sorted(best.values(), key=_rank, reverse=True):
        first = ranked[lost.layout.foreign][0]
        if family_key(lost.layout)[:2] != family_key(first.layout)[:2]:
            families.append((lost, first))
    families = list({family_key(lost.layout)[:2]: (lost, first) for lost, first in reversed(families)}.values())[::-1]
    scaling: dict[int, Estimate] = {}
    for one in kinds[False]:
        doubling = one.layout.devices.bit_length()
        if doubling not in scaling or _rank(one) > _rank(scaling[doubling]):
            scaling[doubling] = one
    reasons = sorted(seek.reasons.values(), key=lambda reason: -reason.count)
    near = seek.tightest.get(False) or seek.tightest.get(True)
    tightest = planner.at(near.layout).estimate(near.layout, whole=True) if near is not None else None
    looked = seek.looked
    return Advice(
        ranked[False],
        ranked[True],
        reasons,
        looked,
        clock() - begun,
        planner.costs,
        tightest,
        families,
        [scaling[doubling] for doubling in sorted(scaling)],
        _own(spec, planner),
    )


def planner_for(spec: RunSpec, cluster: ClusterSpec, limits: Choices) -> Planner:
    """What all layouts of a search have in common. PlanError where the device cannot compute the precision."""

    def planner(of: RunSpec, fp8: Planner | None = None) -> Planner:
        times = DeviceTimes.of(cluster.sheet, of.train.precision)
        return Planner(cluster, times, {size: costs_of(of, size) for size in _microbatches(of, limits)}, fp8=fp8)

    other = None
    if limits.modelled and limits.fp8 and spec.train.precision == "bf16" and "fp8" in cluster.sheet.peak:
        train = spec.train.model_copy(update={"precision": "fp8"})
        rate, own = (DeviceTimes.of(cluster.sheet, name).rate("linear") for name in ("fp8", "bf16"))
        if rate > own:  # elsewhere it would only make the modelled layouts slower
            other = planner(spec.model_copy(update={"train": train}))
    return planner(spec, other)


def _own(spec: RunSpec, planner: Planner) -> Estimate | None:
    """The layout that a spec says, on the cluster."""
    p, train = spec.parallel, spec.train
    positions = p.positions(p.stages)
    if (
        p.schedule not in SCHEDULES
        or train.microbatches % p.replicas
        or positions * p.replicas > planner.cluster.devices
    ):
        return None
    if p.chunks > 1 and p.stages % p.chunks:
        return None
    a = Arrangement(
        positions=positions, chunks=p.stages // positions, replicas=p.replicas, schedule=p.schedule,
        microbatch=train.microbatch, microbatches=train.microbatches // p.replicas,
        groups=max(p.replicas, resolved_groups(spec)), blocks=train.vocab_blocks, head=p.vocab_stages or 1,
    )  # fmt: skip
    ways = [planner.estimate(one, whole=True) for one in ([a] if p.vocab_stages else shared_head.choices(a))]
    return max(ways, key=_rank)


def family_key(a: Arrangement) -> tuple[bool, str, int]:
    """Layouts whose best is kept: of a kind and schedule, and of what this engine runs also by doublings of devices."""
    modelled = a.foreign
    return modelled, a.schedule, 0 if modelled else a.devices.bit_length()


def _rank(found: Estimate) -> float:
    return found.tokens_s


def _best_played(planner: Planner, found: Sequence[Estimate]) -> list[Estimate]:
    """The best by formula, played out and ranked; of layouts that are as good, the
    one with the fewest devices first."""
    ordered = sorted(found, key=_rank, reverse=True)
    chosen: list[Estimate] = []
    seen: set[tuple[object, ...]] = set()
    for one in ordered:
        a = one.layout
        key = (a.positions, a.chunks, a.schedule, a.recompute, a.tensor, a.context, a.sharded > 1, a.head)
        if key not in seen:
            seen.add(key)
            chosen.append(one)
        if len(chosen) >= PLAYED:
            break
    if ordered:  # as fast on fewer devices
        enough = [one for one in ordered if _rank(one) >= (1 - CLOSE) * _rank(ordered[0])]
        thrifty = min(enough, key=lambda one: (one.layout.devices, -_rank(one)))
        chosen += [thrifty] if thrifty not in chosen else []
    exact = []
    for one in chosen:
        a, mine = one.layout, planner.at(one.layout)
        if a.positions == 1:
            exact.append(mine.estimate(a, whole=True))
            continue
        placed = Placed(planner.cluster, a)
        filled = played(a.schedule, a.positions, a.microbatches, mine.stages(a, placed), placed.hop(mine.message(a)))
        exact.append(mine.estimate(a, filled, whole=True))
    exact.sort(key=_rank, reverse=True)
    if exact:
        enough = [one for one in exact if _rank(one) >= (1 - CLOSE) * _rank(exact[0])]
        first = min(enough, key=lambda one: (one.layout.devices, -_rank(one)))
        exact.remove(first)
        exact.insert(0, first)
    return exact


def _microbatches(spec: RunSpec, limits: Choices) -> list[int]:
    """Sequences of a microbatch that are tried: the spec's alone where its numerics stay."""
    own = spec.train.microbatch
    if limits.keep_numerics:
        return [own]
    most = spec.train.batch
    return sorted({size for size in (1, 2, 4, 8, 16, own) if size <= most})


def _divisors_and_powers(number: int, most: int) -> list[int]:
    """Sizes worth trying for an axis: powers of two, and what divides ``number``."""
    found = {d for d in range(1, isqrt(number) + 1) if number % d == 0}
    found |= {number // d for d in found}
    found |= {1 << n for n in range(20)}
    return sorted(size for size in found if 1 <= size <= most)


class _Search:
    """Walks over layouts, and remembers why those that are left out are."""

    def __init__(self, spec: RunSpec, cluster: ClusterSpec, limits: Choices, planner: Planner) -> None:
        self.spec, self.cluster, self.limits, self.planner = spec, cluster, limits, planner
        self.reasons: dict[str, Reason] = {}
        self.looked = 0
        self.tightest: dict[bool, Estimate] = {}
        self.best: dict[tuple[bool, str, int], Estimate] = {}
        train = spec.train
        cap = limits.max_batch_tokens
        self.sequences = cap // train.sequence if cap else train.batch
        if cap and self.sequences < 1:
            raise PlanError(
                f"train.max_batch_tokens {cap} is less than one sequence of {train.sequence} tokens; raise it, or "
                "shorten train.sequence"
            )
        self.context_ok = train.sequence >= 4096

    def reject(self, text: str, a: Arrangement | None, distance: float, detail: Callable[[], str]) -> None:
        self.reasons.setdefault(text, Reason(text)).add(a, distance, detail)

    # --- which ----------------------------------------------------------------------------------------------

    def candidates(self) -> Iterator[Arrangement]:
        for positions, chunks in self._pipelines():
            for tensor, context in self._splits():
                inner = tensor * context
                most = self.cluster.devices // (positions * inner)
                if most < 1:
                    continue
                for replicas in self._replicas(most, inner > 1):
                    yield from self._with(positions, chunks, replicas, tensor, context)

    def _pipelines(self) -> Iterator[tuple[int, int]]:
        """Positions and chunks: of all that leave a stage as many layers at most, the fewest positions."""
        layers = self.spec.model.layers
        most = min(layers, self.cluster.devices, MAX_WIDE)
        deep = {p for p in range(1, most + 1) if p <= 8 or -(-layers // p) < -(-layers // (p - 1)) or not p & (p - 1)}
        deep |= {p + 1 for p in deep if 8 < p < most}  # a position more, for the head
        for positions in sorted(deep):
            limit = layers // positions
            for chunks in sorted({1, 2, 3, 4, 5, 6, 8, limit} & set(range(1, limit + 1))) if positions > 1 else [1]:
                yield positions, chunks

    def _splits(self) -> Iterator[tuple[int, int]]:
        yield 1, 1
        if not self.limits.modelled:
            return
        c = next(iter(self.planner.costs.values()))
        heads, groups, hidden = (m := c.sizes.model).heads, m.groups, m.size_of_hidden
        for tensor in _divisors_and_powers(heads, min(self.cluster.domain, 64)):
            if heads % tensor or hidden % tensor or (groups % tensor and tensor % groups):
                continue
            for context in (1, 2, 4, 8, 16, 32):
                too_short = context > 1 and c.sequence // context < 1024
                if tensor * context > 1 and not too_short and (context == 1 or self.context_ok):
                    yield tensor, context

    def _replicas(self, most: int, modelled: bool) -> Iterator[int]:
        """Powers of two; with modelled axes only those that leave less than half of the devices idle."""
        size = 1
        while size * 2 <= most and size * 2 <= self.sequences:
            if not modelled:
                yield size
            size *= 2
        yield size

    def _with(self, positions: int, chunks: int, replicas: int, tensor: int, context: int) -> Iterator[Arrangement]:
        train, limits = self.spec.train, self.limits
        for microbatch in self.planner.costs:
            if limits.max_batch_tokens and not limits.keep_numerics:
                count = self.sequences // (replicas * microbatch)
            elif train.batch % (replicas * microbatch):
                self.reject(
                    "the batch does not divide into replicas x microbatches", None, replicas * microbatch,
                    lambda d=replicas, b=microbatch: f"train.batch {train.batch} over {d} x {b}",  # type: ignore[misc]
                )  # fmt: skip
                continue
            else:
                count = train.batch // (replicas * microbatch)
            count = min(count, MAX_MICROBATCHES // replicas)
            if count < 1:
                continue
            groups = self._groups(replicas, count)
            if groups is None:
                continue
            for schedule in SCHEDULES if positions > 1 else ("1f1b",):
                fixed = self._schedule(schedule, positions, chunks, count)
                if fixed is None:
                    continue
                base = Arrangement(
                    positions=positions, chunks=chunks, replicas=replicas, schedule=schedule, microbatch=microbatch,
                    microbatches=fixed, tensor=tensor, context=context, groups=groups, blocks=train.vocab_blocks,
                )  # fmt: skip
                fp8 = self.planner.fp8 is not None
                yield from [replace(base, fp8=True)] if fp8 and base.foreign else shared_head.choices(base)
                if self.limits.modelled and replicas > 1 and positions == 1:
                    yield replace(base, sharded=replicas * context, fp8=fp8)

    def _groups(self, replicas: int, count: int) -> int | None:
        """train.reduction_groups: the spec's where it says so or must keep it, else as many as replicas."""
        train = self.spec.train
        if self.limits.keep_numerics or "reduction_groups" in train.model_fields_set:
            own = resolved_groups(self.spec)
            if replicas <= own and (replicas * count) % own == 0:
                return own
            self.reject(
                "more replicas than train.reduction_groups, or groups that do not divide the microbatches", None,
                replicas, lambda: f"{replicas} replicas, reduction_groups {own}",
            )  # fmt: skip
            return None
        return replicas

    def _schedule(self, schedule: str, positions: int, chunks: int, count: int) -> int | None:
        """How many microbatches a schedule takes of those that there are; None where it takes none."""
        wanted = {"interleaved-1f1b": chunks > 1, "zb-v": chunks == 2, "v-half": chunks == 2}.get(schedule, chunks == 1)
        if not wanted:
            return None
        free = bool(self.limits.max_batch_tokens) and not self.limits.keep_numerics
        if schedule == "interleaved-1f1b" and count % max(1, count // positions):
            if not free:
                self.reject(
                    "interleaved 1F1B takes equal rounds of microbatches", None, positions,
                    lambda: f"{count} microbatches on {positions} positions",
                )  # fmt: skip
                return None
            count = _equal_rounds(count, positions)
        if schedule == "gpipe" and free and count > 4 * positions:
            count = 4 * positions  # it holds all of them: more is never what fits
        return count

    # --- how good -------------------------------------------------------------------------------------------

    def lightest(self, a: Arrangement) -> Estimate | None:
        """A layout with as little computed again as makes it fit: more of it only takes longer."""
        self.looked += 1
        if (
            a.context > 1
            and self.cluster.domain % (a.tensor * a.context)
            and a.devices > Placed(self.cluster, a).capacity
        ):
            a = replace(a, packed=True)
        if a.devices > (capacity := Placed(self.cluster, a).capacity):
            self.reject(
                "racks hold no whole number of tensor x context groups, and the rest is too few devices", a,
                a.devices - capacity, lambda: f"{a.devices} devices of {capacity} that can be used",
            )  # fmt: skip
            return None
        known = self.best.get(family_key(a))
        if known is not None and (bound := self.planner.at(a).bound(a)) < HOPELESS * known.tokens_s:
            self.reject(
                "slower than another of their schedule, whatever messages cost", a, known.tokens_s / bound,
                lambda: f"at most {bound / known.tokens_s:.0%} of the tokens a second",
            )  # fmt: skip
            return None
        state, have = self.planner.at(a).state_bytes(a), self.cluster.sheet.memory_bytes
        if state > have:
            self.reject(
                "does not fit the device's memory, weights and optimizer alone", a, state,
                lambda: f"{state / 1e9:.1f} GB of {have / 1e9:.1f} GB",
            )  # fmt: skip
            return None
        for recompute in RECOMPUTES[:1] if a.schedule in APART else RECOMPUTES:  # of all layers: no W is left
            found = self.look(a if recompute == "none" else replace(a, recompute=recompute))
            if found is not None:
                return found
        return None

    def look(self, a: Arrangement) -> Estimate | None:
        """What a layout costs; None where it is left out, with the reason remembered."""
        cluster, planner, placed = self.cluster, self.planner.at(a), Placed(self.cluster, a)
        if a.foreign and a.sharded == 1 and 2 * a.devices <= cluster.devices and a.sequences * 2 <= self.sequences:
            self.reject(
                "more than half of the devices would be idle", a, cluster.devices - a.devices,
                lambda: f"{a.devices} of {cluster.devices} devices",
            )  # fmt: skip
            return None
        if not a.foreign and (uneven := self._launch(a, placed)):
            self.reject(uneven, a, a.devices, lambda: f"{a.devices:,} ranks on {placed.nodes:,} nodes")
            return None
        have = cluster.sheet.memory_bytes
        memory = planner.memory(a, whole=False)
        need = max(sum(kinds.values()) for kinds in memory)
        if need > have:
            self.reject("does not fit the device's memory", a, need, lambda: _too_large(planner, a, need, have))
            kind = a.foreign
            if kind not in self.tightest or need < self.tightest[kind].most_bytes:
                self.tightest[kind] = planner.estimate(a, memory=memory)
            return None
        found = planner.estimate(a, memory=memory)
        if not a.pipeline_first or a.positions == 1 or a.replicas == 1 or not a.foreign:
            return found
        other = planner.estimate(replace(a, pipeline_first=False), memory=memory)
        return other if other.tokens_s > found.tokens_s else found

    def _launch(self, a: Arrangement, placed: Placed) -> str:
        """Why no launch could hold a layout that this engine runs; empty where one can."""
        if placed.nodes > MAX_NODES:
            return f"more than {MAX_NODES} nodes: a launch has no more"
        if a.devices % placed.nodes:
            return "every node of a launch runs as many ranks, and these do not divide"
        return ""


@cache
def _equal_rounds(most: int, positions: int) -> int:
    """The most microbatches, below ``most``, that make equal rounds."""
    return next(m for m in range(most - 1, 0, -1) if m % max(1, m // positions) == 0)


def resolved_groups(spec: RunSpec) -> int:
    """train.reduction_groups as a run has them: the spec's, else 8 or the most that divide its microbatches."""
    own = spec.train.reduction_groups
    if own:
        return own
    groups = 8
    while spec.train.microbatches % groups:
        groups //= 2
    return groups


def _too_large(planner: Planner, a: Arrangement, need: int, have: int) -> str:
    kinds = max(planner.memory(a, whole=False), key=lambda kinds: sum(kinds.values()))
    told = ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in kinds.items())
    return f"{need / 1e9:.1f} GB of {have / 1e9:.1f} GB: {told}"


WASTE = {
    "compute": "slower computation",
    "recompute": "layers computed again",
    "tensor": "waits for tensor messages",
    "context": "waits for keys and values",
    "uneven": "stages of unlike cost",
    "bubble": "bubble",
    "gradients": "gradients exchanged after the last backward",
    "optimizer": "the optimizer",
    "weights": "weights gathered",
}
"""What seconds of a step are spent on, for people."""


def why_lost(lost: Estimate, best: Estimate) -> str:
    """What made a layout slower than another, in the words of its largest difference; in device seconds a token, so
    that unlike batches and numbers of devices compare."""
    slower = best.tokens_s / lost.tokens_s - 1
    if slower <= 0.001:
        return "as fast by formula"
    fewer = best.layout.devices / lost.layout.devices
    mine, theirs = ({n: s * e.layout.devices / e.tokens for n, s in e.parts.items()} for e in (lost, best))
    gaps = {name: mine.get(name, 0.0) - theirs.get(name, 0.0) for name in WASTE}
    worst = max(gaps, key=lambda name: gaps[name])
    wasted = 1 + gaps[worst] / sum(theirs.values())
    failing = best.goodput / lost.goodput
    text = f"{slower:.0%} slower: "
    if fewer >= max(wasted, failing):
        return f"{text}uses {lost.layout.devices:,} devices, not {best.layout.devices:,}"
    if failing > wasted:
        return f"{text}failures, goodput {lost.goodput:.0%} against {best.goodput:.0%}"
    share, other = (e.parts.get(worst, 0.0) / e.step_s for e in (lost, best))
    return f"{text}{WASTE[worst]}, {share:.0%} of its step against {other:.0%}"
