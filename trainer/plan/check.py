"""Checks of a schedule, with and without its messages. Decides nothing about memory.

Two functions, each pure, each raising PlanError that names the position, the action and why:

- ``check_schedule``   compute-only or lowered rows: the numbered rules below
- ``check_lowered``    rows with messages: every send matched in order on its channel, no deadlock under rendezvous

Rules of a schedule, by number in the errors (S1 to S4 are in ``rules.py``, with their words):

S1 to S4  what each row keeps by itself
S5  the rows can run: following F up and B or I down the stages, no position waits for ever
S6  no stage holds more microbatches than its bound
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.errors import PlanError
from trainer.plan.channels import Ends, check_ends
from trainer.plan.messages import play
from trainer.plan.places import Pipeline, Position
from trainer.plan.rows import OPS, RECV_B, RECV_F, SEND_B, SEND_F, Action, B, F, I, Row, Rows, columns
from trainer.plan.rules import check_rules, first_of_each, needs
from trainer.plan.schedules import in_flight


def check_schedule(
    rows: Rows, stages: int | None = None, microbatches: int | None = None, bound: Sequence[int] | None = None
) -> None:
    """Refuses rows that break S1 to S6. ``bound[s]``: most microbatches that stage s may hold (None: no bound)."""
    listed = columns(rows)
    pipeline = check_rules(listed, stages, microbatches)
    _check_runs(listed, pipeline)
    if bound is not None:
        for stage, peak in enumerate(in_flight(listed)):
            if peak > bound[stage]:
                raise PlanError(
                    f"S6: position {pipeline.of_stage[stage]}, stage {stage}: {peak} microbatches in flight, the bound "
                    f"is {bound[stage]}; use 1f1b, or give the stage more memory"
                )


def _check_runs(rows: Sequence[Row], pipeline: Pipeline) -> None:
    """S5: the player, which moves whatever can move, comes to the end of every row."""
    play([row.take(row.compute) for row in rows], pipeline)


def check_lowered(rows: Rows) -> None:
    """The schedule with its messages: ``check_placement``, then the channels.

    A channel is (kind, sending stage, receiving stage). Stages at one position need no message, and may have none.

    S5 is not played: rows whose computations come after what they need, at home or received, and whose messages all
    meet, do run.
    """
    listed = columns(rows)
    pipeline = check_rules(listed)
    try:
        _check_placement(listed, pipeline)
        _check_messages(listed, pipeline.stages)
    except PlanError:
        _check_runs(listed, pipeline)  # where the computations alone cannot run, that says it better
        raise


def check_placement(rows: Rows) -> None:
    """S1 to S4, then each message is where its computation needs it. That messages meet is for ``channels.py``."""
    listed = columns(rows)
    _check_placement(listed, check_rules(listed))


def _check_placement(rows: Sequence[Row], pipeline: Pipeline) -> None:
    for position, row in enumerate(rows):
        _check_row(Position(position), row, pipeline)


def _check_messages(rows: Sequence[Row], stages: int) -> None:
    def ends(row: Row) -> Ends:
        mine = row.take(~row.compute)
        is_send = (mine.op == SEND_F) | (mine.op == SEND_B)
        forward = (mine.op == SEND_F) | (mine.op == RECV_F)
        sender = mine.stage + np.where(is_send, 0, np.where(forward, -1, 1)).astype(np.int32)
        return Ends(np.where(forward, sender, stages + sender).astype(np.int32), is_send, mine.microbatch)

    def text(position: int, place: int) -> str:
        return str(rows[position][int(np.flatnonzero(~rows[position].compute)[place])])

    def name(channel: int) -> tuple[str, int, int]:
        kind, sender = divmod(channel, stages)
        return ("B", sender, sender - 1) if kind else ("F", sender, sender + 1)

    check_ends([ends(row) for row in rows], 2 * stages, text, name)


def _check_row(position: Position, row: Row, pipeline: Pipeline) -> None:
    """A result is there before it is used or sent, whatever another position needs is sent, and nothing is done twice.

    As in ``rules.py``, the first place that any of the rules marks is refused.
    """
    names, local = row.by_stage()
    of_stage = pipeline.column
    stages, width, never = pipeline.stages, 1 + int(row.microbatch.max(initial=-1)), len(row)
    key = local.astype(np.int64) * width + row.microbatch
    at = [np.flatnonzero(row.op == op) for op in range(len(OPS))]
    first = [first_of_each(key[places], places, len(names) * width, never) for places in at]
    backward = np.minimum(first[B], first[I])
    marks: list[tuple[int, int, str]] = []  # place, order of the rules, what is wrong

    for op, places in enumerate(at):
        for place in places[first[op][key[places]] != places][:1]:
            marks.append((place, 0, "was already done"))

    other, forward = needs(row, stages - 1)
    places = np.flatnonzero(other >= 0)
    other, forward, wanted = other[places], forward[places], key[places]
    away = of_stage[other] != position
    there = np.where(away, 0, np.searchsorted(names, other)) * width + row.microbatch[places]
    received = np.where(forward, first[RECV_F][wanted], first[RECV_B][wanted])
    made = np.where(forward, first[F][there], backward[there])
    for late in np.flatnonzero(np.where(away, received, made) > places)[:1]:
        receive, make = (RECV_F, F) if forward[late] else (RECV_B, I)
        what = f"{row.stage[places[late]]}{OPS[receive]}" if away[late] else f"{other[late]}{OPS[make]}"
        text = f"needs {what}{row.microbatch[places[late]]} before it"
        marks.append((int(places[late]), 1, text))

    places = np.flatnonzero(~row.compute)
    ops, stage, wanted = row.op[places], row.stage[places], key[places]
    other = stage + np.where((ops == SEND_F) | (ops == RECV_B), 1, -1).astype(np.int32)
    inside = (other >= 0) & (other < stages)
    for place in np.flatnonzero(~inside)[:1]:
        marks.append((int(places[place]), 2, f"there is no stage {other[place]}"))
    for place in np.flatnonzero(inside & (of_stage[np.where(inside, other, 0)] == position))[:1]:
        ends = [int(stage[place]), int(other[place])][:: 1 if ops[place] in (SEND_F, SEND_B) else -1]
        shared = f"stages {ends[0]} and {ends[1]} share position {position}; they need no message"
        marks.append((int(places[place]), 3, shared))
    made = np.where(ops == SEND_F, first[F][wanted], np.where(ops == SEND_B, backward[wanted], -1))
    for place in np.flatnonzero(made > places)[:1]:
        what = f"{row[int(places[place])]}".replace("SEND_", "") if ops[place] == SEND_F else ""
        what = what or f"the backward of stage {stage[place]}"
        marks.append((int(places[place]), 4, f"before {what} has made what it sends"))
    if marks:
        place, _, text = min(marks)
        raise PlanError(f"position {position}, action {place}, {row[int(place)]}: {text}")

    up = np.equal(row.op, F)
    to = row.stage + np.where(up, 1, -1)
    goes = (up | (row.op == B) | (row.op == I)) & (to >= 0) & (to < stages)
    goes &= of_stage[np.where(goes, to, 0)] != position
    for place in np.flatnonzero(goes & (np.where(up, first[SEND_F][key], first[SEND_B][key]) == never))[:1]:
        action = row[int(place)]
        send = Action(action.stage, "SEND_F" if action.op == "F" else "SEND_B", action.microbatch)
        raise PlanError(f"position {position}: {action} is never sent on: {send} is missing")
