"""The simulator against what can be worked out by hand, and the drawings of what it says."""

from __future__ import annotations

import doctest
import json
from xml.dom import minidom

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.plan import one_by_one
from trainer import models, wire
from trainer.dataset import DatasetRef
from trainer.errors import PlanError
from trainer.models.base import tensor_table
from trainer.plan import compile_plan, draw, flops, flops_per_token, simulate, timeline
from trainer.plan.compile import expand
from trainer.plan.draw import memory_text, timeline_svg, timeline_text
from trainer.plan.expand import expand_stage
from trainer.plan.flops import kernel_flops
from trainer.plan.messages import insert_messages
from trainer.plan.places import Rank
from trainer.plan.schedules import GENERATORS, gpipe, interleaved, one_f_one_b
from trainer.plan.simulate import CostModel, Instruction, from_plan, from_rows
from trainer.plan.timeline import Span, from_chrome, to_chrome
from trainer.spec import ModelSpec, parse_spec
from trainer.spec_how import RecomputeSpec

FREE_LINKS = CostModel(1.0, 1.0, 1e18, 0.0, 0.0)


@pytest.mark.parametrize("module", [simulate, timeline, draw, flops])
def test_examples_in_the_docstrings_run(module: object) -> None:
    failed, ran = doctest.testmod(module)  # type: ignore[arg-type]
    assert ran > 0
    assert failed == 0


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(GENERATORS)), st.integers(1, 8), st.integers(1, 16), st.booleans())
def test_step_time_and_bubble_are_the_textbook_s(name: str, stages: int, microbatches: int, rendezvous: bool) -> None:
    """(M + P - 1) (F + B), a bubble of (P - 1) / (M + P - 1), for both schedules where messages cost nothing."""
    cost = CostModel(1.0, 1.0, 1e18, 0.0, 0.0, rendezvous)
    rows = from_rows(insert_messages(GENERATORS[name](stages, microbatches), stages), {"F": 1.0, "B": 2.0})
    result = simulate.simulate(rows, cost)
    assert result.step_seconds == pytest.approx(3 * (microbatches + stages - 1))
    assert result.bubble == pytest.approx([(stages - 1) / (microbatches + stages - 1)] * stages)


def test_messages_cost_latency_and_bandwidth() -> None:
    cost = CostModel(1.0, 1.0, link_bytes_per_s=100.0, link_latency_s=0.25)
    rows = from_rows(insert_messages(gpipe(2, 1), 2), {"F": 1.0, "B": 2.0}, message_bytes=50)
    result = simulate.simulate(rows, cost)
    # F, half a second on the wire and the latency, F and B, the same again, B
    assert result.step_seconds == pytest.approx(1 + 0.75 + 3 + 0.75 + 2)
    assert result.link_bytes == {(0, 1): 50, (1, 0): 50}


def test_mfu_counts_model_operations_of_all_ranks() -> None:
    rows = [[Instruction("0F0", "F", 2.0, model_flops=30.0)], [Instruction("1F0", "F", 1.0, model_flops=10.0)]]
    result = simulate.simulate(rows, FREE_LINKS, peak_flops=100.0)
    assert result.model_flops == 40.0
    assert result.mfu == pytest.approx(40.0 / (2.0 * 200.0))


def test_ranks_that_block_are_named() -> None:
    rows = [[Instruction("0RECV_B0", "recv", channel=1), Instruction("0SEND_F0", "send", channel=0, microbatch=0)]]
    rows += [[Instruction("1RECV_F0", "recv", channel=0), Instruction("1SEND_B0", "send", channel=1)]]
    with pytest.raises(PlanError, match="rank 0 at 0RECV_B0 on channel 1; rank 1 at 1RECV_F0 on channel 0"):
        simulate.simulate(rows, FREE_LINKS)


def test_every_kernel_of_the_table_has_a_count() -> None:
    for name, kernel in wire.KERNELS.items():
        count = kernel_flops(name, [2] * kernel.dims)
        assert count.done >= count.model >= 0, name
    with pytest.raises(PlanError, match="operations of kernel 'fused_magic'"):
        kernel_flops("fused_magic", [])


