"""Schedules drawn at random: any order that a schedule's file may say."""

from __future__ import annotations

import random


def drawn(of_stage: tuple[int, ...], seed: int, split: float = 0.0, microbatches: int = 6) -> list[list[str]]:
    """A line a position: whatever can be done next, drawn. Forwards in any order on odd stages, backwards ascending.
    ``split``: which share of the backwards is I and, some time later, W; the others are B."""
    source, lines = random.Random(seed), [list[str]() for _ in range(1 + max(of_stage))]
    stages = range(len(of_stage))
    ahead = {
        s: source.sample(range(microbatches), microbatches) if s % 2 else list(range(microbatches)) for s in stages
    }
    back, late = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0)  # the next I (or B) and the next W (or B)
    apart = {(s, m): source.random() < split for s in stages for m in range(microbatches)}
    forwards: set[tuple[int, int]] = set()
    while min(late.values()) < microbatches:
        can: list[tuple[int, str, int]] = []
        for s in stages:
            if ahead[s] and (not s or (s - 1, ahead[s][0]) in forwards):
                can.append((s, "F", ahead[s][0]))
            m = back[s]
            if m < microbatches and (s, m) in forwards and (s == stages[-1] or back[s + 1] > m):
                if apart[s, m]:
                    can.append((s, "I", m))
                elif late[s] == m:
                    can.append((s, "B", m))
            if late[s] < back[s]:
                can.append((s, "W", late[s]))
        s, op, m = source.choice(can)
        lines[of_stage[s]].append(f"{s}{op}{m}")
        if op == "F":
            forwards.add((s, ahead[s].pop(0)))
        back[s] += op in "IB"
        late[s] += op in "WB"
    return lines


def as_csv(lines: list[list[str]]) -> str:
    """The text of a schedule's file."""
    return "".join(",".join(line) + "\n" for line in lines)
