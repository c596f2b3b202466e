"""A layout's step: set against the compiler's own plan where one can be made, and against what must hold anywhere."""

from __future__ import annotations

import math
import tomllib
from dataclasses import replace
from typing import Any

import pytest

from flows.show import foretell
from trainer.errors import PlanError
from trainer.plan.compile import flops_per_token
from trainer.plan.devices import SHEETS
from trainer.planner.cluster import parse_cluster
from trainer.planner.costs import costs_of
from trainer.planner.estimate import Estimate, Planner, goodput_of
from trainer.planner.layouts import Arrangement
from trainer.planner.times import DeviceTimes
from trainer.presets import PRESETS
from trainer.spec import RunSpec, parse_spec

ONE = Arrangement(positions=1, chunks=1, replicas=1, schedule="1f1b", microbatch=1, microbatches=8)


def spec_of(preset: str, *sets: str) -> RunSpec:
    spec = parse_spec(tomllib.loads(PRESETS[preset]), sets)
    return spec.resolve(foretell.stand_in(spec))


def planner_of(spec: RunSpec, cluster: dict[str, Any], sustained: float = 1.0) -> Planner:
    sheet = parse_cluster(cluster, "x")
    times = DeviceTimes.of(sheet.sheet, spec.train.precision, sustained)
    return Planner(sheet, times, {size: costs_of(spec, size) for size in (1, 2, 4, spec.train.microbatch)})


def as_written(spec: RunSpec, planner: Planner) -> Estimate:
    p = spec.parallel
    positions = p.positions(p.stages)
    return planner.estimate(
        replace(
            ONE, positions=positions, chunks=p.stages // positions, schedule=p.schedule, replicas=p.replicas,
            microbatch=spec.train.microbatch, microbatches=spec.train.microbatches // p.replicas,
            groups=spec.train.groups, recompute=p.recompute.kind, blocks=spec.train.vocab_blocks,
            head=p.vocab_stages or 1,
        ),
        whole=True,
    )  # fmt: skip


LAYOUTS = [
    ("gpt2-124m", "parallel.stages=2"),
    ("gpt2-124m", "parallel.stages=4", "parallel.schedule=gpipe", "train.batch=16"),
    ("gpt2-124m", "parallel.stages=4", "parallel.chunks=2", "parallel.schedule=interleaved-1f1b"),
    ("gpt2-124m", "parallel.stages=1", "train.precision=fp32"),
    ("gpt2-124m", "parallel.stages=1", "train.batch=4"),
    ("llama-tiny", "parallel.stages=4"),
    ("gpt2-124m", "parallel.stages=4", "parallel.chunks=2", "parallel.schedule=zb-v"),
    ("gpt2-124m", "parallel.stages=4", "parallel.schedule=zb-h1", "train.reduction_groups=1", "train.batch=16"),
    ("gpt2-124m", "parallel.stages=2", "parallel.replicas=4"),
    ("gpt2-124m", "parallel.stages=2", "parallel.recompute=layer"),
    ("gpt2-124m", "parallel.stages=3", "parallel.recompute=attention"),
    ("gpt2-124m", "parallel.stages=2", "parallel.replicas=2", "train.precision=fp32"),
]


MUON = ("gpt2-124m", "parallel.stages=2", "parallel.replicas=2", "train.optimizer.name=muon")


@pytest.mark.parametrize("preset", [*LAYOUTS, MUON], ids=lambda row: " ".join(row))
def test_memory_is_what_the_compiler_lays_out(preset: tuple[str, ...]) -> None:
    plan, spec, _ = foretell.compile_for(parse_spec(tomllib.loads(PRESETS[preset[0]]), preset[1:]), None)
    found = as_written(spec, planner_of(spec, {"nodes": 8, "device": "H100"}))
    for position, foretold in zip(plan.positions, found.memory, strict=True):
        real = position.bytes_by_kind
        assert foretold["weights"] + foretold["optimizer"] == pytest.approx(real["weights"] + real["moments"], rel=0.01)
        assert foretold["gradients"] == pytest.approx(real["gradients"], rel=0.01)
        assert foretold["activations"] == pytest.approx(real["activations"], rel=0.06)


