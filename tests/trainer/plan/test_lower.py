"""Positions: memory without overlap, messages that match, lists in the order that the engine needs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from trainer import wire
from trainer.dataset import DatasetRef
from trainer.errors import PlanError
from trainer.plan import Plan, compile_plan, memory
from trainer.plan.check import check_lowered
from trainer.plan.compile import expand
from trainer.plan.edges import check_messages
from trainer.plan.messages import free_slots_early, insert_messages
from trainer.plan.places import Stage
from trainer.plan.records import PositionPlan, Ref
from trainer.plan.rows import Row, parse_action
from trainer.plan.schedules import GENERATORS
from trainer.plan.slots import assign_slots, check_hazards, sent_at_once
from trainer.spec import RunSpec, parse_spec, what_digest

DATA = DatasetRef("ab" * 32, 300, 2, (10_000, 5_000), "cd" * 32)
CASES = list(itertools.product(("gpt2", "llama"), (1, 2, 3, 4), ("1f1b", "gpipe"), ("fp32", "bf16"), (True, False)))


def spec_of(
    family: str = "gpt2",
    stages: int = 1,
    schedule: str = "1f1b",
    precision: str = "fp32",
    tied: bool = True,
    **over: Any,
) -> RunSpec:
    more = {"kv_heads": 2} if family == "llama" else {}
    return parse_spec(
        {
            "name": "small",
            "model": {"family": family, "layers": 4, "width": 32, "heads": 4, "context": 64, "tied": tied, **more},
            "train": {"steps": 10, "batch": 12, "microbatch": 2, "sequence": 16, "precision": precision},
            "parallel": {"stages": stages, "schedule": schedule},
            **over,
        }
    ).resolve(DATA)


def plan_of(*case: Any, mode: Any = "train", **over: Any) -> Plan:
    spec = spec_of(*case, **over)
    return compile_plan(spec, DATA, what_digest(spec, DATA), mode)


def refs(position: PositionPlan) -> Iterator[Ref]:
    for program in position.programs.values():
        for call in program.calls:
            yield from (ref for ref in call.ptr if ref is not None)
    for action in (*position.init, *position.load, *position.step):
        if action.ref is not None:
            yield action.ref


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_reference_lies_in_its_space(case: tuple[Any, ...]) -> None:
    for p in plan_of(*case).positions:
        limit = {wire.SPACE_STATIC: p.arena_bytes, wire.SPACE_ACT: p.act_stride, wire.SPACE_MB: p.mb_stride}
        for ref in refs(p):
            assert ref.offset + ref.bytes <= limit[ref.space]
        assert p.act_offset + p.act_slots * p.act_stride <= p.arena_bytes
        assert p.mb_offset + p.mb_count * p.mb_stride <= p.arena_bytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_live_memory_never_overlaps(case: tuple[Any, ...]) -> None:
    """What a call reads from scratch or a slot is what the last writer of that very buffer put there."""
    spec = spec_of(*case)
    plan = compile_plan(spec, DATA, what_digest(spec, DATA))
    for stage, position in zip(expand(spec), plan.positions, strict=True):
        for name, calls in (("F", stage.forward), ("B", stage.backward)):
            owner: dict[tuple[int, int], str] = {}  # (space, 64-byte line) -> buffer that was last touched there
            touched: set[str] = set()
            for call, bound in zip(calls, position.programs[name].calls, strict=True):
                for operand, ref in zip(call.ptr, bound.ptr, strict=True):
                    if ref is None or not hasattr(operand, "buffer"):
                        continue
                    for line in range(ref.offset // 64, (ref.offset + ref.bytes - 1) // 64 + 1):
                        before = owner.get((ref.space, line), operand.buffer)
                        if before != operand.buffer:
                            assert operand.buffer not in touched, f"{operand.buffer} was overwritten by {before}"
                        owner[ref.space, line] = operand.buffer
                touched |= {view.buffer for view in call.views()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_states_are_owned_once_and_apart(case: tuple[Any, ...]) -> None:
    plan = plan_of(*case)
    assert sorted(s.tensor for p in plan.positions for s in p.states) == list(range(len(plan.tensors)))
    for p in plan.positions:
        areas = [(p.act_offset, p.act_slots * p.act_stride), (p.mb_offset, p.mb_count * p.mb_stride)]
        for s in p.states:
            size = 4 * plan.tensors[s.tensor].elements
            areas += [(offset, size) for offset in (s.master, s.m, s.v, s.grad) if offset is not None]
        ends = sorted((first, first + size) for first, size in areas if size)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_lists(case: tuple[Any, ...]) -> None:
    plan = plan_of(*case)
    check_messages(plan.positions, plan.channels)
    check_lowered([list(row) for row in plan.schedule])
    count = len(plan.positions)
    for p in plan.positions:
        kinds = [a.kind for a in p.step]
        for once in (wire.A_REPORT, wire.A_APPLY, wire.A_SNAPSHOT):
            assert kinds.count(once) == 1
        assert kinds.count(wire.A_COMBINE) == (p.position == 0)
        assert kinds.count(wire.A_DATA) == (p.position in (0, count - 1))
        assert kinds[-1] == wire.A_SNAPSHOT
        assert kinds.index(wire.A_REPORT) < kinds.index(wire.A_APPLY)
        runs = [a.program for a in p.step if a.kind == wire.A_RUN]
        assert runs[-2:] == ["sumsq", "adamw"]
        assert [[a.op for a in p.step if a.kind == wire.A_RUN].count(op) for op in "FB"] == [6, 6]
        assert [a.kind for a in p.init] == [wire.A_RUN]


@pytest.mark.parametrize(("stages", "tied"), [(1, True), (3, True), (3, False)])
def test_tied_weights_travel(stages: int, tied: bool) -> None:
    plan = plan_of("gpt2", stages, "1f1b", "bf16", tied)
    kinds = {(c.kind, c.source, c.target) for c in plan.channels}
    travels = {(wire.CH_TIED_GRAD, 2, 0), (wire.CH_TIED_WEIGHT, 0, 2)}
    assert travels <= kinds if stages > 1 and tied else not travels & kinds
    adds = [call for p in plan.positions for call in p.programs["sumsq"].calls if call.kernel == "add_acc"]
    assert len(adds) == int(tied)
    names = [[call.kernel for call in p.programs["adamw"].calls] for p in plan.positions]
    assert [kernels.count("zero") for kernels in names] == [0] * stages, "the head's share is written"


@pytest.mark.parametrize(("stages", "batch", "joined"), [(1, 2, True), (1, 4, False), (3, 2, False)])
def test_a_tied_embedding_of_one_microbatch_and_stage_has_one_gradient(stages: int, batch: int, joined: bool) -> None:
    train = {"steps": 10, "batch": batch, "microbatch": 2, "sequence": 16}
    plan = plan_of("gpt2", stages, train=train)
    calls = [call for p in plan.positions for program in p.programs.values() for call in program.calls]
    of = {name: [call for call in calls if call.kernel == name] for name in wire.KERNELS}
    assert bool(of["embed_wgrad_tied"]) == joined == (not of["embed_wgrad"]) == (not of["add_acc"])
    if joined:
        (embedding,), (head,) = of["embed_wgrad_tied"], of["classifier_grad"]
        assert embedding.ptr[0] == head.ptr[2]
        assert not of["zero"]
        assert plan.positions[0].bytes_by_kind["gradients"] == sum(memory.align(4 * t.elements) for t in plan.tensors)


@pytest.mark.parametrize(("stages", "batch"), [(1, 2), (3, 2), (3, 4)])
def test_a_step_of_one_microbatch_takes_norms_right_behind_gradients(stages: int, batch: int) -> None:
    plan = plan_of("gpt2", stages, train={"steps": 10, "batch": batch, "microbatch": 2, "sequence": 16})
    for p in plan.positions:
        programs = {name: program.calls for name, program in p.programs.items()}
        norms = {name: [call.ptr[1] for call in calls if call.kernel == "sumsq"] for name, calls in programs.items()}
        taken = [ref for refs in norms.values() for ref in refs if ref is not None]
        assert sorted(ref.offset for ref in taken) == sorted(state.grad for state in p.states)
        if batch > 2:
            assert {name for name, refs in norms.items() if refs} == {"sumsq"}
            continue
        made = [call.kernel for call in programs["B"]]
        for at in (at for at, kernel in enumerate(made) if kernel == "sumsq"):
            gradient = programs["B"][at].ptr[1]
            last = max(n for n, call in enumerate(programs["B"]) if made[n] != "sumsq" and gradient in call.ptr)
            assert set(made[last + 1 : at]) <= {"sumsq"}
        assert "sumsq" in made


def test_the_calls_of_an_optimizer_step() -> None:
    plan = plan_of("gpt2", 2, "1f1b", "bf16")
    for p in plan.positions:
        for state, call in zip(p.states, p.programs["adamw"].calls, strict=False):
            tensor = plan.tensors[state.tensor]
            copied = len(tensor.shape) >= 2
            assert (call.ptr[4] is not None) == copied
            assert call.dtype == (wire.BF16 if copied else wire.F32)
            assert call.real[3] == (0.1 if copied else 0.0)
            assert call.dim == (tensor.elements, int(not copied or tensor.part == "embed"))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_slots_are_what_the_schedule_has_in_flight(schedule: str) -> None:
    for stages, microbatches in itertools.product(range(1, 7), range(1, 10)):
        rows = free_slots_early(insert_messages(GENERATORS[schedule](stages, microbatches), stages))
        check_lowered(rows)
        for stage, row in enumerate(rows):
            wanted = min(stages - stage, microbatches) if schedule == "1f1b" else microbatches
            assert assign_slots(row)[0] == wanted


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference(family: str, precision: str) -> None:
    plan = plan_of(family, 3, "1f1b", precision, mode="infer")
    assert plan.config.mode == wire.MODE_INFER
    assert (plan.config.positions, plan.config.microbatches, plan.config.microbatch) == (1, 1, 1)
    (p,) = plan.positions
    assert p.act_slots == p.slot_bytes == 0
    assert p.init == ()
    assert [a.program for a in p.step] == ["F"]
    assert p.programs["F"].calls[-1].kernel == "logits"
    assert p.logits_offset is not None
    assert p.tokens_offset == 0
    assert all(s.m is None and s.grad is None for s in p.states)


def test_hazards_are_refused() -> None:
    def row(text: str) -> Row:
        return Row.of(parse_action(word) for word in text.split())

    assert sent_at_once(row("1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1"), Stage(1))
    assert not sent_at_once(row("1RECV_F0 1F0 1RECV_F1 1F1 1B0 1B1 1SEND_B0 1SEND_B1"), Stage(1))
    with pytest.raises(PlanError, match="not sent yet"):
        check_hazards(row("0F0 0RECV_B0 0SEND_F0 0B0"), Stage(0))


def test_plans_are_refused_where_none_can_be() -> None:
    spec = spec_of()
    with pytest.raises(PlanError, match="32"):
        compile_plan(spec, DATA, b"short")
    unresolved = spec.model_copy(update={"model": spec.model.model_copy(update={"vocab": 0})})
    with pytest.raises(PlanError, match="resolve"):
        compile_plan(unresolved, DATA, bytes(32))
