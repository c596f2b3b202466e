"""Slots: what a program reads is what was written for it, whatever ran between; and none is larger than it must be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.drawn import as_csv, drawn
from tests.trainer.plan.test_lower import DATA, spec_of
from trainer import wire
from trainer.models.base import Call, View
from trainer.plan import Plan, compile_plan
from trainer.plan.compile import expand
from trainer.plan.expand import StagePrograms
from trainer.plan.memory import align
from trainer.plan.places import Stage
from trainer.plan.records import BoundAction, PositionPlan, Ref
from trainer.plan.rows import split_stages
from trainer.spec import RunSpec, what_digest

FILES = Path(__file__).parents[2] / "golden" / "schedules"


def drawn_spec(folder: Path, of_stage: tuple[int, ...], seed: int, share: float, **over: Any) -> RunSpec:
    """A spec whose schedule is drawn: a stage or several a rank, backwards whole or not."""
    path = folder / "it.csv"
    path.write_text(as_csv(drawn(of_stage, seed, share)))
    chunks = max(of_stage.count(position) for position in of_stage)
    parallel = {"stages": len(of_stage), "chunks": chunks, "schedule": f"file:{path}"}
    return spec_of(over.pop("family", "gpt2"), parallel=parallel | over.pop("parallel", {}), **over)


class Flow:
    """Follows every byte of a position through its step: whose it is, by what wrote it."""

    def __init__(self, position: PositionPlan, stages: dict[Stage, StagePrograms]) -> None:
        self.position, self.stages = position, stages
        self.owner: dict[int, object] = {}

    def lines(self, ref: Ref, slot: int) -> Iterator[int]:
        p = self.position
        base = p.act_offset + slot * p.act_stride if ref.space == wire.SPACE_ACT else 0
        return iter(range((base + ref.offset) // 64, (base + ref.offset + ref.bytes - 1) // 64 + 1))

    def label(self, stage: Stage, name: str, backward: bool, microbatch: int) -> tuple[int, Stage, str]:
        """Where two stages at one position share a buffer, it has the name that the one has which makes it."""
        mine, above, below = self.stages[stage], self.stages.get(Stage(stage + 1)), self.stages.get(Stage(stage - 1))
        if backward and above and mine.gradient_received and name == mine.gradient_received.buffer:
            assert above.gradient_sent
            return self.label(Stage(stage + 1), above.gradient_sent.buffer, True, microbatch)
        if below and mine.received and name == mine.received.buffer:
            assert below.sent
            return microbatch, Stage(stage - 1), below.sent.buffer
        return microbatch, stage, name

    def reads(self, ref: Ref, slot: int, label: object) -> None:
        for line in self.lines(ref, slot):
            assert self.owner.get(line) == label, f"{label} is read where {self.owner.get(line)} lies"

    def writes(self, ref: Ref, slot: int, label: object) -> None:
        self.owner |= dict.fromkeys(self.lines(ref, slot), label)

    def call(self, call: Call, refs: tuple[Ref | None, ...], action: BoundAction) -> None:
        assert action.stage is not None
        assert action.microbatch is not None
        kernel = wire.KERNELS[call.kernel]
        added = kernel.named(call.dim).get("ACCUM", 1) == 1 and not (kernel.operands[-1].name == "old" and refs[-1])
        slot = -1 if action.slot is None else action.slot
        listed = [
            (operand.role, ref, self.label(action.stage, view.buffer, action.op != "F", action.microbatch))
            for operand, view, ref in zip(kernel.operands, call.ptr, refs, strict=True)
            if isinstance(view, View) and ref is not None
        ]
        for role, ref, label in listed:
            if role == "read" or (role == "update" and added):
                self.reads(ref, slot, label)
        for role, ref, label in listed:
            if role != "read":
                self.writes(ref, slot, label)

    def run(self) -> int:
        done = 0
        for action in self.position.step:
            if action.stage is None:
                continue
            stage, slot = self.stages[action.stage], -1 if action.slot is None else action.slot
            assert action.microbatch is not None
            if action.kind == wire.A_RUN:
                calls = stage.programs({action.op})[action.op]
                assert action.program is not None
                for call, bound in zip(calls, self.position.programs[action.program].calls, strict=True):
                    self.call(call, bound.ptr, action)
                done += 1
                continue
            backward, sends = action.op == "B", action.kind == wire.A_SEND
            view = (
                (stage.gradient_sent if sends else stage.gradient_received)
                if backward
                else (stage.sent if sends else stage.received)
            )
            assert view is not None
            assert action.ref is not None
            label = self.label(action.stage, view.buffer, backward, action.microbatch)
            (self.reads if sends else self.writes)(action.ref, slot, label)
        return done


def follow(spec: RunSpec) -> Plan:
    plan = compile_plan(spec, DATA, what_digest(spec, DATA))
    stages = expand(spec, split=split_stages(plan.schedule))
    for position in plan.positions:
        mine = {number: stages[number] for number in position.chunks}
        assert Flow(position, mine).run() == int(plan.schedule[position.position].compute.sum())
    return plan


PLACES = ((0,), (0, 1, 2), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1), (1, 0, 0, 1))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("of_stage", PLACES, ids=str)
def test_what_a_program_reads_is_what_was_written_for_it(
    tmp_path: Path, of_stage: tuple[int, ...], share: float
) -> None:
    """Backwards whole, put off, and both at one stage; stages that follow one another at one position."""
    for seed, (family, precision) in enumerate((("gpt2", "fp32"), ("llama", "fp8"))):
        follow(drawn_spec(tmp_path, of_stage, seed, share, family=family, precision=precision))


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["elementwise", "attention", "layer"])
def test_what_is_computed_again_is_there_when_it_is_read(tmp_path: Path, kind: str, share: float) -> None:
    for of_stage, family, precision in (((0,), "llama", "fp8"), ((0, 1), "gpt2", "bf16"), ((0, 0), "gpt2", "fp8")):
        parallel = {"recompute": {"kind": kind, "layers": 1 if len(of_stage) > 1 else 3}}
        follow(drawn_spec(tmp_path, of_stage, 3, share, family=family, precision=precision, parallel=parallel))


@pytest.mark.parametrize("name", ["zbv-2x2x4", "interleavedzerobubble-2x2x4"])
def test_what_pytorch_wrote_lowers(name: str) -> None:
    parallel = {"stages": 4, "chunks": 2, "schedule": f"file:{FILES / name}.csv"}
    train = {"steps": 10, "batch": 4, "microbatch": 1, "sequence": 16}
    plan = follow(spec_of(parallel=parallel, train=train))
    for position in plan.positions:
        assert {"0I", "0W", "0F"} <= {key[:2] for key in position.programs} or position.position
        assert not any(key[1:2] == "B" for key in position.programs) or "zbv" not in name


@pytest.mark.parametrize(
    ("share", "recompute"),
    [(0.0, "none"), (1.0, "none"), (0.0, "layer"), (1.0, {"kind": "elementwise", "layers": [0, 1, 0]})],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_slot_is_as_large_as_what_lives_at_once(
    tmp_path: Path, family: str, precision: str, share: float, recompute: Any
) -> None:
    """Counted apart: of each buffer that outlives a program or meets a message, by its first and last use."""
    parallel = {"recompute": recompute}
    spec = drawn_spec(tmp_path, (0, 1, 2), 1, share, family=family, precision=precision, parallel=parallel)
    plan = compile_plan(spec, DATA, what_digest(spec, DATA))
    size = {"dt": 4 if precision == "fp32" else 2, "acc": 4, "byte": 1}
    for stage, position in zip(expand(spec, split=split_stages(plan.schedule)), plan.positions, strict=True):
        apart = {a.ref.space for a in position.step if a.op == "B" and a.kind == wire.A_SEND and a.ref}
        times: dict[str, list[float]] = {}
        for name in stage.kept:
            for view in (stage.received, stage.sent):
                if view and view.buffer == name:
                    times.setdefault(name, []).append(0.0 if view is stage.received else len(stage.forward))
        for start, calls in ((0, stage.forward), (len(stage.forward), stage.backward)):
            for number, call in enumerate(calls, start):
                for view in call.views():
                    times.setdefault(view.buffer, []).append(number)
        for call in stage.weights:
            for view in call.views():
                times.setdefault(view.buffer, []).append(float("inf"))
        kept = set(stage.kept)
        if stage.gradient_sent and wire.SPACE_ACT in apart:
            kept.add(stage.gradient_sent.buffer)
            times[stage.gradient_sent.buffer].append(float("inf"))
        elif stage.gradient_sent:
            kept.discard(stage.gradient_sent.buffer)
        bytes_of = {name: align(stage.buffers[name].elements * size[stage.buffers[name].kind]) for name in kept}
        most = max(
            sum(bytes_of[name] for name in kept if min(times[name]) <= now <= max(times[name]))
            for now in (*range(len(stage.forward) + len(stage.backward)), float("inf"))
        )
        assert position.act_stride == most
        assert bool(stage.weights) == bool(share)
        if share:
            assert most < sum(bytes_of.values())