def test_operations_of_a_transformer_are_six_a_weight_and_token() -> None:
    rows, out, inner = 7, 11, 13
    total = sum(kernel_flops(f"linear_{part}", (rows, out, inner)).model for part in ("fwd", "igrad", "wgrad"))
    assert total == 6 * rows * out * inner
    assert kernel_flops("classifier_grad", (rows, inner, out, 4)).model == 6 * rows * out * inner


def test_a_call_s_time_is_that_of_its_arithmetic_or_of_its_memory() -> None:
    cost = CostModel(flops_per_s=250.0, memory_bytes_per_s=25.0)
    assert cost.call_seconds("linear_fwd", [10, 10, 10], 1) == pytest.approx(2000 / 250 + cost.call_s)
    assert cost.call_seconds("linear_fwd", [1, 1, 1], 1000) == pytest.approx(1000 / 25 + cost.call_s)


@pytest.mark.parametrize("stages", [1, 3])
def test_a_compiled_plan_s_step(stages: int) -> None:
    """Every action of the lists is there with its text."""
    model = {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 64}
    train = {"steps": 10, "batch": 4, "microbatch": 1, "sequence": 16}
    data = DatasetRef("ab" * 32, 300, 2, (10_000,), "cd" * 32)
    tree = {"name": "small", "model": model, "train": train, "parallel": {"stages": stages}}
    plan = compile_plan(parse_spec(tree).resolve(data), data, bytes(32))
    sheet = CostModel(1e9, 1e9, 1e8, 1e-4)
    lists = from_plan(plan, sheet)
    for position, row, scheduled in zip(plan.positions, lists, plan.schedule, strict=True):
        assert [i.microbatch for i in row] == [a.microbatch for a in position.step]
        texts = [i.action for i in row]
        assert [text for text in texts if text in {str(a) for a in scheduled}] == [str(a) for a in scheduled]
        assert [text for text in texts if text in ("sumsq", "adamw")] == ["sumsq", "adamw"]
    result = simulate.simulate(lists, sheet)
    events, link_bytes = one_by_one.simulate([list(row) for row in lists], sheet)
    assert list(result.timeline.events) == events
    assert result.link_bytes == link_bytes
    tokens = plan.config.microbatches * plan.config.sequence
    assert result.model_flops >= tokens * flops_per_token(parse_spec(tree).resolve(data).model, 16)


def test_what_is_computed_again_takes_time_and_counts_for_nothing() -> None:
    """Operations of the model are as many; memory of a slot less, time more, the more is computed again."""
    model = {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 64}
    train = {"steps": 10, "batch": 4, "microbatch": 1, "sequence": 16}
    data, cost = DatasetRef("ab" * 32, 300, 2, (10_000,), "cd" * 32), CostModel(1e9, 1e10, 1e8, 1e-4)
    found = []
    for kind in ("none", "elementwise", "attention", "layer"):
        tree = {"name": "small", "model": model, "train": train, "parallel": {"stages": 2, "recompute": kind}}
        plan = compile_plan(parse_spec(tree).resolve(data), data, bytes(32))
        said = simulate.simulate(from_plan(plan, cost), cost)
        found.append((said.step_seconds, -plan.positions[0].act_stride, said.model_flops))
    assert found == sorted(found)
    assert len({flops for _, _, flops in found}) == 1
    assert len({bytes_ for _, bytes_, _ in found}) == 4


def test_layers_that_compute_again_count_with_it_in_the_split() -> None:
    """The head is worth 4.2 layers, and 3.5 of those that compute their products again."""
    model = {"family": "gpt2", "layers": 15, "width": 32, "heads": 4, "context": 16}
    train = {"steps": 10, "batch": 4, "microbatch": 1, "sequence": 16}
    data = DatasetRef("ab" * 32, 1700, 2, (10_000,), "cd" * 32)
    found = {}
    for kind in ("none", "elementwise", "layer"):
        tree = {"name": "small", "model": model, "train": train, "parallel": {"stages": 2, "recompute": kind}}
        found[kind] = [len(stage.layers) for stage in expand(parse_spec(tree).resolve(data))]
    assert found == {"none": [10, 5], "elementwise": [10, 5], "layer": [9, 6]}


