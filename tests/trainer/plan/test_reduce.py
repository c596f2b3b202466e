"""Groups and replicas: the step lists are played on symbols, and what they add up is one tree, whatever the layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import pytest

from trainer import wire
from trainer.dataset import DatasetRef
from trainer.errors import PlanError
from trainer.plan import Plan, compile_plan
from trainer.plan.draw import memory_text
from trainer.plan.edges import check_messages
from trainer.plan.records import ActionList, BoundAction, BoundCall, PositionPlan, Ref
from trainer.plan.reduce import Groups
from trainer.plan.simulate import CostModel, from_plan, simulate
from trainer.spec import parse_spec, what_digest
from trainer.wire.kernels import product
from trainer.wire.plan import piece_elements

DATA = DatasetRef("ab" * 32, 300, 2, (10_000, 5_000), "cd" * 32)

Sum = Any
"""A number (a microbatch), or a set of two sums: the operands of an addition may change places."""


def plan_of(
    replicas: int = 1,
    groups: int = 0,
    batch: int = 16,
    stages: int = 1,
    width: int = 32,
    precision: str = "fp32",
    tied: bool = True,
    family: str = "gpt2",
    **parallel: Any,
) -> Plan:
    tree = {
        "name": "small",
        "model": {"family": family, "layers": 4, "width": width, "heads": 4, "context": 64, "tied": tied},
        "train": {
            "steps": 10,
            "batch": batch,
            "microbatch": 1,
            "sequence": 16,
            "precision": precision,
            "reduction_groups": groups,
        },
        "parallel": {"stages": stages, "replicas": replicas, **parallel},
    }
    spec = parse_spec(tree).resolve(DATA)
    return compile_plan(spec, DATA, what_digest(spec, DATA))


def plus(a: Sum | None, b: Sum | None) -> Sum | None:
    """0, which is None, changes nothing."""
    if a is None or b is None:
        return b if a is None else a
    return frozenset([a, b])


def tree_of(groups: int, microbatches: int) -> Sum:
    """What every gradient must be: groups microbatch by microbatch, then neighbours."""
    each = microbatches // groups
    level: list[Sum] = []
    for group in range(groups):
        value: Sum | None = None
        for number in range(group * each, (group + 1) * each):
            value = plus(value, number)
        level.append(value)
    while len(level) > 1:
        level = [plus(level[n], level[n + 1]) for n in range(0, len(level), 2)]
    return level[0]


def written_by(call: BoundCall) -> Ref | None:
    """The gradient that a call does not add to, but writes."""
    row = wire.KERNELS[call.kernel]
    names = [operand.name for operand in row.operands]
    if "dw" not in names or row.named(call.dim).get("ACCUM", 1):
        return None
    return call.ptr[names.index("dw")]


class Player:
    """One position of every replica, action by action at once, on sums instead of numbers."""

    def __init__(self, plan: Plan, position: PositionPlan) -> None:
        self.plan, self.position = plan, position
        self.replicas = plan.config.replicas
        self.memory: list[dict[int, Sum]] = [{} for _ in range(self.replicas)]
        self.piece: dict[int, int] = {}
        """By start of a gradient, bytes of a piece; of a whole one, its own."""
        self.points = dict(self._points())

    def _points(self) -> Iterator[tuple[int, list[int]]]:
        """By start of a gradient, the places in it that are looked at: of each piece the first, and the last."""
        size = {s.grad: 4 * self.plan.tensors[s.tensor].elements for s in self.position.states}
        calls = [call for program in self.position.programs.values() for call in program.calls]
        heads = [call.ptr[2] for call in calls if call.kernel == "classifier_grad"]
        head = min((ref for ref in heads if ref is not None), key=lambda ref: ref.offset, default=None)
        if head is not None:
            size[head.offset] = head.bytes
        for start, count in size.items():
            assert start is not None
            step = count
            if self.replicas > 1 and count > 4 * wire.PIECE_BLOCK:
                step = 4 * piece_elements(count // 4, self.replicas)
            self.piece[start] = step
            yield start, [*range(0, count, step), count - 4]

    def at(self, ref: Ref, replica: int) -> range:
        first = ref.offset
        if ref.space == wire.SPACE_PIECE:
            first += (replica ^ ref.across) * ref.bytes
        return range(first, first + ref.bytes)

    def run(self) -> dict[int, list[dict[int, Sum]]]:
        """By gradient, what its places hold in each replica when the norms are taken."""
        found: dict[int, list[dict[int, Sum]]] = {}
        channels = self.plan.channels
        listed = list(ActionList.of(self.position.step))
        for action, after in itertools.zip_longest(listed, listed[1:]):
            if action.program == "sumsq":
                found = {start: [self._seen(start, r) for r in range(self.replicas)] for start in self.points}
            if action.kind == wire.A_RUN:
                for replica in range(self.replicas):
                    for call in self.position.programs[action.program or ""].calls:
                        self._call(call, replica, action.microbatch)
            elif action.kind == wire.A_SEND and channels[action.channel or 0].kind == wire.CH_REDUCE:
                across = channels[action.channel or 0].across
                assert after.kind == wire.A_RECV
                assert after.channel == action.channel
                assert action.ref is not None
                assert after.ref is not None
                sent = [self._taken(self.at(action.ref, r), r) for r in range(self.replicas)]
                for replica in range(self.replicas):
                    place = self.at(after.ref, replica)
                    self._clear(place, replica)
                    for at, value in sent[replica ^ across].items():
                        self.memory[replica][place.start + at] = value
        return found

    def _seen(self, start: int, replica: int) -> dict[int, Sum]:
        return {at: self.memory[replica].get(start + at) for at in self.points[start]}

    def _taken(self, place: range, replica: int) -> dict[int, Sum]:
        return {at - place.start: value for at, value in self.memory[replica].items() if at in place}

    def _clear(self, place: range, replica: int) -> None:
        self.memory[replica] = {at: v for at, v in self.memory[replica].items() if at not in place}

    def _call(self, call: BoundCall, replica: int, microbatch: int | None) -> None:
        memory = self.memory[replica]
        if call.kernel == "fold":
            to, other = (self.at(ref, replica) for ref in call.ptr if ref is not None)
            assert len(to) == len(other) == 4 * call.dim[0]
            for at, value in self._taken(other, replica).items():
                memory[to.start + at] = plus(memory.get(to.start + at), value)
            self._clear(other, replica)
        elif call.kernel == "zero":
            self._clear(self.at(call.ptr[0], replica), replica)  # type: ignore[arg-type]
        elif call.kernel == "adamw" and call.dim[1]:
            self._clear(self.at(call.ptr[3], replica), replica)  # type: ignore[arg-type]
        elif microbatch is not None and call.part in "BIW":
            first = replica * self.plan.config.microbatches
            stride, written = self._stride(), written_by(call)
            for ref in call.ptr:
                start = None if ref is None or ref.space != wire.SPACE_STATIC else ref.offset
                if ref is None or start is None or self._home(start, stride) is None:
                    continue
                if ref == written:
                    self._clear(self.at(ref, replica), replica)
                    memory = self.memory[replica]
                for at in self.points[self._home(start, stride)]:  # type: ignore[index]
                    memory[start + at] = plus(memory.get(start + at), first + microbatch)

    def _stride(self) -> int:
        """From a buffer of gradients to the next."""
        return next(
            (c.ptr[1].offset - c.ptr[0].offset  # type: ignore[union-attr]
             for name, p in self.position.programs.items() if "fold" in name for c in p.calls), 0)  # fmt: skip

    def _home(self, start: int, stride: int) -> int | None:
        if start in self.points:
            return start
        buffers = (self.plan.config.reduction_groups // self.replicas).bit_length()
        return next((h for h in self.points for n in range(1, buffers) if start == h + n * stride), None)


CASES = [
    {"replicas": 1, "groups": 1},
    {"replicas": 1, "groups": 8},
    {"replicas": 1, "groups": 16},
    {"replicas": 2, "groups": 8},
    {"replicas": 8, "groups": 8},
    {"replicas": 4, "groups": 16, "stages": 2},
    {"replicas": 4, "groups": 4, "stages": 4, "chunks": 2, "schedule": "interleaved-1f1b"},
    {"replicas": 2, "groups": 2, "stages": 2, "width": 320},
    {"replicas": 4, "groups": 8, "stages": 2, "width": 320, "precision": "bf16", "tied": False},
    {"replicas": 8, "groups": 8, "stages": 4, "chunks": 2, "schedule": "gpipe", "width": 320},
    {"replicas": 2, "groups": 8, "stages": 2, "width": 320, "family": "llama"},
    {"replicas": 2, "groups": 4, "width": 512, "precision": "fp8", "batch": 4},
    {"replicas": 1, "groups": 8, "stages": 4, "schedule": "zb-h1"},
    {"replicas": 2, "groups": 8, "stages": 4, "schedule": "zb-h1", "width": 320},
    {"replicas": 4, "groups": 4, "stages": 4, "schedule": "zb-v", "chunks": 2, "width": 512, "batch": 32},
    {"replicas": 2, "groups": 2, "stages": 4, "schedule": "v-half", "chunks": 2, "width": 320, "family": "llama"},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layout_adds_up_one_tree(case: dict[str, Any]) -> None:
    plan = plan_of(**case)
    check_messages(plan.positions, plan.channels)
    groups, replicas = plan.config.reduction_groups, plan.config.replicas
    whole = tree_of(groups, plan.config.microbatches * replicas)
    for position in plan.positions:
        player = Player(plan, position)
        once = player.run()
        assert player.run() == once, "a step depends on what the one before left"
        for start, seen in once.items():
            size, checked = player.piece[start], 0
            for replica, at in itertools.product(range(replicas), player.points[start]):
                if at // size == replica or player.points[start][1] + 4 == size:
                    checked += 1
                    assert seen[replica][at] == whole, (position.position, start, replica, at)
            assert checked >= 2


@pytest.mark.parametrize("case", [case for case in CASES if case.get("precision") != "fp8"], ids=str)
def test_a_step_s_first_gradient_of_a_matrix_is_written(case: dict[str, Any]) -> None:
    """Wholly, once, and nothing makes it zero; of matrices the embedding's alone is added to from zero."""
    plan = plan_of(**case)
    for position in plan.positions:
        calls = [c for a in ActionList.of(position.step) if a.program for c in position.programs[a.program].calls]
        written = [ref.offset for ref in map(written_by, calls) if ref is not None]
        assert len(set(written)) == len(written)
        for call in calls:
            row = wire.KERNELS[call.kernel]
            if (ref := written_by(call)) is not None:
                dw = next(operand for operand in row.operands if operand.name == "dw")
                assert 4 * prod(product(one, row.named(call.dim)) for one in (dw.rows, dw.columns)) == ref.bytes
            zeroed = call.ptr[3] if call.kernel == "adamw" and call.dim[1] else None
            zeroed = call.ptr[0] if call.kernel == "zero" else zeroed
            if zeroed is not None:
                assert not any(zeroed.offset <= at < zeroed.offset + zeroed.bytes for at in written)
        for state in position.states:
            tensor = plan.tensors[state.tensor]
            assert (state.grad in written) == (len(tensor.shape) == 2 and tensor.part != "embed"), tensor.name


