"""What a run recorded of its steps is read back bit for bit, from few objects, and of the attempt that counts."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Sequence

import pytest

from checkpoint.keys import segment_key
from checkpoint.log import AttemptInfo
from checkpoint.log.records import parse_attempt
from checkpoint.store.memory import MemoryStore
from flows.replay.recorded import bits, computed_by, newest_step, read_recorded
from tests.checkpoint.samples import attempt_body

RUN = "demo-0a1b2c"
rng = random.Random(7)


def attempt(n: int, step: int) -> AttemptInfo:
    return parse_attempt(n, 0.0, attempt_body(None, step))


def value(step: int, epoch: int) -> float:
    """Some double, with all of its bits in use."""
    return float(
        struct.unpack("<d", struct.pack("<Q", (0x3FF << 52) | (step * 0x9E3779B97F4A7 + epoch) % (1 << 52)))[0]
    )


def line(step: int, epoch: int) -> bytes:
    """As the engine writes it: 17 digits."""
    loss, norm = value(step, epoch), value(step + 1000, epoch)
    return f'{{"event":"step","epoch":{epoch},"step":{step},"loss":{loss:.17g},"grad_norm":{norm:.17g}}}\n'.encode()


def said(store: MemoryStore, epoch: int, objects: Sequence[Sequence[int]]) -> None:
    """Objects of metrics with the lines of these steps."""
    for number, steps in enumerate(objects):
        noise = b'{"event":"log","text":"x"}\nnot a line\n'
        store.put(segment_key(RUN, epoch, number), noise + b"".join(line(step, epoch) for step in steps))


class Counting(MemoryStore):
    gets = 0

    def get(self, key: str, **more: int | None) -> bytes:
        self.gets += 1
        return super().get(key, **more)


def test_of_a_step_the_attempt_counts_that_began_last_before_it() -> None:
    """The second went back to step 10 and fell at 14, the third began again from there, the fourth from memory."""
    attempts = [attempt(1, 0), attempt(5, 10), attempt(9, 10), attempt(12, 23)]
    found = {step: a.n for step in (1, 10, 11, 14, 23, 24) if (a := computed_by(attempts, step))}
    assert found == {1: 1, 10: 1, 11: 9, 14: 9, 23: 9, 24: 12}
    assert computed_by([attempt(1, 8)], 8) is None


def test_every_bit_comes_back() -> None:
    store = MemoryStore()
    said(store, 1, [range(1, 21)])
    found = read_recorded(store, RUN, [attempt(1, 0)], 1, 20)
    assert {step: found[step][2:4] for step in found} == {
        step: (value(step, 1), value(step + 1000, 1)) for step in range(1, 21)
    }
    for _ in range(2000):
        (x,) = struct.unpack("<d", rng.randbytes(8))
        if x - x == 0.0:
            assert bits(json.loads(f"{x:.17g}") + 0.0) == bits(x)


def test_lines_of_an_attempt_that_was_given_up_do_not_count_and_lost_ones_are_missing() -> None:
    store = MemoryStore()
    said(store, 1, [range(1, 6), range(6, 15)])
    said(store, 5, [[], range(11, 13), [15, 16]])
    attempts = [attempt(1, 0), attempt(5, 10)]
    found = read_recorded(store, RUN, attempts, 8, 16)
    assert {step: line.epoch for step, line in found.items()} == {8: 1, 9: 1, 10: 1, 11: 5, 12: 5, 15: 5, 16: 5}
    assert newest_step(store, RUN, attempts) == 16
    assert newest_step(store, RUN, [*attempts, attempt(9, 12)]) == 12


@pytest.mark.parametrize("first", [1, 777, 30_000, 59_999])
def test_few_objects_are_read_of_a_long_run(first: int) -> None:
    store = Counting()
    said(store, 1, [range(at, at + 3) for at in range(1, 60_000, 3)])
    found = read_recorded(store, RUN, [attempt(1, 0)], first, min(first + 5, 60_000))
    assert sorted(found) == list(range(first, min(first + 5, 60_000) + 1))
    assert store.gets < 25
