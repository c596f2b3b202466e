"""What an agent asks of a store while nothing happens, counted on a simulated clock, and what it still does at once.

The real watcher, hints, heartbeat, committer and uploader, over a store in memory that counts and has the pace of S3.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.agent.commit import Committer
from checkpoint.agent.output import Hints
from checkpoint.agent.status import NodeStatus, RankStatus
from checkpoint.agent.upload import Uploader
from checkpoint.agent.watch import Watcher
from checkpoint.log import RunLog, RunState
from checkpoint.store import MemoryStore
from checkpoint.store.base import FREE, PAID, Data, Info, Pace
from tests.checkpoint.samples import attempt_body
from tests.support.wait import wait_for

RUN = "idle-0a1b2c"
TICK_S = 0.125
LOOP_S = 1.0
"""Of the agent's loop, which looks at the status so often although nothing has happened."""


class Counted(MemoryStore):
    """Every request by its verb and the kind of object."""

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace)
        self.asked: Counter[str] = Counter()

    def _ask(self, verb: str, key: str) -> None:
        kinds = ("log/", "live/nodes/", "/metrics/", "/logs/", "live/curve")
        self.asked[f"{verb} {next((kind.strip('/') for kind in kinds if kind in key), key)}"] += 1

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        self._ask("create", key)
        return super().create(key, data, sha256=sha256)

    def put(self, key: str, data: Data) -> None:
        self._ask("put", key)
        super().put(key, data)

    def get(self, key: str, **more: Any) -> bytes:
        self._ask("get", key)
        return super().get(key, **more)

    def head(self, key: str) -> Info | None:
        self._ask("head", key)
        return super().head(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        self._ask("list", prefix)
        return super().list(prefix, start_after)


class Idle:
    """An agent's parts, and ``run`` for the seconds that pass; ``looks``: when the log was looked at."""

    def __init__(self, pace: Pace, ranks: int) -> None:
        self.now = 1000.0
        self.store = Counted(pace)
        log = RunLog(self.store, RUN, writer="driver")
        log.append("attempt", attempt_body(), log.fold())
        post: Callable[[Callable[[], None]], None] = lambda call: call()  # noqa: E731
        clock = lambda: self.now  # noqa: E731
        self.states: list[RunState] = []
        self.looks: list[float] = []
        self.watcher = Watcher(
            RunLog(self.store, RUN), pace.look_s, post=post, on_state=self.states.append, on_error=lambda _: None,
            on_refused=lambda: None, clock=clock,
        )  # fmt: skip
        self.hints = Hints(self.store, RUN, keys.status_key(RUN, "l", 0), clock)
        self.hints.begin(1)
        self.committer = Committer(
            RunLog(self.store, RUN, writer="agent"), 0, 2, post=post, on_commit=lambda *_: None, on_idle=lambda: None,
            on_error=lambda _: None, poll_s=pace.look_s, clock=clock,
        )  # fmt: skip
        self.pool = ThreadPoolExecutor(1)
        self.uploader = Uploader(
            self.store, RUN, 0, 2, "i", pool=self.pool, post=post, on_part=lambda *_: None, on_idle=lambda: None,
            on_error=lambda _: None,
        )  # fmt: skip
        self.status = NodeStatus(0, "l", "i", epoch=1, phase="running")
        self.status.ranks = {rank: RankStatus(pid=100 + rank) for rank in range(ranks)}
        self.steps = itertools.count(1)
        self.watcher.look()
        self._loop_at = -math.inf

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, *_: object) -> None:
        self.hints.close()
        self.uploader.close()
        self.pool.shutdown()

    def loop(self) -> None:
        """As the agent's does when something has happened, and each second."""
        self._loop_at = self.now
        before = self.store.asked["put live/nodes"]
        writes = self.hints._beat_at
        if self.hints.beat(self.status):
            self.watcher.expect()
        if self.hints._beat_at != writes:  # in a thread of its own
            wait_for(lambda: self.store.asked["put live/nodes"] > before, "the status to be written")

    def run(self, seconds: float, *, training: bool) -> Counter[str]:
        """Requests in that time."""
        before, end = Counter(self.store.asked), self.now + seconds
        while self.now < end:
            self.now += TICK_S
            if training:
                line = json.dumps({"event": "step", "step": (step := next(self.steps)), "epoch": 1, "pad": "x" * 300})
                self.hints.metrics(line.encode())
                self.hints.output(0, line.encode() + b"\n")
                for rank, status in self.status.ranks.items():
                    status.step = step
                    if step % 8 == rank:  # the others say something now and then
                        self.hints.output(rank, b"a word\n")
            if self.now - self._loop_at >= LOOP_S:
                self.loop()
            self.hints.pump()
            self.committer.pump()
            if self.now >= self.watcher._looked + self.watcher.pause_s():
                self.watcher.look()
                self.looks.append(self.now)
        found = Counter(self.store.asked)
        found.subtract(before)
        return +found


