"""The schedules whose backward has two parts: rows by hand, bounds, refusals; all schedules beside the literature."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.plan.formulas import NAMES, Figures, formula, lines, simulated
from trainer.errors import PlanError, SpecError
from trainer.plan import zero_bubble
from trainer.plan.check import check_lowered, check_schedule
from trainer.plan.messages import free_slots_early, insert_messages
from trainer.plan.places import Pipeline
from trainer.plan.rows import Row
from trainer.plan.schedules import ZERO_BUBBLE, held_at_once, in_flight, pipeline_for, rows_for
from trainer.plan.simulate import CostModel, from_rows, simulate
from trainer.spec import parse_spec
from trainer.spec_how import THERE_AND_BACK


def texts(rows: list[Row]) -> list[str]:
    return [" ".join(map(str, row)) for row in rows]


def test_examples_in_the_docstrings_run() -> None:
    failed, ran = doctest.testmod(zero_bubble)
    assert ran > 0
    assert failed == 0


def test_rows_by_hand() -> None:
    """ZB-H1 and ZB-V as the paper's figures have them, V-Half as its pattern gives it."""
    assert texts(zero_bubble.zb_h1(3, 4)) == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
    ]
    assert texts(zero_bubble.zb_v(2, 4)) == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0F3 0B0 3F2 3I2 3W2 0B1 3F3 3I3 3W3 0B2 0B3",
        "1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1F3 1I1 1W1 2F3 2I2 2W2 1I2 2I3 1I3 1W2 2W3 1W3",
    ]
    assert texts(zero_bubble.v_half(2, 3)) == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 0I0 3I1 0W0 3W1 0I1 0W1 3F2 3I2 3W2 0I2 0W2",
        "1F0 2F0 1F1 2F1 2I0 1I0 2W0 1F2 2I1 1I1 1W0 2F2 2W1 1W1 2I2 1I2 2W2 1W2",
    ]


def bound(name: str, positions: int, microbatches: int) -> int:
    """Of a position: what it holds at once of its stages' microbatches."""
    if name == "v-half":
        return min(positions + 2 - positions % 2, 2 * microbatches)
    return min(positions, microbatches) * (2 if name in THERE_AND_BACK else 1)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(ZERO_BUBBLE)), st.integers(1, 8), st.integers(1, 20))
def test_any_size_runs_within_its_bound(name: str, positions: int, microbatches: int) -> None:
    """In order, free of deadlock, in its memory: at each position, and still so with the messages put in."""
    stages = positions * (2 if name in THERE_AND_BACK else 1)
    rows = rows_for(name, pipeline_for(name, stages, positions), microbatches)
    check_schedule(rows, stages, microbatches)
    lowered = free_slots_early(insert_messages(rows, stages))
    check_lowered(lowered)
    assert held_at_once(lowered) == held_at_once(rows)
    most = bound(name, positions, microbatches)
    if name == "v-half" and positions == 1:
        most = 2
    assert max(held_at_once(rows)) <= most
    if name == "zb-h1":
        assert in_flight(rows) == [most] * positions
    elif microbatches >= 2 * positions:
        assert held_at_once(rows) == [most] * positions


@pytest.mark.parametrize("name", sorted(ZERO_BUBBLE))
def test_the_backward_has_one_part_where_nobody_waits(name: str) -> None:
    """B on stage 0, where each W directly follows its I; nowhere else, and then for the whole stage."""
    for positions, microbatches in ((1, 1), (2, 5), (4, 8), (3, 2)):
        stages = positions * (2 if name in THERE_AND_BACK else 1)
        for row in rows_for(name, pipeline_for(name, stages, positions), microbatches):
            whole = {a.stage for a in row if a.op == "B"}
            assert whole <= {0}
            assert not whole & {a.stage for a in row if a.op in "IW"}
            if name != "v-half" and any(a.stage == 0 for a in row):
                assert whole == {0}


def close(found: Figures, said: Figures) -> bool:
    return (found.idle, found.within, found.held) == pytest.approx((said.idle, said.within, said.held), abs=1e-9)


