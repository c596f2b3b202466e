"""The agent's end of its node's socket, by hand: what is read of several peers, and in what order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.agent.link import Arrival, Link
from tests.support.agents import Connection


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    monkeypatch.chdir(tmp_path)
    made = Link(Path("agent.sock"))
    try:
        yield made
    finally:
        made.close()


def names(arrivals: list[Arrival]) -> list[str]:
    return [arrival.message.name if arrival.message else "gone" for arrival in arrivals]


def test_an_end_is_heard_after_all_that_the_rank_had_said(link: Link, tmp_path: Path) -> None:
    """However much that is, and though the supervisor's socket has something to read first."""
    supervisor, rank, late = (Connection(tmp_path) for _ in range(3))
    assert link.poll(0.0) == []
    supervisor.send("OUTPUT", rank=0, payload=b"not finite")
    for step in range(150):
        rank.send("METRICS", rank=0, payload=b'{"step":%d}' % step)
    rank.send("WORDS", rank=0, payload=b"{}")
    rank.close()
    late.send("HELLO", rank=1)
    late.send("WORDS", rank=1, payload=b"{}")
    Connection(tmp_path).close()  # not even accepted before
    supervisor.send("EXIT", rank=0, a=87)
    supervisor.send("IDLE")
    heard = names(link.poll(5.0))
    assert heard[0] == "OUTPUT"
    assert heard[-2:] == ["EXIT", "IDLE"]
    assert sorted(set(heard[1:-2])) == ["HELLO", "METRICS", "WORDS", "gone"]
    assert [heard.count(name) for name in ("METRICS", "WORDS", "gone")] == [150, 2, 2]
    for peer in (supervisor, late):
        peer.close()


def test_who_wakes_a_link_that_is_closed_wakes_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at the log that comes back while the agent leaves: it left with 70, as of a bug in that thread."""
    monkeypatch.chdir(tmp_path)
    link = Link(Path("agent.sock"))
    link.close()
    link.wake()