@pytest.fixture(params=[1, 8])
def idle(request: pytest.FixtureRequest) -> Iterator[Idle]:
    with Idle(PAID, request.param) as made:
        yield made


@pytest.mark.parametrize("training", [True, False])
def test_an_idle_agent_asks_once_a_second_at_most(idle: Idle, training: bool) -> None:
    """However many of its ranks print; for ten minutes, after a minute to become idle."""
    idle.run(60.0, training=training)
    asked = idle.run(600.0, training=training)
    assert 300 <= sum(asked.values()) <= 600, asked
    assert asked["get log"] >= 600 / PAID.idle_s - 2
    assert asked["put live/nodes"] >= 600 / (PAID.beat_s + LOOP_S) - 2
    if training:
        assert asked["put metrics"] >= 10, asked
        assert asked["put logs"] >= 10 * len(idle.status.ranks)
        assert asked["put live/curve"] >= 5
    else:
        assert not [what for what in asked if what not in ("get log", "put live/nodes")]


def test_a_ranks_end_is_told_at_once_and_the_next_attempt_looked_for(idle: Idle) -> None:
    idle.run(120.0, training=True)
    since, seq = idle.now, idle.status.seq
    last = "the last words\n"
    idle.hints.output(0, last.encode())
    idle.status.ranks[0].code = 70
    idle.loop()
    assert idle.status.seq == seq + 1
    idle.hints.pump()  # whatever was written before
    kept = b"".join(idle.store.get(info.key)[8:] for info in idle.store.list(keys.output_prefix(RUN, 1, 0)))
    assert kept.endswith(last.encode())
    idle.looks.clear()
    idle.run(2.0, training=False)
    assert len(idle.looks) >= 3
    assert idle.looks[0] - since <= PAID.look_s
    idle.run(20.0, training=False)
    idle.looks.clear()
    idle.run(30.0, training=False)
    assert len(idle.looks) <= 30 / PAID.idle_s + 1


def test_what_ranks_say_first_comes_as_fast_as_in_a_folder() -> None:
    with Idle(PAID, 1) as idle:
        asked = idle.run(1.0, training=True)
        assert asked["put metrics"] >= 3


def test_a_folder_is_asked_as_often_as_ever() -> None:
    with Idle(FREE, 1) as idle:
        idle.run(10.0, training=True)
        asked = idle.run(60.0, training=True)
        assert asked["put metrics"] >= 4 * 60 - 8
        assert asked["put live/nodes"] >= 60 - 2
        assert asked["get log"] >= 60 / TICK_S - 8


def test_a_flood_of_lines_is_not_held_back() -> None:
    """What does not fit the memory that waiting lines may take is written, whatever it costs."""
    with Idle(PAID, 1) as idle:
        idle.run(60.0, training=True)
        line = json.dumps({"event": "step", "step": 1, "epoch": 1, "pad": "x" * 1000}).encode()
        before = idle.store.asked["put metrics"]
        for _ in range(20_000):
            idle.hints.metrics(line)
            idle.hints.pump()
        idle.hints.pump(last=True)
        assert idle.store.asked["put metrics"] - before >= 20
        written = [idle.store.get(info.key) for info in idle.store.list(keys.metrics_prefix(RUN, 1))]
        assert sum(data.count(b"\n") for data in written) == 60 / TICK_S + 20_000
        assert max(map(len, written)) <= 1 << 20  # of a reader
