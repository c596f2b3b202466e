"""Token shards.

Owns: ``DatasetRef`` (what a plan must know of a prepared dataset) and writing one shard file (``engine/wire/shard.h``,
which also says in which order the engine reads samples). Does not own: tokenizers, the manifest in the store, or
fetching (flows and checkpoint do).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer import wire
from trainer.errors import DatasetError
from trainer.wire.order import MixPhase

HEADER_BYTES = ctypes.sizeof(wire.ShardHeader)
MAX_VOCAB = 1 << 31
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Mixture:
    """Of what a dataset is mixed: ``parts``, the digest of each part's own dataset and how many of the shards are its,
    in order; ``phases``, what each has of a cycle from which batch on (``engine/wire/shard.h``).
    """

    parts: tuple[tuple[str, int], ...]
    phases: tuple[MixPhase, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= wire.PARTS_MAX or min(count for _, count in self.parts) < 1:
            raise DatasetError(f"a mixture of {len(self.parts)} parts; it has 1 to {wire.PARTS_MAX}, each with a shard")
        firsts = [phase.from_batch for phase in self.phases]
        if not 1 <= len(firsts) <= wire.PHASES_MAX or firsts[0] != 1 or any(a >= b for a, b in pairwise(firsts)):
            raise DatasetError(f"a mixture's phases begin with batches {firsts[:8]}; they ascend from 1")
        for phase in self.phases:
            if len(phase.weights) != len(self.parts) or min(phase.weights) < 0:
                raise DatasetError(f"a mixture's weights {list(phase.weights)[:8]}: there is one a part, none below 0")
            if not 1 <= phase.cycle <= wire.CYCLE_MAX:
                raise DatasetError(f"a mixture's weights are {phase.cycle} in all; they must be 1 to {wire.CYCLE_MAX}")

    def to_map(self) -> dict[str, Any]:
        """Plain values, as the manifest has them."""
        return {
            "parts": [{"digest": digest, "shards": count} for digest, count in self.parts],
            "phases": [{"from_batch": p.from_batch, "weights": list(p.weights)} for p in self.phases],
        }

    def shards_of(self, shards: Sequence[int]) -> list[Sequence[int]]:
        """Those of each part."""
        ends = list(accumulate(count for _, count in self.parts))
        return [shards[end - count : end] for (_, count), end in zip(self.parts, ends, strict=True)]


@dataclass(frozen=True)
class DatasetRef:
    """A prepared dataset, as the planner sees it.

    ``digest`` is the SHA-256 (hex) of its manifest, ``shards`` the number of tokens of each shard in order,
    ``token_bytes`` 2 or 4; ``eot``, ``begin``: the token that ends, begins each document, or None; ``mix``: of what it
    is mixed, None where it is one corpus; ``counted``: tokens whose prediction counts, None where it has no mask, so
    that all do.
    """

    digest: str
    vocab: int
    token_bytes: int
    shards: tuple[int, ...]
    tokenizer_digest: str
    eot: int | None = None
    mix: Mixture | None = None
    counted: int | None = None
    begin: int | None = None

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
        if self.masked and self.vocab > 1 << (8 * self.token_bytes - 1):
            raise DatasetError(
                f"dataset token_bytes {self.token_bytes} has no room for a mask beside a vocabulary of {self.vocab}; "
                "2 bytes hold up to 32768, 4 bytes the rest"
            )
        if not self.shards or min(self.shards) < 0:
            raise DatasetError(f"dataset has shards {list(self.shards)}; at least one shard with tokens is needed")
        if self.eot is not None and not 0 <= self.eot < self.vocab:
            raise DatasetError(f"dataset eot {self.eot} is outside its vocabulary of {self.vocab}")
        if self.begin is not None and not 0 <= self.begin < self.vocab:
            raise DatasetError(f"dataset begin {self.begin} is outside its vocabulary of {self.vocab}")
        if self.mix is not None and sum(count for _, count in self.mix.parts) != len(self.shards):
            raise DatasetError(f"the parts of a mixture have not the {len(self.shards)} shards of its dataset")

    @property
    def masked(self) -> bool:
        """Whether it says of each token if its prediction counts."""
        return self.counted is not None

    @property
    def size_words(self) -> str:
        """Its tokens, for people."""
        counted = "" if self.counted is None else f", of which {self.counted:,} count"
        return f"{self.tokens:,} tokens{counted}"

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(self.shards)

    @property
    def parts(self) -> list[Sequence[int]]:
        """The shards of each part; all of them where it is one corpus."""
        return [self.shards] if self.mix is None else self.mix.shards_of(self.shards)

    def samples(self, sequence: int) -> int:
        """Samples of ``sequence`` tokens (plus one target) in one pass: ``(tokens - 1) // sequence`` a shard."""
        return samples_of(self.shards, sequence)

    def to_map(self) -> dict[str, Any]:
        """Plain values, for people and JSON."""
        return {
            "digest": self.digest,
            "vocab": self.vocab,
            "token_bytes": self.token_bytes,
            "shards": list(self.shards),
            "tokenizer_digest": self.tokenizer_digest,
            "eot": self.eot,
            **({} if self.mix is None else {"mix": self.mix.to_map()}),
            **({} if self.begin is None else {"begin": self.begin}),
            **({} if self.counted is None else {"counted": self.counted}),
        }


