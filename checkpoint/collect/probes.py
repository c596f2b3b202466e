"""What probing a store left behind (``checkpoint/probe.py``, ``doctor.py``): a day later it is garbage."""

from __future__ import annotations

import re

from checkpoint.collect.collector import delete_all
from checkpoint.store.base import Store

OLD_S = 86_400.0
_PROBES = re.compile(r"probe/(?:doctor-)?[0-9a-f]{16}/")
"""Not the marks ``probe/passed-…``: they spare a store the probe."""


def sweep_probes(store: Store, now: float, most: int, *, dry_run: bool = False) -> int:
    """Delete at most so many objects of probes that are a day old at ``now``, by the store's clock; how many."""
    old = [
        info.key
        for info in store.list("probe/")
        if _PROBES.match(info.key) and info.modified is not None and now - info.modified > OLD_S
    ][:most]
    if old and not dry_run:
        delete_all(store, old)
    return len(old)
