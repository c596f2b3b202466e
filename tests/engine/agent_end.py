"""The agent's end of the socket, for tests of the engine's end: the agent's own `Link`, driven by hand."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint.agent.link import Link, Message, Peer
from tests.e2e import engine_runs
from tests.engine.native import build_program
from trainer import wire
from trainer.plan.compiled import Plan

WAIT_S = 60.0


class Agent:
    """Listens, keeps every message, and knows who is there."""

    def __init__(self, path: Path) -> None:
        self.link = Link(path)
        self.messages: list[Message] = []
        self.hellos: dict[int, Peer] = {}
        self.left: list[int | None] = []
        self.closed = False

    def close(self) -> None:
        """The agent dies; its messages stay to be looked at."""
        if not self.closed:
            self.closed = True
            self.link.close()

    def pump(self, seconds: float = 0.02) -> None:
        for event in self.link.poll(seconds):
            if event.message is None:
                self.left.append(event.peer.rank)
                self.hellos = {r: p for r, p in self.hellos.items() if p is not event.peer}
            else:
                if event.message.name == "HELLO":
                    event.peer.rank = event.message.rank
                    self.hellos[event.message.rank] = event.peer
                self.messages.append(event.message)

    def until(self, condition: Callable[[], bool], what: str, seconds: float = WAIT_S) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds:g} s for {what}; came: {[m.name for m in self.messages]}"
            if self.closed:
                time.sleep(0.01)
            else:
                self.pump()

    def of(self, name: str, rank: int | None = None, epoch: int | None = None) -> list[Message]:
        return [
            m
            for m in self.messages
            if m.name == name and rank in (None, m.rank) and (epoch is None or m.epoch == epoch)
        ]

    def hears(self, name: str, rank: int | None = None, epoch: int | None = None) -> Message:
        """The first such message, waited for."""
        self.until(lambda: bool(self.of(name, rank, epoch)), f"{name} of rank {rank}, epoch {epoch}")
        return self.of(name, rank, epoch)[0]

    def tell(self, name: str, rank: int = -1, **fields: object) -> None:
        self.until(lambda: rank in self.hellos, f"the HELLO of {rank}")
        self.link.send(self.hellos[rank], name, **fields)  # type: ignore[arg-type]

    def output(self, rank: int, stream: int = 1) -> str:
        return b"".join(m.payload for m in self.of("OUTPUT", rank) if m.a == stream).decode()

    def prepare(self, epoch: int, ranks: int, port_base: int = 0, bind: bytes = b"127.0.0.1", look: int = 0) -> None:
        self.tell("PREPARE", epoch=epoch, a=look, payload=bytes(wire.MsgPrepare(ranks, port_base, bind)))

    def ports(self, epoch: int) -> tuple[int, ...]:
        data = self.hears("PORTS", epoch=epoch).payload
        return tuple(int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2))

    def start(self, epoch: int, ranks: int, attempt: Path, plan: Path, first: int = 0) -> None:
        payload = os.fsencode(attempt) + b"\0" + os.fsencode(plan) + b"\0"
        self.tell("START", epoch=epoch, a=first, b=ranks, payload=payload)

    def run(self, epoch: int, ranks: int, plan: Path) -> None:
        """PREPARE, PORTS, START."""
        self.prepare(epoch, ranks)
        self.ports(epoch)
        self.start(epoch, ranks, plan.with_name("attempt"), plan)


@contextmanager
def agent_at(path: Path) -> Iterator[Agent]:
    agent = Agent(path)
    try:
        yield agent
    finally:
        agent.close()


def only_rank(engine: Path, plan: Plan, folder: Path) -> list[str | Path]:
    """The command of a plan's only rank, under the agent at ``folder/agent.sock``; its data lie in ``folder/data``."""
    (folder / "plan").write_bytes(plan.to_bytes())
    (folder / "attempt").write_bytes(engine_runs.attempt_bytes(plan, [0], folder / "data", folder))
    command = [engine, "rank", "--plan", folder / "plan", "--attempt", folder / "attempt", "--rank", "0"]
    return [*command, "--agent", folder / "agent.sock"]


@contextmanager
def node(
    socket_path: Path, log: Path, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """node_drive as a supervisor; killed at the end, whatever happened, and its ranks with it."""
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [str(build_program("node_drive")), "node", "--agent", str(socket_path)],
            stdout=stream,
            stderr=stream,
            env={**os.environ, **(env or {})},
            cwd=cwd,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def script(path: Path, text: str) -> Path:
    """A plan of node_drive: lines "<rank> <word> [text]"."""
    path.write_text(text)
    return path
