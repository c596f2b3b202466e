"""The hints that an agent leaves for people: metrics segments, the ring of output, status; and a store that is away."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint.agent.output import RING, SEGMENT_BYTES, Hints
from checkpoint.errors import StoreUnavailable
from checkpoint.store import Data, Store, open_store
from checkpoint.store.memory import MemoryStore
from tests.support.agents import NodePeer, agent, make_run, tiny_spec, wait_for

STATUS = "runs/r/live/nodes/l/0"


@contextmanager
def hints(store: Store) -> Iterator[Hints]:
    made = Hints(store, "r", STATUS)
    try:
        yield made
    finally:
        made.close()


def ring(store: Store, epoch: int, rank: int, run: str = "r") -> bytes:
    """The kept output, as a reader joins it."""
    found = {}
    for info in store.list(f"runs/{run}/live/{epoch}/logs/{rank}/"):
        data = store.get(info.key)
        found[struct.unpack("<Q", data[:8])[0]] = data[8:]
    return b"".join(found[n] for n in sorted(found))


def metrics(store: Store, epoch: int, run: str = "r") -> list[bytes]:
    return b"".join(store.get(i.key) for i in store.list(f"runs/{run}/live/{epoch}/metrics/")).splitlines()


def test_metrics_keep_their_order_over_segments_and_agents() -> None:
    store = open_store("memory:")
    lines = [b'{"step":%d,"pad":"%s"}' % (n, b"x" * 300) for n in range(1000)]
    with hints(store) as first:
        first.begin(5)
        for line in lines[:600]:
            first.metrics(line)
    with hints(store) as second:  # an agent that was restarted
        second.begin(5)
        for line in lines[600:]:
            second.metrics(line)
    assert metrics(store, 5) == lines
    assert all(info.bytes <= SEGMENT_BYTES for info in store.list("runs/r/live/5/metrics/"))


def test_the_ring_keeps_the_last_segments_and_goes_on_after_a_restart() -> None:
    store = open_store("memory:")
    written = b"".join(b"%09d\n" % n for n in range(7 * SEGMENT_BYTES // 10))
    with hints(store) as first:
        first.begin(1)
        first.output(3, written[: 2 * SEGMENT_BYTES + 100])
    with hints(store) as second:
        second.begin(1)
        second.output(3, written[2 * SEGMENT_BYTES + 100 :])
    assert ring(store, 1, 3) == written
    with hints(store) as third:
        third.begin(2)
        for _ in range(2):
            third.output(0, b"y" * SEGMENT_BYTES * (RING // 2 + 10))
            wait_for(lambda: third._rings[0].growing == b"" and not third._rings[0].waiting, "the segment to be taken")
        third.output(0, b"the end")
    kept = ring(store, 2, 0)
    assert kept.endswith(b"the end")
    assert len(list(store.list("runs/r/live/2/logs/0/"))) == RING
    assert len(kept) == (RING - 1) * SEGMENT_BYTES + len(b"the end")


class Away(MemoryStore):
    """A store that takes nothing while ``away``."""

    away = True

    def put(self, key: str, data: Data) -> None:
        if self.away:
            raise StoreUnavailable("away")
        super().put(key, data)


def test_a_rank_that_prints_first_while_another_is_written_loses_nothing() -> None:
    """The writer is inside the store with the ring of rank 0 when rank 1 makes a new one."""
    inside, go = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def put(self, key: str, data: Data) -> None:
            if "/logs/0/" in key and not inside.is_set():
                inside.set()
                assert go.wait(60)
            super().put(key, data)

    store = Slow()
    with hints(store) as made:
        made.begin(1)
        made.output(0, b"zero")
        assert inside.wait(60)
        for rank in range(1, 9):
            made.output(rank, b"%d" % rank)
        go.set()
    assert [ring(store, 1, rank) for rank in range(9)] == [b"zero", *(b"%d" % rank for rank in range(1, 9))]


def test_a_store_that_is_away_costs_old_lines_not_memory() -> None:
    store = Away()
    with hints(store) as made:
        made.begin(1)
        made.status(b"one")
        for n in range(100_000):
            made.metrics(b'{"step":%d,"pad":"0123456789012345678901234567890123456789012345678901234567"}' % n)
        for _ in range(200):
            made.output(0, b"z" * SEGMENT_BYTES)
        wait_for(lambda: made.error, "the error to be said")
        assert made._metrics_bytes <= 4 << 20
        assert len(made._rings[0].waiting) <= RING
        made.status(b"two")
        store.away = False
        wait_for(lambda: store.head(STATUS) and store.get(STATUS) == b"two", "the status")
        wait_for(lambda: made.error is None, "the error to go")
    assert metrics(store, 1)[-1].startswith(b'{"step":99999,')
    assert len(ring(store, 1, 0)) == RING * SEGMENT_BYTES


def test_traces_are_kept_and_an_attempts_hints_stay_apart(tmp_path: Path) -> None:
    store = open_store("memory:")
    path = tmp_path / "trace-1.json"
    path.write_bytes(b'{"traceEvents":[]}')
    with hints(store) as made:
        made.begin(1)
        made.metrics(b'{"step":1}')
        made.output(0, b"of one")
        made.trace(1, path)
        made.begin(2)
        made.metrics(b'{"step":2}')
        made.output(0, b"of two")
    assert (metrics(store, 1), metrics(store, 2)) == ([b'{"step":1}'], [b'{"step":2}'])
    assert (ring(store, 1, 0), ring(store, 2, 0)) == (b"of one", b"of two")
    assert store.get("runs/r/live/1/trace/1") == path.read_bytes()


def test_a_bug_in_one_kind_of_hint_is_said_and_costs_that_kind_alone(tmp_path: Path) -> None:
    """An object of no number among the metrics, which the writer does not expect, under the real agent."""
    spec = tiny_spec()
    run, plan = make_run(tmp_path, spec)
    with agent(run, tmp_path) as process:
        node = NodePeer(process.work)
        epoch = run.attempt(spec, plan)
        stray = f"runs/{run.name}/live/{epoch}/metrics/notes"
        run.store.create(stray, b"by hand")
        (rank,) = node.start()
        rank.link.send("METRICS", rank=0, epoch=epoch, payload=b'{"event":"step","step":1}')
        status = wait_for(lambda: (s := run.status()) and s["error"] and s, "the error in the status")
        assert "metrics" in status["error"]
        rank.link.send("METRICS", rank=0, epoch=epoch, payload=b'{"event":"step","step":2}')
        node.link.send("OUTPUT", rank=0, epoch=epoch, a=1, payload=b"still heard\n")
        wait_for(lambda: ring(run.store, epoch, 0, run.name) == b"still heard\n", "the output")
        path = run.store.local_path(stray)
        assert path is not None
        path.unlink()
        rank.link.send("METRICS", rank=0, epoch=epoch, payload=b'{"event":"step","step":3}')
        wait_for(lambda: metrics(run.store, epoch, run.name)[-1:] == [b'{"event":"step","step":3}'], "the metrics")
        later = wait_for(lambda: (s := run.status()) and s["error"] is None and s, "the error to go")
        assert later["seq"] > status["seq"]
        assert later["ranks"]["0"]["step"] == 3
        node.close()
        said = [json.loads(line) for line in process.log().splitlines()]
    assert any(line["level"] == "error" and "ValueError" in line.get("trace", "") for line in said)


def test_a_trace_of_no_path_costs_that_trace(tmp_path: Path) -> None:
    store = open_store("memory:")
    path = tmp_path / "trace-1.json"
    path.write_bytes(b"{}")
    with hints(store) as made:
        made.begin(1)
        made.trace(0, tmp_path / "with\0zero")
        made.trace(1, path)
        made.status(b"one")
    assert made.error is None
    assert store.get("runs/r/live/1/trace/1") == b"{}"
    assert store.get(STATUS) == b"one"


def test_a_thread_that_a_bug_ends_ends_the_agent(tmp_path: Path) -> None:
    program = """
import sys, threading
from checkpoint.agent.__main__ import main
assert main(sys.argv[1:]) == 78  # no key: it has not begun, but it would be heard
late = threading.Thread(target=lambda: 1 // 0, name="log")
late.start()
late.join()
"""
    args = ["--store", "memory:", "--run", "r", "--launch", "l", "--node", "0", "--nodes", "1", "--socket", "a.sock"]
    args += ["--work", str(tmp_path), "--key-file", str(tmp_path / "none")]
    ended = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 70
    last = json.loads(ended.stderr.splitlines()[-1])
    assert last["level"] == "critical"
    assert "thread log" in last["text"]
    assert "ZeroDivisionError" in last["trace"]
