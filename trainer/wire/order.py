"""Which sample a run reads where: a mirror of ``engine/data/order.c`` (``engine/wire/shard.h`` is the manual).

Arithmetic, no state. The engine decides what is read; this is for whoever has to know it before: the agent fetches
ahead, people are told how far a run has come in each part of its data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = tuple(number * _GOLDEN & _MASK64 for number in range(6))


def mix(z: int) -> int:
    """SplitMix64's finalizer."""
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & _MASK64
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & _MASK64
    return z ^ z >> 31


def key(seed: int, group: int, use: int) -> int:
    """Of a permutation."""
    return mix(mix(mix(seed & _MASK64) + group & _MASK64) + use & _MASK64)


def permute(key: int, n: int, x: int) -> int:
    """``x``'s place in the keyed permutation of ``0..n-1``."""
    if n <= 1:
        return 0
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = x >> half, x & mask
        for add in _ROUNDS:
            z = right + key + add & _MASK64
            z ^= z >> 30
            z = z * 0xBF58476D1CE4E5B9 & _MASK64
            z ^= z >> 27
            z = z * 0x94D049BB133111EB & _MASK64
            left, right = right, (left ^ z ^ z >> 31) & mask
        x = left << half | right
        if x < n:
            return x


@dataclass(frozen=True)
class Shuffle:
    """The order of one dataset's samples, pass after pass."""

    samples: int
    seed: int
    shuffled: bool
    block: int
    window: int

    @cached_property
    def used(self) -> int:
        """Samples of a pass: whole blocks."""
        return self.samples // self._block * self._block if self.shuffled else self.samples

    @property
    def _block(self) -> int:
        return min(self.block, self.samples)

    def sample(self, i: int) -> int:
        """The number of the sample at place ``i``."""
        if not self.shuffled:
            return i % self.samples
        block, used = self._block, self.used
        e, j = divmod(i, used)
        span = self.window * block
        q, inside = divmod(j, span)
        n = min(span, used - q * span)
        k = permute(key(self.seed, e, 1 + q), n, inside)
        return _block_at(self.seed, e, used // block, q * self.window + k // block) * block + k % block


@lru_cache(1 << 14)  # a window's blocks come again and again
def _block_at(seed: int, e: int, blocks: int, slot: int) -> int:
    return permute(key(seed, e, 0), blocks, slot)


@dataclass(frozen=True)
class MixPhase:
    """Weights by part, from this 1-based batch on."""

    from_batch: int
    weights: tuple[int, ...]

    @cached_property
    def cycle(self) -> int:
        """Samples after which each part has had its weight."""
        return sum(self.weights)


@dataclass(frozen=True)
class Order:
    """The order of a run's samples. ``parts``: samples of each part of its data, one where it is no mixture;
    ``phases``: empty where it is none.
    """

    parts: tuple[int, ...]
    phases: tuple[MixPhase, ...]
    batch: int
    """Samples of an optimizer step."""
    seed: int
    shuffled: bool
    block: int
    window: int

    @cached_property
    def _shuffles(self) -> tuple[Shuffle, ...]:
        return tuple(
            Shuffle(samples, self.seed + k * _GOLDEN & _MASK64, self.shuffled, self.block, self.window)
            for k, samples in enumerate(self.parts)
        )

    @cached_property
    def bases(self) -> tuple[tuple[int, ...], ...]:
        """By phase and part: places of the part's order that lie before the phase."""
        return tuple(bases(self.phases, self.batch))

    @cached_property
    def _firsts(self) -> tuple[int, ...]:
        """Of each part: the number of its first sample."""
        return tuple(sum(self.parts[:k]) for k in range(len(self.parts)))

    def sample(self, i: int) -> int:
        """The number, in the order of all parts' shards, of the sample that the run reads at its place ``i``."""
        part, place = self.place(i)
        return self._firsts[part] + self._shuffles[part].sample(place)

    def place(self, i: int) -> tuple[int, int]:
        """The part from which the run's sample ``i`` is, and its place in that part's order."""
        if not self.phases:
            return 0, i
        p = self._phase(i)
        phase, bases = self.phases[p], self.bases[p]
        c, r = divmod(i - (phase.from_batch - 1) * self.batch, phase.cycle)
        u = permute(key(~self.seed, p, c), phase.cycle, r)
        for part, weight in enumerate(phase.weights):
            if u < weight:
                return part, bases[part] + c * weight + u
            u -= weight
        raise AssertionError("a place beyond its cycle")

    def _phase(self, i: int) -> int:
        batch = i // self.batch + 1
        return max(p for p, phase in enumerate(self.phases) if phase.from_batch <= batch)

    def taken(self, batches: int) -> tuple[int, ...]:
        """How many places of each part's order lie behind a run that has come through so many batches."""
        if not self.phases:
            return (batches * self.batch,)
        if not batches:
            return (0,) * len(self.parts)
        i = batches * self.batch
        p = self._phase(i - 1)
        phase = self.phases[p]
        c, r = divmod(i - (phase.from_batch - 1) * self.batch, phase.cycle)
        found = [base + c * weight for base, weight in zip(self.bases[p], phase.weights, strict=True)]
        for x in range(r):
            found[self.place(i - r + x)[0]] += 1
        return tuple(found)

    def used(self, part: int) -> int:
        """Samples of a pass over a part."""
        return self._shuffles[part].used


def bases(phases: Sequence[MixPhase], batch: int) -> Iterator[tuple[int, ...]]:
    """By phase and part: what whole cycles of the phases before have used of the part's order."""
    before: tuple[int, ...] = (0,) * len(phases[0].weights) if phases else ()
    for number, phase in enumerate(phases):
        yield before
        if number + 1 < len(phases):
            cycles = -(-(phases[number + 1].from_batch - phase.from_batch) * batch // phase.cycle)
            before = tuple(base + cycles * weight for base, weight in zip(before, phase.weights, strict=True))
