"""Token shards as the tests look into them; what reads them in a run is the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer import wire
from trainer.dataset import HEADER_BYTES


def read_shard(path: Path) -> npt.NDArray[np.int64]:
    """Tokens of a whole shard file, without its mask."""
    return masked_shard(path)[0]


def masked_shard(path: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Tokens of a whole shard file, and which ones' prediction counts."""
    data = path.read_bytes()
    header = wire.ShardHeader.from_buffer_copy(data)
    assert bytes(header.magic) == wire.SHARD_MAGIC
    assert header.version in (wire.SHARD_VERSION, wire.SHARD_MASKED)
    assert len(data) == HEADER_BYTES + header.tokens * header.token_bytes
    stored = np.frombuffer(data, dtype=f"<u{header.token_bytes}", offset=HEADER_BYTES).astype(np.int64)
    mask = 1 << (8 * header.token_bytes - 1) if header.version == wire.SHARD_MASKED else 0
    return stored & ~mask, (stored & mask) == 0
