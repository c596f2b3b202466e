"""Plans on accelerators: sheets, memory, and a step's time by roofline."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from flows.show import foretell
from tests.support.calls import called
from trainer.errors import PlanError
from trainer.plan import Plan
from trainer.plan.devices import (
    SHEETS,
    TOGETHER,
    TOGETHER_CALLS,
    WORKSPACE_BYTES,
    busy,
    cost_of,
    fits,
    launches,
    on_device,
    on_host,
    sheet_of,
    smaller_chunks,
)
from trainer.presets import PRESETS
from trainer.spec import RunSpec, parse_spec
from trainer.wire.kernels import KERNELS

ENGINE = Path(__file__).resolve().parents[3] / "trainer" / "engine"


def compiled(preset: str, *sets: str) -> tuple[Plan, RunSpec]:
    plan, spec, _ = foretell.compile_for(parse_spec(tomllib.loads(PRESETS[preset]), sets), None)
    return plan, spec


@pytest.fixture(scope="module")
def one() -> tuple[Plan, RunSpec]:
    return compiled("gpt2-124m", "parallel.stages=1", "train.batch=32", "train.microbatch=32")


def test_the_workspace_is_the_engines() -> None:
    text = (ENGINE / "kernels" / "cuda" / "cuda.h").read_text()
    found = re.search(r"#define HS_CUDA_WORKSPACE \(UINT64_C\((\d+)\) << 20\)", text)
    assert found is not None
    assert int(found[1]) << 20 == WORKSPACE_BYTES


def test_what_goes_together_is_what_the_backend_says() -> None:
    text = (ENGINE / "kernels" / "cuda" / "cuda.h").read_text()
    listed = re.split(r"define HS_CUDA_TOGETHER_KERNELS|define X", text)[-2]
    assert tuple(re.findall(r"X\([A-Z_]+, (\w+)\)", listed)) == TOGETHER
    assert re.findall(r"define HS_CUDA_TOGETHER (\d+)", text) == [str(TOGETHER_CALLS)]


def test_calls_that_are_one_launch_are_charged_one(one: tuple[Plan, RunSpec]) -> None:
    """148 norms and 148 updates are 3 and 3; tests/engine/test_executor.py has it that the engine launches as many."""
    plan, spec = one
    (position,) = plan.positions
    step = [position.programs[str(a.program)].calls for a in position.step if a.program is not None]
    assert sum(map(len, step)) - sum(map(launches, step)) == 290
    cost = cost_of(SHEETS["H100"], spec)
    each = sum(cost.bound_seconds(call) for calls in step for call in calls)
    together = sum(cost.program_seconds(calls) for calls in step)
    assert each - together == pytest.approx(290 * cost.call_s)
    laptop = cost_of(SHEETS["LAPTOP"], spec)
    assert all(laptop.program_seconds(c) == sum(map(laptop.bound_seconds, c)) for c in step)


def test_memory_of_device_and_host_is_the_plans(one: tuple[Plan, RunSpec]) -> None:
    plan, spec = one
    (position,) = plan.positions
    device, host = on_device(position, spec), on_host(plan, position)
    arena = sum(device[kind] for kind in device if kind not in ("workspace", "context"))
    assert position.arena_bytes - 8192 < arena <= position.arena_bytes  # it is rounded up to a page, twice
    assert host["slots"] == 3 * position.slot_bytes
    assert all(value >= 0 for value in device.values())


@pytest.mark.parametrize("name", SHEETS)
def test_a_step_takes_what_its_roofline_says(one: tuple[Plan, RunSpec], name: str) -> None:
    """Neither faster than the peak allows nor slower than the smallest share that the estimate assumes."""
    plan, spec = one
    sheet = sheet_of(name.lower())
    found = foretell.simulate_on(plan, spec, sheet)
    assert sheet.attention_share / 2 < found.mfu < sheet.product_share["bf16"]
    fast = foretell.simulate_on(plan, spec, SHEETS["B200"]).step_seconds
    assert fast <= found.step_seconds or name in ("GB200", "GB300")


def test_the_rates_are_those_of_a_calls_kind(one: tuple[Plan, RunSpec]) -> None:
    cost = cost_of(SHEETS["H100"], one[1])
    filled = 512 / (4 * 132)  # tiles of 128 x 256 in 4 rounds
    product = cost.call_seconds("linear_fwd", [4096, 4096, 4096, 4096, 4096, 0], 0)
    assert product == pytest.approx(2 * 4096**3 / (filled * 0.8 * 989e12) + cost.call_s)
    attention = cost.call_seconds("attention_fwd", [1, 4096, 32, 32, 64, 1, 1, 1, 1, 0], 0)
    assert attention == pytest.approx(4 * 32 * 64 * 4096 * 4097 / 2 / (0.45 * 989e12) + cost.call_s)
    eight = cost_of(
        SHEETS["H100"], one[1].model_copy(update={"train": one[1].train.model_copy(update={"precision": "fp8"})})
    )
    dims = [4096] * KERNELS["linear8_fwd"].dims
    assert eight.call_seconds("linear8_fwd", dims, 0) == pytest.approx(
        2 * 4096**3 / (filled * 0.71 * 1979e12) + cost.call_s
    )
    same = [4096, 4096, 4096, 4096, 4096, 0]
    assert eight.call_seconds("linear_fwd", same, 0) == product, "what is not the blocks' stays bf16"
    assert cost.call_seconds("gelu_fwd", [1], 3_015_000) == pytest.approx(1e-6 + cost.call_s)


def test_tiles_that_do_not_fill_the_processors_cost_time(one: tuple[Plan, RunSpec]) -> None:
    """What docs/gpu.md has of GPT-2 124M: 4 ms, all of it of the weights' gradients."""
    sheet = SHEETS["H200"]
    plan, spec = one
    counted, filled = (
        foretell.simulate_on(plan, spec, each).step_seconds for each in (sheet, replace(sheet, processors=0))
    )
    assert 3.5e-3 < counted - filled < 4.5e-3
    assert busy("linear_wgrad", [32768, 2304, 768], 132) == 108 / 132
    assert busy("linear8_fwd", [32768, 768, 768], 132) > 0.96
    assert busy("linear_wgrad", [32768, 768, 768], 0) == busy("attention_fwd", [1] * 10, 132) == 1.0


