"""This machine is never behind a proxy: what the command and its children take from the environment says so.

Servers on loopback (Prefect's own, a store of this machine) are talked to by clients of several libraries; all of them
read ``NO_PROXY``, and not one leaves loopback out by itself. ``k8s.proxy`` has the rules for API servers: kubectl's.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def pass_loopback_by(environment: MutableMapping[str, str]) -> None:
    """Add loopback to the list of what is reached directly, in both of its spellings, where a proxy is named at all.

    The lower spelling holds for these clients where both are there, even an empty one; afterwards they are the same.
    """
    if not any(environment.get(name) or environment.get(name.upper()) for name in _PROXIES):
        return
    said = environment.get("no_proxy", environment.get("NO_PROXY", ""))
    entries = [entry for entry in re.split(r"[,\s]+", said) if entry]
    if "*" in entries:
        entries = ["*"]  # some know it only where it is alone
    else:
        entries += [name for name in LOOPBACK if name not in entries]
    environment["no_proxy"] = environment["NO_PROXY"] = ",".join(entries)
