"""What is trained: a few numbers on one, two or three ranks, and the state that is true after each step.

The state of a step is a function of the state before it, element by element, so whatever the layouts of a run and
wherever it was torn and restored, the same step has the same bytes, or something was mixed up. A step reads a batch, at
a rate: where an order has others skipped or the rate lowered, what was trained before and left behind has other bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from checkpoint.amendments import NONE, Amendments
from checkpoint.digest import KINDS
from checkpoint.layout import Owned, PlanLayout, PositionLayout, RankLayout, TensorInfo, round_up
from trainer import wire

RUN = "proof-0a1b2c"
WHAT = hashlib.sha256(b"what").digest()
DATASET = hashlib.sha256(b"dataset").digest()
TENSORS = tuple(TensorInfo(name, (n,), n) for name, n in (("a", 4), ("b", 3), ("c", 1)))
OWNERS: Mapping[int, tuple[tuple[int, ...], ...]] = {1: ((0, 1, 2),), 2: ((0,), (1, 2)), 3: ((0,), (1,), (2,))}
"""Ranks (each a node of its own) -> the tensors that each keeps."""
SLOTS = 3


@lru_cache
def plan_of(ranks: int, steps: int) -> PlanLayout:
    positions = []
    for number, tensors in enumerate(OWNERS[ranks]):
        owned, at = [], 0
        for t in tensors:
            owned.append(Owned(t, at, TENSORS[t].elements))
            at += len(KINDS) * round_up(4 * TENSORS[t].elements, 64)
        size = wire.SLOT_HEADER_BYTES + wire.SLOT_HEADER_BYTES + at
        positions.append(PositionLayout(number, size, at, tuple(owned)))
    return PlanLayout(
        digest=hashlib.sha256(f"plan of {ranks}, {steps}".encode()).digest(), what_digest=WHAT, dataset_digest=DATASET,
        replicas=1, steps=steps, numerics=wire.NUMERICS_F32, slots=SLOTS, batch=2, shards=(), token_bytes=2,
        tensors=TENSORS, positions=tuple(positions),
    )  # fmt: skip


@lru_cache
def how_of(ranks: int) -> Mapping[str, Any]:
    return MappingProxyType({
        "parallel": {"stages": ranks, "device": "cpu"},
        "checkpoint": {"deadline_s": 60.0, "commit_s": 60.0},
        "launch": {"target": "local", "nodes": ranks, "connect_s": 20.0, "stall_s": 15.0},
        "recovery": {},
    })  # fmt: skip


@dataclass(frozen=True)
class Course:
    """By what a run is trained; ``before``: the course of the run that it began from, up to step ``begins``."""

    amended: Amendments = NONE
    seed: int = 0
    begins: int = 0
    before: Course | None = None

    def mark(self, step: int) -> int:
        """Of the batch that this step reads, and at which rate."""
        if self.before is not None and step <= self.begins:
            return self.before.mark(step)
        lowered = round(4096 * (1.0 - self.amended.factor(step)))
        return self.amended.batch(step) + 1009 * self.seed + 7919 * lowered


@lru_cache(maxsize=1 << 14)
def truth(tensor: int, kind: int, step: int, course: Course = Course()) -> bytes:
    """The bytes of one kind of a tensor after so many steps."""
    if step == 0:
        n = TENSORS[tensor].elements
        return struct.pack(f"<{n}I", *(1000 * tensor + 100 * kind + i for i in range(n)))
    return advanced(truth(tensor, kind, step - 1, course), course.mark(step))


def advanced(data: bytes, mark: int) -> bytes:
    """One step of it."""
    n = len(data) // 4
    return struct.pack(
        f"<{n}I", *((x * 1664525 + 1013904223 + mark) & 0x3FFFFFFF for x in struct.unpack(f"<{n}I", data))
    )


State = dict[tuple[int, int], bytes]
"""(tensor, kind) -> bytes."""


def first_state(layout: RankLayout) -> State:
    return {(s.tensor, kind): truth(s.tensor, kind, 0) for s in layout.states for kind in range(len(KINDS))}


def read_state(layout: RankLayout, data: memoryview) -> State:
    return {
        (s.tensor, kind): bytes(data[s.kind_offset(kind) : s.kind_offset(kind) + 4 * s.elements])
        for s in layout.states
        for kind in range(len(KINDS))
    }


def write_state(layout: RankLayout, data: memoryview, state: State) -> None:
    for s in layout.states:
        for kind in range(len(KINDS)):
            data[s.kind_offset(kind) : s.kind_offset(kind) + 4 * s.elements] = state[s.tensor, kind]


def wrong(state: State, step: int, course: Course = Course()) -> str:
    """Which of it is not what is true after this step; empty where all is."""
    bad = [key for key, data in state.items() if data != truth(*key, step, course)]
    return "" if not bad else f"{KINDS[bad[0][1]]} of tensor {TENSORS[bad[0][0]].name} is not that of step {step}"
