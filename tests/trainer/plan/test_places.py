"""Stage, position, replica, rank and owner are five things: maps that are not the identity, pushed through the passes.

``V`` has four stages at two positions, there and back; ``MOVED`` a position for every stage, none of them its own. What
is expected stands here by hand. That a moved plan trains to the same bits is in ``tests/e2e/test_equal_bits.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from tests.trainer.plan import one_by_one
from trainer import models, wire
from trainer.dataset import DatasetRef
from trainer.errors import PlanError
from trainer.models.base import tensor_table
from trainer.plan import Plan, compile_plan
from trainer.plan.check import check_lowered, check_schedule
from trainer.plan.draw import timeline_text
from trainer.plan.memory import check_budget
from trainer.plan.messages import free_slots_early, insert_messages
from trainer.plan.places import Layout, Pipeline, Position, Ranks, Replica
from trainer.plan.rows import Row, parse_action
from trainer.plan.schedules import in_flight, interleaved, stage_positions
from trainer.plan.simulate import CostModel, from_plan, from_rows, simulate
from trainer.plan.slots import assign_slots, holders
from trainer.spec import ModelSpec, parse_spec, what_digest
from trainer.wire.plan import parse

DATA = DatasetRef("ab" * 32, 300, 2, (10_000,), "cd" * 32)
MODEL: dict[str, Any] = {"family": "gpt2", "layers": 8, "width": 32, "heads": 4, "context": 64}


def pipeline(*of_stage: int) -> Pipeline:
    return Pipeline(tuple(map(Position, of_stage)), 1 + max(of_stage))


V = pipeline(0, 1, 1, 0)
MOVED = pipeline(2, 0, 1)
FREE = CostModel(1.0, 1.0, 1e18, 0.0, 0.0)

V_ROWS = ["0F0 0F1 3F0 3B0 3F1 3B1 0B0 0B1", "1F0 2F0 1F1 2F1 2B0 1B0 2B1 1B1"]
V_LOWERED = [
    "0F0 0SEND_F0 0F1 0SEND_F1 3RECV_F0 3F0 3B0 3RECV_F1 3SEND_B0 3F1 3B1 3SEND_B1 0RECV_B0 0B0 0RECV_B1 0B1",
    "1RECV_F0 1F0 2F0 1RECV_F1 2SEND_F0 1F1 2F1 2SEND_F1 2RECV_B0 2B0 1B0 2RECV_B1 1SEND_B0 2B1 1B1 1SEND_B1",
]


def rows(texts: Iterable[str]) -> list[Row]:
    return [Row.of(map(parse_action, text.split())) for text in texts]


def plan_of(stages: int, at: Pipeline | None = None, **parallel: Any) -> Plan:
    tree = {
        "name": "small",
        "model": MODEL,
        "train": {"steps": 10, "batch": 4, "microbatch": 1, "sequence": 16, "precision": "bf16"},
        "parallel": {"stages": stages, "threads": 1, **parallel},
    }
    spec = parse_spec(tree).resolve(DATA)
    return compile_plan(spec, DATA, what_digest(spec, DATA), pipeline=at)


def test_a_rank_is_a_position_in_a_replica() -> None:
    ranks = Ranks(3, 2)
    assert len(ranks) == 6
    assert [(ranks.replica(r), ranks.position(r)) for r in ranks.all] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]
    assert [ranks.rank(ranks.replica(r), ranks.position(r)) for r in ranks.all] == list(range(6))
    assert ranks.rank(Replica(1), Position(0)) == 3
    assert [ranks.on_node(node, 3) for node in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_a_stage_is_at_a_position() -> None:
    assert V.chunks == ((0, 3), (1, 2))
    assert (V.first, V.last, V.stages, V.positions) == (0, 0, 4, 2)
    assert MOVED.chunks == ((1,), (2,), (0,))
    assert (MOVED.first, MOVED.last) == (2, 1)
    assert Pipeline.in_turn(3).of_stage == (0, 1, 2)
    with pytest.raises(PlanError, match="stage 1 is placed at position 2; there are positions 0 to 1"):
        Pipeline((Position(0), Position(2)), 2)


def test_a_tensor_s_owner_is_its_stage_s_position() -> None:
    model = ModelSpec.model_validate({**MODEL, "vocab": 300})
    tensors = tensor_table(models.family("gpt2"), model)
    layers = (range(1), range(1, 4), range(4, 6), range(6, 8))
    layout = Layout(layers, V)
    for tensor in tensors:
        assert layout.owner(tensor) == (1 if tensor.layer in (1, 2, 3, 4, 5) else 0)
    moved = Layout(layers, pipeline(2, 0, 3, 1))
    owner = {tensor.name: moved.owner(tensor) for tensor in tensors}
    stage = {tensor.name: moved.stage(tensor) for tensor in tensors}
    for name, wanted in (("wte.weight", (0, 2)), ("h.3.attn.c_attn.weight", (1, 0)), ("ln_f.weight", (3, 1))):
        (found,) = [known for known in owner if known.endswith(name)]
        assert (stage[found], owner[found]) == wanted
    owned = moved.owned(tensors)
    assert sorted(number for mine in owned for number in mine) == list(range(len(tensors)))
    assert {tensors[number].layer for number in owned[3]} == {4, 5}
    with pytest.raises(PlanError, match="the layers make 4 stages, the pipeline places 3"):
        Layout(layers, MOVED)


def test_a_schedule_of_two_stages_a_position() -> None:
    plain = rows(V_ROWS)
    check_schedule(plain, 4, 2)
    assert stage_positions(plain) == {0: 0, 1: 1, 2: 1, 3: 0}
    lowered = insert_messages(plain, 4)
    assert [" ".join(map(str, row)) for row in lowered] == V_LOWERED
    assert lowered == one_by_one.insert_messages([list(row) for row in plain], 4)
    check_lowered(lowered)
    early = free_slots_early(lowered)
    assert early == one_by_one.free_slots_early([list(row) for row in lowered])
    check_lowered(early)
    assert in_flight(lowered) == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("texts", "bound", "words"),
    [
        (V_ROWS, [2, 2, 2, 0], "S6: position 0, stage 3: 1 microbatches in flight, the bound is 0"),
        (
            [V_ROWS[0], V_ROWS[1].replace("2B0 ", "")],
            None,
            "S2: position 1: I .or B. of stage 2, microbatch 0 is missing",
        ),
        ([V_ROWS[0] + " 1F0", V_ROWS[1]], None, "position 1, 1F0: stage 1 already runs at position 0"),
        (
            [V_ROWS[0].replace("3F0 3B0", "3B0 3F0"), V_ROWS[1]],
            None,
            "S3: position 0, action 2, 3B0: before its forward 3F0",
        ),
        ([V_ROWS[0], V_ROWS[1].replace("1F0 2F0", "2F0 1F0")], None, "S5: position 0 can never start 3F0"),
    ],
)
def test_refusals_name_stage_and_position(texts: list[str], bound: list[int] | None, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        check_schedule(rows(texts), bound=bound)


def test_stages_of_one_position_need_no_message() -> None:
    more = [V_LOWERED[0], V_LOWERED[1].replace("1F0 2F0", "1F0 1SEND_F0 2F0")]
    with pytest.raises(PlanError, match="position 1, action 2, 1SEND_F0: stages 1 and 2 share position 1"):
        check_lowered(rows(more))
    with pytest.raises(PlanError, match="position 0: 0F1 is never sent on: 0SEND_F1 is missing"):
        check_lowered(rows([V_LOWERED[0].replace("0SEND_F1 ", ""), V_LOWERED[1].replace("1RECV_F1 ", "")]))


def test_every_replica_follows_the_rows() -> None:
    """Rank 0 and 2 are at position 0, 1 and 3 at position 1; nothing passes between the replicas."""
    lists = from_rows(insert_messages(rows(V_ROWS), 4), {"F": 1.0, "B": 2.0}, 50, replicas=2)
    result = simulate(lists, FREE)
    assert result.step_seconds == pytest.approx(16)
    assert result.bubble == pytest.approx([0.25] * 4)
    assert result.link_bytes == {(0, 1): 200, (1, 0): 200, (2, 3): 200, (3, 2): 200}
    starts = {event.action: event.start for event in result.timeline.rows[3] if event.kind in "FB"}
    assert starts == pytest.approx({"1F0": 1, "2F0": 2, "1F1": 3, "2F1": 4, "2B0": 6, "1B0": 8, "2B1": 10, "1B1": 12})
    drawn = [line.split("|")[1] for line in timeline_text(result.timeline, 52).splitlines() if line.startswith("rank")]
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_a_node_s_memory_is_that_of_its_ranks() -> None:
    positions = plan_of(2).positions
    first, second = (p.total_bytes for p in positions)
    assert first != second

    def fits(nodes: int, budget: int) -> bool:
        try:
            check_budget(positions, nodes, budget, replicas=2)
        except PlanError:
            return False
        return True

    for nodes, most in ((1, 2 * (first + second)), (2, first + second), (4, max(first, second))):
        assert fits(nodes, most)
        assert not fits(nodes, most - 1)
    with pytest.raises(PlanError, match=f"node {int(second > first)} needs {max(first, second)} bytes"):
        check_budget(positions, 4, max(first, second) - 1, replicas=2)


def test_a_plan_says_what_runs_on_a_node() -> None:
    plan = plan_of(3, MOVED)
    twice = replace(plan, config=replace(plan.config, replicas=2))
    assert [[p.position for p in node] for node in plan.on_nodes(3)] == [[0], [1], [2]]
    assert [[p.position for p in node] for node in twice.on_nodes(2)] == [[0, 1, 2], [0, 1, 2]]
    assert [[p.position for p in node] for node in twice.on_nodes(3)] == [[0, 1], [2, 0], [1, 2]]


def test_a_plan_whose_stages_are_at_other_positions() -> None:
    plain, moved = plan_of(3), plan_of(3, MOVED)
    assert [p.chunks for p in moved.positions] == [(1,), (2,), (0,)]
    for stage, position in enumerate(MOVED.of_stage):
        ours, theirs = moved.positions[position], plain.positions[stage]
        assert [s.tensor for s in ours.states] == [s.tensor for s in theirs.states]
        for kind in ("weights", "moments", "gradients", "activations", "scratch", "slots"):
            assert ours.bytes_by_kind[kind] == theirs.bytes_by_kind[kind]
        assert ours.act_slots == theirs.act_slots == 3 - stage
    edges: dict[int, set[tuple[int, int]]] = {}
    for channel in moved.channels:
        edges.setdefault(channel.kind, set()).add((channel.source, channel.target))
    assert edges == {
        wire.CH_FORWARD: {(2, 0), (0, 1)},
        wire.CH_BACKWARD: {(1, 0), (0, 2)},
        wire.CH_TIED_WEIGHT: {(2, 1)},
        wire.CH_TIED_GRAD: {(1, 2)},
        wire.CH_REPORT: {(1, 0), (2, 0)},
        wire.CH_CONTROL: {(0, 1), (0, 2)},
    }
    does = [Counter(action.kind for action in p.step) for p in moved.positions]
    assert [count[wire.A_COMBINE] for count in does] == [1, 0, 0]  # position 0, whatever its stage
    assert [count[wire.A_DATA] for count in does] == [0, 1, 1]  # the head and the embedding
    file = parse(moved.to_bytes())
    actions = file.records("actions", wire.PlanAction)
    for number, record in enumerate(file.records("positions", wire.PlanPosition)):
        step = actions[record.first_step : record.first_step + record.steps]
        assert record.position == number
        assert {a.stage for a in step if chr(a.op) in "FB"} == set(moved.positions[number].chunks)
        assert {a.stage for a in step if chr(a.op) not in "FB"} == {number}
    times = [simulate(from_plan(plan, FREE), FREE).step_seconds for plan in (plain, moved)]
    assert times[0] == pytest.approx(times[1])


def test_stages_that_follow_one_another_at_a_position_exchange_nothing() -> None:
    """Four stages there and back: 1 and 2 share position 1 and a slot, 0 and 3 are apart at position 0."""
    plan = plan_of(4, V, chunks=2, schedule="gpipe")
    assert [p.chunks for p in plan.positions] == [(0, 3), (1, 2)]
    assert V.runs(Position(0)) == ((0,), (3,))
    assert V.runs(Position(1)) == ((1, 2),)
    assert [[str(a) for a in row if not a.is_compute][:2] for row in plan.schedule] == [
        ["0SEND_F0", "0SEND_F1"],
        ["1RECV_F0", "1RECV_F1"],
    ]
    assert {(a.stage, a.op) for row in plan.schedule for a in row if not a.is_compute} == {
        (0, "SEND_F"), (1, "RECV_F"), (2, "SEND_F"), (3, "RECV_F"),
        (3, "SEND_B"), (2, "RECV_B"), (1, "SEND_B"), (0, "RECV_B"),
    }  # fmt: skip
    first, second = plan.positions
    assert (first.act_slots, second.act_slots) == (8, 4)  # a slot of a microbatch for each run of stages
    made = first.programs["0F"].calls[-1].ptr[0]
    taken = first.programs["3F"].calls[0].ptr
    assert made is not None
    assert all(ref is None or ref.space != wire.SPACE_ACT or ref != made for ref in taken[:1])
    left = second.programs["1F"].calls[-1].ptr[0]
    assert left in second.programs["2F"].calls[0].ptr  # read where it was made
    assert [a.slot for a in second.step if a.op == "F" and a.microbatch == 1] == [1, 1, 1, 1]  # RECV, 1F, 2F, SEND
    assert first.tokens_offset is not None  # the embedding and the head, and so no tied weights on the way
    assert first.loss_offset is not None
    assert second.tokens_offset is None
    assert {c.kind for c in plan.channels}.isdisjoint({wire.CH_TIED_GRAD, wire.CH_TIED_WEIGHT})


def test_slots_are_a_pool_of_all_stages_at_a_position() -> None:
    """As many as are in flight at once, and one for what is sent; never more than the stages' own peaks."""
    for positions, chunks, microbatches in ((2, 2, 4), (4, 2, 8), (4, 4, 16)):
        at = Pipeline.in_turn(positions * chunks, positions)
        rows = free_slots_early(insert_messages(interleaved(positions, chunks, microbatches), at.stages))
        for position in map(Position, range(positions)):
            row = rows[position]
            pool = assign_slots(row, holders(row, at.runs(position)))[0]
            apart = sum(assign_slots(row.of_one(stage))[0] for stage in at.chunks[position])
            assert pool == (chunks - 1) * positions + 2 * (positions - position - 1) + 2
            assert pool <= apart
    assert [p.act_slots for p in plan_of(4, chunks=2, schedule="interleaved-1f1b").positions] == [6, 4]


