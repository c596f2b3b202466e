"""Token shards as the tests look into them; what reads them in a run is the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer import wire
from trainer.dataset import HEADER_BYTES


def read_shard(path: Path) -> npt.NDArray[np.int64]:
    """Tokens of a whole shard file."""
    data = path.read_bytes()
    header = wire.ShardHeader.from_buffer_copy(data)
    assert bytes(header.magic) == wire.SHARD_MAGIC
    assert header.version == wire.SHARD_VERSION
    assert len(data) == HEADER_BYTES + header.tokens * header.token_bytes
    return np.frombuffer(data, dtype=f"<u{header.token_bytes}", offset=HEADER_BYTES).astype(np.int64)