def test_a_replica_s_programs_are_few_and_what_it_does_not_need_is_left_out() -> None:
    plain, grouped = plan_of(groups=1), plan_of(groups=8)
    assert set(plain.positions[0].programs) == {"F", "B", "B first", "init", "sumsq", "adamw"}
    names = set(grouped.positions[0].programs)
    assert {"B", "B first", "B.1", "B.2", "B.3"} < names
    assert {n for n in names if "fold" in n} == {"B fold 1.1", "B fold 2.2", "B fold 2.1", "B fold 3.3"}


def test_groups_cost_memory_for_gradients_alone() -> None:
    """1 + log2 of a replica's groups; two where the replicas' gradients meet in pieces beside one."""
    kinds = {n: plan_of(n[0], n[1]).positions[0].bytes_by_kind for n in [(1, 1), (1, 2), (1, 8), (2, 8), (4, 8)]}
    one = kinds[1, 1]["gradients"]
    assert [kinds[n]["gradients"] // one for n in kinds] == [1, 2, 4, 3, 2]
    for other in kinds.values():
        assert [other[k] for k in ("weights", "moments", "slots")] == [
            kinds[1, 1][k] for k in ("weights", "moments", "slots")
        ]


def test_replicas_share_the_state_of_large_tensors() -> None:
    one, four = plan_of(1, 4, width=512).positions[0], plan_of(4, 4, width=512).positions[0]
    assert sum(s.pieces == 4 for s in four.states) == 12
    assert four.bytes_by_kind["moments"] < 0.4 * one.bytes_by_kind["moments"]
    assert four.slot_bytes < 0.4 * one.slot_bytes


@pytest.mark.parametrize(
    "case",
    [
        {"groups": 4},
        {"groups": 8},
        {"groups": 4, "schedule": "zb-h1"},
        {"groups": 4, "schedule": "v-half", "chunks": 2, "stages": 4},
    ],
    ids=str,
)
def test_an_exchange_is_under_way_while_the_next_layer_s_backward_runs(case: dict[str, Any]) -> None:
    """At most one layer's pieces, the last to be made, have no computation between their messages and their sums."""
    plan = plan_of(4, width=512, **{"stages": 2} | case)
    for position in plan.positions:
        listed = list(ActionList.of(position.step))

        def adds(action: BoundAction, ref: Ref, position: PositionPlan = position) -> bool:
            calls = position.programs[action.program].calls if action.program is not None else ()
            return any(c.kernel == "fold" and c.ptr[1] == ref for c in calls)

        alone = 0
        for n, action in enumerate(listed):
            if action.kind != wire.A_RECV or plan.channels[action.channel or 0].kind != wire.CH_REDUCE:
                continue
            assert action.ref is not None
            end = next(later for later in range(n + 1, len(listed)) if adds(listed[later], action.ref))
            busy = any(between.op in "BIW" and between.kind == wire.A_RUN for between in listed[n:end])
            if not busy and not action.ref.bytes % (4 * wire.PIECE_BLOCK):
                alone += action.ref.bytes
        layer = 4 * sum(3 * piece_elements(n * 512 * 512, 4) for n in (3, 4, 4))
        assert alone <= layer * len(position.chunks), position.position


@pytest.mark.parametrize("replicas", [2, 8])
def test_an_exchange_is_a_pair(replicas: int) -> None:
    plan = plan_of(replicas, 8, stages=2)
    position = plan.positions[1]
    listed = list(ActionList.of(position.step))
    place = next(n for n, a in enumerate(listed) if a.channel is not None and plan.channels[a.channel].across)
    swapped = [*listed[:place], listed[place + 1], listed[place], *listed[place + 2 :]]
    apart = [*listed[:place], listed[place], listed[place + 2], listed[place + 1], *listed[place + 3 :]]
    for wrong in (swapped, apart, listed[:place] + listed[place + 1 :]):
        positions = [plan.positions[0], replace(position, step=wrong)]
        with pytest.raises(PlanError, match=r"position 1, action \d+, .* to another replica: it is no pair"):
            check_messages(positions, plan.channels)


@pytest.mark.parametrize(("microbatches", "count"), [(1, 1), (8, 8), (8, 2), (12, 4), (64, 16)])
def test_a_group_s_buffer_is_free_when_it_begins(microbatches: int, count: int) -> None:
    groups = Groups(microbatches, count)
    used: set[int] = set()
    for number in range(microbatches):
        variant = groups.variants[groups.variant_of[number]]
        begins = number % (microbatches // count) == 0
        assert (variant.buffer in used) != begins
        used.add(variant.buffer)
        used -= set(range(variant.buffer - variant.folds + 1, variant.buffer + 1))
        assert variant.last == (number == microbatches - 1)
        assert variant.first == (number == 0)
        assert not variant.last or used == {0}
    assert max(v.buffer for v in groups.variants) == groups.buffers - 1


def test_a_piece_is_whole_blocks() -> None:
    assert [piece_elements(e, 4) // wire.PIECE_BLOCK for e in (1, 262144, 262145, 1048576, 1048577)] == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("rendezvous", [False, True])
def test_the_simulator_plays_exchanges(rendezvous: bool) -> None:
    """All ranks, every byte of an exchange between the two that it is of; and most of it while the ranks compute."""
    plan = plan_of(4, 4, stages=2, width=512)
    slow, fast = (CostModel(1e10, 1e10, rate, 1e-6, 1e-6, rendezvous) for rate in (1e9, 1e15))
    played = simulate(from_plan(plan, slow), slow)
    assert len(played.timeline.rows) == 8
    pieces = [piece_elements(plan.tensors[s.tensor].elements, 4) for s in plan.positions[1].states if s.pieces > 1]
    whole = [4 * plan.tensors[s.tensor].elements for s in plan.positions[1].states if s.pieces == 1]
    blocks = sum(pieces) // wire.SUMSQ_BLOCK
    across = {(a, b): count for (a, b), count in played.link_bytes.items() if a % 2 == b % 2 == 1}
    assert {a ^ b for a, b in across} == {2, 4, 6}
    gathered = 4 * sum(pieces)
    for (a, b), count in across.items():
        tied = 4 * plan.tensors[0].elements  # the head's share of an embedding that is whole here
        neighbours = sum(whole) + tied if (a ^ b) // 2 in (1, 2) else 0
        assert neighbours <= count - (4 * sum(pieces) + gathered + 8 * blocks) <= neighbours + 64 * len(whole)
    alone = sum(across.values()) / len(across) * 3 / slow.link_bytes_per_s
    more = played.step_seconds - simulate(from_plan(plan, fast), fast).step_seconds
    assert more < (1.0 if rendezvous else 0.75) * alone


def test_the_table_of_memory_counts_all_replicas() -> None:
    table = memory_text([position.bytes_by_kind for position in plan_of(2, 8, stages=2).positions], replicas=2)
    assert [line.split()[0] for line in table.splitlines()] == ["position", "0", "1", "all"]
    assert "all x 2" in table
    assert memory_text([{"weights": 1024}], replicas=4).splitlines()[-1].split()[-2:] == ["4.0", "KiB"]
