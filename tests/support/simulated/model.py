"""How long things take in the simulated cluster, in seconds, and what goodput is. docs/proof.md tells both."""

from __future__ import annotations

from dataclasses import dataclass

FAILURE_EVERY_S = 3 * 3600.0
"""On the average, of all classes together."""
DISTURBED_EVERY_S = 3600.0
"""On the average, something that is no failure of the gang: of a driver, of the store, the API, the observations."""

STEP_S = 2.0
"""Of a step on both ranks; on one rank twice that."""
RANKS = 2
SNAPSHOT_STEPS, SNAPSHOT_S = 30, 0.2
"""Steps between snapshots in memory, and how long the ranks stand still for one."""
DURABLE_STEPS, UPLOAD_S = 90, 20.0
"""Steps between checkpoints in the store, and how long an upload takes beside training."""

LOG_S = (0.2, 3.0)
"""Until an agent sees a new record."""
PEER_S = (0.3, 2.0)
"""Until the peers of a rank that died see it."""
START_S = (12.0, 20.0)
"""Ranks: fork, the check of the machine, connections."""
MEMORY_S, STORE_S = 4.0, (40.0, 80.0)
"""State out of memory, and out of the store."""
PLACED_S = (10.0, 40.0)
"""A pod: a place, its image, its containers."""
SILENT_S, TAINTED_S, GONE_S = 50.0, 80.0, 360.0
"""After a machine died: its pods are not ready, must go, are gone."""
GRACE_S = 40.0
"""Between a pod's being told to go and its end."""
STALL_S, CONNECT_S = 60.0, 120.0
LOOK_S = (0.2, 2.0)
"""Between a change and the driver's look that sees it. Looks between which nothing changes are left out, but for one a
minute."""
PERSON_S = 900.0
"""Until a person has mended what a run gave up for, and resumes it. That time is not the run's."""


@dataclass
class Account:
    """Where the time went. ``goodput``: time of the steps that were kept, by the time in which the run could have
    trained: all of it, but what it waited for a person, or for machines that were not there (fewer than the smallest of
    its layouts needs).
    """

    total_s: float = 0.0
    kept_s: float = 0.0
    person_s: float = 0.0
    no_machines_s: float = 0.0

    def add(self, other: Account) -> None:
        self.total_s += other.total_s
        self.kept_s += other.kept_s
        self.person_s += other.person_s
        self.no_machines_s += other.no_machines_s

    @property
    def goodput(self) -> float:
        return self.kept_s / max(self.total_s - self.person_s - self.no_machines_s, 1e-9)
