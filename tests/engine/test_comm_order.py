"""Rendezvous order (loop.c), and that the checker of plans says what it does."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Mapping
from pathlib import Path

from tests.engine.comm_peer import Gang, run_loop
from tests.trainer.plan.message_ends import MessageEnd, check_channels
from tests.trainer.plan.test_columns import random_schedule
from trainer.errors import PlanError
from trainer.plan.messages import insert_messages
from trainer.plan.places import Position, Stage
from trainer.plan.rows import Action, Row
from trainer.plan.schedules import stage_positions


def test_rendezvous_passes_the_right_order_and_stalls_the_wrong_one(tmp_path: Path) -> None:
    gang = Gang(channels=((0, 1, 4096), (1, 0, 64)), ports=(1, 2), stall_ms=400, connect_ms=5000)
    code, out = run_loop(tmp_path, gang, "S0.0 S0.1 R1.0 R1.1", "R0.0 R0.1 S1.0 S1.1")
    assert code == 0, out
    code, out = run_loop(tmp_path, gang, "S0.0 R1.0", "S1.0 R0.0")  # both send first: needs a buffer
    assert code in (75, 86)  # both stall; who is second may see that the first has left
    assert re.search(r"[01] STALLED S([01]).0 send of microbatch 0 on channel \1 .* passed its deadline", out), out


def test_rendezvous_sees_what_does_not_fit_and_who_left(tmp_path: Path) -> None:
    gang = Gang(channels=((0, 1, 4096),), ports=(1, 2), stall_ms=20000, connect_ms=5000)
    code, out = run_loop(tmp_path, gang, "S0.0", "R0.1")
    assert code == 75
    assert "1 LOST R0.1 rank 0, channel 0: 4096 bytes of microbatch 0 were sent, 4096 of 1 awaited" in out
    code, out = run_loop(tmp_path, gang, "S0.0 S0.1", "R0.0")
    assert code == 75
    assert "0 LOST S0.1 rank 1 is gone" in out


def test_messages_as_late_as_they_may_be(tmp_path: Path) -> None:
    """Both send first, which passes; a wait that can never end is seen at once; that a rank left, too."""
    gang = Gang(channels=((0, 1, 4096), (1, 0, 64)), ports=(1, 2), stall_ms=20000, connect_ms=5000)
    for seed in range(4):
        code, out = run_loop(tmp_path, gang, "B0.0 O1.0 G1.0 W0.1", "B1.0 O0.0 W1.1 G0.0", mode=f"late.{seed}")
        assert code == 0, out
    code, out = run_loop(tmp_path, gang, "R1.0 B0.0", "R0.0 B1.0", mode="late.1")
    assert code in (75, 86)
    assert re.search(
        r"[01] STALLED R([01]).0 recv of microbatch 0 on channel \1 .* can never pass: every rank waits", out
    )
    code, out = run_loop(tmp_path, gang, "B0.0", "O0.0 G0.0", mode="late.1")
    assert code == 75
    assert "1 LOST G0.0 rank 0 is gone" in out


def test_the_four_rank_pipeline_as_threads(tmp_path: Path) -> None:
    forward = [(i, i + 1, 70_000) for i in range(3)]
    backward = [(i + 1, i, 70_000) for i in range(3)]
    gang = Gang(channels=(*forward, *backward), ports=(1, 2, 3, 4), connect_ms=5000)
    lists = []
    for rank in range(4):
        steps = []
        for m in range(5):
            steps += [f"R{rank - 1}.{m}"] if rank else []
            steps += [f"S{rank}.{m}"] if rank < 3 else []
        for m in range(5):
            steps += [f"R{3 + rank}.{m}"] if rank < 3 else []
            steps += [f"S{2 + rank}.{m}"] if rank else []
        lists.append(" ".join(steps))
    code, out = run_loop(tmp_path, gang, *lists)
    assert code == 0, out


def disordered(rows: list[list[Action]], source: random.Random) -> None:
    """Moves, mostly, or loses or doubles a message of a rank."""
    row = source.choice([row for row in rows if row])
    at, to = source.randrange(len(row)), source.randrange(len(row))
    kind = source.randrange(10)
    if kind < 4:
        row[at], row[to] = row[to], row[at]
    elif kind < 8:
        row.insert(to, row.pop(at))
    elif kind == 8:
        del row[at]
    else:
        row.insert(to, row[at])


def agreed(folder: Path, rows: list[list[Action]], rank_of: Mapping[Stage, Position]) -> str:
    """What the checker says of rows of messages, and what happens on comm/loop.c: "runs", "stalls" or "breaks"."""
    edges = sorted({(a.op[-1], a.edge) for row in rows for a in row})
    ends = [[MessageEnd((a.op[-1], a.edge), a.is_send, a.microbatch, str(a)) for a in row] for row in rows]
    try:
        check_channels(ends)
        verdict = "runs"
    except PlanError as error:
        verdict = "stalls" if str(error).startswith("deadlock") else "breaks"
    lists = [
        " ".join(f"{'S' if a.is_send else 'R'}{edges.index((a.op[-1], a.edge))}.{a.microbatch}" for a in row)
        for row in rows
    ]
    gang = Gang(
        channels=tuple((rank_of[edge[0]], rank_of[edge[1]], 64) for _, edge in edges),
        ports=tuple(range(1, 1 + len(rows))),
        stall_ms=20_000 if verdict == "runs" else 100,
    )
    code, out = run_loop(folder, gang, *lists)
    assert (code == 0) == (verdict == "runs"), (verdict, lists, out)
    if verdict != "breaks":  # what breaks may stall before it
        assert (" STALLED " in out) == (verdict == "stalls"), (verdict, lists, out)
    return verdict


def test_the_checker_says_of_messages_what_the_engine_does(tmp_path: Path) -> None:
    """Random schedules, some with messages out of order: refused where a rank fails, a deadlock where one stalls."""
    source = random.Random(11)
    seen = set()
    for _ in range(int(os.environ.get("HOTSTAGE_FUZZ_MESSAGES", "40"))):
        computed, stages = random_schedule(source)
        rows = [[a for a in row if not a.is_compute] for row in insert_messages(computed, stages)]
        if not any(rows):
            continue
        for _ in range(source.randrange(4)):
            if any(rows):
                disordered(rows, source)
        if any(rows):
            seen.add(agreed(tmp_path, rows, stage_positions(computed)))
    assert seen == {"runs", "stalls", "breaks"}


def own_orders(source: random.Random) -> tuple[list[list[Action]], list[int]]:
    """Rows in which each position looks at itself alone: its forwards, I and W (or B) in any order that its own stages
    allow. The positions may wait for one another for ever. Where the stages are, too."""
    stages, microbatches = source.randint(2, 4), source.randint(1, 3)
    positions = source.randint(2, stages)
    rank_of = [*range(positions), *(source.randrange(positions) for _ in range(stages - positions))]
    source.shuffle(rank_of)
    rows: list[list[Action]] = []
    for here in range(positions):
        mine = [stage for stage in range(stages) if rank_of[stage] == here]
        parts = {stage: source.choice((("F", "B"), ("F", "I", "W"))) for stage in mine}
        done = {(stage, op): 0 for stage in mine for op in parts[stage]}
        row: list[Action] = []
        while min(done.values()) < microbatches:
            ready = []
            for stage, op in done:
                back = parts[stage][1]
                after = {"F": [(stage - 1, "F")], "W": [(stage, "I")]}.get(op)
                if after is None:
                    above = parts.get(stage + 1, ("", ""))[1]
                    after = [(stage, "F"), (stage + 1, above)]
                if done[stage, op] < microbatches and all(done[stage, op] < done.get(a, microbatches) for a in after):
                    ready.append((stage, op, back))
            stage, op, _ = source.choice(ready)
            row.append(Action(Stage(stage), op, done[stage, op]))
            done[stage, op] += 1
        rows.append(row)
    return rows, rank_of


def with_messages(row: list[Action], rank_of: list[int]) -> list[Action]:
    """Each receive right before what needs it, each send right behind what made it."""
    out, here = [], rank_of[row[0].stage]
    for action in row:
        kind, step = ("F", 1) if action.op == "F" else ("B", -1)
        source, target = action.stage - step, action.stage + step
        if action.op != "W" and 0 <= source < len(rank_of) and rank_of[source] != here:
            out.append(Action(action.stage, f"RECV_{kind}", action.microbatch))
        out.append(action)
        if action.op != "W" and 0 <= target < len(rank_of) and rank_of[target] != here:
            out.append(Action(action.stage, f"SEND_{kind}", action.microbatch))
    return out


def test_the_checker_says_of_computations_what_the_engine_does(tmp_path: Path) -> None:
    """Positions that look at themselves alone: where the checker sees no way through the computations (S5) the engine
    stalls, with messages as they come; where it places the messages, the engine runs."""
    source = random.Random(5)
    seen = set()
    for _ in range(int(os.environ.get("HOTSTAGE_FUZZ_MESSAGES", "40")) // 2):
        rows, rank_of = own_orders(source)
        placed: list[Row] = []
        said = ""
        try:
            placed = insert_messages(rows, len(rank_of))
        except PlanError as error:
            said = str(error)
        assert placed or said.startswith("S5"), said
        positions = {Stage(stage): Position(position) for stage, position in enumerate(rank_of)}
        as_they_come = [[a for a in with_messages(row, rank_of) if not a.is_compute] for row in rows]
        naive = agreed(tmp_path, as_they_come, positions)
        assert naive == "stalls" or placed, rows
        if placed:
            assert agreed(tmp_path, [[a for a in row if not a.is_compute] for row in placed], positions) == "runs"
        seen.add((naive, bool(placed)))
    assert seen >= {("stalls", False), ("stalls", True), ("runs", True)}