def test_the_simulator_plays_a_plan_s_replicas() -> None:
    plan = plan_of(3, MOVED)
    twice = replace(plan, config=replace(plan.config, replicas=2))
    one, two = (simulate(from_plan(p, FREE), FREE) for p in (plan, twice))
    assert (len(one.timeline.rows), len(two.timeline.rows)) == (3, 6)
    assert two.link_bytes == {
        (a + shift, b + shift): count for (a, b), count in one.link_bytes.items() for shift in (0, 3)
    }
    done = [{event.action for event in row} for row in two.timeline.rows]
    assert ["0F0" in actions for actions in done] == [False, False, True, False, False, True]  # stage 0: ranks 2, 5
    assert ["combine" in actions for actions in done] == [True, False, False, True, False, False]  # position 0
    assert [[e.start for e in row] for row in two.timeline.rows] == [
        [e.start for e in row] for row in one.timeline.rows
    ] * 2


def test_what_cannot_be_lowered_yet_is_refused_in_words() -> None:
    with pytest.raises(PlanError, match=r"schedule 1f1b takes 1 stage a position, parallel\.chunks is 2; take interl"):
        plan_of(4, V)
    with pytest.raises(PlanError, match="position 1 holds no stage"):
        plan_of(2, Pipeline((Position(0), Position(2)), 3))
    with pytest.raises(PlanError, match="the layers make 4 stages, the pipeline places 3"):
        plan_of(4, MOVED)