def test_small_chunks_of_the_head_are_told() -> None:
    """Each moves the head's matrix and its gradient; from CHUNK_HERE on they are nothing."""
    sheet = SHEETS["H100"]
    small, spec = compiled("gpt2-124m", "train.microbatch=8", "train.batch=32", "train.classifier_chunk=64")
    said = smaller_chunks(small, spec, sheet)
    assert re.fullmatch(
        r"train.classifier_chunk = 64 costs \d\d ms of it: .*; 4096 would take 1\.\d GiB more for logits", said
    ), said
    large, other = compiled("gpt2-124m", "train.microbatch=8", "train.batch=32", "train.classifier_chunk=4096")
    assert smaller_chunks(large, other, sheet) == ""
    slow, fast = (foretell.simulate_on(p, s, sheet).step_seconds for p, s in ((small, spec), (large, other)))
    assert slow - fast == pytest.approx(float(said.split()[4]) * 1e-3, rel=0.1)


def test_a_plan_that_does_not_fit_is_refused_with_both_tables() -> None:
    plan, spec = compiled("llama-1b", "parallel.stages=1", "launch.nodes=1", "train.microbatch=64")
    with pytest.raises(PlanError) as error:
        fits(plan, spec, SHEETS["H100"])
    first, *table = str(error.value).splitlines()
    assert re.fullmatch(
        r"position 0 needs \d+ bytes \([\d.]+ GiB\) of a H100, which has 80000000000 \(74.5 GiB\): take more stages "
        r"\(parallel.stages\) or a smaller microbatch \(train.microbatch\)",
        first,
    )
    assert any("over the budget of 74.5 GiB" in line for line in table)
    assert any("pinned" in line for line in table)


def test_the_command(tmp_path: Path) -> None:
    spec = tmp_path / "my.toml"
    spec.write_text(PRESETS["gpt2-demo"])
    code, said = called(["plan", str(spec), "--device", "h200"])
    assert code == 0
    assert "ms foretold on H200" in said
    assert "nothing of it is measured" in said
    code, said = called(["plan", str(spec), "--device", "H200", "--json"])
    facts = json.loads(said)
    assert facts["device"] == "H200"
    assert len(facts["host_memory"]) == len(facts["memory"]) == facts["stages"]
    code, said = called(["plan", str(spec), "--device", "A100"])
    assert code == 78
    assert "there is no sheet of a device 'A100'; there are H100, H200, B200, GB200, GB300, LAPTOP" in said
