"""Rules that a row of a schedule keeps by itself, each on whole columns.

S1  a stage has one position, and the stages are 0 .. S-1
S2  every stage has the microbatches 0 .. M-1, each with one F and either one B or one I and one W
S3  on a stage, F comes before I or B, and I before W, of the same microbatch
S4  on a stage, I or B ascend in the microbatch, and so do W or B: the sum of a gradient has one order

A rule marks the places that break it; what is refused is the first place of a row that any rule marks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.errors import PlanError
from trainer.plan.places import Pipeline, Position, Stage
from trainer.plan.rows import SEND_F, B, F, I, Row, W
from trainer.plan.schedules import Say, in_words, stage_positions

PARTS = ("F", "I", "W")
"""What is done for a stage and a microbatch; B does I and W."""


def check_rules(
    rows: Sequence[Row], stages: int | None = None, microbatches: int | None = None, say: Say = in_words
) -> Pipeline:
    """Refuses rows that break S1 to S4, with or without messages; returns where the stages are.

    ``say`` names a place to people."""
    positions = stage_positions(rows, None if say is in_words else say)
    count = stages if stages is not None else max(positions, default=-1) + 1
    wrong = sorted(positions.keys() ^ set(range(count)))
    if count < 1 or wrong:
        stage, has = wrong[0] if wrong else 0, "is missing"
        if stage in positions:
            place = int(np.flatnonzero(rows[positions[Stage(stage)]].stage == stage)[0])
            has = "is one too many" + (f" ({say(positions[Stage(stage)], place)})" if say is not in_words else "")
        raise PlanError(f"S1: stage {stage} {has}: the schedule must run stages 0 to {count - 1}")
    total = microbatches
    if total is None:
        total = max(int(row.microbatch.max(initial=-1)) for row in rows) + 1
    for position, row in enumerate(rows):
        _check_row(Position(position), row, total, say)
    return Pipeline(tuple(positions[Stage(stage)] for stage in range(count)), len(rows))


def first_of_each(keys: NDArray[np.int64], places: NDArray[np.intp], count: int, never: int) -> NDArray[np.intp]:
    """By key below ``count``, the first of ``places`` (ascending) that has it; ``never`` where none has."""
    first = np.full(count, never)
    first[keys[::-1]] = places[::-1]
    return first


def _check_row(position: Position, row: Row, microbatches: int, say: Say) -> None:
    names, local = row.by_stage()
    places = np.flatnonzero(row.compute)
    beyond = np.flatnonzero(row.microbatch[places] >= microbatches)
    if len(beyond):  # what comes before it is looked at first
        places = places[: beyond[0]]
    op, microbatch = row.op[places], row.microbatch[places]
    numbers, width = None, microbatches
    if microbatches > len(row):  # some are missing: columns of what is there, not of what should be
        numbers, inverse = np.unique(microbatch, return_inverse=True)
        microbatch = inverse.astype(np.int32)
        width = max(1, len(numbers))
    keys = local[places].astype(np.int64) * width + microbatch
    count, never = len(names) * width, len(row)
    parts = [np.flatnonzero((op == F) if part == F else (op == part) | (op == B)) for part in (F, I, W)]
    first = [first_of_each(keys[part], places[part], count, never) for part in parts]

    marks: list[tuple[int, int, int, str, str]] = []  # place, part, order of the rules, the rule, what is wrong
    for part, chosen in enumerate(parts):
        at, key = places[chosen], keys[chosen]
        for place in at[first[part][key] != at][:1]:
            done = f"{PARTS[part]} of stage {row.stage[place]}, microbatch {row.microbatch[place]} was already done"
            marks.append((place, part, 0, "S2", done))
        if part == F:
            continue
        for place in at[first[part - 1][key] > at][:1]:
            before = f"{'forward' if part == I else 'input gradient'} {row.stage[place]}{PARTS[part - 1]}"
            marks.append((place, part, 1, "S3", f"before its {before}{row.microbatch[place]}"))
        order = np.argsort(local[at], kind="stable") if len(names) > 1 else np.arange(len(at))
        at, key = at[order], key[order]
        falls = np.flatnonzero((key[1:] < key[:-1]) & (key[1:] // width == key[:-1] // width))
        if len(falls):
            fall = falls[at[falls + 1].argmin()]
            text = f"after microbatch {row.microbatch[at[fall]]}; backward microbatches ascend on a stage"
            marks.append((at[fall + 1], part, 2, "S4", text))
    if marks:
        place, _, _, rule, text = min(marks)
        raise PlanError(f"{rule}: {say(position, int(place))}, {row[int(place)]}: {text}")
    if len(beyond):
        place = int(np.flatnonzero(row.compute)[beyond[0]])
        raise PlanError(
            f"S2: {say(position, place)}, {row[place]}: microbatch {row.microbatch[place]} is beyond the "
            f"last, {microbatches - 1}"
        )
    _check_whole(say(position), names, first, width, numbers, microbatches, never)


def _check_whole(
    where: str,
    names: NDArray[np.int32],
    first: Sequence[NDArray[np.intp]],
    width: int,
    numbers: NDArray[np.int32] | None,
    microbatches: int,
    never: int,
) -> None:
    """S2: nothing is missing. The first that is: by stage, then microbatch, then part."""
    missing = np.stack([table.reshape(len(names), width) == never for table in first], axis=2)
    gap = microbatches  # the first microbatch that no stage of the row has
    if numbers is not None:
        gap = int(np.flatnonzero(np.append(numbers, -1) != np.arange(len(numbers) + 1))[0])
    if gap == microbatches and not missing.any():
        return
    for number, stage in enumerate(names.tolist()):
        lacks = np.argwhere(missing[number])
        microbatch, part = gap, 0
        if len(lacks):
            known = int(lacks[0][0])
            found = known if numbers is None or known >= len(numbers) else int(numbers[known])
            if found < gap:
                microbatch, part = found, int(lacks[0][1])
        if microbatch < microbatches:
            wanted = "F" if part == 0 else f"{PARTS[part]} (or B)"
            raise PlanError(f"S2: {where}: {wanted} of stage {stage}, microbatch {microbatch} is missing")


def needs(row: Row, last_stage: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """What other stage must have worked on the same microbatch before each action may start, and whether forward.

    -1: none. An F needs the F of the stage before it; a B or I the input gradient of the stage after it.
    """
    forward = np.equal(row.op, F)
    up = forward & (row.stage > 0)
    down = ((row.op == B) | (row.op == I)) & (row.stage < last_stage)
    return np.where(up, row.stage - 1, np.where(down, row.stage + 1, np.int32(-1))).astype(np.int32), forward


assert max(F, I, W, B) < SEND_F  # computations come first among operations
