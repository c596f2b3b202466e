"""The run log: dense records, each created if absent, and the state that folding them gives.

Invariants
  L1  record n is ``runs/<run>/log/<n>``, created once, never changed, never deleted; numbers are dense from 1;
  L2  an attempt's epoch is its record's number, and that record is the fence: a checkpoint record of another epoch
      than the newest attempt's is void;
  L3  record n is a fold exactly where n is a multiple of 256; it names an object with the state folded up to n - 1;
  L4  nothing here compares clocks; ``time`` is for people;
  L5  a record that cannot be read halts every writer (readers keep what came before it).

Order of calls. Driver: ``fold``, decide, ``append("attempt", ...)``, act. Agents: ``fold``; see their attempt; upload;
``append("checkpoint", ..., epoch=theirs)``. Whoever loses a number gets Conflict with the newer state and decides again
(``transact`` is that loop); whoever finds a newer epoch than its own gets Halted and stops writing.

    log = RunLog(store, "demo-0a1b2c", writer="driver")
    state = log.fold()
    state = log.append("attempt", body, state)
    state = log.fold(state)                     # incremental: reads what is new
"""

from __future__ import annotations

from checkpoint.log.records import (
    FOLD_EVERY,
    KINDS,
    MAX_RECORD_BYTES,
    OUTCOMES,
    AttemptInfo,
    CheckpointInfo,
    EndedInfo,
    Intervention,
    Record,
    StartPoint,
    fold_target,
)
from checkpoint.log.run_log import RunLog, condensed_key
from checkpoint.log.state import RunState, ended_body

__all__ = [
    "FOLD_EVERY",
    "KINDS",
    "MAX_RECORD_BYTES",
    "OUTCOMES",
    "AttemptInfo",
    "CheckpointInfo",
    "EndedInfo",
    "Intervention",
    "Record",
    "RunLog",
    "RunState",
    "StartPoint",
    "condensed_key",
    "ended_body",
    "fold_target",
]