def test_layers_that_a_stage_has_not_are_not_computed_again() -> None:
    model = {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 64}
    train = {"steps": 10, "batch": 4, "microbatch": 1, "sequence": 16}
    parallel = {"stages": 2, "recompute": {"kind": "layer", "layers": 3}}
    data = DatasetRef("ab" * 32, 300, 2, (10_000,), "cd" * 32)
    spec = parse_spec({"name": "small", "model": model, "train": train, "parallel": parallel}).resolve(data)
    with pytest.raises(PlanError, match=r"recompute\.layers: 3 layers of stage . are to be .* take at most . there"):
        compile_plan(spec, data, bytes(32))
    how = spec.parallel.model_copy(update={"schedule": "zb-h1", "recompute": RecomputeSpec(kind="layer")})
    with pytest.raises(PlanError, match=r"every layer of stage . .* nothing would be left for W; .* whole backwards"):
        compile_plan(spec.model_copy(update={"parallel": how}), data, bytes(32))


def test_one_table_counts_operations() -> None:
    """The layout's costs are half of what the training programs' products are; MFU's count is the usual formula."""
    for family, more in (("gpt2", {}), ("llama", {"kv_heads": 2, "tied": False})):
        tree = {"family": family, "layers": 2, "width": 32, "heads": 4, "context": 16, "vocab": 300, **more}
        model = ModelSpec.model_validate(tree)
        tensors = tensor_table(models.family(family), model)
        whole = expand_stage(models.family(family), model, tensors, range(2), 3, 16, 8, 1.0)
        head = expand_stage(models.family(family), model, tensors, range(2), 3, 16, 8, 1.0, True).forward[-1]
        products = [flops.work(call.kernel, call.dim) for call in (*whole.forward, *whole.backward)]
        done = sum(work.products + work.again for work in products)
        assert sum(flops.call_cost(call) for call in (*whole.forward, head)) == done
        weights = sum(t.elements for t in tensors if len(t.shape) == 2 and "wpe" not in t.name)
        weights -= 0 if model.tied else 300 * 32  # the embedding is read, not multiplied
        assert flops_per_token(model, 16) == 6 * weights + 6 * 2 * 17 * 32


def test_events_of_all_ranks_read_as_a_list() -> None:
    rows = [[], [Instruction("a", "F", 1.0), Instruction("b", "B", 1.0)], [], [Instruction("c", "F", 1.0)], []]
    events = simulate.simulate(rows, FREE_LINKS).timeline.events
    listed = list(events)
    assert [event.action for event in listed] == ["a", "b", "c"]
    assert [events[n] for n in range(-3, 3)] == listed + listed
    assert events[1:] == listed[1:]
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            events[beyond]


def test_a_channel_has_one_rank_at_each_end() -> None:
    rows = [[Instruction("send", "send", channel=7)], [Instruction("again", "send", channel=7)]]
    with pytest.raises(PlanError, match="rank 1 at again: this end of channel 7 belongs to rank 0"):
        simulate.simulate(rows, FREE_LINKS)


def test_a_cost_model_without_speed_is_refused() -> None:
    with pytest.raises(PlanError, match="flops_per_s is 0"):
        CostModel(0.0, 1.0)


def planned(stages: int, microbatches: int) -> timeline.Timeline:
    cost = CostModel(1.0, 1.0, 1e9, 1e-4)
    rows = from_rows(insert_messages(one_f_one_b(stages, microbatches), stages), {"F": 0.01, "B": 0.02}, 1000)
    return simulate.simulate(rows, cost).timeline


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 1), (2, 4), (4, 8), (8, 32)])
def test_text_is_aligned_and_fits(stages: int, microbatches: int) -> None:
    lines = timeline_text(planned(stages, microbatches)).splitlines()
    assert max(len(line) for line in lines) <= 100
    rows = [line for line in lines if line.startswith("rank")]
    assert len(rows) == stages
    assert len({line.index("|") for line in rows}) == len({line.rindex("|") for line in rows}) == 1


