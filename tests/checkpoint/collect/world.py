"""A run that saves, beside its collector."""

from __future__ import annotations

from typing import Any

from checkpoint import keys
from checkpoint.collect.collector import Collected, collect
from checkpoint.collect.retention import Rules
from checkpoint.log import RunLog
from tests.support.small_checkpoints import RUN, Clock, Watched, begin, names, save, whole

GRACE_S = 100.0

KEEP = {"parallel": {"stages": 2}, "checkpoint": {"keep": {"last": 2, "grace_s": GRACE_S}}}

PLAN = keys.plan_key(RUN, "ab" * 32)

RULES = Rules(last=2, grace_s=GRACE_S)


class World:
    """A run with rules in a watched store, whose clock the test moves."""

    def __init__(self, how: dict[str, Any] | None = None) -> None:
        self.clock = Clock()
        self.store = Watched(self.clock)
        self.log = RunLog(self.store, RUN, writer="driver")
        self.how = KEEP if how is None else how
        self.state = begin(self.log, self.log.fold(), self.how)

    def saved(self, *steps: int) -> World:
        for step in steps:
            self.state = save(self.store, self.log, self.log.fold(), step)
        return self

    def again(self) -> World:
        """The next attempt."""
        self.state = begin(self.log, self.log.fold(), self.how)
        return self

    def late(self, seconds: float = GRACE_S + 2) -> World:
        self.clock.now += seconds
        return self

    def collect(self, **more: Any) -> Collected:
        report = collect(self.store, RUN, **more)
        self.state = self.log.fold()
        return report

    @property
    def points(self) -> list[tuple[int, int]]:
        """The checkpoints of which anything is there."""
        found = map(keys.point_of, names(self.store, RUN, "chunks/", "manifests/"))
        return sorted({at for at in found if at is not None})

    def check(self) -> None:
        """Whatever the log lets anybody use is whole."""
        state = self.log.fold()
        wrong = [why for info in state.restore_candidates() for why in whole(self.store, RUN, info)]
        pinned = [info for n in state.pins.values() if (info := state.checkpoint(n)) is not None]
        wrong += [why for info in pinned for why in whole(self.store, RUN, info)]
        assert not wrong
