"""The live hint by which the driver sees a node: ``runs/<run>/live/nodes/<launch>/<node>``.

msgpack map, overwritten when something in it is new that a reader waits for (``NodeStatus.news``), and else as often
as the store's pace says (each second in a folder); safe to lose, never a decision by itself:

    node, launch       whose it is
    seq                counts up with every write of this agent process; readers age it by their own clock
    incarnation        token of this agent process
    pid                of the agent
    supervisor         pid of the supervisor that is connected, or None
    epoch              attempt that this node runs or ran last; 0: none yet
    phase              idle | restoring | starting | running | ended
    ranks              {"<rank>": {pid, code, signal, words, step, final, killed, memory, xid, kernel}}: of this
                       attempt; code and signal are None while it lives; words: last words (JSON text), or why the
                       agent could not start it; killed: by its supervisor, after another rank's end: never a cause;
                       memory: where the kernel killed it for memory, the bytes that its container may use (0: no
                       limit), else None; xid: number of what NVIDIA's driver wrote of its device, kernel: that line
                       (``kernel_log.py``), else None
    slots              [{step, epoch}] that every rank of this node holds ready in memory, newest first
    durable            step of the newest checkpoint committed in this attempt or before it, or -1
    devices            what its ranks run on, for people; "" where there is nothing to say
    gpus               names of the CUDA devices that its ranks use, each device's; [] on the CPU
    error              what the store or the machine refuses at the moment, or None
    left               True once this node has left for good: its launcher does not start it again
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoint import codec


@dataclass
class RankStatus:
    """A rank of the present attempt: its exit ``code``, or the ``signal`` that killed it; both None while it lives."""

    pid: int | None = None
    code: int | None = None
    signal: int | None = None
    words: str | None = None
    step: int = 0
    final: bool = False
    killed: bool = False
    memory: int | None = None
    xid: int | None = None
    kernel: str | None = None

    @property
    def gone(self) -> bool:
        return self.code is not None or self.signal is not None

    def to_map(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "code": self.code,
            "signal": self.signal,
            "words": self.words,
            "step": self.step,
            "final": self.final,
            "killed": self.killed,
            "memory": self.memory,
            "xid": self.xid,
            "kernel": self.kernel,
        }

    @classmethod
    def from_map(cls, value: Mapping[str, Any]) -> RankStatus:
        return cls(
            value.get("pid"),
            value.get("code"),
            value.get("signal"),
            value.get("words"),
            int(value.get("step", 0)),
            bool(value.get("final", False)),
            bool(value.get("killed", False)),
            value.get("memory"),
            value.get("xid"),
            value.get("kernel"),
        )


@dataclass
class NodeStatus:
    """This node's status; `pack` gives the next one to write."""

    node: int
    launch: str
    incarnation: str
    supervisor: int | None = None
    epoch: int = 0
    phase: str = "idle"
    ranks: dict[int, RankStatus] = field(default_factory=dict)
    slots: Sequence[tuple[int, int]] = ()
    durable: int = -1
    devices: str = ""
    gpus: Sequence[str] = ()
    error: str | None = None
    left: bool = False
    seq: int = 0

    def news(self) -> tuple[Any, ...]:
        """What is told at once: all but the counters that go on while all is well (steps, slots, the newest
        checkpoint).
        """
        ranks = tuple(
            (n, r.pid, r.code, r.signal, r.words, r.final, r.killed, r.memory, r.xid)
            for n, r in sorted(self.ranks.items())
        )
        return self.supervisor, self.epoch, self.phase, self.error, self.left, ranks

    def pack(self) -> bytes:
        self.seq += 1
        return codec.pack_hint(
            {
                "node": self.node,
                "launch": self.launch,
                "seq": self.seq,
                "incarnation": self.incarnation,
                "pid": os.getpid(),
                "supervisor": self.supervisor,
                "epoch": self.epoch,
                "phase": self.phase,
                "ranks": {str(rank): status.to_map() for rank, status in sorted(self.ranks.items())},
                "slots": [{"step": step, "epoch": epoch} for step, epoch in self.slots],
                "durable": self.durable,
                "devices": self.devices,
                "gpus": list(self.gpus),
                "error": self.error,
                "left": self.left,
            }
        )