@pytest.mark.parametrize("preset", [*LAYOUTS[:3], MUON], ids=lambda row: " ".join(row))
def test_the_step_is_what_the_compiled_plan_takes(preset: tuple[str, ...]) -> None:
    """The same sheet, without what published runs lose: within an eighth of the simulated plan, message by message."""
    plan, spec, _ = foretell.compile_for(parse_spec(tomllib.loads(PRESETS[preset[0]]), preset[1:]), None)
    found = as_written(spec, planner_of(spec, {"nodes": 1, "devices_per_node": 4, "device": "H100"}))
    real = foretell.simulate_on(plan, spec, SHEETS["H100"])
    assert found.step_s == pytest.approx(real.step_seconds, rel=0.125)
    assert found.mfu == pytest.approx(real.mfu, rel=0.125)


SHARED = [
    ("gpt2-124m", "parallel.stages=4", "parallel.vocab_stages=4"),
    ("gpt2-124m", "parallel.stages=4", "parallel.vocab_stages=2", "parallel.schedule=gpipe", "train.batch=16"),
    ("gpt2-124m", "parallel.stages=4", "parallel.vocab_stages=4", "model.tied=false", "train.reduction_groups=1"),
    ("gpt2-124m", "parallel.stages=2", "parallel.vocab_stages=2", "parallel.replicas=2"),
]


@pytest.mark.parametrize("preset", SHARED, ids=lambda row: " ".join(row))
def test_a_head_that_positions_share_is_counted(preset: tuple[str, ...]) -> None:
    """State to a hundredth; at least what the compiler holds, and not half as much again; the step as others'."""
    sets = (*preset[1:], "train.vocab_blocks=4")
    plan, spec, _ = foretell.compile_for(parse_spec(tomllib.loads(PRESETS[preset[0]]), sets), None)
    planner = planner_of(spec, {"nodes": 8, "device": "H100"})
    found = as_written(spec, planner)
    for position, foretold in zip(plan.positions, found.memory, strict=True):
        held = position.bytes_by_kind
        assert foretold["weights"] + foretold["optimizer"] == pytest.approx(held["weights"] + held["moments"], rel=0.01)
        assert foretold["gradients"] == pytest.approx(held["gradients"], rel=0.01)
        assert 0.94 * held["activations"] <= foretold["activations"] <= 1.5 * held["activations"]
    real = foretell.simulate_on(plan, spec, SHEETS["H100"])
    one = as_written(
        spec.model_copy(update={"parallel": spec.parallel.model_copy(update={"vocab_stages": 1})}), planner
    )
    alone, _, _ = foretell.compile_for(
        parse_spec(tomllib.loads(PRESETS[preset[0]]), [*sets, "parallel.vocab_stages=1"]), None
    )
    gain = real.step_seconds / foretell.simulate_on(alone, spec, SHEETS["H100"]).step_seconds
    assert found.step_s / one.step_s == pytest.approx(gain, rel=0.2)


def test_operations_and_parameters_are_the_models() -> None:
    for preset in ("gpt2-124m", "llama-tiny"):
        spec = spec_of(preset)
        costs = costs_of(spec)
        assert costs.flops_token == pytest.approx(flops_per_token(spec.model, spec.train.sequence))
        plan, _, _ = foretell.compile_for(spec, None)
        assert costs.parameters == plan.parameters