SIZES = [(2, 2), (2, 16), (3, 9), (4, 4), (4, 8), (4, 16), (5, 40), (8, 32)]
EVERY = [(p, n * p) for p in (*range(2, 17), 24, 32, 48, 64) for n in range(1, 9)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [SIZES, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_bubble_and_memory_are_the_literature_s(name: str, sizes: list[tuple[int, int]]) -> None:
    for p, m in sizes:
        assert close(simulated(name, p, m), formula(name, p, m)), (simulated(name, p, m), formula(name, p, m))
        assert formula("v-half", p, m).idle <= formula("1f1b", p, m).idle / 2


@pytest.mark.parametrize(("name", "p"), [("zb-h1", 64), ("zb-v", 64), ("1f1b", 64)])
def test_the_same_of_many_positions(name: str, p: int) -> None:
    assert close(simulated(name, p, 2 * p), formula(name, p, 2 * p))


@pytest.mark.parametrize(("f", "i", "w"), [(1.0, 1.0, 1.0), (1.0, 1.5, 0.5), (1.0, 2.0, 0.25), (1.2, 1.0, 0.9)])
def test_zb_h1_of_any_times(f: float, i: float, w: float) -> None:
    """M (F + I + W) + (P - 1) (F + I - W), of 1F1B's (P - 1) (F + I + W)."""
    for p, m in ((2, 4), (4, 8), (8, 16)):
        rows = insert_messages(zero_bubble.zb_h1(p, m), p)
        done = simulate(from_rows(rows, {"F": f, "I": i, "W": w}), CostModel(1.0, 1.0, 1e18, 0.0, 0.0))
        assert done.step_seconds == pytest.approx(m * (f + i + w) + (p - 1) * (f + i - w))


@pytest.mark.parametrize("fiw", [(8, 10, 6), (8, 11, 5), (7, 8, 9)])
def test_v_half_is_made_for_what_its_stages_last(fiw: tuple[int, int, int]) -> None:
    """Times that differ cost no wait in every microbatch: the bubble stays below 1F1B's, however many there are. An
    order that is made for times alike takes twice 1F1B's bubble and more, where I is the longest."""
    seconds = dict(zip("FIW", map(float, fiw), strict=True))
    for p, m in ((4, 8), (4, 32), (5, 40)):
        pipeline = Pipeline.there_and_back(2 * p, p)
        rows = rows_for("v-half", pipeline, m, [fiw] * (2 * p))
        check_schedule(rows, 2 * p, m)
        assert max(held_at_once(rows)) == bound("v-half", p, m)
        free = CostModel(1.0, 1.0, 1e18, 0.0, 0.0)
        done = simulate(from_rows(insert_messages(rows, 2 * p), seconds), free)
        whole = 2 * (p - 1) * sum(fiw)
        assert done.step_seconds - 2 * m * sum(fiw) < 0.82 * whole
        if (p, m) == (4, 32) and fiw[1] > fiw[0]:
            unit = simulate(from_rows(insert_messages(rows_for("v-half", pipeline, m), 2 * p), seconds), free)
            assert (unit.step_seconds - 2 * m * sum(fiw) > 1.5 * whole) == (fiw[1] > fiw[2])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.data())
def test_v_half_of_uneven_stages(positions: int, microbatches: int, data: st.DataObject) -> None:
    times = [data.draw(st.tuples(*[st.integers(1, 9)] * 3)) for _ in range(2 * positions)]
    rows = zero_bubble.v_half(positions, microbatches, times)
    check_schedule(rows, 2 * positions, microbatches)
    check_lowered(insert_messages(rows, 2 * positions))
    assert max(held_at_once(rows)) <= max(2, bound("v-half", positions, microbatches))


def test_the_table_of_the_page_is_the_simulator_s() -> None:
    page = (Path(__file__).parents[3] / "docs" / "schedules.md").read_text().splitlines()
    for line in lines([(2, 2), (2, 16), (4, 8), (8, 8)]):
        assert line in page


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"schedule": "zb-h1", "stages": 4, "chunks": 2},
            "schedule zb-h1 takes 1 stage a rank; take schedule = 'zb-v', or",
        ),
        (
            {"schedule": "zb-v", "stages": 4},
            "schedule zb-v takes 2 stages a rank, there and back along the ranks; take chunks",
        ),
        ({"schedule": "v-half", "stages": 3, "chunks": 2}, "chunks = 2 and an even number of stages, such as 4"),
        (
            {"schedule": "zb-h2"},
            "schedule 'zb-h2' is unknown; take one of 1f1b, gpipe, interleaved-1f1b, zb-h1, zb-v, v-half",
        ),
    ],
)
def test_a_spec_says_what_a_schedule_takes(how: dict[str, Any], words: str) -> None:
    model = {"family": "gpt2", "layers": 8, "width": 32, "heads": 4, "context": 64}
    train = {"steps": 1, "batch": 4, "microbatch": 1, "sequence": 16}
    with pytest.raises(SpecError) as refused:
        parse_spec({"name": "small", "model": model, "train": train, "parallel": how})
    assert words in str(refused.value)


def test_what_a_schedule_cannot_place_is_refused_with_the_mend() -> None:
    with pytest.raises(PlanError, match=r"schedule zb-h1 takes 1 stage a position, parallel\.chunks is 2; take zb-v"):
        rows_for("zb-h1", Pipeline.in_turn(4, 2), 4)
    for pipeline in (Pipeline.in_turn(4, 2), Pipeline.there_and_back(3, 2), Pipeline.in_turn(2)):
        with pytest.raises(PlanError, match=r"there and back: set parallel\.chunks = 2 and parallel\.stages = 4"):
            rows_for("v-half", pipeline, 4)
    with pytest.raises(PlanError, match="0 microbatches"):
        rows_for("zb-v", Pipeline.there_and_back(4, 2), 0)
