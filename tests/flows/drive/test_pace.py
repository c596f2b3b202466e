"""What a driver asks of a store whose requests cost, and that nobody who writes as seldom as there counts as silent."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from checkpoint import keys
from checkpoint.agent.status import NodeStatus, RankStatus
from checkpoint.claims import Place
from checkpoint.errors import NotFound
from checkpoint.store import MemoryStore
from checkpoint.store.base import FREE, PAID, Info, Pace
from flows.drive.claims import SILENT_SOON_S, StoreClaims
from flows.drive.decide import judge
from flows.drive.live import MetricsReader, OutputFollower, StatusReader
from flows.drive.loop import POLL_S, calm_pause_s, pause_after
from flows.drive.views import AttemptView, AwaitStop, LogView, Phase, Policy, Watch

RUN = "r-0a1b2c"
LOOP_S = 1.0


class Paced(MemoryStore):
    """A store of some pace, that counts the looks for what may be there, listings and reads that find nothing, and
    remembers what was read.
    """

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace)
        self.looks = 0
        self.read: list[str] = []

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        self.looks += 1
        return super().list(prefix, start_after)

    def get(self, key: str, **more: Any) -> bytes:
        try:
            self.read.append(key)
            return super().get(key, **more)
        except NotFound:
            self.looks += 1
            raise


@pytest.mark.parametrize(("pace", "beat_s"), [(FREE, LOOP_S), (PAID, PAID.beat_s + LOOP_S)])
def test_a_healthy_gang_is_never_silent(pace: Pace, beat_s: float) -> None:
    """With the shortest limits that hold in a folder; and one that falls silent is so once these have passed."""
    store, now = Paced(pace), 0.0
    reader = StatusReader(store, RUN, "l", clock=lambda: now)
    status = NodeStatus(0, "l", "t", epoch=1, phase="running", ranks={0: RankStatus(pid=7)})
    attempt = AttemptView(1, "l", 1, 1, "", 0, None, None, (), None)
    policy = Policy(steps=10_000, launch="l", nodes=1, ranks=1, stall_s=1.5, commit_s=1.5, start_s=0.0)
    written = -beat_s
    while now < 120.0:
        if now - written >= beat_s:
            written, status.ranks[0].step = now, status.ranks[0].step + 1
            store.put(keys.status_key(RUN, "l", 0), status.pack())
        (view,) = reader.poll(1, {0: True})
        assert view.age_s <= LOOP_S
        assert view.step_age_s <= LOOP_S
        assert isinstance(judge(LogView(attempts=(attempt,)), [view], policy), Watch)
        now += 0.25
    now = written + pace.beat_s + policy.stall_s + policy.commit_s
    assert reader.poll(1, {})[0].age_s >= policy.stall_s


@pytest.mark.parametrize(("pace", "most"), [(FREE, 600), (PAID, 26)])
def test_metrics_are_looked_for_as_often_as_they_come(pace: Pace, most: int) -> None:
    store, now = Paced(pace), 0.0
    reader = MetricsReader(store, RUN, attach=True, clock=lambda: now)
    seen: list[int] = []

    def write(step: int) -> None:
        line = json.dumps({"event": "step", "epoch": 2, "step": step}).encode()
        store.create(keys.segment_key(RUN, 2, step), line)

    for _ in range(5):  # the first lines of an attempt are what everybody waits for
        assert reader.poll([2]) == []
        now += 0.1
    assert store.looks >= 5
    before = store.looks
    for step in range(600):
        write(step)
        seen += [line["step"] for line in reader.poll([2])]
        now += 0.1
    assert store.looks - before <= most
    write(600)
    seen += [line["step"] for line in reader.poll([2], last=True)]
    assert seen == list(range(601))


def test_who_follows_output_reads_what_is_new_and_not_all_that_is_kept() -> None:
    store = Paced(PAID)
    follower = OutputFollower(store, RUN, 2, 0)

    def write(number: int, text: bytes) -> str:
        store.put(key := f"{keys.output_prefix(RUN, 2, 0)}{number % 64:02d}", struct.pack("<Q", number) + text)
        return key

    for number in range(64):
        write(number, b"%d " % number)
    assert follower.poll().split() == [b"%d" % number for number in range(64)]
    store.read.clear()
    assert follower.poll() == b""
    assert store.read == []
    grown, wrapped = write(63, b"63 more"), write(64, b"64 ")
    assert follower.poll() == b"more64 "
    assert sorted(store.read) == [wrapped, grown]


@pytest.mark.parametrize(("pace", "soon_s"), [(FREE, SILENT_SOON_S), (PAID, 3 * PAID.beat_s)])
def test_a_launch_of_this_machine_before_its_boot_is_heard_for_some_beats(pace: Pace, soon_s: float) -> None:
    store, now = Paced(pace), 0.0
    claims = StoreClaims(store, RUN, clock=lambda: now)
    place = Place(socket.gethostname(), "another boot", "pid:[1]", "/nowhere", "a" * 32)
    store.create(keys.launch_key(RUN, "l"), replace(place, nodes=1).to_bytes())
    overs = []
    while now < soon_s + 1:
        held = claims.where("l", None)
        assert held is not None
        overs.append(bool(held.over))
        now += 1.0
    assert overs == [False] * int(soon_s) + [True]


@pytest.mark.parametrize("pace", [FREE, PAID])
def test_a_driver_looks_often_only_where_something_is_due(pace: Pace) -> None:
    """An attempt may be held back for a minute: that is no reason to ask the store twenty times a second."""
    look_s = 0.005
    for phase in (Phase.TRAINING, Phase.WAITING, Phase.BACKOFF):
        pause = pause_after(Watch(phase), look_s, POLL_S, pace)
        assert pause == calm_pause_s(look_s, max(POLL_S, pace.look_s)) > 4 * POLL_S
    assert pause_after(Watch(Phase.DRAINING), look_s, POLL_S, pace) == POLL_S
    assert pause_after(AwaitStop(), look_s, POLL_S, pace) == 0.0