def test_text_shows_the_schedule() -> None:
    cost = CostModel(1.0, 1.0, 1e18, 0.0, 0.0)
    rows = from_rows(insert_messages(one_f_one_b(2, 2), 2), {"F": 1.0, "B": 2.0})
    assert timeline_text(simulate.simulate(rows, cost).timeline, 52).splitlines() == [
        "planned: 9 s a step                           bubble",
        "rank  0 |F0--F1--        B0======    B1======| 33.3%",
        "rank  1 |    F0--B0======F1--B1======        | 33.3%",
        "        F- forward   B= backward   blank: waiting",
    ]


def test_text_tells_a_rank_that_mostly_waits_where_many_actions_share_a_column() -> None:
    """It was drawn as one that works all the time."""
    events = [
        Span(Rank(rank), f"{kind}{n}", kind, n + at, n + at + work / 2, n)
        for rank, work in ((0, 0.2), (1, 0.9))
        for n in range(200)
        for kind, at in (("F", 0.0), ("B", 0.5))
    ]
    rows = timeline_text(timeline.Timeline(events, 2), 60).splitlines()
    assert [set(row.split("|")[1]) <= set("fb") for row in rows[1:3]] == [True, False]
    assert rows[2] == rows[2].replace("b", "B").replace("f", "F")
    assert rows[3].endswith("small letters: mostly waiting")


def test_text_draws_replicas_that_are_alike_once() -> None:
    one = planned(2, 4)
    rows = [timeline.EventRow.of(Rank(rank), row) for rank, row in enumerate((*one.rows, *one.rows))]
    two = timeline.Timeline(timeline.EventList(rows), 4, one.title)
    drawn = timeline_text(two, replicas=2).splitlines()
    assert drawn.pop(3) == "        ranks 2 to 3: the other replica does the same at the same time"
    assert drawn == timeline_text(one).splitlines()
    slower = timeline.Timeline(timeline.EventList([*rows[:3], timeline.EventRow.of(Rank(3), ())]), 4)
    assert [line[:7] for line in timeline_text(slower, replicas=2).splitlines()[1:5]] == [
        f"rank  {n}" for n in range(4)
    ]


def test_text_of_many_ranks_draws_both_ends() -> None:
    lines = timeline_text(planned(100, 2)).splitlines()
    assert [line for line in lines if not line.startswith("rank")][1] == "        ranks 32 to 67 are left out here"
    assert [int(line[5:7]) for line in lines if line.startswith("rank")] == [*range(32), *range(68, 100)]


def test_svg_is_whole_and_safe() -> None:
    shown = planned(4, 8)
    named = timeline.Timeline(shown.events, shown.ranks, 'a <script>"&')
    text = timeline_svg([shown, named])
    tree = minidom.parseString(text)
    blocks = [r for r in tree.getElementsByTagName("rect") if r.getElementsByTagName("title")]
    assert len(blocks) == 2 * len(shown.events)
    assert "<script>" not in text
    assert "prefers-color-scheme" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", ""), "self-contained"
    used = {r.getAttribute("class") for r in blocks}
    assert used == {"k-F", "k-B", "k-send", "k-recv"}


def test_empty_timelines_draw() -> None:
    empty = timeline.Timeline((), 2)
    assert "rank  1" in timeline_text(empty)
    minidom.parseString(timeline_svg(empty))


