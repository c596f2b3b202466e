"""The supervisor of a node, as a real process with real ranks, seen from the agent's end of the socket."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from tests.engine.agent_end import WAIT_S, Agent, agent_at, node, script
from tests.engine.engine_build import engine
from tests.support.processes import alive, children
from trainer import wire

__all__ = ["engine"]


@dataclass
class Node:
    """An agent's end and the supervisor that talks to it."""

    agent: Agent
    process: Popen[bytes]
    path: Path

    def plan(self, text: str) -> Path:
        return script(self.path / "plan", text)

    @property
    def log(self) -> str:
        return (self.path / "log").read_text()

    def exits(self, epoch: int) -> dict[int, int]:
        """After IDLE: rank -> code. Nothing of the attempt lives."""
        self.agent.hears("IDLE", epoch=epoch)
        ends = self.agent.of("EXIT", epoch=epoch)
        assert not [m.b for m in ends if alive(m.b)]
        return {m.rank: m.a for m in ends}


@pytest.fixture
def ready(tmp_path: Path) -> Iterator[Node]:
    secrets = {"AWS_ACCESS_KEY_ID": "k", "AWS_REGION": "r", "MY_SECRET_THING": "s", "PLAIN": "yes"}
    socket_path = tmp_path / "agent.sock"
    with agent_at(socket_path) as agent, node(socket_path, tmp_path / "log", secrets) as process:
        agent.hears("HELLO", -1)
        yield Node(agent, process, tmp_path)


def test_an_attempt_from_ports_to_idle(ready: Node) -> None:
    plan = ready.plan("4 listen\n4 out one\n4 err two\n5 listen\n5 out three\n5 exit 85\n")
    ready.agent.prepare(7, 2)
    ports = ready.agent.ports(7)
    for port in ports:  # bound before any rank runs
        with socket.create_connection(("127.0.0.1", port), WAIT_S):
            pass
    ready.agent.start(7, 2, ready.path / "attempt", plan, first=4)
    assert ready.exits(7) == {4: 0, 5: 85}
    assert ready.agent.output(4) == f"port {ports[0]}\none\n"
    assert ready.agent.output(4, 2) == "two\n"
    assert ready.agent.output(5) == f"port {ports[1]}\nthree\n"
    names = [m.name for m in ready.agent.messages]
    assert names.index("OUTPUT") < names.index("EXIT") < names.index("IDLE")
    assert not children(ready.process.pid)
    assert "three" in ready.log, "the supervisor's own output shows the ranks'"


def test_ranks_see_no_secrets(ready: Node) -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_REGION", "MY_SECRET_THING", "PLAIN")
    ready.agent.run(1, 1, ready.plan("".join(f"0 env {name}\n" for name in names)))
    ready.exits(1)
    assert ready.agent.output(0) == "".join(f"{n} is not set\n" for n in names[:3]) + "PLAIN=yes\n"


@pytest.mark.parametrize(("end", "code"), [("exit 65", 65), ("raise 14", -14), ("exit 1", 1)])
def test_a_rank_that_dies_ends_its_attempt(ready: Node, end: str, code: int) -> None:
    ready.agent.run(1, 3, ready.plan(f"0 wait\n1 {end}\n2 hang\n"))
    assert ready.exits(1) == {0: 75, 1: code, 2: -signal.SIGKILL}
    assert {m.rank: m.c for m in ready.agent.of("EXIT")} == {0: 0, 1: 0, 2: 1}, "whom the supervisor killed"
    assert ready.agent.of("EXIT")[0].rank == 1, "the cause comes first"


def test_sigkill_of_a_rank(ready: Node) -> None:
    ready.agent.run(1, 2, ready.plan("0 out up\n0 wait\n1 out up\n1 wait\n"))
    ready.agent.until(lambda: ready.agent.output(0) + ready.agent.output(1) == "up\nup\n", "both ranks")
    pids = children(ready.process.pid)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    assert ready.exits(1) == {0: 75, 1: -9}
    ready.agent.run(2, 1, ready.plan("0 out again\n"))  # the next attempt, in place
    assert ready.exits(2) == {0: 0}


