"""Token shards and the order in which a run reads them.

Owns: ``DatasetRef`` (what a plan must know of a prepared dataset), reading and writing one shard file
(``engine/wire/shard.h``), and ``SampleOrder``, the same arithmetic as the engine's. Does not own: tokenizers, the
manifest in the store, or fetching (flows and checkpoint do).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer import wire
from trainer.errors import DatasetError

HEADER_BYTES = ctypes.sizeof(wire.ShardHeader)
MAX_VOCAB = 1 << 31
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class DatasetRef:
    """A prepared dataset, as the planner sees it.

    ``digest`` is the SHA-256 (hex) of its manifest, ``shards`` the number of tokens of each shard in order,
    ``token_bytes`` 2 or 4, ``eot`` the token that ends a document, or None.
    """

    digest: str
    vocab: int
    token_bytes: int
    shards: tuple[int, ...]
    tokenizer_digest: str
    eot: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("digest", self.digest), ("tokenizer_digest", self.tokenizer_digest)):
            if not _HEX64.fullmatch(value):
                raise DatasetError(f"dataset {name} {value!r} is not 64 lower-case hex digits; prepare the data again")
        if not 1 <= self.vocab <= MAX_VOCAB:
            raise DatasetError(f"dataset vocabulary {self.vocab} is outside 1..{MAX_VOCAB}; prepare the data again")
        if self.token_bytes not in (2, 4) or self.vocab > 1 << (8 * self.token_bytes):
            raise DatasetError(
                f"dataset token_bytes {self.token_bytes} cannot hold a vocabulary of {self.vocab}; "
                "2 bytes hold up to 65536, 4 bytes the rest"
            )
        if not self.shards or min(self.shards) < 0:
            raise DatasetError(f"dataset has shards {list(self.shards)}; at least one shard with tokens is needed")
        if self.eot is not None and not 0 <= self.eot < self.vocab:
            raise DatasetError(f"dataset eot {self.eot} is outside its vocabulary of {self.vocab}")

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(self.shards)

    def samples(self, sequence: int) -> int:
        """Samples of ``sequence`` tokens (plus one target) in one pass: ``(tokens - 1) // sequence`` a shard."""
        return sum(max(0, tokens - 1) // sequence for tokens in self.shards)

    def to_map(self) -> dict[str, Any]:
        """Plain values, for msgpack and JSON; ``from_map`` is the inverse."""
        return {
            "digest": self.digest,
            "vocab": self.vocab,
            "token_bytes": self.token_bytes,
            "shards": list(self.shards),
            "tokenizer_digest": self.tokenizer_digest,
            "eot": self.eot,
        }

    @classmethod
    def from_map(cls, value: Mapping[str, Any]) -> DatasetRef:
        """The dataset that ``to_map`` wrote; raises DatasetError where a key is missing or of the wrong type."""
        try:
            eot = value.get("eot")
            return cls(
                digest=str(value["digest"]),
                vocab=int(value["vocab"]),
                token_bytes=int(value["token_bytes"]),
                shards=tuple(int(tokens) for tokens in value["shards"]),
                tokenizer_digest=str(value["tokenizer_digest"]),
                eot=None if eot is None else int(eot),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"dataset description does not hold: {error!r}; prepare the data again") from error


def token_bytes_for(vocab: int) -> int:
    """Bytes of a stored token: 2 up to a vocabulary of 65536, 4 above."""
    return 2 if vocab <= 1 << 16 else 4


def write_shard(path: Path, tokens: npt.NDArray[Any], vocab: int) -> None:
    """Write one shard file (header, then tokens). Every token must be in ``0..vocab-1``."""
    flat = np.asarray(tokens).reshape(-1)
    if flat.size == 0:
        raise DatasetError(f"shard {path.name} would hold no token; a shard needs at least one")
    if int(flat.min()) < 0 or int(flat.max()) >= vocab:
        bad = int(flat[(flat < 0) | (flat >= vocab)][0])
        raise DatasetError(f"token {bad} of shard {path.name} is outside the vocabulary 0..{vocab - 1}")
    size = token_bytes_for(vocab)
    header = wire.ShardHeader(version=wire.SHARD_VERSION, token_bytes=size, tokens=flat.size, vocab=vocab)
    header.magic[:] = wire.SHARD_MAGIC
    with path.open("wb") as file:
        file.write(bytes(header))
        file.write(flat.astype(f"<u{size}").tobytes())


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
