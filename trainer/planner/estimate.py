"""A layout's step on a cluster: seconds by part, memory of each position by kind, traffic by link, MFU, goodput.

What is assumed beside the device's sheet stands here with its reason; what is fitted stands in ``times.py``.

The end of a step: gradients go out chunk by chunk as their last backward ends (a position's last chunk is exposed but
for what its own last backward covers), then the optimizer, then the weights come back, the first chunk's before the
next step can begin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import exp, log2, sqrt

from trainer.plan.devices import WORKSPACE_BYTES
from trainer.plan.layout import split_layers
from trainer.plan.reduce import in_pieces
from trainer.plan.timeline import Timeline
from trainer.planner import shared_head
from trainer.planner.cluster import ClusterSpec
from trainer.planner.costs import ModelCosts, ModelPiece
from trainer.planner.layouts import APART, Arrangement
from trainer.planner.links import LINKS, Placed
from trainer.planner.pipelines import Filled, closed, held, play_out
from trainer.planner.times import DeviceTimes, Parts
from trainer.spec_how import THERE_AND_BACK
from trainer.wire.plan import piece_elements

TENSOR_EXPOSED = 0.5
"""Of the tensor axis' collectives, what products do not hide (overlapped with them in halves)."""
OPTIMIZER_BYTES = 12
"""A parameter's fp32 master and moments, which its owner keeps."""
UPDATE_BYTES = 38
"""What a step's end reads and writes of a parameter: its gradient for the norm and for AdamW, master and moments in and
out, the copy, the gradient's zero."""
KINDS = ("weights", "gradients", "optimizer", "activations", "buffers")
"""Of memory."""
Memory = tuple[Mapping[str, int], ...]
"""Bytes by kind of some positions."""


@dataclass(frozen=True)
class Estimate:
    """What a layout costs."""

    layout: Arrangement
    placed: Placed
    step_s: float
    parts: Mapping[str, float]
    """Seconds of the step by what they are spent on, on average over positions, and what the slowest takes more
    (``uneven``); they add up to ``step_s``."""
    bubble: float
    """Of the step, what positions wait for the pipeline, on average."""
    mfu: float
    goodput: float
    """Of the time, what goes into steps that count, with failures, snapshots and restarts."""
    checkpoint_s: float
    """Between checkpoints, for the best goodput."""
    memory: tuple[Mapping[str, int], ...]
    """By position; of some of them while layouts are compared (``whole``)."""
    traffic: Mapping[str, float]
    """Bytes that a device sends a step, by link class."""
    tokens: int
    played: bool = field(default=False)
    """The pipeline was played out, not taken from its formula."""

    @property
    def tokens_s(self) -> float:
        """Tokens a second of steps that count."""
        return self.tokens / self.step_s * self.goodput

    @property
    def most_bytes(self) -> int:
        """Of the fullest device."""
        return max(sum(kinds.values()) for kinds in self.memory)


@dataclass(frozen=True, slots=True)
class Stored:
    """Elements of a piece's tensors on one device."""

    padded: float
    """Of gradients: with room for all replicas' pieces."""
    copies: float
    """Of what kernels read, where that is not the master."""
    owned: float
    """Of masters and moments."""
    pieces: float
    """Of what is in pieces, its own."""
    whole: float
    """Of what every replica has whole."""
    single: float
    """Of masters with one moment: Muon's."""


