"""Token shards.

Owns: ``DatasetRef`` (what a plan must know of a prepared dataset) and writing one shard file (``engine/wire/shard.h``,
which also says in which order the engine reads samples). Does not own: tokenizers, the manifest in the store, or
fetching (flows and checkpoint do).
"""

from __future__ import annotations

import ctypes
import re
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
        """Plain values, for people and JSON."""
        return {
            "digest": self.digest,
            "vocab": self.vocab,
            "token_bytes": self.token_bytes,
            "shards": list(self.shards),
            "tokenizer_digest": self.tokenizer_digest,
            "eot": self.eot,
        }


def token_bytes_for(vocab: int) -> int:
    """Bytes of a stored token: 2 up to a vocabulary of 65536, 4 above."""
    return 2 if vocab <= 1 << 16 else 4


def shard_bytes(tokens: npt.NDArray[Any], vocab: int, name: str) -> bytes:
    """One shard file (header, then tokens). Every token must be in ``0..vocab-1``."""
    flat = np.asarray(tokens).reshape(-1)
    check_tokens(flat, vocab, name)
    data, view = new_shard(flat.size, vocab)
    view[:] = flat
    return bytes(data)


def check_tokens(tokens: npt.NDArray[Any], vocab: int, name: str) -> None:
    """DatasetError where a shard of these could not be: it would be empty, or a token is not in ``0..vocab-1``."""
    if tokens.size == 0:
        raise DatasetError(f"shard {name} would hold no token; a shard needs at least one")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
        bad = int(tokens[(tokens < 0) | (tokens >= vocab)][0])
        raise DatasetError(f"token {bad} of shard {name} is outside the vocabulary 0..{vocab - 1}")


def new_shard(tokens: int, vocab: int) -> tuple[bytearray, npt.NDArray[Any]]:
    """The bytes of a shard of so many tokens, and its tokens, to be filled in: one copy of a large thing."""
    size = token_bytes_for(vocab)
    header = wire.ShardHeader(version=wire.SHARD_VERSION, token_bytes=size, tokens=tokens, vocab=vocab)
    header.magic[:] = wire.SHARD_MAGIC
    data = bytearray(HEADER_BYTES + tokens * size)
    data[:HEADER_BYTES] = bytes(header)
    return data, np.frombuffer(data, f"<u{size}", offset=HEADER_BYTES)


def write_shard(path: Path, tokens: npt.NDArray[Any], vocab: int) -> None:
    """Write one shard file."""
    path.write_bytes(shard_bytes(tokens, vocab, path.name))
