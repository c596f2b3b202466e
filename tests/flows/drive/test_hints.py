"""Hints of a run are read as hostile: any type in any field, and the driver goes on."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import msgpack
import pytest

from checkpoint.agent.status import NodeStatus, RankStatus
from checkpoint.codec import pack
from checkpoint.store import open_store
from flows.drive.decide import judge as decide
from flows.drive.events import Event
from flows.drive.hints import node_status, step_line, words_of
from flows.drive.live import MetricsReader, StatusReader
from flows.drive.views import AttemptView, LogView, NodeView, Policy, RankView, Watch
from flows.show.lines import Lines

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 70, 256, 1 << 60, -(1 << 63), 0.5, math.nan, math.inf, -math.inf, "", "x", "9", "٣",
    "\ud83d".encode("utf-8", "surrogatepass"), b"", b"\xff", [], [1], [[]], {}, {"a": 1}, {"step": "x", "epoch": None},
    "[" * 9000, '{"why": ' * 3000, '{"why": NaN, "x": 1e999, "y": 99999999999999999999}', "\u20ac" * 20_000,
    '{"why": "\\ud83d", "\\ud83d": "' + "x" * 60_000 + '"}', json.dumps({str(n): "y" * 60 for n in range(900)}),
]  # fmt: skip


def status(**more: Any) -> dict[str, Any]:
    ranks = {0: RankStatus(pid=7, step=5), 1: RankStatus(pid=8, code=75, words='{"why": "peer"}', step=5)}
    made = NodeStatus(0, "l", "t", epoch=1, phase="running", ranks=ranks, slots=[(4, 1)])
    value: dict[str, Any] = msgpack.unpackb(made.pack())
    return {**value, **more}


def test_a_status_is_read_as_it_was_written() -> None:
    found = node_status(0, msgpack.packb(status(error="no room")))
    assert found is not None
    view, beat = found
    ranks = (RankView(0, 7, step=5), RankView(1, 8, code=75, step=5, words={"why": "peer"}))
    assert view == NodeView(0, None, 1, "running", ranks, frozenset({(4, 1)}), error="no room")
    assert beat == 1


def _packed(value: Any) -> bytes:
    return bytes(msgpack.packb(value))


def test_any_type_in_any_field_of_a_status_ends_no_driver() -> None:
    rng = random.Random(3)
    policy = Policy(steps=100, launch="l", nodes=1, ranks=2)
    log = LogView((AttemptView(1, "l", 1, 2, "p", 0, None, None, (), None),))
    ends = 0
    for _ in range(3000):
        value = status()
        for _ in range(rng.randrange(1, 4)):
            target = rng.choice([value, value["ranks"], *value["ranks"].values(), *value["slots"]])
            if isinstance(target, dict) and target:
                target[rng.choice([*target, rng.choice(["2", "x", ""])])] = rng.choice(JUNK)
            if not isinstance(value["ranks"], dict) or not isinstance(value["slots"], list):
                break
        found = node_status(0, _packed(value))
        nodes = [found[0]] if found is not None else []
        cause = getattr(decide(log, nodes, policy), "cause", None)
        if cause is not None:
            ends += 1
            assert len(pack(cause.to_map())) < 32 << 10  # a record can hold it
        if found is None:
            assert isinstance(decide(log, [NodeView(0)], policy), Watch)  # unknown is never failure
    assert ends
    whole = _packed(status())
    for _ in range(3000):  # bytes that were cut or changed
        raw = bytearray(whole[: rng.randrange(len(whole) + 1)])
        for _ in range(rng.randrange(3)):
            if raw:
                raw[rng.randrange(len(raw))] = rng.randrange(256)
        node_status(0, bytes(raw))


@pytest.mark.parametrize("field", ["code", "signal"])
def test_how_a_rank_ended_holds_or_the_node_is_unknown(field: str) -> None:
    value = status()
    value["ranks"]["0"][field] = "9"
    assert node_status(0, _packed(value)) is None


def test_any_type_in_any_field_of_a_line_ends_no_driver() -> None:
    rng = random.Random(4)
    good = {"event": "step", "epoch": 1, "step": 3, "loss": 2.5, "grad_norm": 1.0, "tokens_per_s": 9.0, "step_us": 10}
    assert step_line(good) == good
    said: list[str] = []
    lines = Lines(said.append, 100, every_s=0.0)
    told = 0
    for _ in range(3000):
        line = dict(good)
        for _ in range(rng.randrange(1, 3)):
            line[rng.choice(list(good))] = rng.choice([*JUNK, 10**400])
        found = step_line(line)
        if found is not None:
            told += 1
            lines.tell(Event("step", found))
    assert len(said) == told > 0


def test_readers_pass_over_what_does_not_hold(tmp_path: Any) -> None:
    store = open_store(f"file://{tmp_path}")
    store.put("runs/r-000000/live/nodes/l/0", b"\x81\x90\x00")  # a list as a key
    store.put("runs/r-000000/live/nodes/l/1", b"x" * (2 << 20))
    views = StatusReader(store, "r-000000", "l").poll(2, {})
    assert [v.phase for v in views] == ["none", "none"]
    good = json.dumps({"event": "step", "epoch": 1, "step": 1})
    text = "\n".join(["[" * 100_000, '{"step": 1e999}', '{"a": NaN}', "\xff", good])
    store.put("runs/r-000000/live/1/metrics/00000000", text.encode())
    assert json.loads(good) in MetricsReader(store, "r-000000").poll([1])


def test_last_words_may_be_anything() -> None:
    for junk in JUNK:
        assert words_of(junk) is None or isinstance(words_of(junk), dict)
