"""A sweep's points, how many of its runs go on at once, and what its table says; how its runs train: test_chain.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoint.store import open_store
from flows.drive.events import Outcome
from flows.recurring.sweep import grid_points, listed_points, pointed_specs, run_points, sweep_words, table_lines
from tests.support.place import ROOT
from trainer.errors import PlanError, SpecError
from trainer.spec import RunSpec, load_spec

SPEC = load_spec(ROOT / "examples" / "demo.toml", [])


def test_a_grid_is_every_combination() -> None:
    found = grid_points(["train.optimizer.lr=1e-3, 3e-4", "recovery.allowed_stages=[1,2],[]", "name='a,b'"])
    assert found == [
        ("train.optimizer.lr=1e-3", "recovery.allowed_stages=[1,2]", "name='a,b'"),
        ("train.optimizer.lr=1e-3", "recovery.allowed_stages=[]", "name='a,b'"),
        ("train.optimizer.lr=3e-4", "recovery.allowed_stages=[1,2]", "name='a,b'"),
        ("train.optimizer.lr=3e-4", "recovery.allowed_stages=[]", "name='a,b'"),
    ]
    for bad in ("train.seed", "train.seed=", "=1", "train.seed=1,,2"):
        with pytest.raises(SpecError, match="write it as section"):
            grid_points([bad])
    with pytest.raises(SpecError, match=r"names train\.seed twice; give its values once"):
        grid_points(["train.seed=1,2", "train.seed =3"])


def test_a_list_has_a_line_a_point(tmp_path: Path) -> None:
    path = tmp_path / "points.txt"
    path.write_text("# rates\n\ntrain.seed=1 train.optimizer.lr=1e-3  # small\nname=\"'b'\"\n")
    assert listed_points(path) == [("train.seed=1", "train.optimizer.lr=1e-3"), ("name='b'",)]
    path.write_bytes(b"\xef\xbb\xbftrain.seed=1\r\ntrain.seed=2\r\n")  # as Windows writes it
    assert listed_points(path) == [("train.seed=1",), ("train.seed=2",)]
    for text, words in (
        ("train.seed", "line 1: 'train.seed' is no list of .* write it as train.seed=1 "),
        ("a='", "close the quotes"),
        (
            "train.seed=1\ntrain.optimizer.lr=1 lr=2",
            r"line 2 sets train\.optimizer\.lr twice; leave one of the two out",
        ),
    ):
        path.write_text(text)
        with pytest.raises(SpecError, match=words):
            listed_points(path)
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        listed_points(tmp_path / "none")
    with pytest.raises(SpecError, match="is larger than 1048576 bytes"):
        listed_points(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "the sweep has no point"),
        ([("parallel.threads=1",), ("parallel.threads=2",)], "points 1 and 2 of the sweep train the same"),
        ([("train.seed=1",), ("train.sed=2",)], "there is no key train.sed"),
        ([("train.seed=-1",)], r"point 1 \(train.seed=-1\)"),
        ([(f"train.seed={n}",) for n in range(1001)], "1001 points; the limit is 1000"),
    ],
)
def test_points_that_cannot_be_are_refused_before_any_begins(points: list[tuple[str, ...]], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        pointed_specs(SPEC, points)


def test_two_at_once_a_failure_holds_up_nobody_and_after_a_stop_none_begins(tmp_path: Path) -> None:
    points = [(f"train.seed={n}",) for n in range(6)]
    specs = pointed_specs(SPEC, points)
    lock, going, most, stop = threading.Lock(), [0], [0], threading.Event()
    both = threading.Barrier(2)

    def drive(spec: RunSpec, named: Callable[[str], None]) -> Outcome:
        seed = spec.train.seed
        with lock:
            going[0] += 1
            most[0] = max(most[0], going[0])
        if seed < 2:
            both.wait(60)  # two of them are here
        if seed > 3:
            stop.wait(60)  # one may have begun before that; the next has not
        try:
            if seed == 1:
                raise PlanError("it does not fit")
            named(f"run-{seed}")
            if seed == 3:
                stop.set()
            gave_up = seed == 2
            return Outcome(f"run-{seed}", "gave_up" if gave_up else "succeeded", "no luck", 4, None, 1, 70 * gave_up)
        finally:
            with lock:
                going[0] -= 1

    told: list[int] = []
    store = open_store(f"file://{tmp_path}/store")
    rows = run_points(specs, points, 2, drive, store, stop=stop, tell=lambda rows: told.append(len(rows)), every_s=0.05)
    assert most[0] == 2
    assert [row.state for row in rows[:4]] == ["succeeded", "refused", "gave up", "succeeded"]
    assert rows[5].state == "not begun"
    assert (rows[1].note, rows[1].exit_code, rows[2].exit_code, rows[5].exit_code) == ("it does not fit", 78, 70, 85)
    assert told
    assert table_lines(rows)[0].split() == ["train.seed", "state", "step", "run", "note"]
    assert sweep_words(rows).startswith(f"{sum(row.state == 'succeeded' for row in rows)} of 6 runs succeeded")