def samples_of(shards: Sequence[int], sequence: int) -> int:
    """Samples of ``sequence`` tokens in shards of so many."""
    return sum(max(0, tokens - 1) // sequence for tokens in shards)


def token_bytes_for(vocab: int, room: bool = False) -> int:
    """Bytes of a stored token: 2 up to a vocabulary of 65536, 4 above; with ``room`` for its mask 4 above 32768."""
    return 2 if vocab <= 1 << (15 if room else 16) else 4


def mask_of(token_bytes: int) -> int:
    """The bit of a stored token of a masked shard that says that its prediction does not count."""
    return 1 << (8 * token_bytes - 1)


def without_mask(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The tokens of a masked shard (u16 or u32)."""
    return stored & (mask_of(stored.itemsize) - 1)


def counts_of(stored: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which tokens of a masked shard are predicted for the loss."""
    return stored < mask_of(stored.itemsize)


def shard_bytes(tokens: npt.NDArray[Any], vocab: int, name: str, counts: npt.NDArray[np.bool_] | None = None) -> bytes:
    """One shard file (header, then tokens). Every token must be in ``0..vocab-1``; ``counts``: which ones' prediction
    counts, None for a shard without a mask."""
    flat, masked = np.asarray(tokens).reshape(-1), counts is not None
    check_tokens(flat, vocab, name)
    data, view = new_shard(flat.size, vocab, token_bytes_for(vocab, masked), masked)
    view[:] = flat
    if counts is not None:
        view[~counts.reshape(-1)] |= mask_of(view.itemsize)
    return bytes(data)


def check_tokens(tokens: npt.NDArray[Any], vocab: int, name: str) -> None:
    """DatasetError where a shard of these could not be: it would be empty, or a token is not in ``0..vocab-1``."""
    if tokens.size == 0:
        raise DatasetError(f"shard {name} would hold no token; a shard needs at least one")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
        bad = int(tokens[(tokens < 0) | (tokens >= vocab)][0])
        raise DatasetError(f"token {bad} of shard {name} is outside the vocabulary 0..{vocab - 1}")


def new_shard(tokens: int, vocab: int, size: int, masked: bool) -> tuple[bytearray, npt.NDArray[Any]]:
    """The bytes of a shard of so many tokens of ``size`` bytes, and its tokens, to be filled in: one copy of a large
    thing."""
    version = wire.SHARD_MASKED if masked else wire.SHARD_VERSION
    header = wire.ShardHeader(version=version, token_bytes=size, tokens=tokens, vocab=vocab)
    header.magic[:] = wire.SHARD_MAGIC
    data = bytearray(HEADER_BYTES + tokens * size)
    data[:HEADER_BYTES] = bytes(header)
    return data, np.frombuffer(data, f"<u{size}", offset=HEADER_BYTES)


def write_shard(path: Path, tokens: npt.NDArray[Any], vocab: int, counts: npt.NDArray[np.bool_] | None = None) -> None:
    """Write one shard file."""
    path.write_bytes(shard_bytes(tokens, vocab, path.name, counts))