CLUSTER = {"nodes": 64, "devices_per_node": 4, "device": "GB300", "rack_nodes": 16, "nic_gbit_s": 800}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"replicas": 4, "groups": 8},
        {"positions": 4, "schedule": "zb-h1"},
        {"positions": 2, "chunks": 2, "schedule": "zb-v"},
        {"positions": 2, "tensor": 4, "context": 2, "replicas": 2, "recompute": "layer", "groups": 2},
        {"replicas": 8, "sharded": 8, "groups": 8},
    ],
)
def test_a_steps_parts_are_its_whole(change: dict[str, Any]) -> None:
    planner = planner_of(spec_of("gpt2-124m"), CLUSTER)
    found = planner.estimate(replace(ONE, **change), whole=True)
    assert math.isclose(sum(found.parts.values()), found.step_s, rel_tol=1e-9)
    assert all(seconds >= 0 for seconds in found.parts.values())
    assert 0 < found.mfu < 1
    assert 0 <= found.bubble < 1
    assert len(found.memory) == found.layout.positions
    assert planner.bound(found.layout) >= found.tokens_s


def test_each_choice_costs_and_saves_what_it_should() -> None:
    planner = planner_of(spec_of("gpt2-124m"), CLUSTER)
    base = replace(ONE, positions=4, replicas=2, groups=2)
    plain = planner.estimate(base, whole=True)
    layer = planner.estimate(replace(base, recompute="layer"), whole=True)
    part = planner.estimate(replace(base, recompute="attention"), whole=True)
    activations = [e.memory[0]["activations"] for e in (plain, part, layer)]
    assert activations == sorted(activations, reverse=True)
    assert plain.step_s < part.step_s < layer.step_s
    forward = plain.parts["compute"] / 3  # a layer's last product is not done again
    assert 0.6 * forward < layer.parts["recompute"] < forward
    four, two = (planner.estimate(replace(base, groups=groups), whole=True).memory[1] for groups in (16, 4))
    assert four["gradients"] == 2 * two["gradients"]  # 4 (log2(G / D) + 1) bytes a parameter
    assert two["gradients"] >= plain.memory[1]["gradients"] > two["gradients"] / 2  # one, and what others send
    wide = planner.estimate(replace(base, replicas=8, groups=8, microbatches=2), whole=True)
    assert plain.memory[0]["optimizer"] / 4 <= wide.memory[0]["optimizer"] < plain.memory[0]["optimizer"] / 2  # padded
    sharded = planner.estimate(replace(ONE, replicas=8, groups=8, sharded=8), whole=True)
    whole = planner.estimate(replace(ONE, replicas=8, groups=8), whole=True)
    assert sharded.memory[0]["gradients"] < whole.memory[0]["gradients"]
    split = planner.estimate(replace(base, tensor=4), whole=True)
    assert split.memory[1]["weights"] * 4 == pytest.approx(plain.memory[1]["weights"], rel=0.2)  # padded
    assert split.parts["tensor"] > 0


def test_goodput_is_dalys() -> None:
    cluster = parse_cluster({**CLUSTER, "failures_node_day": 0.01, "restart_s": 100, "checkpoint_stall_s": 2}, "x")
    rate = 64 * 0.01 / 86_400
    share, interval = goodput_of(cluster, 64, 0.5)
    assert interval == pytest.approx(math.sqrt(2 * 2 / rate), abs=0.5)  # Young's, in whole steps
    first_order = 1 - 2 / interval - rate * (interval / 2 + 100)
    assert share == pytest.approx(first_order, abs=1e-4)
    assert goodput_of(cluster, 64, 5000.0)[0] < share  # a long step loses more of itself
    worse = parse_cluster({**CLUSTER, "failures_node_day": 90, "restart_s": 100, "checkpoint_stall_s": 2}, "x")
    assert 0 < goodput_of(worse, 64, 0.5)[0] < 0.2
    never = parse_cluster({**CLUSTER, "failures_node_day": 0}, "x")
    assert goodput_of(never, 64, 0.5) == (1.0, math.inf)


def test_a_device_without_the_precision_is_refused() -> None:
    device = {"name": "old", "memory_gb": 32, "memory_gbyte_s": 900, "peak_tflops": {"fp32": 16}}
    cluster = parse_cluster({"nodes": 1, "device": device}, "x")
    with pytest.raises(PlanError, match=r"the sheet of old has no peak for bf16.*add device.peak_tflops.bf16"):
        DeviceTimes.of(cluster.sheet, "bf16")
