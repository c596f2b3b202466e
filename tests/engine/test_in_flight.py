"""Activations in flight, measured: which pages of which slot each action touches in the engine, against the plan.

The pages that an action may touch follow from where the plan places the buffers of its calls; those that it does touch
are seen by the processor (``programs/touch_drive.c``). Buffers are whole pages here, so that they are told apart. So a
buffer is in flight in the engine from the action to the action that the plan says, and in no other slot.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.native import build_program
from trainer import wire
from trainer.dataset import DatasetRef
from trainer.plan import Plan, compile_plan
from trainer.plan.records import BoundAction, PositionPlan
from trainer.plan.schedules import in_flight
from trainer.spec import parse_spec

PAGE = 4096
ROWS = 1024
"""Of a microbatch: a number a row is a page."""
DATA = DatasetRef("0" * 64, 60, 2, (100 * ROWS,), "0" * 64)


def plan_of(folder: Path, precision: str, parallel: dict[str, Any], **model: Any) -> Plan:
    sizes = {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 64, "vocab": 60}
    train = {"steps": 1, "batch": 6 * ROWS // 64, "microbatch": ROWS // 64, "sequence": 64, "precision": precision}
    train["vocab_blocks"] = parallel.get("vocab_stages", 1)
    tree = {"name": "pages", "model": sizes | model, "train": train, "parallel": {"threads": 1} | parallel}
    plan = compile_plan(parse_spec(tree).resolve(DATA), DATA, bytes(32))
    (folder / "plan").write_bytes(plan.to_bytes())
    return plan


def pages(position: PositionPlan, action: BoundAction) -> set[int]:
    """Those of the slots that the plan has the action touch."""
    assert action.slot is not None
    refs = [action.ref]
    if action.kind == wire.A_RUN:
        assert action.program is not None
        refs = [ref for call in position.programs[action.program].calls for ref in call.ptr]
    slot = position.act_offset % PAGE + action.slot * position.act_stride
    spans = [(slot + ref.offset, ref.bytes) for ref in refs if ref is not None and ref.space == wire.SPACE_ACT]
    return {page for first, size in spans for page in range(first // PAGE, (first + size - 1) // PAGE + 1)}


def inside(position: PositionPlan) -> set[int]:
    """Pages that are the slots' alone: the first and the last may be shared with what lies beside them."""
    begin = position.act_offset % PAGE
    return set(range(-(-begin // PAGE), (begin + position.act_slots * position.act_stride) // PAGE))


def measured(folder: Path, position: PositionPlan) -> Iterator[tuple[BoundAction, set[int]]]:
    command = [str(build_program("touch_drive")), str(folder / "plan"), str(position.position)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        place, *spans = line.split()
        found = [tuple(map(int, span.split("+"))) for span in spans]
        yield position.step[int(place)], {page for first, count in found for page in range(first, first + count)}


def most_in_flight(found: list[tuple[BoundAction, set[int]]]) -> int:
    """The most slots that hold a microbatch at once: from the first touch for it to the last."""
    touches = [(action.slot, action.microbatch) for action, pages_touched in found if pages_touched]
    first = {holder: number for number, holder in reversed(list(enumerate(touches)))}
    last = {holder: number for number, holder in enumerate(touches)}
    return max(sum(first[h] <= now <= last[h] for h in first) for now in range(len(touches)))


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "1f1b": ("fp32", {"stages": 3}, {}),
    "gpipe": ("bf16", {"stages": 2, "recompute": "layer"}, {"width": 64}),
    "interleaved-1f1b": ("fp32", {"stages": 4, "chunks": 2}, {}),
    "zb-h1": ("bf16", {"stages": 3}, {"width": 64}),
    "zb-v": ("fp32", {"stages": 4, "chunks": 2}, {"family": "llama", "kv_heads": 2}),
    "v-half": ("fp32", {"stages": 4, "chunks": 2, "recompute": {"kind": "elementwise", "layers": 1}}, {"layers": 8}),
}


HEADS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "1f1b": ("fp32", {"stages": 3, "vocab_stages": 2}, {}),
    "zb-h1": ("bf16", {"stages": 4, "vocab_stages": 4}, {"width": 64, "tied": False}),
}
"""Of ranks that share the head."""


@pytest.mark.parametrize("schedule", HEADS)
def test_so_do_the_actions_of_a_shared_head(tmp_path: Path, schedule: str) -> None:
    precision, parallel, model = HEADS[schedule]
    plan = plan_of(tmp_path, precision, parallel | {"schedule": schedule}, **model)
    for position in plan.positions:
        found, alone = list(measured(tmp_path, position)), inside(position)
        scheduled = [action for action in position.step if action.stage is not None]
        assert [action for action, _ in found] == scheduled
        for action, touched in found:
            assert touched & alone == pages(position, action) & alone, action
        assert most_in_flight(found) == position.act_slots


@pytest.mark.parametrize("schedule", CASES)
def test_each_action_touches_the_pages_of_its_buffers(tmp_path: Path, schedule: str) -> None:
    """And no others; as many microbatches are in flight as the schedule says and as there are slots."""
    precision, parallel, model = CASES[schedule]
    plan = plan_of(tmp_path, precision, parallel | {"schedule": schedule}, **model)
    expected = in_flight(plan.schedule)
    for position in plan.positions:
        found, alone = list(measured(tmp_path, position)), inside(position)
        assert [action for action, _ in found] == [action for action in position.step if action.stage is not None]
        for action, touched in found:
            assert touched & alone == pages(position, action) & alone, action
        assert most_in_flight(found) == position.act_slots
        if len(position.chunks) == 1:
            assert set().union(*(touched for _, touched in found)) >= alone
            assert position.act_slots == expected[position.chunks[0]]
