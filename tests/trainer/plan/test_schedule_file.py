"""Schedules as files: what PyTorch wrote is read, what is written is what PyTorch reads, and what is wrong has a place.

The files of tests/golden/schedules were written by PyTorch 2.15's own code (see tests/golden/README.md).
"""

from __future__ import annotations

import csv
import doctest
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.dataset import DatasetRef
from trainer.errors import PlanError, SpecError
from trainer.plan import Plan, compile_plan, schedule_file
from trainer.plan.places import Pipeline
from trainer.plan.rows import Row, split_stages
from trainer.plan.schedule_file import from_csv, to_csv
from trainer.plan.schedules import gpipe, interleaved, one_f_one_b, rows_for
from trainer.spec import parse_spec, what_digest

GOLDEN = Path(__file__).parents[2] / "golden" / "schedules"
DATA = DatasetRef("ab" * 32, 300, 2, (10_000,), "cd" * 32)
V_TEXT = "0F0,0F1,3F0,3B0,3F1,3B1,0B0,0B1\n,1F0,2F0,1F1,2F1,2B0,1B0,2B1,1B1\n"


def plan_of(schedule: str, stages: int = 4, chunks: int = 2, batch: int = 4) -> Plan:
    tree: dict[str, Any] = {
        "name": "small",
        "model": {"family": "gpt2", "layers": 8, "width": 32, "heads": 4, "context": 64},
        "train": {"steps": 10, "batch": batch, "microbatch": 1, "sequence": 16},
        "parallel": {"stages": stages, "chunks": chunks, "schedule": schedule},
    }
    spec = parse_spec(tree).resolve(DATA)
    return compile_plan(spec, DATA, what_digest(spec, DATA))


def test_examples_in_the_docstrings_run() -> None:
    assert doctest.testmod(schedule_file).attempted > 0
    assert doctest.testmod(schedule_file).failed == 0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("gpipe-3x4", gpipe(3, 4)),
        ("interleaved1f1b-2x2x4", interleaved(2, 2, 4)),
        ("interleaved1f1b-2x2x4.comms", interleaved(2, 2, 4)),
        ("interleaved1f1b-3x3x4", interleaved(3, 3, 4)),
        ("interleaved1f1b-4x2x8", interleaved(4, 2, 8)),
    ],
)
def test_what_pytorch_wrote_is_ours_and_back(name: str, rows: list[Row]) -> None:
    text = (GOLDEN / f"{name}.csv").read_text()
    stages = 1 + max(int(row.stage.max()) for row in rows)
    found, pipeline = from_csv(text, name, stages, 1 + int(rows[0].microbatch.max()))
    assert found == rows
    assert pipeline == Pipeline.in_turn(stages, len(rows))
    computed = [[c for c in line if c and c.rstrip("0123456789")[-1] in "FB" and "_" not in c]
                for line in csv.reader(text.splitlines())]  # fmt: skip
    assert list(csv.reader(to_csv(rows).splitlines())) == computed


def in_two_parts(rows: list[Row]) -> list[list[str]]:
    """Text with every B as I and W, as PyTorch's zero-bubble schedules write it."""
    return [[part for a in row for part in ([f"{a.stage}I{a.microbatch}", f"{a.stage}W{a.microbatch}"] if a.op == "B"
             else [str(a)])] for row in rows]  # fmt: skip


@pytest.mark.parametrize("name", ["zbv-2x2x4", "zbv-4x2x8", "zbv-3x2x7.comms"])
def test_our_zb_v_is_pytorch_s(name: str) -> None:
    positions, _, microbatches = (int(n) for n in name.split("-")[1].split(".")[0].split("x"))
    rows, pipeline = from_csv((GOLDEN / f"{name}.csv").read_text(), name, 2 * positions, microbatches)
    assert pipeline == Pipeline.there_and_back(2 * positions, positions)
    theirs = [[str(a) for a in row] for row in rows]
    if "comms" in name:  # it joins I and W that follow one another, as B
        theirs = in_two_parts(rows)
    assert theirs == in_two_parts(rows_for("zb-v", pipeline, microbatches))


def test_what_pytorch_splits_is_read() -> None:
    for name, stages in (
        ("interleavedzerobubble-2x2x4", 4),
        ("interleavedzerobubble-3x2x4.comms", 6),
        ("zbv-2x2x4", 4),
    ):
        rows, _ = from_csv((GOLDEN / f"{name}.csv").read_text(), name, stages, 4)
        assert split_stages(rows)


def test_what_pytorch_misnumbers_is_read_as_it_must_be_meant() -> None:
    """Its Schedule1F1B counts the last rank's forwards from 1; nothing else that is counted so is read."""
    text = (GOLDEN / "1f1b-3x4.csv").read_text()
    assert from_csv(text, "1f1b", 3, 4)[0] == one_f_one_b(3, 4)
    for wrong in (text.replace("2F2", "2F0"), text.replace("2F4,", ""), text.replace("0F0", "0F4")):
        with pytest.raises(PlanError, match=r"line [13]"):
            from_csv(wrong, "1f1b", 3, 4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.data())
