"""Schedules as files: the CSV of PyTorch's pipelining, a line for a position (there: a rank), a cell for an action.

Owns the text of whole schedules; that of an action is ``rows.py``'s. ``_dump_csv`` of PyTorch writes it in two forms,
and both are read: ``compute_only``, where empty cells are waits, and ``compute_comms``, whose messages, waits and
exchanges of sharded weights are left out here: ``messages.py`` places messages so that channels which buffer nothing
cannot deadlock. What is written is ``compute_only``.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np

from trainer.errors import PlanError
from trainer.plan.messages import play
from trainer.plan.places import Pipeline, Position
from trainer.plan.rows import SPREAD, Action, F, Row, Rows, columns, parse_action
from trainer.plan.rules import check_rules

PREFIX = "file:"
"""Before the path, where a spec names a schedule."""
MAX_BYTES = 64 << 20
_LEFT_OUT = re.compile(r"\d+(WAIT_REDUCE_GRAD|REDUCE_GRAD|UNSHARD|RESHARD|(WAIT_)?SEND_[FB]\d+|RECV_[FB]\d+)")


def to_csv(rows: Rows) -> str:
    """The computations of a schedule, in PyTorch's compute-only form.

    >>> from trainer.plan.schedules import one_f_one_b
    >>> print(to_csv(one_f_one_b(2, 2)), end="")
    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1
    """
    listed = columns(rows)
    if any((row.op >= SPREAD).any() for row in listed):
        raise PlanError(
            "ranks share the head, which PyTorch's schedules cannot say: parts of it would be stages without layers; "
            "set parallel.vocab_stages = 1"
        )
    return "".join(",".join(map(str, row.take(row.compute))) + "\n" for row in listed)


def from_csv(text: str, origin: str, stages: int, microbatches: int) -> tuple[list[Row], Pipeline]:
    """The computations of a file and where its stages are. PlanError with line and cell where it is not a schedule of
    so many stages and microbatches, or cannot run."""
    try:
        return _read(text, stages, microbatches)
    except PlanError as error:
        sizes = f"for {stages} stages and {microbatches} microbatches"
        raise PlanError(f"schedule {origin}, {sizes}: {error}") from None


def _read(text: str, stages: int, microbatches: int) -> tuple[list[Row], Pipeline]:
    lines = list(csv.reader(io.StringIO(text)))
    while lines and not any(map(str.strip, lines[-1])):
        lines.pop()
    if not lines:
        raise PlanError("no action; write a line for each rank, such as 0F0,0F1,0B0,0B1")
    rows, cells = [], []
    for number, line in enumerate(lines, 1):
        actions, places = [], []
        for cell, word in enumerate(map(str.strip, line), 1):
            if word and not _LEFT_OUT.fullmatch(word):
                actions.append(_action(word, f"line {number}, cell {cell}"))
                places.append(cell)
        if not actions:
            raise PlanError(f"line {number} holds no computation; a rank has a stage at least")
        rows.append(_from_zero(Row.of(actions), stages, microbatches))
        cells.append(places)

    def say(position: Position, place: int | None = None) -> str:
        return f"line {position + 1}" if place is None else f"line {position + 1}, cell {cells[position][place]}"

    pipeline = check_rules(rows, stages, microbatches, say)
    play(rows, pipeline, say)
    return rows, pipeline


def _from_zero(row: Row, stages: int, microbatches: int) -> Row:
    """PyTorch's Schedule1F1B writes the forwards of its last rank as 1 to M, which no schedule can mean: there is no
    microbatch M. They are read as 0 to M - 1; its backwards are right."""
    forward = row.op == F
    if row.only_stage != stages - 1 or not np.array_equal(row.microbatch[forward], np.arange(1, microbatches + 1)):
        return row
    return Row(row.op, row.stage, row.microbatch - forward)


def _action(word: str, where: str) -> Action:
    if word.startswith("(") and word.endswith(")OVERLAP_F_B"):
        apart = word[1 : -len(")OVERLAP_F_B")].replace(";", ",")
        raise PlanError(
            f"{where}: {word!r} runs two computations at once; a rank of this engine runs one after the other: write "
            f"{apart}"
        )
    try:
        return parse_action(word)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from None


def load(name: str, stages: int, positions: int, microbatches: int) -> tuple[list[Row], Pipeline]:
    """The schedule that a spec names as ``file:PATH``, which must fit the spec's layout."""
    path = name.removeprefix(PREFIX)
    mend = "correct parallel.schedule, or take 1f1b"
    try:
        if Path(path).is_fifo():  # it would be waited for
            raise PlanError(
                f"schedule {path}: is no regular file, and every attempt of a run reads it; copy it into one"
            )
        with Path(path).open("rb") as source:
            data = source.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise PlanError(f"schedule {path}: cannot be read: {why}; {mend}") from error
    if len(data) > MAX_BYTES:
        raise PlanError(f"schedule {path}: is larger than {MAX_BYTES} bytes; {mend}")
    rows, pipeline = from_csv(text, path, stages, microbatches)
    if pipeline.positions != positions:
        raise PlanError(
            f"schedule {path}: has {pipeline.positions} lines, one a rank; {stages} stages make {positions} ranks: set "
            f"parallel.chunks = {-(-stages // pipeline.positions)}, or write {positions} lines"
        )
    return rows, pipeline
