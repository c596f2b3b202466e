"""A rank's talk with its agent: never blocks, keeps what matters while the agent is away, hands the slots back."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.engine.agent_end import WAIT_S, Agent, agent_at
from tests.engine.native import build_program, ended


class Rank:
    """A running link_drive: rank 3 of epoch 8."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.answer()


@contextmanager
def rank(socket_path: Path) -> Iterator[Rank]:
    process = subprocess.Popen(
        [str(build_program("link_drive")), str(socket_path), "3", "8"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with ended(process):
        yield Rank(process)


@contextmanager
def slots(count: int) -> Iterator[tuple[int, ...]]:
    fds = tuple(os.memfd_create(f"slot-{i}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for i in range(count))
    for fd in fds:
        os.ftruncate(fd, 1 << 20)
        fcntl.fcntl(fd, 1033, 0x1 | 0x2 | 0x4)  # F_ADD_SEALS: SEAL, SHRINK, GROW
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def hand_over(agent: Agent, r: Rank, fds: tuple[int, ...], restore: int = -1) -> None:
    r.say("slots 20000")
    assert agent.hears("HELLO", 3, 8).a == r.process.pid
    agent.tell("SLOTS", 3, a=len(fds), b=restore, fds=fds, epoch=8)
    assert r.answer() == f"ok {restore}"


def test_a_rank_from_hello_to_its_last_words(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with agent_at(path) as agent, slots(2) as fds, rank(path) as r:
        hand_over(agent, r, fds, restore=1)
        for line in ('metrics {"step":1}', "ready 0 1 0", "trace /some/trace.json", 'words {"code":0}'):
            assert r.ask(line) == "ok 0"
        assert agent.hears("METRICS", 3, 8).payload == b'{"step":1}'
        ready = agent.hears("READY", 3)
        assert (ready.a, ready.b, ready.c) == (0, 1, 0)
        assert agent.hears("TRACE").payload == b"/some/trace.json"
        assert agent.hears("WORDS").payload == b'{"code":0}'
        assert r.ask("leave 1000") == "ok 0"


def test_commit_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with agent_at(path) as agent, slots(1) as fds, rank(path) as r:
        hand_over(agent, r, fds)
        assert r.ask("committed 5 200").startswith("LOST 0 step 5 was not committed in time")
        agent.tell("COMMITTED", 3, a=4)
        agent.tell("COMMITTED", 3, a=6)
        assert r.ask("committed 5 20000") == "ok 0"


def test_a_restarted_agent_gets_the_slots_and_what_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with slots(3) as fds, rank(path) as r:
        with agent_at(path) as agent:
            hand_over(agent, r, fds)
            assert r.ask("ready 1 10 0") == "ok 0"
            agent.hears("READY", 3)
        for step in range(11, 14):
            assert r.ask(f'metrics {{"step":{step}}}') == "ok 0"
        assert r.ask("ready 2 13 1") == "ok 0"
        assert r.ask("leave 0") == "AGAIN 0"
        with agent_at(path) as again:
            r.say("committed 13 20000")  # the wait connects by itself
            hello = again.hears("HELLO", 3, 8)
            assert len(hello.fds) == 3
            assert [os.fstat(a).st_ino for a in hello.fds] == [os.fstat(b).st_ino for b in fds]
            again.until(lambda: len(again.of("READY", 3)) == 2, "both snapshots, said again")
            assert [(m.a, m.b, m.c) for m in again.of("READY")] == [(1, 10, 0), (2, 13, 1)]
            again.until(lambda: len(again.of("METRICS")) == 3, "the metrics of meanwhile")
            assert [m.payload for m in again.of("METRICS")] == [b'{"step":%d}' % step for step in (11, 12, 13)]
            again.tell("COMMITTED", 3, a=13)
            assert r.answer() == "ok 0"
            for fd in hello.fds:
                os.close(fd)


def test_algorithms_are_agreed_on_also_with_an_agent_that_was_restarted(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with slots(1) as fds, rank(path) as r:
        with agent_at(path) as agent:
            hand_over(agent, r, fds)
            r.say("agree 20000 mine")
            assert agent.hears("ALGORITHMS", 3, 8).payload == b"mine"
        with agent_at(path) as again:
            assert again.hears("ALGORITHMS", 3, 8).payload == b"mine"
            again.tell("ALGORITHMS", 3, payload=b"the run's", epoch=8)
            assert r.answer() == "ok 0 the run's"
            for fd in again.hears("HELLO", 3).fds:
                os.close(fd)
            for answer, told in ((b"no room", "CONFIG 0 no room"), (b"x" * 65, "BUG 0 the agent's algorithms have 65")):
                again.messages.clear()
                r.say("agree 20000 more")
                again.hears("ALGORITHMS", 3)
                again.tell("ALGORITHMS", 3, a=0 if len(answer) > 64 else 78, payload=answer, epoch=8)
                assert r.answer().startswith(told)
            assert "did not say in time which algorithms the run has chosen" in r.ask("agree 100 more")
            r.process.send_signal(signal.SIGUSR1)
            assert r.ask("agree 20000 more") == "LOST 0 a peer was lost while this rank waited for the run's algorithms"


def test_an_agent_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with agent_at(path) as agent, slots(1) as fds, rank(path) as r:
        hand_over(agent, r, fds)
        text = "x" * 4000
        for step in range(2000):  # 8 MB: more than the socket and the ring hold
            assert r.ask(f"metrics {step:04d}{text}") == "ok 0"
        assert r.ask("words {}") == "ok 0"
        r.say("leave 20000")
        agent.hears("WORDS", 3)
        assert r.answer() == "ok 0"
        steps = [int(m.payload[:4]) for m in agent.of("METRICS")]
        assert steps == sorted(steps)
        assert steps[-1] == 1999, "the newest are kept"
        assert len(steps) < 2000


def test_no_agent_in_time_and_a_lost_peer_are_said(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with rank(path) as r:
        assert r.ask("slots 150").startswith("LOST -1 the agent at")
        r.process.send_signal(signal.SIGUSR1)
        assert r.ask("slots 20000") == "LOST -1 a peer was lost while this rank waited for its snapshot slots"
    with rank(tmp_path / ("x" * 200)) as r:
        assert "a Unix socket takes 1 to 107" in r.answer()
        assert r.process.wait(WAIT_S) == 78


def test_data_that_is_there_is_not_waited_for_and_late_data_is_told_in_the_agents_words(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with slots(1) as fds, rank(path) as r:
        with agent_at(path) as agent:
            hand_over(agent, r, fds)
            assert r.ask("ahead 4") == "ok 0"
            agent.tell("DATA", 3, a=6)
            assert r.ask("data 5 20000") == "ok 0"
            said = agent.hears("DATA", 3, 8)
            assert (said.a, said.b) == (4, 6)  # what has come by now
            assert r.ask("data 6 0") == "ok 0"  # known: nobody is asked
            assert r.ask("read 6") == "ok 0"
            late = r.ask("data 7 50")
            assert late.startswith("LOST 0 the data of step 7 is not here after")
            assert late.endswith(
                "names no failure of its store; is the store too slow for this node's share of the data?"
            )
            agent.until(lambda: len(agent.of("DATA", 3)) == 2, "how far it has read")
            assert [(m.a, m.b) for m in agent.of("DATA", 3)][1] == (6, 6)
            agent.tell("DATA", 3, a=6, b=75, payload=b"data/d/00001.bin is awaited: the store is away")
            late = r.ask("data 7 50")
            assert late.startswith("LOST 0 the data of step 7 is not here after")
            assert late.endswith("the agent has it up to step 6: data/d/00001.bin is awaited: the store is away")
        with agent_at(path) as again:  # another one hears first what was promised
            r.say("data 9 20000")
            told = again.hears("DATA", 3, 8)
            assert (told.a, told.b) == (6, 6)
            again.tell("DATA", 3, a=9)
            assert r.answer() == "ok 0"
            again.tell("DATA", 3, a=9, b=65, payload=b"damaged")
            refused = r.ask("data 10 20000")  # it never comes: at once
            assert refused.startswith("DATA 0 the data of step 10 is not here after")
            assert refused.endswith("the agent has it up to step 9: damaged")
            again.tell("DATA", 3, a=9, b=78, payload=b"the disk is full")
            again.tell("COMMITTED", 3, a=1)
            assert r.ask("committed 1 20000") == "ok 0"
            assert r.ask("data 10 0").startswith("CONFIG 0 the data of step 10")
            os.kill(r.process.pid, signal.SIGUSR1)
            assert "a peer was lost while this rank waited for the data of step 10" in r.ask("data 10 20000")
