"""A log of any length in a moment: real records and real folds, written past the one-by-one of `RunLog.append`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from checkpoint import keys
from checkpoint.log import FOLD_EVERY, Record, RunLog, RunState
from checkpoint.log.state import Fold
from checkpoint.store import Store
from tests.checkpoint.samples import point_body

STEP = 10


def long_log(
    store: Store, run: str, attempts: int, each: int, body: Callable[[int | None, int], dict[str, Any]]
) -> RunState:
    """So many attempts with ``each`` checkpoints; ``body``: of an attempt from this checkpoint record and step."""
    log, fold = RunLog(store, run, writer="long"), Fold(RunState(run))

    def add(kind: str, content: dict[str, Any], epoch: int = 0) -> None:
        nonlocal fold
        if (fold.n + 1) % FOLD_EVERY == 0 and kind != "fold":
            state = fold.freeze()
            fold = Fold(state)
            add("fold", log._store_state(state), state.epoch)
        n = fold.n + 1
        record = Record(n, kind, epoch or n, "long:0", 1.0 * n, content)
        data = record.to_bytes()
        fold.add(Record.parse(data, n))
        assert store.create(keys.log_key(run, n), data)
        if kind != "fold":
            last[:] = [data]

    last: list[bytes] = []
    step, epoch, newest = 0, 0, None
    for _ in range(attempts):
        add("attempt", body(newest, step))
        epoch = fold.n
        for _ in range(each):
            step += STEP
            add("checkpoint", point_body(step, epoch), epoch)
        newest = fold.n if each else newest
    state = fold.freeze()
    log._condense(state, last[0])
    return state


def calls(work: Callable[[], Any]) -> int:
    """How many functions ``work`` calls, in Python or C, but those that a store calls: work, without a clock."""
    count = 0

    def see(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        if event in ("call", "c_call") and "/checkpoint/store/" not in frame.f_code.co_filename:
            count += 1

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
