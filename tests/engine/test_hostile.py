"""Seeded mutations of attempt files and of the agent's messages: refused by name or lived with, never a crash.

Small here; the slow marker has the long campaigns. A failure names its seed and number: they give the same bytes again.
"""

from __future__ import annotations

import array
import contextlib
import os
import random
import select
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from checkpoint.agent.gang import layouts
from checkpoint.agent.slots import SlotTable
from checkpoint.amendments import Amendments
from checkpoint.layout import read_plan
from tests.e2e import engine_runs
from tests.engine.engine_build import engine
from tests.engine.test_rank import Gang, gang, small_plan
from trainer import wire

__all__ = ["engine", "gang"]  # fixtures

SIZES = [pytest.param(60, id="short"), pytest.param(1500, id="long", marks=pytest.mark.slow)]
TELLING = (0, 1, 2, 3, 63, 64, 255, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(data: bytes, dice: random.Random) -> bytearray:
    """One to four places changed: a bit, a field to a telling value, a run of bytes, or the length."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        if not out:
            break
        at = dice.randrange(len(out))
        match dice.randrange(5):
            case 0:
                out[at] ^= 1 << dice.randrange(8)
            case 1:
                width = dice.choice((4, 8))
                at = at // width * width
                out[at : at + width] = (dice.choice(TELLING) & (2 ** (8 * width) - 1)).to_bytes(width, "little")
            case 2:
                count = dice.randint(1, 64)
                out[at : at + count] = bytes([dice.choice((0, 0x41, 0xFF))]) * len(out[at : at + count])
            case 3:
                del out[at : at + dice.randint(1, 300)]
            case 4:
                out[at:at] = dice.randbytes(dice.randint(1, 300))
    return out


def resealed(data: bytearray) -> bytes:
    """With the checksum that goes with the bytes, so that the deeper checks are reached."""
    first = wire.Attempt.run.offset
    if len(data) > first:
        at = wire.Attempt.crc.offset
        data[at : at + 4] = engine_runs._crc32c(bytes(data[first:])).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("count", SIZES)
def test_mutated_attempts_are_refused_or_run(gang: Gang, tmp_path: Path, count: int) -> None:
    """Every end is one of the table of exit codes, with words; a file that still holds trains as it says."""
    amended = Amendments(steps=2, skip=((1, 1), (4, 5)), rate=((2, 0.5),))
    gang.prepare(small_plan(tmp_path), lambda a: setattr(a, "connect_ms", 500), amended=amended)
    good = (tmp_path / "attempt").read_bytes()
    seed, ends = 3, dict.fromkeys(wire.EXITS, 0)
    for number in range(count):
        dice = random.Random(seed * 1_000_003 + number)
        data = mutated(good, dice)
        (tmp_path / "attempt").write_bytes(resealed(data) if dice.randrange(10) else bytes(data))
        code, _, err = gang.run()
        assert code in wire.EXITS, f"mutation {number} of seed {seed}: {code}\n{err}"
        assert code != 70, f"mutation {number} of seed {seed}: {err}"
        assert code == 0 or err.strip(), f"mutation {number} of seed {seed}: {code} without a word"
        ends[code] += 1
    assert ends[78] > count // 2
    assert ends[0] > 0


def _noise(dice: random.Random) -> bytes:
    """A message of an agent to a rank, with numbers that do not fit, half of them changed."""
    name = dice.choice(["SLOTS", "COMMITTED", "DATA", "ALGORITHMS", "PREPARE", "METRICS"])
    numbers = {field: dice.choice((0, 1, -1, 17, 65, 2**31, 2**32, 2**62, -(2**62))) for field in "abc"}
    good = packet(name, 1, dice.randbytes(dice.choice((0, 8, 100, 4000))), rank=0, **numbers)
    return bytes(mutated(good, dice) if dice.randrange(2) else good)[: wire.MSG_MAX]


def _send(peer: socket.socket, data: bytes, fds: Sequence[int]) -> None:
    with contextlib.suppress(OSError):  # it has gone, or turned us away: it comes again
        socket.send_fds(peer, [data], fds)


def _answer(peer: socket.socket, head: wire.Msg, dice: random.Random, slots: Sequence[int]) -> None:
    """What an agent says to that message, behind up to two that are noise, with descriptors of anything."""
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        with contextlib.ExitStack() as files:
            made = [os.memfd_create("anything") for _ in range(dice.choice((0, 1, 2, 16, 20)))]
            for fd in made:
                files.callback(os.close, fd)
            _send(peer, _noise(dice), made)
    if head.type == wire.MSGS["HELLO"]:
        restore = dice.choice((-1, -1, 0, 5, 2**33))
        _send(peer, packet("SLOTS", 1, rank=0, a=len(slots), b=restore), slots)
    elif head.type == wire.MSGS["READY"] and head.c:
        _send(peer, packet("COMMITTED", 1, rank=0, a=head.b), ())


@pytest.mark.slow
def test_mutated_messages_do_not_bring_a_rank_down(gang: Gang, tmp_path: Path) -> None:
    """It trains, or ends with a word and a code of the table."""

    def hurry(attempt: wire.Attempt) -> None:
        attempt.connect_ms = attempt.stall_ms = attempt.commit_ms = 1500

    plan, seed, ends = small_plan(tmp_path, every=1), 9, dict.fromkeys(wire.EXITS, 0)
    gang.prepare(plan, hurry, ports=[0])
    layout = read_plan(plan.to_bytes())
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "agent.sock"))
        listener.listen()
        for number in range(100):
            dice = random.Random(seed * 1_000_003 + number)
            table = SlotTable(layouts(layout, range(1)), layout.digest, layout.what_digest, layout.slots)
            table.create(0)
            slots = [slot.fd for slot in table.slots[0]]
            process, peers = gang.start(0, "--agent", str(tmp_path / "agent.sock")), [listener]
            while process.poll() is None:
                for ready in select.select(peers, [], [], 0.02)[0]:
                    if ready is listener:
                        peers.append(listener.accept()[0])
                        continue
                    try:
                        data = ready.recv(wire.MSG_MAX)
                    except OSError:
                        data = b""
                    if data:
                        _answer(ready, wire.Msg.from_buffer_copy(data), dice, slots)
                    else:
                        peers.remove(ready)
                        ready.close()
            for peer in peers[1:]:
                peer.close()
            _, err = process.communicate()
            assert table.close()
            code = process.returncode
            assert code in wire.EXITS, f"round {number} of seed {seed}: {code}\n{err}"
            assert code != 70, f"round {number} of seed {seed}: {err}"
            assert code == 0 or err.strip(), f"round {number} of seed {seed}: {code} without a word"
            ends[code] += 1
    assert ends[0] > 50


class Supervisor:
    """A real supervisor and the raw end of its socket: packets as they are, well formed or not."""

    def __init__(self, engine: Path, folder: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.listener.bind(f"/proc/self/fd/{here}/agent.sock")  # short, however deep the folder is
        os.close(here)
        self.listener.listen()
        self.listener.settimeout(20)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            command = [engine, "node", "--agent", "agent.sock"]
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        self.peer: socket.socket | None = None

    def connected(self) -> socket.socket:
        if self.peer is None:
            self.peer, _ = self.listener.accept()
            self.peer.settimeout(20)
        return self.peer

    def send(self, packet: bytes, fds: list[int]) -> bool:
        """False where the supervisor had closed this connection."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.connected().sendmsg([packet], rights)
        except (BrokenPipeError, ConnectionResetError):
            self.drop()
            return False
        return True

    def drop(self) -> None:
        assert self.peer is not None
        self.peer.close()
        self.peer = None

    def answers(self, epoch: int) -> None:
        """It lives, and a good PREPARE gets its ports."""
        while True:
            payload = bytes(wire.MsgPrepare(2, 0, b"127.0.0.1"))
            if not self.send(packet("PREPARE", epoch, payload), []):
                continue
            try:
                while data := self.connected().recv(wire.MSG_MAX + 64):
                    head = wire.Msg.from_buffer_copy(data)
                    if head.type == wire.MSGS["PORTS"] and head.epoch == epoch:
                        assert head.bytes == 4
                        return
            except ConnectionResetError:
                pass
            self.drop()  # it turned away what came before: it connects again
            assert self.process.poll() is None, self.log.read_text()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.peer is not None:
            self.peer.close()
        self.listener.close()


def packet(name: str, epoch: int, payload: bytes = b"", **fields: int) -> bytes:
    given = {"rank": -1, "a": 0, "b": 0, "c": 0} | fields
    head = wire.Msg(
        wire.MSG_MAGIC, wire.MSGS[name], given["rank"], len(payload), epoch, given["a"], given["b"], given["c"]
    )
    return bytes(head) + payload


@contextlib.contextmanager
def supervisor(engine: Path, folder: Path) -> Iterator[Supervisor]:
    made = Supervisor(engine, folder)
    try:
        yield made
    finally:
        made.close()


def _hostile(dice: random.Random, epoch: int) -> bytes:
    """A message of the agent with something wrong in it (END apart: it is obeyed)."""
    match dice.randrange(4):
        case 0:
            good = packet("PREPARE", epoch, bytes(wire.MsgPrepare(dice.randint(0, 3), 0, b"127.0.0.1")))
        case 1:
            good = packet("START", epoch, b"/nowhere/attempt\0/nowhere/plan\0", b=dice.randint(0, 3))
        case 2:
            good = packet(dice.choice(["STOP", "KILL", "COMMITTED", "SLOTS", "HELLO"]), epoch)
        case _:
            good = packet("METRICS", epoch, dice.randbytes(dice.randint(0, 4000)))
    out = mutated(good, dice)
    at = wire.Msg.type.offset
    if len(out) >= at + 4 and int.from_bytes(out[at : at + 4], "little") == wire.MSGS["END"]:
        out[at] = 77
    at = wire.Msg.epoch.offset
    if len(out) >= at + 8 and int.from_bytes(out[at : at + 8], "little") > epoch:
        out[at : at + 8] = epoch.to_bytes(8, "little")  # a newer epoch would fence the good messages: that is its right
    return bytes(out[: wire.MSG_MAX])


@pytest.mark.parametrize("count", SIZES)
def test_mutated_messages_do_not_bring_a_supervisor_down(engine: Path, tmp_path: Path, count: int) -> None:
    seed, epoch = 5, 1
    with supervisor(engine, tmp_path) as node:
        node.answers(epoch)
        before = len(os.listdir(f"/proc/{node.process.pid}/fd"))
        for number in range(5 * count):
            dice = random.Random(seed * 1_000_003 + number)
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(dice.choice((0, 0, 0, 1, 5, 20)))]
            try:
                node.send(_hostile(dice, epoch), fds)
            finally:
                for fd in fds:
                    os.close(fd)
            assert node.process.poll() is None, f"message {number} of seed {seed}\n{node.log.read_text()[-3000:]}"
            if number % 50 == 49:
                epoch += 1
                node.answers(epoch)
        open_fds = len(os.listdir(f"/proc/{node.process.pid}/fd"))
        # a mutated PREPARE may have bound some listeners more; kept descriptors would be four a message
        assert open_fds < before + 5 * count, "descriptors that came with messages are kept"
        node.process.send_signal(signal.SIGTERM)
        assert node.process.wait(60) == 143, node.log.read_text()[-3000:]
