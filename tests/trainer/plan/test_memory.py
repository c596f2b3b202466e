"""Placement by lifetime, the account of bytes, the budget."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import wire
from trainer.dataset import DatasetRef
from trainer.errors import PlanError
from trainer.plan import Plan, compile_plan
from trainer.plan.memory import RUNTIME_BYTES, Interval, align, place, slot_bytes
from trainer.spec import parse_spec, what_digest

DATA = DatasetRef("ab" * 32, 300, 2, (10_000,), "cd" * 32)


def plan_of(*sets: str) -> Plan:
    tree = {
        "name": "small",
        "model": {"family": "gpt2", "layers": 4, "width": 32, "heads": 4, "context": 64},
        "train": {"steps": 10, "batch": 12, "microbatch": 2, "sequence": 16},
    }
    spec = parse_spec(tree, sets).resolve(DATA)
    return compile_plan(spec, DATA, what_digest(spec, DATA))


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 9), st.integers(0, 9)), max_size=20))
def test_buffers_alive_at_once_are_apart(raw: list[tuple[int, int, int]]) -> None:
    items = [Interval(str(n), size, min(a, b), max(a, b)) for n, (size, a, b) in enumerate(raw)]
    offsets, end = place(items)
    assert all(offsets[i.name] % 64 == 0 and offsets[i.name] + i.bytes <= end for i in items)
    for one, two in itertools.combinations(items, 2):
        if one.first <= two.last and two.first <= one.last:
            a, b = offsets[one.name], offsets[two.name]
            assert a + one.bytes <= b or b + two.bytes <= a
    peak = max((sum(align(i.bytes) for i in items if i.first <= t <= i.last) for t in range(10)), default=0)
    assert peak <= end <= sum(align(i.bytes) for i in items)


def test_lifetimes_that_do_not_meet_share_memory() -> None:
    offsets, end = place([Interval("a", 100, 0, 1), Interval("b", 100, 2, 3), Interval("c", 100, 1, 2)])
    assert offsets["a"] == offsets["b"] != offsets["c"]
    assert end == 256


def test_the_account_adds_up() -> None:
    for stages in (1, 2, 4):
        for p in plan_of(f"parallel.stages={stages}").positions:
            assert set(p.bytes_by_kind) == set(wire.MEMORY_KINDS)
            kinds = ("weights", "moments", "gradients", "activations", "scratch")
            inside = sum(p.bytes_by_kind[kind] for kind in kinds)
            assert inside <= p.arena_bytes < inside + p.bytes_by_kind["other"]
            assert p.bytes_by_kind["slots"] == 3 * p.slot_bytes
            assert p.bytes_by_kind["moments"] > 1.9 * p.bytes_by_kind["weights"] - 4 * 300 * 32 * 2


def test_more_microbatches_in_flight_take_more_activations() -> None:
    one, gpipe = (plan_of("parallel.stages=2", f"parallel.schedule={s}") for s in ("1f1b", "gpipe"))
    assert [p.act_slots for p in one.positions] == [2, 1]
    assert [p.act_slots for p in gpipe.positions] == [6, 6]
    assert gpipe.positions[1].bytes_by_kind["activations"] > 4 * one.positions[1].bytes_by_kind["activations"]


def test_half_precision_halves_activations() -> None:
    full, half = (plan_of(f"train.precision={p}").positions[0] for p in ("fp32", "bf16"))
    assert 0.45 < half.act_stride / full.act_stride < 0.6
    assert half.bytes_by_kind["weights"] > full.bytes_by_kind["weights"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_logits_take_their_place_where_they_are_as_wide(precision: str) -> None:
    calls = plan_of(f"train.precision={precision}").positions[0].programs["B"].calls
    ((logits, dlogits),) = (call.ptr[6:] for call in calls if call.kernel == "classifier_grad")
    assert (logits == dlogits) == (precision == "fp32")


def test_fp8_copies_are_counted() -> None:
    """Codes and their transpose take what a bf16 copy takes, and 64 bytes for a scale; kept activations less."""
    bf16, fp8 = (plan_of(f"train.precision={p}").positions[0] for p in ("bf16", "fp8"))
    matrices = 4 * 4  # of a layer, layers
    assert fp8.bytes_by_kind["weights"] == bf16.bytes_by_kind["weights"] + 64 * matrices
    assert fp8.act_stride < bf16.act_stride
    for kind in ("moments", "gradients", "slots"):
        assert fp8.bytes_by_kind[kind] == bf16.bytes_by_kind[kind]


def test_a_slot_has_room_for_header_checksums_and_data() -> None:
    assert slot_bytes(64) == 4096 + 4096 + 4096
    data = 600 * wire.SLOT_CHUNK
    assert slot_bytes(data) == 4096 + 8192 + data


def test_over_the_budget_is_refused_with_the_table() -> None:
    need = plan_of().positions[0].total_bytes / (1 << 30)
    plan_of(f"launch.memory_gib={need * 1.01}")
    with pytest.raises(PlanError, match=r"raise launch\.memory_gib") as caught:
        plan_of(f"launch.memory_gib={need * 0.99}")
    assert "activations" in str(caught.value)
    two = plan_of("parallel.stages=2").positions
    each = max(p.total_bytes for p in two) / (1 << 30) * 1.01
    plan_of("parallel.stages=2", "launch.nodes=2", f"launch.memory_gib={each}")
    with pytest.raises(PlanError, match="node 0 needs"):
        plan_of("parallel.stages=2", "launch.nodes=1", f"launch.memory_gib={each}")


@pytest.mark.parametrize(("replicas", "threads"), [(1, 0), (2, 0), (4, 1)])
def test_the_table_of_a_refusal_adds_up_to_what_it_says(replicas: int, threads: int) -> None:
    sets = (f"parallel.replicas={replicas}", "parallel.stages=2", f"parallel.threads={threads}")
    with pytest.raises(PlanError, match="node 0 needs") as caught:
        plan_of(*sets, "train.batch=8", "train.microbatch=1", "launch.memory_gib=0.001")
    text = str(caught.value)
    said = re.search(r"node 0 needs \d+ bytes \(([^)]*)\)", text)
    assert said
    assert text.splitlines()[-1].endswith(f" {said[1]}")


def test_a_budget_of_the_host_does_not_count_what_lies_on_devices() -> None:
    position = plan_of().positions[0]
    slots = (position.bytes_by_kind["slots"] + RUNTIME_BYTES) / (1 << 30)
    assert position.total_bytes / (1 << 30) > 1.05 * slots
    plan_of("parallel.device=cuda", f"launch.memory_gib={1.01 * slots}")
    with pytest.raises(PlanError, match=r"raise launch\.memory_gib") as caught:
        plan_of("parallel.device=cuda", f"launch.memory_gib={0.99 * slots}")
    assert "activations" not in str(caught.value)
