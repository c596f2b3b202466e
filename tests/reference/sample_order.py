"""The order in which a run reads its samples, once more in Python: what the engine's arithmetic is compared with."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.dataset import DatasetRef
from trainer.errors import DatasetError

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """SplitMix64's finalizer."""
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & _MASK64
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & _MASK64
    return z ^ z >> 31


def _key(seed: int, epoch: int, use: int) -> int:
    return _mix(_mix(_mix(seed & _MASK64) + epoch & _MASK64) + use & _MASK64)


def _permute(key: int, n: int, x: int) -> int:
    """Place of ``x`` in the keyed permutation of ``0..n-1``: a balanced Feistel network with cycle walking."""
    if n == 1:
        return 0
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = x >> half, x & mask
        for number in range(6):
            left, right = right, left ^ (_mix(right + key + number * _GOLDEN & _MASK64) & mask)
        x = left << half | right
        if x < n:
            return x


@dataclass(frozen=True)
class SampleOrder:
    """Which sample is read at which place of a run: arithmetic, no state (``engine/wire/shard.h``).

    Place ``i`` counts samples from the run's start: ``i = step * batch + b``, steps from 0.
    """

    ref: DatasetRef
    sequence: int
    seed: int
    shuffled: bool = True
    block: int = 64
    window: int = 64

    def __post_init__(self) -> None:
        if self.samples == 0:
            raise DatasetError(
                f"no shard holds a sample: the longest has {max(self.ref.shards)} tokens, a sample needs "
                f"{self.sequence + 1}; shorten train.sequence or add text"
            )

    @property
    def samples(self) -> int:
        """Samples of one pass over the shards."""
        return self.ref.samples(self.sequence)

    def sample(self, i: int) -> int:
        """Number of the sample at place ``i``, counted over all shards in order."""
        total = self.samples
        if not self.shuffled:
            return i % total
        block = min(self.block, total)
        usable = total // block * block
        epoch, j = divmod(i, usable)
        blocks, span = usable // block, self.window * block
        q = j // span
        n = min(span, usable - q * span)
        k = _permute(_key(self.seed, epoch, 1 + q), n, j - q * span)
        number = _permute(_key(self.seed, epoch, 0), blocks, q * self.window + k // block)
        return number * block + k % block

    def locate(self, sample: int) -> tuple[int, int]:
        """``(shard, first token)`` of a sample."""
        for shard, tokens in enumerate(self.ref.shards):
            count = max(0, tokens - 1) // self.sequence
            if sample < count:
                return shard, sample * self.sequence
            sample -= count
        raise DatasetError(f"sample {sample} lies beyond the last shard")


@dataclass(frozen=True)
class MixedOrder:
    """The same of a mixture, by walking through its phases and cycles from the run's start (the engine computes it).

    ``parts``: samples of each; ``phases``: (first batch, weights).
    """

    parts: tuple[int, ...]
    phases: tuple[tuple[int, tuple[int, ...]], ...]
    batch: int
    seed: int
    shuffled: bool = True
    block: int = 64
    window: int = 64

    def walk(self, count: int) -> list[tuple[int, int]]:
        """Part, and number in it, of the run's first samples."""
        orders = [
            SampleOrder(
                DatasetRef("0" * 64, 2, 2, (samples + 1,), "0" * 64),
                1,
                self.seed + part * _GOLDEN & _MASK64,
                self.shuffled,
                self.block,
                self.window,
            )
            for part, samples in enumerate(self.parts)
        ]
        found: list[tuple[int, int]] = []
        used = [0] * len(self.parts)
        for p, (first, weights) in enumerate(self.phases):
            last = (self.phases[p + 1][0] - 1) * self.batch if p + 1 < len(self.phases) else count
            assert len(found) == min(count, (first - 1) * self.batch)
            cycle = 0
            while len(found) < min(count, last):
                members = [(part, n) for part, weight in enumerate(weights) for n in range(weight)]
                key = _key(~self.seed & _MASK64, p, cycle)
                for x in range(len(members)):
                    part, n = members[_permute(key, len(members), x)]
                    if len(found) < min(count, last):
                        found.append((part, orders[part].sample(used[part] + n)))
                used = [a + b for a, b in zip(used, weights, strict=True)]
                cycle += 1
        return found
