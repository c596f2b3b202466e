"""What evaluations gave, as people read it: a column for each number, failures named, nothing that breaks a table."""

from __future__ import annotations

from checkpoint.evaluated import Evaluation, Ran
from flows.drive.scores import line_evaluations, score_markdown, score_table
from tests.flows.tracking.world import World


def test_rows_have_the_same_columns_and_the_newest_comes_first() -> None:
    rows = [
        Evaluation(10, 1, loss=3.0, commands={"a": Ran({"acc": 0.5}, 1.0)}),
        Evaluation(20, 1, loss=2.5, commands={"a": Ran({}, 1.0, "it exited with 1")}, sample="one | two\nthree"),
    ]
    assert score_table(rows) == [
        {"step": "20", "validation/loss": "2.5", "a/acc": "", "failed": "a: it exited with 1"},
        {"step": "10", "validation/loss": "3", "a/acc": "0.5", "failed": ""},
    ]
    assert score_table(rows[:1]) == [{"step": "10", "validation/loss": "3", "a/acc": "0.5"}]
    assert [row["step"] for row in score_table(rows, 1)] == ["20"]
    assert score_markdown(rows).splitlines() == [
        "| step | validation/loss | a/acc | failed |",
        "|---|---|---|---|",
        "| 20 | 2.5 |  | a: it exited with 1 |",
        "| 10 | 3 | 0.5 |  |",
        "",
        "Sample at step 20:",
        "",
        "    one | two",
        "    three",
    ]
    assert score_markdown([]) == ""


def test_text_of_others_stays_in_its_cell() -> None:
    rows = [Evaluation(1, 1, commands={"a|b": Ran({}, 1.0, "x | y\n| z\x1b[31m")})]
    lines = score_markdown(rows).splitlines()
    assert len(lines) == 3
    assert "\x1b" not in lines[2]
    assert lines[2].count("|") - lines[2].count("\\|") == 3


def test_what_an_order_left_behind_is_not_the_run_s() -> None:
    world = World()
    world.attempt()
    for step in (10, 20):
        world.save(step)
        world.evaluated(step, loss=float(step))
    world.back_to(10)
    world.save(15)
    world.evaluated(15, loss=1.5)
    assert [row.step for row in line_evaluations(world.store, world.log.fold())] == [10, 15]
