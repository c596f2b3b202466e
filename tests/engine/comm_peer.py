"""A rank's other side, in Python: attempt files, the handshake of ``wire/frame.h``, frames. For the tests of tcp.c."""

from __future__ import annotations

import contextlib
import ctypes
import hmac
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoint.agent.crc32c import crc32c
from tests.engine.native import build_program
from trainer import wire

WAIT_S = 60.0
MAC = ctypes.sizeof(wire.Hello) - 32


def until(condition: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
    """Poll a condition; fails, naming it, when it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.005)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, below those that the kernel gives out: no other process's connection gets one
    until a rank listens there.
    """
    found: list[int] = []
    for port in random.sample(range(12_000, 32_768), 1_000):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise AssertionError(f"of 1000 ports only {len(found)} are free")


@dataclass(frozen=True)
class Gang:
    """What the ranks of an attempt agree on. ``channels``: (from, to, bytes) of positions, or with across."""

    channels: tuple[tuple[int, ...], ...]
    ports: tuple[int, ...]
    hosts: tuple[str, ...] = ()
    run: bytes = b"demo-1a2b3c"
    epoch: int = 7
    key: bytes = bytes(range(32))
    nonce: bytes = b"n" * 16
    plan: bytes = b"p" * 32
    start_step: int = 12
    connect_ms: int = 20000
    stall_ms: int = 20000

    def file(self, path: Path) -> Path:
        hosts = self.hosts or ("127.0.0.1",) * len(self.ports)
        ranks = b"".join(
            bytes(wire.AttemptRank(h.encode(), port, 0)) for h, port in zip(hosts, self.ports, strict=True)
        )
        a = wire.Attempt()
        a.magic[:] = wire.ATTEMPT_MAGIC
        a.version, a.run, a.epoch, a.ranks = wire.ATTEMPT_VERSION, self.run, self.epoch, len(self.ports)
        a.plan_digest[:], a.key[:], a.nonce[:] = self.plan, self.key, self.nonce
        a.device_kind = wire.DEVICES["cpu"]
        a.start_step, a.connect_ms, a.stall_ms = self.start_step, self.connect_ms, self.stall_ms
        path.write_bytes(bytes(a) + ranks)
        return path

    def hello(self, channel: int) -> wire.Hello:
        h = wire.Hello()
        h.magic[:], h.version, h.channel = wire.HELLO_MAGIC, wire.HELLO_VERSION, channel
        ends = self.channels[channel] if channel < len(self.channels) else (0, 0, 0)
        h.from_, h.to, h.epoch, h.run, h.start_step = ends[0], ends[1], self.epoch, self.run, self.start_step
        h.plan_digest[:], h.gang_nonce[:], h.nonce[:] = self.plan, self.nonce, os.urandom(16)
        return h

    def mac(self, role: bytes, sender: bytes, receiver: bytes) -> bytes:
        return hmac.digest(self.key, role + sender[:MAC] + receiver[:MAC], "sha256")

    def with_(self, **changes: object) -> Gang:
        return replace(self, **changes)  # type: ignore[arg-type]


def exactly(s: socket.socket, count: int) -> bytes:
    """That many bytes, or fewer where the connection ends."""
    data = b""
    while len(data) < count:
        try:
            more = s.recv(count - len(data))
        except ConnectionError:
            return data
        if not more:
            return data
        data += more
    return data


def dial(port: int) -> socket.socket:
    s = socket.create_connection(("127.0.0.1", port), WAIT_S)
    s.settimeout(WAIT_S)
    return s


def greet_receiver(s: socket.socket, gang: Gang, channel: int) -> bool:
    """The sender's part; True where the receiver accepted. Both macs are checked as a sender would."""
    mine = bytes(gang.hello(channel))
    try:
        s.sendall(mine)
        theirs = exactly(s, len(mine))
        if len(theirs) < len(mine):
            return False
        if not hmac.compare_digest(theirs[MAC:], gang.mac(b"R", mine, theirs)):
            s.sendall(gang.mac(b"S", mine, theirs))
            return exactly(s, 1) == b"\x01"
        s.sendall(gang.mac(b"S", mine, theirs))
        return exactly(s, 1) == b"\x01"
    except ConnectionError:
        return False


def greet_sender(s: socket.socket, gang: Gang, channel: int) -> bool:
    """The receiver's part; True where the sender went through to the word."""
    theirs = exactly(s, ctypes.sizeof(wire.Hello))
    mine = bytes(gang.hello(channel))
    mine = mine[:MAC] + gang.mac(b"R", theirs, mine)
    s.sendall(mine)
    if exactly(s, 32) != gang.mac(b"S", theirs, mine):
        return False
    s.sendall(b"\x01")
    return True


def contents(channel: int, microbatch: int, count: int) -> bytes:
    """What comm_drive sends and expects."""
    return bytes((i * 31 + channel * 7 + microbatch * 13 + (i >> 8)) & 0xFF for i in range(count))


def frame(channel: int, microbatch: int, data: bytes, sequence: int) -> bytes:
    head = wire.Frame(wire.FRAME_MAGIC, channel, sequence, len(data), microbatch, 0)
    return bytes(head) + data + bytes(wire.FrameEnd(wire.FRAME_END_MAGIC, crc32c(data)))


@dataclass
class Driver:
    """A running comm_drive: its lines as they come."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    readers: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        for stream, into in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            assert stream is not None
            self.readers.append(threading.Thread(target=self._read, args=(stream, into), daemon=True))
            self.readers[-1].start()

    @staticmethod
    def _read(stream: Iterable[str], into: list[str]) -> None:
        for line in stream:
            into.append(line.strip())

    def says(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def logs(self, text: str) -> bool:
        return any(text in line for line in self.errors)

    def go(self) -> None:
        """Ends a pause (action P)."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        """The exit code; everything that was said is then here."""
        code = self.process.wait(WAIT_S)
        for reader in self.readers:
            reader.join(WAIT_S)
        return code


@contextmanager
def drive(
    gang: Gang, path: Path, rank: int, *actions: str, start_step: int | None = None, mode: str = "tcp", **more: str
) -> Iterator[Driver]:
    """comm_drive as one rank over tcp, or between devices; killed at the end, whatever happened. more: environment."""
    command = [str(build_program("comm_drive")), mode, str(gang.file(path / f"attempt-{rank}")), channels(gang)]
    command += [str(rank), "-1", str(gang.start_step if start_step is None else start_step), *actions]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **more},
    )
    try:
        yield Driver(process)
    finally:
        process.kill()
        process.wait()


def channels(gang: Gang) -> str:
    return ",".join(":".join(map(str, channel)) for channel in gang.channels)


def two(*more: tuple[int, int, int], **changes: object) -> Gang:
    """Ranks 0 and 1 with a channel each way, and more."""
    return Gang(channels=((0, 1, 300_000), (1, 0, 64), *more), ports=tuple(free_ports(2))).with_(**changes)


def to_one(**changes: object) -> Gang:
    """Rank 1 receives on channels 0 and 1; the test is rank 0."""
    return Gang(channels=((0, 1, 1000), (0, 1, 64)), ports=tuple(free_ports(2))).with_(**changes)


def dial_when_open(port: int) -> socket.socket:
    """A connection to a listener that may not be there yet."""
    found: list[socket.socket] = []

    def attempt() -> bool:
        try:
            found.append(dial(port))
        except OSError:
            return False
        return True

    until(attempt, f"a listener on port {port}")
    return found[0]


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))
        s.listen()
        s.settimeout(WAIT_S)
        yield s


def run_loop(path: Path, gang: Gang, *ranks: str, mode: str = "loop") -> tuple[int, str]:
    done = subprocess.run(
        [str(build_program("comm_drive")), mode, str(gang.file(path / "attempt")), channels(gang), *ranks],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    return done.returncode, done.stdout