def test_ranks_that_end_well_leave_the_others_alone(ready: Node) -> None:
    ready.agent.run(1, 2, ready.plan("0 exit 0\n1 out up\n1 wait\n"))
    ready.agent.hears("EXIT", 0)
    ready.agent.until(lambda: ready.agent.output(1) == "up\n", "rank 1")
    assert len(children(ready.process.pid)) == 1
    ready.agent.tell("STOP")
    assert ready.exits(1) == {0: 0, 1: 85}
    assert ready.process.poll() is None


def test_kill_is_at_once_and_a_prepared_attempt_can_be_dropped(ready: Node) -> None:
    ready.agent.run(1, 2, ready.plan("0 hang\n1 hang\n"))
    ready.agent.tell("KILL")
    assert ready.exits(1) == {0: -9, 1: -9}
    ready.agent.prepare(2, 1)
    port = ready.agent.ports(2)[0]
    ready.agent.tell("KILL")
    ready.agent.hears("IDLE", epoch=2)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), WAIT_S)


def test_a_newer_attempt_takes_the_place_of_a_running_one(ready: Node) -> None:
    ready.agent.run(1, 1, ready.plan("0 hang\n"))
    ready.agent.until(lambda: len(children(ready.process.pid)) == 1, "the rank")
    ready.agent.prepare(3, 1)
    assert ready.exits(1) == {0: -9}
    assert len(ready.agent.ports(3)) == 1


def test_a_node_may_have_as_many_open_files_as_the_hard_limit_says(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        with agent_at(tmp_path / "a.sock") as agent, node(tmp_path / "a.sock", tmp_path / "log") as process:
            agent.hears("HELLO", -1)
            assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_open_files_run_out_the_limit_and_the_mend_are_named(ready: Node) -> None:
    """Wherever that is, from the first listener to the last pipe: it was a bug of hotstage, 70."""
    plan, pid = ready.plan("0 exit 0\n1 exit 0\n"), ready.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used, ends = len(list(Path(f"/proc/{pid}/fd").iterdir())), []
    for epoch in range(1, 40):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + epoch, hard))
        ready.agent.prepare(epoch, 2)
        ready.agent.until(
            lambda e=epoch: ready.agent.of("PORTS", epoch=e) or ready.agent.of("EXIT", -1, e), "an answer"
        )
        if not ready.agent.of("EXIT", -1, epoch):
            ready.agent.start(epoch, 2, ready.path / "attempt", plan)
            ready.agent.hears("IDLE", epoch=epoch)
        refused = ready.agent.of("EXIT", -1, epoch)
        if not refused:
            break
        ends.append((refused[0].a, b"raise the hard limit (ulimit -Hn" in refused[0].payload))
    assert len(ends) > 5
    assert set(ends) == {(78, True)}, ends
    assert {m.a for m in ready.agent.of("EXIT", epoch=epoch)} == {0}


def test_a_port_in_use_is_refused_with_the_mend(ready: Node) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ready.agent.prepare(1, 1, port_base=port)
        refusal = ready.agent.hears("EXIT", -1, 1)
    assert refusal.a == 78
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use".encode() in refusal.payload
    assert b"choose another launch.port_base" in refusal.payload
    ready.agent.prepare(2, 1, bind=b"not-an-address")
    assert b"'not-an-address' is no address to listen on" in ready.agent.hears("EXIT", -1, 2).payload
    ready.agent.run(3, 1, ready.plan("0 out fine\n"))
    assert ready.exits(3) == {0: 0}


