"""Writers of a log that race, and writers with stale states."""

from __future__ import annotations

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint.errors import Conflict, Halted
from checkpoint.log import RunLog, RunState
from checkpoint.store import Store
from checkpoint.store.memory import MemoryStore
from tests.checkpoint.samples import RUN, attempt_body, point_body, started


def test_writers_that_race_all_get_in_once(store: Store) -> None:
    _, state = started(store)
    writers, each = 6, 6

    def work(number: int) -> None:
        log = RunLog(store, RUN, writer=f"w{number}")
        at = state
        for count in range(each):
            done = False

            def decide(_: RunState) -> tuple[str, dict[str, Any]] | None:
                return None if done else ("intervention", {"kind": f"{number}-{count}"})  # noqa: B023 (called at once)

            at = log.transact(decide, at)
            done = True

    with ThreadPoolExecutor(writers) as pool:
        list(pool.map(work, range(writers)))
    final = RunLog(store, RUN).fold()
    assert final.n == 1 + writers * each
    assert Counter(i.body["kind"] for i in final.interventions) == Counter(
        f"{n}-{c}" for n in range(writers) for c in range(each)
    )


def test_two_drivers_race_for_an_attempt_and_one_holds_the_run(store: Store) -> None:
    logs = [RunLog(store, RUN, writer=f"driver-{n}") for n in range(8)]
    state = logs[0].fold()

    def start(log: RunLog) -> RunState | None:
        try:
            return log.append("attempt", attempt_body(launch=log._writer), state)
        except Conflict:
            return None

    with ThreadPoolExecutor(len(logs)) as pool:
        won = [s for s in pool.map(start, logs) if s is not None]
    assert len(won) == 1
    assert won[0] == logs[0].fold()


class Racing:
    """Writers with stale states, in any order: what a crash, a partition or a slow pod makes of them."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.states = {w: RunState(RUN) for w in ("driver-a", "driver-b", "agent-0", "agent-1")}
        self.epochs = dict.fromkeys(self.states, 0)
        self.accepted: dict[int, str] = {}
        self.problems: list[str] = []

    def move(self, who: str, what: str) -> None:
        log = RunLog(self.store, RUN, writer=who)
        state = self.states[who]
        if what == "fold":
            self.states[who] = log.fold(state)
            return
        if what == "join":
            self.epochs[who] = state.epoch
            return
        agent = who.startswith("agent")
        try:
            if agent:
                if not self.epochs[who]:
                    return
                body = point_body(state.n, self.epochs[who])
                self.states[who] = log.append("checkpoint", body, state, epoch=self.epochs[who])
            else:
                options = state.restore_candidates()
                named = options[0].n if options and what == "attempt" else None
                kind = "attempt" if what in ("attempt", "scratch") else "intervention"
                body = attempt_body(named) if kind == "attempt" else {"kind": "note"}
                self.states[who] = log.append(kind, body, state)
        except Conflict as conflict:
            self.problems += [] if conflict.state.n > state.n else [f"{who}: a conflict with nothing newer"]
            self.states[who] = conflict.state
        except Halted as halted:
            right = agent and halted.state is not None and halted.state.epoch > self.epochs[who]
            self.problems += [] if right else [f"{who}: halted without a newer epoch"]
            self.epochs[who] = 0
        else:
            assert self.states[who].n not in self.accepted
            self.accepted[self.states[who].n] = who

    def check(self) -> None:
        truth = RunLog(self.store, RUN).fold()
        records = list(RunLog(self.store, RUN).records())
        assert truth.unreadable is None
        assert self.problems == []
        assert [r.n for r in records] == list(range(1, truth.n + 1))
        assert {r.n: r.writer.split(":")[0] for r in records if r.kind != "fold"} == self.accepted
        newest = 0
        for record in records:  # no checkpoint of a fenced epoch was ever accepted
            newest = record.n if record.kind == "attempt" else newest
            assert record.kind != "checkpoint" or record.epoch == newest
        for state in self.states.values():
            assert RunLog(self.store, RUN).fold(state) == truth
        line = truth.restore_candidates()
        assert len({c.n for c in line}) == len(line)
        assert all(a.n > b.n for a, b in itertools.pairwise(line))


moves = st.lists(
    st.tuples(
        st.sampled_from(["driver-a", "driver-b", "agent-0", "agent-1"]),
        st.sampled_from(["fold", "join", "write", "write", "attempt", "scratch"]),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(moves)
def test_any_interleaving_of_stale_writers_keeps_the_rules(story: list[tuple[str, str]]) -> None:
    racing = Racing()
    for who, what in story:
        racing.move(who, what)
    racing.check()
