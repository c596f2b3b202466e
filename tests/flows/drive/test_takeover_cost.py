"""What a driver, a report and a listing ask of the store does not grow with the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint.curve import Curve
from checkpoint.keys import curve_key, segment_key
from checkpoint.log import RunLog
from checkpoint.store import Info, MemoryStore
from checkpoint.store.base import Data
from flows.drive.begin import prepare_run
from flows.drive.live import MetricsReader, read_curve
from flows.drive.loop import Driver
from flows.drive.run import Prepared, attempt_body
from flows.drive.train import make_driver
from flows.show.facts import report_facts, summary
from trainer.launch import Launch, LaunchView, nothing
from trainer.spec import parse_spec

ATTEMPTS, OBJECTS = 300, 10_000


class Counted(MemoryStore):
    """Every request by its verb; a page of a listing is one."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        self.asked.append(f"create {key}")
        return super().create(key, data, sha256=sha256)

    def put(self, key: str, data: Data) -> None:
        self.asked.append(f"put {key}")
        super().put(key, data)

    def get(self, key: str, **more: Any) -> bytes:
        self.asked.append(f"get {key}")
        return super().get(key, **more)

    def head(self, key: str) -> Info | None:
        self.asked.append(f"head {key}")
        return super().head(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[Info]:
        for number, info in enumerate(super().list(prefix, start_after)):
            if number % 1000 == 0:
                self.asked.append(f"list {prefix}")
            yield info
        if not any(a == f"list {prefix}" for a in self.asked[-1:]):
            self.asked.append(f"list {prefix}")


def step(epoch: int, number: int) -> dict[str, Any]:
    return {"event": "step", "epoch": epoch, "step": number, "time": 1.0 * number, "loss": 2.0, "tokens_per_s": 10.0}


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counted, Prepared, int]:
    """A run of 300 attempts; the newest has 10,000 objects of metrics, indexed but for the last three."""
    folder: Path = tmp_path_factory.mktemp("long")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    store = Counted()
    spec = parse_spec(
        {
            "name": "long",
            "model": {"family": "gpt2", "layers": 2, "width": 32, "heads": 4, "context": 16},
            "train": {"steps": 1_000_000, "batch": 4, "microbatch": 2, "sequence": 16},
            "data": {"vocab_size": 300, "source": f"text:{folder}/a.txt"},
        }
    )
    prepared = prepare_run(spec, store)
    log = RunLog(store, prepared.run)
    state = log.fold()
    for _ in range(ATTEMPTS):
        body = attempt_body(
            prepared, f"{prepared.run}-l1", {"checkpoint": None, "step": 0, "slots": None}, reason="x", cause=None
        )
        state = log.append("attempt", body, state)
    epoch = state.epoch
    curve = Curve()
    for number in range(OBJECTS):
        line = step(epoch, number + 1)
        store.create(segment_key(prepared.run, epoch, number), json.dumps(line).encode())
        if number < OBJECTS - 3:
            curve.add(line, number)
    for attempt in state.attempts[:-1]:
        curve.add(step(attempt.epoch, attempt.epoch), 0)
    store.put(curve_key(prepared.run), curve.to_bytes())
    store.asked.clear()
    return store, prepared, epoch


class Decided(Exception):
    pass


class Nowhere:
    """A launcher whose first order ends the look."""

    detaches = False

    def ensure(self, launch: Launch) -> None:
        raise Decided

    def observe(self, launch_id: str) -> LaunchView:
        return LaunchView(launch_id, "absent")

    def stop(self, launch_id: str, grace_s: float, asked: Callable[[], None] = nothing) -> None:
        raise Decided

    def close(self) -> None:
        pass


@pytest.mark.parametrize("indexed", [True, False])
def test_a_driver_decides_after_ten_requests(
    long: tuple[Counted, Prepared, int], indexed: bool, tmp_path: Path
) -> None:
    """With the real launcher's claims as well; in an old run too, whose metrics have no index."""
    store, prepared, _ = long
    kept = store.get(curve_key(prepared.run))
    if not indexed:
        store.delete(curve_key(prepared.run))
    driver: Driver = make_driver(prepared, store, out=tmp_path / "out")
    real, nowhere = driver.launcher, Nowhere()
    nowhere.observe = real.observe  # type: ignore[method-assign]
    driver.launcher = nowhere
    store.asked.clear()
    with pytest.raises(Decided):
        driver.run()
    store.put(curve_key(prepared.run), kept)
    assert 0 < len([a for a in store.asked if not a.startswith("put")]) <= 10, store.asked
    assert not [a for a in store.asked if "metrics" in a]


def test_metrics_are_followed_from_where_the_run_is(long: tuple[Counted, Prepared, int]) -> None:
    store, prepared, epoch = long
    reader = MetricsReader(store, prepared.run, attach=True)
    store.asked.clear()
    lines = reader.poll([epoch - 1, epoch])
    assert [line["step"] for line in lines] == [epoch - 1, OBJECTS - 3, OBJECTS - 1, OBJECTS]
    assert len(store.asked) <= 6, store.asked
    store.asked.clear()
    assert reader.poll([epoch - 1, epoch]) == []
    store.create(segment_key(prepared.run, epoch, OBJECTS), json.dumps(step(epoch, OBJECTS + 1)).encode())
    assert [line["step"] for line in reader.poll([epoch])] == [OBJECTS + 1]
    assert not [a for a in store.asked if a.startswith("list")]  # a folder is not listed again, however full it is
    store.delete(segment_key(prepared.run, epoch, OBJECTS))


def test_an_old_run_is_followed_and_read_without_an_index(long: tuple[Counted, Prepared, int]) -> None:
    store, prepared, epoch = long
    kept = store.get(curve_key(prepared.run))
    store.delete(curve_key(prepared.run))
    try:
        store.asked.clear()
        lines = MetricsReader(store, prepared.run, attach=True).poll([epoch])
        assert [line["step"] for line in lines] == [OBJECTS - 1, OBJECTS]
        assert len(store.asked) < 40, len(store.asked)
        whole = read_curve(store, prepared.run, [epoch])
        assert (whole.rows[epoch].first.step, whole.rows[epoch].last.step) == (1, OBJECTS)
    finally:
        store.put(curve_key(prepared.run), kept)


@pytest.mark.parametrize(("look", "most"), [(report_facts, 40), (summary, 10)])
def test_what_people_look_at_costs_a_handful(long: tuple[Counted, Prepared, int], look: Any, most: int) -> None:
    store, prepared, _ = long
    store.asked.clear()
    told = look(store, prepared.run)
    assert 0 < len(store.asked) <= most, store.asked
    if look is report_facts:
        assert (told.steps, len(told.attempts)) == (OBJECTS, ATTEMPTS)