def test_planned_and_measured_have_one_form() -> None:
    shown = planned(2, 4)
    whole = json.loads(to_chrome(shown))
    names = [e["args"]["name"] for e in whole["traceEvents"] if e["name"] in ("process_name", "thread_name")]
    assert names == ["planned", "rank 0", "rank 1"]
    traces = {}
    for rank in range(2):  # as the engine writes them: one file a rank, absolute times, several steps
        events = []
        for step in (6, 7):
            for e in whole["traceEvents"]:
                if e["ph"] == "X" and e["tid"] == rank:
                    moved = e | {"ts": e["ts"] + 5e6 + step * 1e6, "args": e["args"] | {"step": step}}
                    events.append(moved)
        events.append({"name": "2F0", "ph": "X", "ts": 9e6, "dur": 1.0, "args": {"step": 8 + rank}})
        traces[rank] = json.dumps({"traceEvents": events})
    measured = from_chrome(traces)
    assert measured.title == "measured, step 7"
    assert measured.seconds == pytest.approx(shown.seconds)
    assert [e.action for e in measured.events] == [e.action for e in shown.events]
    assert [e.start for e in measured.events] == pytest.approx([e.start for e in shown.events], abs=1e-9)
    body = [timeline_text(t).splitlines()[1:] for t in (shown, measured)]
    assert body[0] == body[1]
    both = json.loads(to_chrome([shown, measured]))["traceEvents"]
    assert [e["args"]["name"] for e in both if e["name"] == "process_name"] == ["planned", "measured, step 7"]
    planned_ones, measured_ones = ([e for e in both if e["ph"] == "X" and e["pid"] == pid] for pid in (0, 1))
    assert [(e["name"], e["tid"]) for e in planned_ones] == [(e["name"], e["tid"]) for e in measured_ones]
    assert min(e["ts"] for e in measured_ones) == min(e["ts"] for e in planned_ones) == 0


def test_traces_that_cannot_be_read_are_named() -> None:
    with pytest.raises(ValueError, match="trace of rank 3 is not a Chrome trace"):
        from_chrome({3: "[]"})
    with pytest.raises(ValueError, match="no step is in every trace"):
        from_chrome({0: '{"traceEvents": []}'})


def test_memory_over_budget_is_marked() -> None:
    text = memory_text([{"weights": 10, "slots": 4096}, {"weights": 0, "slots": 1}], budget=4000)
    assert "over the budget of 3.9 KiB" in text.splitlines()[1]
    assert "over" not in text.splitlines()[2]


@pytest.mark.parametrize("rendezvous", [False, True])
@pytest.mark.parametrize(("positions", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 16), (4, 4, 16), (8, 2, 32)])
def test_interleaving_divides_the_bubble(positions: int, chunks: int, microbatches: int, rendezvous: bool) -> None:
    """(P - 1) (F + B) of a stage, and stages are smaller by the number of chunks (Narayanan et al. 2021): exact where
    a message starts when it is made. Near it also where a send waits for its receiver: neighbours are seldom free
    at once, and an order in which every send comes before the next computation takes three times as long then."""
    rows = insert_messages(interleaved(positions, chunks, microbatches), positions * chunks)
    lists = from_rows(rows, {"F": 1.0 / chunks, "B": 2.0 / chunks})
    done = simulate.simulate(lists, CostModel(1.0, 1.0, 1e18, 0.0, 0.0, rendezvous=rendezvous))
    formula = 3.0 * microbatches + 3.0 * (positions - 1) / chunks
    assert formula - 1e-9 <= done.step_seconds <= (1.09 if rendezvous else 1 + 1e-9) * formula


def test_a_message_starts_when_it_is_made() -> None:
    """Wherever its send stands in the list; on its channel no sooner than the one before it."""
    row = [
        Instruction("0F0", "F", 1.0, microbatch=0),
        Instruction("0F1", "F", 1.0, microbatch=1),
        Instruction("0SEND_F0", "send", channel=0, microbatch=0),
        Instruction("0F2", "F", 1.0, microbatch=2),
        Instruction("0SEND_F2", "send", channel=0, microbatch=2),
        Instruction("0SEND_F1", "send", channel=0, microbatch=1),
        Instruction("REPORT", "send", channel=1),
    ]
    texts = [i.action for i in simulate.sends_at_once(simulate.InstructionList.of(row))]
    assert texts == ["0F0", "0SEND_F0", "0F1", "0F2", "0SEND_F2", "0SEND_F1", "REPORT"]
