"""Who does things to runs: for people to read, never for rights."""

from __future__ import annotations

import getpass
import re
import socket

from checkpoint.codec import unpack_hint
from checkpoint.errors import Damaged, NotFound
from checkpoint.keys import index_key
from checkpoint.store import Store

MAX_BYTES = 64 << 10


def who() -> str:
    """The person at this terminal, for people to read."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no name for this number, as in a pod
        user = "somebody"
    return re.sub(r"[^\w.@-]", "_", f"{user}@{socket.gethostname()}")[:100]


def founder(store: Store, run: str) -> str:
    """Who started a run, by its place in the list of runs; empty where that does not say (it is a hint)."""
    try:
        value = unpack_hint(store.get(index_key(run)), "a place in the list of runs", max_bytes=MAX_BYTES)
    except (NotFound, Damaged):
        return ""
    owner = value.get("owner") if isinstance(value, dict) else None
    return owner[:100] if isinstance(owner, str) else ""