def test_sigterm_forwards_and_leaves_with_85(ready: Node) -> None:
    ready.agent.run(1, 2, ready.plan("0 out up\n0 wait\n1 out up\n1 wait\n"))
    ready.agent.until(lambda: ready.agent.output(0) + ready.agent.output(1) == "up\nup\n", "both ranks")
    ready.process.send_signal(signal.SIGTERM)
    assert ready.exits(1) == {0: 85, 1: 85}
    assert ready.process.wait(WAIT_S) == 85


def test_a_stop_before_the_rank_is_ready_for_it_is_not_lost(ready: Node) -> None:
    ready.agent.run(1, 1, ready.plan("0 wait\n"))
    ready.agent.until(lambda: "rank started" in ready.log, "the fork")
    ready.process.send_signal(signal.SIGTERM)  # perhaps between fork and exec
    assert ready.process.wait(WAIT_S) == 85


def test_what_ended_ill_while_stopping_is_the_code(ready: Node) -> None:
    ready.agent.run(1, 2, ready.plan("0 out up\n0 wait\n0 exit 1\n1 out up\n1 hang\n"))
    ready.agent.until(lambda: ready.agent.output(0) + ready.agent.output(1) == "up\nup\n", "both ranks")
    ready.process.send_signal(signal.SIGTERM)
    ready.agent.hears("EXIT", 0)
    ready.agent.tell("KILL")
    assert ready.process.wait(WAIT_S) == 75


def test_a_stop_with_nothing_saved_does_not_say_85(ready: Node) -> None:
    ready.agent.run(1, 2, ready.plan("0 wait\n1 exit 143\n"))
    ready.agent.hears("EXIT", 1)
    ready.process.send_signal(signal.SIGTERM)
    assert ready.exits(1) == {0: 85, 1: 143}, "the end of one that was asked to stop is no loss for the others"
    assert ready.process.wait(WAIT_S) == 143


def test_a_stop_before_any_attempt_does_not_say_85(ready: Node) -> None:
    ready.process.send_signal(signal.SIGTERM)
    assert ready.process.wait(WAIT_S) == 143


def test_a_rank_that_pours_out_lines_does_not_hide_another_s_end(ready: Node) -> None:
    ready.agent.run(1, 2, ready.plan("0 pour\n1 exit 65\n"))
    assert ready.exits(1) == {0: -signal.SIGKILL, 1: 65}


