"""Which Kubernetes is old enough. Pure."""

from __future__ import annotations

import re

OLDEST = (1, 29)
MEND = (
    f"upgrade the cluster to {'.'.join(map(str, OLDEST))} or later: the agent is a native sidecar, which older ones do "
    "not know"
)


def too_old(version: str) -> bool | None:
    """Whether the API server's ``gitVersion`` is of a Kubernetes that cannot run a gang; None where it tells nothing.

    >>> too_old("v1.28.9"), too_old("v1.35.4+k3s1"), too_old("next")
    (True, False, None)
    """
    match = re.match(r"v?(\d+)\.(\d+)", version)
    return None if match is None else (int(match[1]), int(match[2])) < OLDEST