def test_written_and_read_again(positions: int, chunks: int, microbatches: int, data: st.DataObject) -> None:
    turn = data.draw(st.sampled_from((Pipeline.in_turn, Pipeline.there_and_back)))
    pipeline = turn(positions * chunks, positions)
    rows = rows_for("gpipe", pipeline, microbatches)
    assert from_csv(to_csv(rows), "it", positions * chunks, microbatches) == (rows, pipeline)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no action; write a line for each rank"),
        ("0F0,0B0\n\n1F0,1B0\n", "line 2 holds no computation"),
        ("0F0,0X0\n1F0,1B0", "line 1, cell 2: cannot read the action '0X0'"),
        ("0F,0B0\n1F0,1B0", "line 1, cell 1: cannot read the action '0F'"),
        (
            "0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1B0",
            "line 1, cell 2: '(0F1;0B0)OVERLAP_F_B' runs two computations at once; a rank of this engine runs one "
            "after the other: write 0F1,0B0",
        ),
        ("0F0,,0B0\n1F0", "S2: line 2: I (or B) of stage 1, microbatch 0 is missing"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1", "line 2: I (or B) of stage 1, microbatch 1 is missing"),
        ("0F0,,0F0,0B0\n1F0,1B0", "S2: line 1, cell 3, 0F0: F of stage 0, microbatch 0 was already done"),
        ("0B0,0F0\n1F0,1B0", "S3: line 1, cell 1, 0B0: before its forward 0F0"),
        (
            "0F0,0F1,0B0,0B1\n,1F0,1F1,1B1,1B0",
            "S4: line 2, cell 5, 1B0: after microbatch 1; backward microbatches ascend on a stage",
        ),
        ("0F0,0B0\n1F0,1B0,0F1,0B1", "line 2, cell 3, 0F1: stage 0 already runs at position 0"),
        (
            "0F0,0B0,2F0,2B0\n1F0,1B0",
            "S1: stage 2 is one too many (line 1, cell 3): the schedule must run stages 0 to 1",
        ),
        ("0F0,0B0", "S1: stage 1 is missing"),
        ("0F0,0F2,0B0,0B2\n1F0,1B0", "line 1, cell 2, 0F2: microbatch 2 is beyond the last, 0"),
        (
            "0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1",
            "they wait for one another: line 1, cell 2, 0B0, needs I of stage 1, microbatch 0, which is "
            "line 2's; line 2, cell 1, 1F1, needs F of stage 0, microbatch 1, which is "
            "line 1's",
        ),
    ],
)
def test_what_is_wrong_has_line_and_cell(text: str, words: str) -> None:
    with pytest.raises(PlanError) as refused:
        from_csv(text, "it", 2, 1 + ("F1" in text))
    assert words in str(refused.value)
    assert str(refused.value).startswith("schedule it, for 2 stages and ")


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanError, match=r"pipe: is no regular file, and every attempt of a run reads it; copy it"):
        plan_of(f"file:{tmp_path / 'pipe'}", batch=2)


def test_a_spec_names_a_file(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    path.write_text(V_TEXT)
    plan = plan_of(f"file:{path}", batch=2)
    assert [p.chunks for p in plan.positions] == [(0, 3), (1, 2)]  # where the file has them, not in turn
    assert to_csv(plan.schedule) == V_TEXT.replace("\n,", "\n")
    with pytest.raises(PlanError, match="microbatch 2 is missing"):
        plan_of(f"file:{path}", batch=3)
    with pytest.raises(PlanError, match=r"has 2 lines, one a rank; 4 stages make 4 ranks: set parallel\.chunks = 2"):
        plan_of(f"file:{path}", chunks=1, batch=2)
    with pytest.raises(PlanError, match=r"cannot be read: No such file or directory; correct parallel\.schedule"):
        plan_of(f"file:{tmp_path}/none.csv")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="cannot be read: it is not text in UTF-8"):
        plan_of(f"file:{path}")
    with pytest.raises(SpecError, match=r"parallel\.schedule 'zb' is unknown; take one of 1f1b, gpipe, .*, file:PATH"):
        plan_of("zb")


def test_the_command_writes_what_a_spec_reads(tmp_path: Path) -> None:
    from flows.cli.plan import plan

    spec, out = tmp_path / "spec.toml", tmp_path / "out.csv"
    spec.write_text(
        'name = "small"\n[model]\nfamily = "gpt2"\nlayers = 4\nwidth = 32\nheads = 4\ncontext = 64\n'
        "[train]\nsteps = 2\nbatch = 4\nmicrobatch = 1\nsequence = 16\n"
        '[parallel]\nstages = 4\nchunks = 2\nschedule = "interleaved-1f1b"\n'
    )
    done = CliRunner().invoke(plan, [str(spec), "--schedule-csv", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"written: {out}" in done.output
    assert out.read_text() == to_csv(interleaved(2, 2, 4))
    assert plan_of(f"file:{out}").to_bytes() == plan_of("interleaved-1f1b").to_bytes()