@pytest.mark.parametrize("folder", ["kept", "deleted"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_supervisor_whose_agent_does_not_come_again_ends(tmp_path: Path, folder: str, ranks: int) -> None:
    home, log = tmp_path / "node", tmp_path / "log"
    home.mkdir()
    plan = script(tmp_path / "plan", "0 out up\n0 wait\n1 out up\n1 hang\n")
    with (
        agent_at(home / "agent.sock") as agent,
        node(Path("agent.sock"), log, {"HOTSTAGE_ENGINE_AGENT_AWAY_S": "0.5"}, cwd=home) as process,
    ):
        agent.hears("HELLO", -1)
        if ranks:
            agent.run(1, ranks, plan)
            agent.until(lambda: agent.output(0) + agent.output(1) == "up\nup\n", "both ranks")
        pids = children(process.pid)
        assert len(pids) == ranks
        agent.close()
        if folder == "deleted":
            (home / "agent.sock").unlink(missing_ok=True)
            home.rmdir()
        assert process.wait(WAIT_S) == 75
        assert not [pid for pid in pids if alive(pid)]
    said = log.read_text()
    assert '"event":"no agent: this node ends"' in said
    assert f'"live_ranks":{ranks}' in said
    assert said.count("last words of a rank") == (1 if ranks else 0)


def test_a_supervisor_whose_agent_never_comes_ends(tmp_path: Path) -> None:
    with node(tmp_path / "agent.sock", tmp_path / "log", {"HOTSTAGE_ENGINE_AGENT_AWAY_S": "0.1"}) as process:
        assert process.wait(WAIT_S) == 75


def test_an_agent_that_comes_again_in_time_finds_its_ranks(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with agent_at(path) as agent, node(path, tmp_path / "log", {"HOTSTAGE_ENGINE_AGENT_AWAY_S": "20"}) as process:
        agent.run(1, 1, script(tmp_path / "plan", "0 out up\n0 wait\n"))
        agent.until(lambda: agent.output(0) == "up\n", "the rank")
        agent.close()
        with agent_at(path) as again:
            assert again.hears("HELLO", -1).b == 1
            again.tell("STOP")
            assert again.hears("EXIT", 0).a == 85
        assert process.poll() is None


def test_end_kills_and_leaves_with_0(ready: Node) -> None:
    ready.agent.run(1, 1, ready.plan("0 hang\n"))
    ready.agent.tell("END")
    assert ready.exits(1) == {0: -9}
    assert ready.process.wait(WAIT_S) == 0


def test_ranks_die_with_the_supervisor(ready: Node) -> None:
    ready.agent.run(1, 2, ready.plan("0 out up\n0 hang\n1 out up\n1 hang\n"))
    ready.agent.until(lambda: ready.agent.output(0) + ready.agent.output(1) == "up\nup\n", "both ranks")
    pids = children(ready.process.pid)
    ready.process.kill()
    ready.agent.until(lambda: not any(alive(pid) for pid in pids), "the ranks' end")


def test_a_restarted_agent_is_told_what_stands(ready: Node) -> None:
    ready.agent.run(4, 2, ready.plan("0 out first\n0 wait\n1 exit 0\n"))
    ready.agent.until(lambda: ready.agent.output(0) == "first\n", "rank 0")
    ready.agent.hears("EXIT", 1)
    ready.agent.close()
    pid = children(ready.process.pid)[0]
    with agent_at(ready.path / "agent.sock") as again:
        hello = again.hears("HELLO", -1)
        assert (hello.epoch, hello.b, hello.a) == (4, 1, ready.process.pid)
        assert again.hears("EXIT", 1, 4).a == 0
        assert alive(pid), "losing the agent does not disturb a rank"
        again.tell("STOP")
        assert again.hears("EXIT", 0, 4).a == 85
        again.hears("IDLE", epoch=4)
        again.tell("START", epoch=4, a=0, b=2, payload=b"x\0y\0")  # said twice: nothing happens
        again.run(5, 1, ready.plan("0 exit 0\n"))
        again.hears("IDLE", epoch=5)


def test_output_without_a_reader_never_holds_up_a_rank(ready: Node) -> None:
    ready.agent.run(1, 1, ready.plan("0 flood 4096\n"))
    ready.agent.close()
    ready.agent.until(lambda: "rank ended" in ready.log, "the rank's end without an agent")
    with agent_at(ready.path / "agent.sock") as again:
        again.hears("IDLE", epoch=1)
        text = again.output(0)
        assert text.endswith("the end of the flood\n"), "the newest is kept"
        assert len(text) <= 2 << 20


def test_a_stopped_rank_is_reported_as_stalled(ready: Node) -> None:
    attempt = wire.Attempt()
    attempt.magic[:], attempt.version, attempt.stall_ms = wire.ATTEMPT_MAGIC, wire.ATTEMPT_VERSION, 300
    (ready.path / "attempt").write_bytes(bytes(attempt))
    ready.agent.run(1, 2, ready.plan("0 move\n0 out up\n0 wait\n1 out up\n1 wait\n"))
    ready.agent.until(lambda: ready.agent.output(0) + ready.agent.output(1) == "up\nup\n", "both ranks")
    first = children(ready.process.pid)[0]
    os.kill(first, signal.SIGSTOP)
    assert ready.exits(1) == {0: 86, 1: 75}
    assert '"of":0,"process":"T","step":3,"action":"RECV","index":4,"op":"F","microbatch":1,"peer":0' in ready.log


def test_signals_that_the_parent_ignored_are_seen(tmp_path: Path) -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGCHLD, signal.SIGTERM)}
    try:
        with agent_at(tmp_path / "agent.sock") as agent, node(tmp_path / "agent.sock", tmp_path / "log") as process:
            for number, handler in before.items():
                signal.signal(number, handler)
            agent.run(1, 2, script(tmp_path / "plan", "0 exit 0\n1 wait\n"))
            agent.hears("EXIT", 0, 1)
            process.terminate()
            assert process.wait(WAIT_S) == 85
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_socket_path_that_cannot_be_one(tmp_path: Path) -> None:
    with node(tmp_path / ("x" * 120), tmp_path / "log") as process:
        assert process.wait(WAIT_S) == 78
    assert "a Unix socket takes 1 to 107" in (tmp_path / "log").read_text()


@contextmanager
def looking(folder: Path, **env: str) -> Iterator[Node]:
    """A node whose look at its devices says ``NODE_DRIVE_DEVICES``."""
    with agent_at(folder / "agent.sock") as agent, node(folder / "agent.sock", folder / "log", env) as process:
        agent.hears("HELLO", -1)
        yield Node(agent, process, folder)


def test_ports_carry_the_line_of_devices_where_it_was_asked_for(tmp_path: Path) -> None:
    line = '{"devices":[],"why":"' + "x" * 30000 + '"}'
    with looking(tmp_path, NODE_DRIVE_DEVICES=line) as ready:
        ready.agent.prepare(1, 2, look=1)
        payload = ready.agent.hears("PORTS", epoch=1).payload
        assert payload[4:].decode() == line
        ready.agent.start(1, 2, tmp_path / "attempt", ready.plan("0 exit 0\n1 exit 0\n"))
        assert ready.exits(1) == {0: 0, 1: 0}
        ready.agent.prepare(2, 2)
        assert len(ready.agent.hears("PORTS", epoch=2).payload) == 4


def test_a_look_at_devices_that_ends_without_a_word(ready: Node) -> None:
    ready.agent.prepare(1, 1, look=1)
    found = json.loads(ready.agent.hears("PORTS", epoch=1).payload[2:])
    assert found["devices"] == []
    assert found["why"].startswith("the process that looks for devices ended without a word")


def test_a_look_at_devices_that_hangs_keeps_nobody(tmp_path: Path) -> None:
    """It is killed with its attempt, and the next one looks anew; a supervisor that is told to end ends."""
    with looking(tmp_path, NODE_DRIVE_DEVICES="hang") as ready:
        ready.agent.prepare(1, 1, look=1)
        ready.agent.until(lambda: len(children(ready.process.pid)) == 1, "the look")
        (first,) = children(ready.process.pid)
        ready.agent.prepare(2, 1, look=1)
        ready.agent.until(lambda: children(ready.process.pid) not in ([first], []), "another look")
        ready.agent.until(lambda: not alive(first), "the end of the first")
        ready.agent.prepare(3, 1)
        assert len(ready.agent.ports(3)) == 1
        assert not ready.agent.of("PORTS", epoch=1) + ready.agent.of("PORTS", epoch=2)
        ready.agent.tell("END")
        assert ready.process.wait(WAIT_S) == 0


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["Nehalem", "max"])
def test_a_cpu_without_avx2_is_told_once(engine: Path, tmp_path: Path, cpu: str) -> None:
    """By its node, when that starts, whatever attempts and ranks come."""
    qemu = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if qemu is None:
        pytest.skip("no qemu-user here (on Debian: apt-get install qemu-user-static)")
    command = [qemu, "-cpu", cpu, str(engine), "node", "--agent", str(tmp_path / "agent.sock")]
    with Popen(command, stderr=PIPE, text=True) as process:
        assert process.stderr
        assert "supervisor" in process.stderr.readline()
        process.terminate()
        rest = process.stderr.read()
    assert rest.count("this CPU has no AVX2 and FMA") == (cpu == "Nehalem")
