"""The agent's actions by themselves, over a real store: what a node lets go of when something takes its place."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint import codec, keys
from checkpoint.agent import effects as do
from checkpoint.agent import events as ev
from checkpoint.agent.actions import Actions
from checkpoint.agent.gang import CannotStart, Gang, Options
from checkpoint.agent.link import Link
from checkpoint.agent.meet import SMALL
from checkpoint.agent.metrics import Gauge
from checkpoint.agent.prepare import Preparer
from checkpoint.claims import Place
from tests.support.agent_world import attempt_info
from tests.support.agents import make_run, tiny_spec


class Node:
    """Actions of node 0, and the loop that hears what they post."""

    def __init__(self, tmp_path: Path) -> None:
        self.spec = tiny_spec(parallel__stages=2)
        self.run, self.plan = make_run(tmp_path, self.spec)
        work = tmp_path / "work"
        work.mkdir()
        self.options = Options(
            self.run.name, self.run.launch, 0, 1, Path("agent.sock"), work, b"k" * 16, Place.of(work), "127.0.0.1",
            "127.0.0.1", 0, 0.01,
        )  # fmt: skip
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.events: list[ev.Event] = []

    def actions(self, link: Link, **options: Any) -> Actions:
        return Actions(
            replace(self.options, **options), self.run.store, self.run.log, link, "a0", post=self.posted.put,
            feed=self.events.append, on_commit=lambda *_: None, on_error=lambda _: None,
            gauge=Gauge(),
        )  # fmt: skip

    def gang(self) -> Gang:
        """Of a new attempt."""
        self.run.attempt(self.spec, self.plan)
        return Gang.of(self.run.state.attempts[-1], 0)

    def hear(self, kind: type[ev.Event]) -> Any:
        """The next event of this kind, once it is posted."""
        while not any(isinstance(event, kind) for event in self.events):
            self.posted.get(timeout=60)()
        found = next(event for event in self.events if isinstance(event, kind))
        self.events.remove(found)
        return found


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    link = Link(Path("agent.sock"))
    yield link
    link.close()


def slots_open() -> int:
    """Descriptors of slots in this process: each keeps its memory."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sum("hotstage-slot" in name for name in names)


def test_a_preparation_that_fails_leaves_no_slots(node: Node) -> None:
    """It had made them for itself: the next attempt's are as large, and the node's memory is for one table."""
    gang, before = node.gang(), slots_open()
    lost = replace(gang, attempt=replace(gang.attempt, checkpoint=77))
    with ThreadPoolExecutor(1) as pool, pytest.raises(CannotStart, match="record 77"):
        Preparer(node.run.store, node.options, pool).prepare(lost, node.run.state, None, threading.Event())
    assert slots_open() == before


def test_what_was_prepared_for_an_attempt_that_never_ran_goes_before_the_next_is(node: Node, link: Link) -> None:
    actions = node.actions(link)
    try:
        for _ in range(2):
            gang = node.gang()
            actions.run(do.Begin(gang))
            unused = dict(actions._found)
            actions.run(do.Prepare(gang, node.run.state))
            actions.tidy()
            assert all(slot._map.closed for p in unused.values() for slots in p.table.slots.values() for slot in slots)
            assert node.hear(ev.Provided).epoch == gang.epoch
        assert unused
    finally:
        actions.stop()
        actions.close()
        assert all(provisions.table.close() for provisions in actions._found.values())


def test_ports_of_a_supervisor_that_is_lost_are_not_put_together(node: Node, link: Link) -> None:
    """Its node meets the others again, under the new one's ports: whoever waits with the old ones stops at once."""
    nodes, epoch, store = SMALL + 1, SMALL + 1, node.run.store  # node 0 is the first in order
    gang = Gang.of(attempt_info(epoch, nodes), 0)
    actions = node.actions(link, nodes=nodes)
    try:
        before = set(threading.enumerate())
        actions.run(do.Meet(gang, ev.Address("127.0.0.1", [1, 2])))
        (old,) = [thread for thread in threading.enumerate() if thread.name == "peers" and thread not in before]
        actions.run(do.Meet(gang, ev.Address("127.0.0.1", [3, 4])))
        old.join(60)
        assert not old.is_alive()
        for other in range(1, nodes):
            address = codec.pack_hint({"host": "h", "ports": [5, 6]})
            store.put(keys.address_key(node.run.name, epoch, other), address)
        assert node.hear(ev.Met).nodes[0] == ev.Address("127.0.0.1", [3, 4])
        together = codec.unpack_hint(store.get(keys.together_key(node.run.name, epoch)), "", max_bytes=1 << 16)
        assert together[0]["ports"] == [3, 4]
    finally:
        actions.stop()
        actions.close()
