"""The index of metrics: bounded whatever the run's length, joined from several writers, read as a hint."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import msgpack
import pytest

from checkpoint.agent.output import Hints
from checkpoint.curve import MAX_BYTES, MAX_POINTS, MAX_ROWS, Curve
from checkpoint.errors import Damaged
from checkpoint.keys import curve_key, segment_key
from checkpoint.store import MemoryStore
from checkpoint.store.base import Data
from tests.support.wait import wait_for


def line(step: int, epoch: int = 1, loss: float | None = None) -> dict[str, Any]:
    return {
        "event": "step",
        "epoch": epoch,
        "step": step,
        "time": 1000.0 + step / 7,
        "loss": 5.0 - step / 1e6 if loss is None else loss,
        "grad_norm": 1.25,
        "tokens_per_s": 99.5,
        "step_us": 1234,
    }


def filled(steps: range, epoch: int = 1) -> Curve:
    curve = Curve()
    for step in steps:
        curve.add(line(step, epoch), step // 10)
    return curve


def test_a_short_run_is_kept_whole() -> None:
    curve = Curve.parse(filled(range(1, 801)).to_bytes())
    assert list(curve.curve()) == list(range(1, 801))
    assert curve.curve()[7].line().items() >= line(7).items()
    row = curve.rows[1]
    assert (row.first.step, row.last.step, row.since, row.next) == (1, 800, 0, 81)


@pytest.mark.parametrize("steps", [1024, 1025, 4096, 50_001])
def test_a_long_run_is_kept_in_as_many_points(steps: int) -> None:
    curve = filled(range(1, steps + 1))
    assert MAX_POINTS // 2 - 1 <= len(curve.points) <= MAX_POINTS
    assert list(curve.points) == list(range(curve.stride, steps + 1, curve.stride))
    assert list(curve.curve())[-1] == steps  # the last one is there, whatever the stride
    assert len(curve.to_bytes()) < 128 << 10


def test_many_attempts_are_kept_in_one_object() -> None:
    curve = Curve()
    for epoch in range(1, MAX_ROWS + 100):
        curve.add(line(epoch, epoch), 0)
    assert len(curve.rows) == MAX_ROWS
    assert max(curve.rows) == MAX_ROWS + 99
    assert len(curve.to_bytes()) < MAX_BYTES
    assert Curve.parse(curve.to_bytes()).rows == curve.rows


def test_joining_gives_the_same_whoever_begins() -> None:
    """Two writers of two attempts, the second of which did some steps again; in whatever order they meet."""
    one, two = filled(range(1, 701), 1), filled(range(600, 900), 4)
    a, b = Curve.parse(one.to_bytes()), Curve.parse(two.to_bytes())
    a.merge(two)
    b.merge(one)
    assert a.curve() == b.curve()
    assert a.rows == b.rows
    assert (a.began, a.curve()[650].epoch, a.curve()[599].epoch) == (1, 4, 1)
    again = Curve.parse(a.to_bytes())
    again.merge(b)
    assert (again.curve(), again.rows) == (a.curve(), a.rows)
    coarse = filled(range(1, 5000), 2)
    a.merge(coarse)
    assert a.stride == coarse.stride
    assert len(a.points) <= MAX_POINTS


def test_what_is_no_index_is_refused() -> None:
    good = filled(range(1, 50)).to_bytes()
    rng = random.Random(5)
    for _ in range(2000):
        bad = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            Curve.parse(bytes(bad)).curve()
        except Damaged:
            continue
    for value in ({"v": 2}, {}, [], 7, {"v": 1, "began": 1, "stride": 0, "rows": [], "points": []}):
        with pytest.raises(Damaged):
            Curve.parse(msgpack.packb(value))


def test_an_agent_writes_it_and_the_next_one_goes_on(tmp_path: Path) -> None:
    store = MemoryStore()
    for epoch, steps in ((3, range(1, 40)), (3, range(40, 60)), (9, range(50, 80))):
        hints = Hints(store, "r", "runs/r/live/nodes/l/0")  # another agent each time
        hints.begin(epoch)
        for step in steps:
            hints.metrics(json.dumps(line(step, epoch)).encode())
        hints.close()
    curve = Curve.parse(store.get(curve_key("r")))
    assert list(curve.curve()) == list(range(1, 80))
    assert {e: (r.first.step, r.last.step) for e, r in curve.rows.items()} == {3: (1, 59), 9: (50, 79)}
    assert {e: r.next for e, r in curve.rows.items()} == {
        e: len(list(store.list(f"runs/r/live/{e}/metrics/"))) for e in (3, 9)
    }


def test_what_a_killed_agent_did_not_index_is_caught_up() -> None:
    store = MemoryStore()
    for number in range(5):
        store.create(segment_key("r", 2, number), json.dumps(line(number + 1, 2)).encode())
    store.put(curve_key("r"), _only_two_segments().to_bytes())
    hints = Hints(store, "r", "runs/r/live/nodes/l/0")
    hints.begin(2)
    hints.metrics(json.dumps(line(6, 2)).encode())
    hints.close()
    curve = Curve.parse(store.get(curve_key("r")))
    assert list(curve.curve()) == [1, 2, 3, 4, 5, 6]
    assert curve.rows[2].next == 6


def _only_two_segments() -> Curve:
    curve = Curve()
    curve.add(line(1, 2), 0)
    curve.add(line(2, 2), 1)
    return curve


def test_an_index_that_does_not_hold_is_begun_anew() -> None:
    store = MemoryStore()
    store.put(curve_key("r"), b"\xc1 rubbish")
    hints = Hints(store, "r", "runs/r/live/nodes/l/0")
    hints.begin(4)
    hints.metrics(json.dumps(line(1, 4)).encode())
    hints.close()
    assert hints.error is None
    assert Curve.parse(store.get(curve_key("r"))).began == 4


def test_the_heartbeat_does_not_wait_for_a_trace(tmp_path: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def put(self, key: str, data: Data) -> None:
            if "/trace/" in key:
                inside.set()
                assert go.wait(60)
            super().put(key, data)

    store, key, path = Slow(), "runs/r/live/nodes/l/0", tmp_path / "trace"
    path.write_bytes(b"{}")
    hints = Hints(store, "r", key)
    try:
        hints.begin(1)
        hints.trace(0, path)
        assert inside.wait(60)
        for beat in (b"one", b"two", b"three"):
            hints.status(beat)
            wait_for(lambda b=beat: store.head(key) and store.get(key) == b, "the heartbeat")  # type: ignore[misc]
        assert store.head("runs/r/live/1/trace/0") is None
    finally:
        go.set()
        hints.close()
    assert store.get("runs/r/live/1/trace/0") == b"{}"