class Planner:
    """A model on a cluster: everything that layouts have in common."""

    def __init__(
        self,
        cluster: ClusterSpec,
        times: DeviceTimes,
        costs: Mapping[int, ModelCosts],
        counts: tuple[int, ...] | None = None,
        fp8: Planner | None = None,
    ) -> None:
        self.cluster, self.times, self.costs = cluster, times, costs
        self.fp8 = fp8  # the same model with its layers' products in FP8
        self.counts = counts  # layers of each stage, where somebody else split them
        self._stored: dict[tuple[int, int, int, bool], Stored] = {}
        self._pieces: dict[tuple[int, str, int, int], tuple[Parts, Parts, Parts]] = {}

    def at(self, a: Arrangement) -> Planner:
        """The one for a layout's precision."""
        return self.fp8 if a.fp8 and self.fp8 is not None else self

    def together(self, a: Arrangement) -> bool:
        """Whether the layers' matrices are whole in every replica, not in pieces, as this engine has those that are FP8
        and those that Muon takes."""
        return (self.times.precision == "fp8" or self.muon(a)) and not a.foreign

    def muon(self, a: Arrangement) -> bool:
        """Whether Muon takes the layers' matrices."""
        return self.costs[a.microbatch].sizes.muon

    def pieces(self, a: Arrangement) -> tuple[Parts, Parts, Parts]:
        """Seconds of embedding, layer and head for a microbatch, without messages."""
        key = (a.microbatch, a.recompute, a.tensor, a.context)
        if key not in self._pieces:
            c = self.costs[a.microbatch]
            embed, plain, layer, head = (
                self.times.piece(piece, a.tensor, a.context)
                for piece in (c.embed, c.layer, c.again(a.recompute), c.head)
            )
            self._pieces[key] = (embed, replace(layer, again=layer.whole - plain.whole), head)
        return self._pieces[key]

    # --- time -----------------------------------------------------------------------------------------------

    def exposed(self, a: Arrangement, placed: Placed) -> tuple[Parts, Parts]:
        """Seconds of a layer that a microbatch waits for the tensor and the context axis."""
        c = self.costs[a.microbatch]
        tensor = context = Parts()
        if a.tensor > 1:
            one = TENSOR_EXPOSED * placed.collective("tensor", c.rows * c.width * c.dt_bytes / a.context)
            again = 4 * one if a.recompute == "layer" else 0.0
            tensor = Parts(4 * one, 4 * one + again, 2 * one, again)  # W gathers its inputs again
        if a.context > 1:
            one = placed.collective("context", c.rows * c.kv_width * c.dt_bytes / a.tensor)
            again = one if a.recompute in ("attention", "layer") else 0.0
            context = Parts(one, 2 * one + again, 0.0, again)
        return tensor, context

    def stages(self, a: Arrangement, placed: Placed) -> list[Parts]:
        """Seconds of each stage for a microbatch, with what it waits for its tensor and context neighbours."""
        embed, layer, head = self.pieces(a)
        tensor, context = self.exposed(a, placed)
        counts = self.split(a)
        each = layer + tensor + context
        scaled = {count: each * count for count in set(counts)}
        found = [scaled[count] for count in counts]
        found[0] += embed
        if a.head > 1:
            return shared_head.with_parts_of(a, found, head)
        found[-1] += head
        return found

    def split(self, a: Arrangement) -> tuple[int, ...]:
        """Layers of each stage: by cost, as the compiler splits them."""
        if self.counts is not None:
            return self.counts
        c = self.costs[a.microbatch]
        ratio = round(1000 * c.head.cost / c.layer.cost)
        return _split(c.layers, ratio, a.stages) if a.head == 1 else shared_head.split(a, c.layers, ratio)

    def layers_at(self, a: Arrangement) -> tuple[int, ...]:
        """Layers of each position."""
        counts = self.split(a)
        return counts if a.chunks == 1 else _by_position(counts, a.positions, a.schedule in THERE_AND_BACK)

    def message(self, a: Arrangement) -> float:
        """Bytes of an activation between stages, of one device."""
        c = self.costs[a.microbatch]
        return c.rows * c.width * c.dt_bytes / (a.tensor * a.context)

    def state_bytes(self, a: Arrangement) -> float:
        """Of an average position: weights, gradients and optimizer, whatever is in flight. Not more than ``memory``."""
        if a.sharded > 1:
            return 0.0
        c = self.costs[a.microbatch]
        copies = a.replicas * a.context
        item = c.dt_bytes if c.dt_bytes == 2 else 0
        each = 4 + item + (OPTIMIZER_BYTES - 4 * self.muon(a)) / copies
        return c.layers / a.positions * c.layer.parameters / a.tensor * each

    def stored(self, a: Arrangement, piece: ModelPiece, together: bool) -> Stored:
        """Elements that a device holds of a piece's tensors. In this engine tensors are in pieces of whole blocks, so
        that the last may be padded, or whole where they have few blocks (``plan/reduce.py``)."""
        copies = a.replicas * a.context
        key = (id(piece), copies, a.tensor * (-1 if a.foreign else 1), together)
        if key not in self._stored:
            padded = matrices = owned = pieces = whole = single = 0.0
            for elements, copied in piece.tensors:
                mine = -(-elements // a.tensor)
                if a.foreign:
                    part: float = mine / copies if copies > 1 else 0.0
                else:
                    part = piece_elements(mine, copies) if in_pieces(mine, copies) else 0
                if together and copied:
                    part = 0
                padded += max(part * copies, mine)
                owned += part or mine
                single += (part or mine) if piece.orthogonal and copied else 0
                pieces, whole = pieces + part, whole + (0 if part else mine)
                # a compute copy: of matrices where they are not fp32, of what is in pieces
                if part or (copied and self.times.precision != "fp32"):
                    matrices += max(part * copies, mine)
            self._stored[key] = Stored(padded, matrices, owned, pieces, whole, single)
        return self._stored[key]

    def _received(self, a: Arrangement, counts: Sequence[int], first: bool, last: bool) -> float:
        """Bytes that hold what other replicas send of their gradients, where there is no second buffer of them: of
        the two largest layers (or ends), as the last backward is cut."""
        c = self.costs[a.microbatch]
        copies = a.replicas * a.context
        if copies == 1 or a.groups > a.replicas:
            return 0.0
        layer, embed, head = (self.stored(a, p, self.together(a) and p is c.layer) for p in (c.layer, c.embed, c.head))
        most = 0.0
        for number, count in enumerate(counts):
            units = [layer.pieces] * count
            whole = layer.whole * count
            if last and number == len(counts) - 1:
                tied = self.stored(a, c.shared, False)
                units, whole = [head.pieces + tied.pieces, *units], whole + head.whole + tied.whole
            if first and number == 0:
                units, whole = [*units, embed.pieces], whole + embed.whole
            exchanged = (copies - 1) * sum(sorted(units)[-2:])
            most = max(most, 4 * exchanged, 4 * whole)
        return most

    def deepest_chunk(self, a: Arrangement, position: int) -> int:
        """Layers of a position's largest stage."""
        counts = self.split(a)
        if a.chunks == 1:
            return counts[position]
        return max(_chunks(counts, a.positions, a.schedule in THERE_AND_BACK)[position])

    def chunks_at(self, a: Arrangement, position: int) -> tuple[int, ...]:
        """Layers of each of a position's stages."""
        counts = self.split(a)
        if a.chunks == 1:
            return (counts[position],)
        return _chunks(counts, a.positions, a.schedule in THERE_AND_BACK)[position]

    def parameters(self, a: Arrangement) -> float:
        """Of the fullest position, on one device (what the tensor axis leaves of them)."""
        c = self.costs[a.microbatch]
        found = [count * c.layer.parameters for count in self.layers_at(a)]
        found[0] += c.embed.parameters
        found[last_position(a)] += c.head.parameters
        return max(found) / a.tensor

    def estimate(
        self, a: Arrangement, filled: Filled | None = None, *, whole: bool = False, memory: Memory | None = None
    ) -> Estimate:
        """The step of a layout. ``filled``: its pipeline, played out. ``whole``: the memory of every position, not
        only of those that may have the most. ``memory``: what :meth:`memory` has said of it already."""
        c = self.costs[a.microbatch]
        placed = Placed(self.cluster, a)
        stages = self.stages(a, placed)
        at = at_positions(a, stages)
        played = filled is not None
        if filled is None:
            filled = closed(a.schedule, a.microbatches, stages, at, placed.hop(self.message(a)))
        if a.head > 1:
            filled = shared_head.filled_with(a, filled, self.pieces(a)[2], placed.hop(self.message(a)))
        slow = max(at, key=lambda part: part.whole)
        tensor, context = self.exposed(a, placed)
        layers = self.layers_at(a)
        deepest, average = max(layers), sum(layers) / len(layers)
        parameters = self.parameters(a)
        end, traffic = self._end(a, placed, slow, parameters, deepest)
        step = filled.seconds + sum(end.values())
        m = a.microbatches
        waits = {"tensor": tensor.whole * average * m, "context": context.whole * average * m}
        again = self.pieces(a)[1].again * average * m
        parts = {"compute": filled.mean - again - sum(waits.values()), "recompute": again, **waits}
        parts |= {"uneven": filled.busiest - filled.mean, "bubble": filled.seconds - filled.busiest, **end}
        tokens = a.sequences * c.sequence
        flops = c.flops_token * tokens
        goodput, interval = goodput_of(self.cluster, placed.nodes, step)
        message = self.message(a)
        passes = [
            ("tensor", (8 + 2 + 4 * (a.recompute == "layer"))
             * c.rows * c.width * c.dt_bytes / a.context * (a.tensor - 1) / a.tensor * deepest * m),
            ("context", (3 + (a.recompute in ("attention", "layer"))) * c.rows * c.kv_width * c.dt_bytes / a.tensor
             * (a.context - 1) / a.context * deepest * m),
            ("pipeline", 2 * message * a.chunks * m),
        ]  # fmt: skip
        for axis, size in passes:
            for link, part in placed.traffic(axis, size).items():
                traffic[link] = traffic.get(link, 0.0) + part
        return Estimate(
            layout=a,
            placed=placed,
            step_s=step,
            parts={name: seconds for name, seconds in parts.items() if seconds > 0 or name in ("compute", "bubble")},
            bubble=max(0.0, filled.seconds - filled.mean) / step,
            mfu=flops / (step * self.times.peak * a.devices),
            goodput=goodput,
            checkpoint_s=interval,
            memory=memory or self.memory(a, whole),
            traffic={link: traffic[link] for link in LINKS if traffic.get(link, 0.0) > 0},
            tokens=tokens,
            played=played,
        )

    def bound(self, a: Arrangement) -> float:
        """Tokens a second that a layout could not pass: like stages, no messages."""
        c = self.costs[a.microbatch]
        _, layer, _ = self.pieces(a)
        share = c.layers / a.positions
        deepest = -(-c.layers // a.positions)
        fill = {"interleaved-1f1b": layer.whole / a.chunks, "zb-h1": max(0.0, layer.f + layer.i - layer.w)}
        idle = 0.0 if a.schedule in THERE_AND_BACK else fill.get(a.schedule, layer.whole) * share * (a.positions - 1)
        step = a.microbatches * deepest * layer.whole + idle
        return a.sequences * c.sequence / step * goodput_of(self.cluster, Placed(self.cluster, a).nodes, step)[0]

    def _end(
        self, a: Arrangement, placed: Placed, slow: Parts, parameters: float, deepest: int
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds and bytes of what follows the microbatches on a position: gradients, optimizer, weights."""
        c = self.costs[a.microbatch]
        copies = a.replicas * a.context
        traffic: dict[str, float] = {}
        gradients = weights = 0.0
        covered = (slow.i + slow.w) / a.chunks * (deepest - 1) / max(1, deepest)
        if copies > 1 and a.sharded == 1:
            # what is whole in every replica goes whole to each of the others, and comes back from none
            times, back = (copies, 0) if self.together(a) else (1, c.dt_bytes)
            reduce = self._over_copies(a, placed, 4 * parameters * times)
            gather = self._over_copies(a, placed, back * parameters)
            window = (a.chunks - 1) / a.chunks * min(a.microbatches, a.positions) * (slow.i + slow.w)
            gradients = max(reduce / a.chunks - covered, reduce - window - covered, 0.0)
            weights = gather / a.chunks
            sizes = (4 * times + back) * parameters * (copies - 1) / copies
            for axis in ("data", "context"):
                share = (placed.axes[axis].size - 1) / max(1, copies - 1) if axis == "context" else 1.0
                if placed.axes[axis].size > 1:
                    for link, part in placed.traffic(axis, sizes * share).items():
                        traffic[link] = traffic.get(link, 0.0) + part
        elif a.sharded > 1:
            # weights are gathered for each microbatch's forward and backward, gradients summed after each backward
            gather = self._over_copies(a, placed, c.dt_bytes * parameters)
            waits = 3 * gather * a.microbatches
            work = slow.whole * a.microbatches
            weights = max(0.0, waits - work) + gather / max(1, deepest)
            for link, part in placed.traffic(
                "data", 3 * c.dt_bytes * parameters * a.microbatches * (copies - 1) / copies
            ).items():
                traffic[link] = traffic.get(link, 0.0) + part
        # the head's gradient to the first position, the new weights back; of one that is shared, to those that own none
        sent = c.tied / a.tensor if last_position(a) > 0 else 0.0
        if a.head > 1:
            owner = 0 if c.tied else last_position(a)
            sent = c.matrix / a.head * sum(p != owner for p in shared_head.head_positions(a))
        if sent:
            gradients += placed.hop(4 * sent)
            weights += placed.hop(c.dt_bytes * sent)
            for link, part in placed.traffic("pipeline", 4 * sent).items():
                traffic[link] = traffic.get(link, 0.0) + part
        optimizer = self.times.stream(UPDATE_BYTES * parameters / (1 if self.together(a) else copies))
        if self.muon(a):
            optimizer += max(self.layers_at(a)) * self.times.orthogonal(c.layer.orthogonal, a.tensor)
        return {"gradients": gradients, "optimizer": optimizer, "weights": weights}, traffic

    def _over_copies(self, a: Arrangement, placed: Placed, size: float) -> float:
        """Seconds of an exchange among all that hold the same weights: replicas, and context pieces of them."""
        return placed.collective("data", size / a.context) + placed.collective("context", size)

    # --- memory ---------------------------------------------------------------------------------------------

    def memory(self, a: Arrangement, whole: bool = True) -> Memory:
        """Bytes by kind: of every position, or of those that may have the most."""
        counts = self.layers_at(a)
        chosen: Iterable[int] = range(a.positions)
        if not whole:
            chosen = {0, counts.index(max(counts)), a.positions - 1}
        return tuple(self._at(a, position, counts[position]) for position in chosen)

    def _at(self, a: Arrangement, position: int, layers: int) -> dict[str, int]:
        c = self.costs[a.microbatch]
        split = a.tensor * a.context
        first = position == 0
        last = position == last_position(a)
        pieces = [(c.layer, layers), (c.embed, int(first)), (c.head, int(last))]
        buffered = log2(a.groups / a.replicas) + 1
        each = self.stored(a, c.layer, self.together(a))
        whole, matrices, owned = layers * each.padded, layers * each.copies, layers * each.owned
        for piece, there in pieces[1:]:
            if there:
                more = self.stored(a, piece, False)
                whole, matrices, owned = whole + more.padded, matrices + more.copies, owned + more.owned
        weights = matrices * c.dt_bytes  # FP8: codes and their transpose
        gradients, optimizer = 4 * whole * buffered, OPTIMIZER_BYTES * owned - 4 * layers * each.single
        # where weight gradients are put off; at the first position of the others each is right behind its I
        apart = a.schedule in APART and (position > 0 or a.schedule == "v-half")
        kept, ends = c.slot(a.recompute, apart)
        ahead = held(a.schedule, a.chunks, a.microbatches, a.positions, position)
        stream = c.rows * c.width * c.dt_bytes
        # a position has one pool of slots, as large as its largest chunk needs
        own = [ends[0]] * first + [ends[2]] * last + [ends[1]] * (a.chunks > first + last)
        slot = a.chunks * (self.deepest_chunk(a, position) * kept + max(own))
        if a.schedule == "interleaved-1f1b":  # received before it is its turn
            ahead += 1 / a.chunks
        elif a.schedule in THERE_AND_BACK and position == a.positions - 1:  # both chunks lie in one slot
            ahead += 1
        ahead = min(ahead, a.microbatches)
        given = first + 2 * last + (a.head > 1 and not last and position in shared_head.head_positions(a))
        activations = ahead * slot / split + 4 * c.rows * a.microbatches * given
        if a.head > 1:
            activations -= ahead * slot
            activations += shared_head.activations(a, c, position, last_position(a), slot, ahead)
        activations += 0 if first and a.chunks == 1 else stream / split  # the gradient that is sent
        again = c.again(a.recompute)
        scratch = max(p.scratch_bytes for p, n in ((again, 1), *pieces[1:]) if n) / split
        if a.sharded > 1:
            gathered = 2 * c.layer.parameters / a.tensor * c.dt_bytes
            weights, gradients = weights / a.sharded + gathered, gradients / a.sharded + 2 * gathered
        if a.head > 1:
            owner = 0 if c.tied else last_position(a)
            copy, shares = shared_head.weights(a, c, position, owner, buffered)
            weights, gradients = weights + copy, gradients + shares
        # the head's own gradient, but where both uses have one, and its copy where the embedding is elsewhere
        if c.tied and last and a.head == 1 and not a.stages == a.replicas == a.microbatches == 1:
            gradients += 4 * self.stored(a, c.shared, False).padded * buffered
            weights += 0 if first else c.tied * c.dt_bytes / a.tensor
        if c.tied and first and not last and a.head == 1:  # comes while the last backward runs
            gradients += 4 * self.stored(a, c.shared, False).owned
        windows = 4 * stream / split if a.positions > 1 else 0.0
        gradients += self._received(a, self.chunks_at(a, position), first, last)
        buffers = scratch + windows + WORKSPACE_BYTES + self.times.sheet.context_bytes
        sizes = (weights, gradients, optimizer, activations, buffers)
        return {kind: int(size) for kind, size in zip(KINDS, sizes, strict=True)}

    def timeline(self, a: Arrangement) -> Timeline:
        """A replica's step, played out."""
        placed = Placed(self.cluster, a)
        stages = self.stages(a, placed)
        return play_out(a.schedule, a.positions, a.microbatches, stages, placed.hop(self.message(a))).timeline


@lru_cache(4096)
def _split(layers: int, head: int, stages: int) -> tuple[int, ...]:
    return tuple(len(part) for part in split_layers([1000] * layers, head, stages))


def last_position(a: Arrangement) -> int:
    """Where the head is."""
    return 0 if a.schedule in THERE_AND_BACK and a.chunks % 2 == 0 else a.positions - 1


def at_positions(a: Arrangement, stages: Sequence[Parts]) -> list[Parts]:
    """What each position takes for a microbatch, all its chunks together."""
    if a.chunks == 1:
        return list(stages)
    found = [Parts()] * a.positions
    for stage, position in enumerate(of_stage(a.stages, a.positions, a.schedule in THERE_AND_BACK)):
        found[position] += stages[stage]
    return found


@lru_cache(1024)
def of_stage(stages: int, positions: int, back: bool) -> tuple[int, ...]:
    """The position of every stage."""
    turns = (divmod(stage, positions) for stage in range(stages))
    return tuple(positions - 1 - at if back and turn % 2 else at for turn, at in turns)


@lru_cache(4096)
def _by_position(counts: tuple[int, ...], positions: int, back: bool) -> tuple[int, ...]:
    found = [0] * positions
    for count, position in zip(counts, of_stage(len(counts), positions, back), strict=True):
        found[position] += count
    return tuple(found)


@lru_cache(4096)
def _chunks(counts: tuple[int, ...], positions: int, back: bool) -> tuple[tuple[int, ...], ...]:
    found: list[list[int]] = [[] for _ in range(positions)]
    for count, position in zip(counts, of_stage(len(counts), positions, back), strict=True):
        found[position].append(count)
    return tuple(map(tuple, found))


def goodput_of(cluster: ClusterSpec, nodes: int, step_s: float) -> tuple[float, float]:
    """The share of time that goes into steps that count, and the seconds between checkpoints that make it largest.

    With failures at random, an interval of T seconds and its snapshot's stall C take (1/rate + R) (e^(rate (T + C)) -
    1) seconds on average (Daly 2006), R to restart. The best T is near sqrt(2 C / rate), in whole steps.
    """
    rate, stall, restart = cluster.failures_node_s * nodes, cluster.checkpoint_stall_s, cluster.restart_s
    if rate <= 0:
        return 1.0, float("inf")

    def share(interval: float) -> float:
        exponent = rate * (interval + stall)
        return interval / ((1 / rate + restart) * (exp(exponent) - 1)) if exponent < 500 else 0.0

    least = max(step_s, cluster.checkpoint_every_s)
    best = max(sqrt(2 * stall / rate), least)
    steps = max(1, round(best / step_s))
    candidates = {max(step_s * n, least) for n in (steps - 1, steps, steps + 1) if n >= 1}
    interval = max(candidates, key=share)
    return share(interval), interval
