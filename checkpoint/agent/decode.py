"""A message of the engine (``wire/agent.h``) as an event of the machine."""

from __future__ import annotations

from checkpoint.agent import events as ev
from checkpoint.agent.link import Message


def event_of(peer: int, m: Message, *, rival: bool = False) -> ev.Event | None:
    """None for a message that is not for the agent. ``rival``: another supervisor that lives has the node."""
    match m.name:
        case "HELLO" if m.rank < 0:
            return ev.SupervisorHello(peer, m.a, m.epoch, m.b, rival)
        case "HELLO":
            return ev.RankHello(peer, m.epoch, m.rank, m.a, len(m.fds))
        case "PORTS":
            return ev.Ports(peer, m.epoch, m.payload)
        case "READY":
            return ev.Ready(m.epoch, m.rank, m.b, bool(m.c))
        case "METRICS" | "WORDS" | "TRACE" | "OUTPUT":
            return ev.RankSaid(m.name, m.epoch, m.rank, m.payload)
        case "ALGORITHMS" if m.rank >= 0:
            return ev.Proposed(peer, m.epoch, m.rank, m.payload)
        case "DATA" if m.rank >= 0:
            return ev.DataRead(peer, m.epoch, m.rank, m.a, m.b)
        case "EXIT" if m.rank < 0:
            return ev.EngineRefused(peer, m.epoch, m.a, m.payload.rstrip(b"\0").decode(errors="replace"))
        case "EXIT":
            return ev.RankExit(peer, m.epoch, m.rank, m.a, m.b, m.c, int.from_bytes(m.payload[:8], "little"))
        case "IDLE":
            return ev.EngineIdle(peer, m.epoch)
        case _:
            return None
