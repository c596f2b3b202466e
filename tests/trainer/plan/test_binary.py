"""The plan file: canonical, read back, and what is cut, flipped or of another version refused, here and there."""

from __future__ import annotations

import ctypes
import hashlib
import random
import subprocess
from pathlib import Path

import pytest

from trainer import wire
from trainer.dataset import DatasetRef
from trainer.engine_path import engine_binary
from trainer.plan import Plan, compile_plan
from trainer.spec import parse_spec, what_digest
from trainer.wire.plan import parse
from trainer.wire.unreadable import Unreadable

DATA = DatasetRef("ab" * 32, 300, 2, (10_000, 5_000), "cd" * 32)


def plan_of(*sets: str, mode: str = "train") -> Plan:
    tree = {
        "name": "small",
        "model": {"family": "llama", "layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "context": 64},
        "train": {"steps": 10, "batch": 4, "microbatch": 2, "sequence": 16},
    }
    spec = parse_spec(tree, sets).resolve(DATA)
    return compile_plan(spec, DATA, what_digest(spec, DATA), "infer" if mode == "infer" else "train")


def check(path: Path, data: bytes) -> subprocess.CompletedProcess[str]:
    path.write_bytes(data)
    return subprocess.run(
        [engine_binary(), "check-plan", path], capture_output=True, text=True, timeout=60, check=False
    )


def test_equal_specs_give_equal_bytes() -> None:
    one, two = plan_of("parallel.stages=2"), plan_of("parallel.stages=2")
    assert one.to_bytes() == two.to_bytes()
    assert one.digest == two.digest == parse(one.to_bytes()).digest
    assert plan_of("train.seed=1", "parallel.stages=2").digest != one.digest


@pytest.mark.parametrize("stages", [1, 3])
def test_a_file_reads_back(stages: int) -> None:
    plan = plan_of(f"parallel.stages={stages}", "train.precision=bf16")
    file = parse(plan.to_bytes())
    assert [file.name(t) for t in file.records("tensors", wire.PlanTensor)] == [t.name for t in plan.tensors]
    assert [s.tokens for s in file.records("shards", wire.PlanShard)] == [10_000, 5_000]
    assert [s.first_sample for s in file.records("shards", wire.PlanShard)] == [0, 624]
    config = file.config
    assert (config.positions, config.microbatches, config.vocab, config.dtype) == (stages, 2, 300, wire.BF16)
    assert config.data_samples == 624 + 312
    assert bytes(config.dataset_digest).hex() == "ab" * 32
    positions = file.records("positions", wire.PlanPosition)
    actions = file.records("actions", wire.PlanAction)
    programs = file.records("programs", wire.PlanProgram)
    calls = file.records("calls", wire.PlanCall)
    for record, position in zip(positions, plan.positions, strict=True):
        assert (record.states, record.inits, record.loads, record.steps) == (
            len(position.states),
            len(position.init),
            len(position.load),
            len(position.step),
        )
        step = actions[record.first_step : record.first_step + record.steps]
        for raw, action in zip(step, position.step, strict=True):
            number = position.position if action.stage is None else action.stage
            assert (raw.kind, chr(raw.op), raw.stage) == (action.kind, action.op, number)
            if action.program is not None:
                program = programs[raw.program]
                assert file.name(program) == position.programs[action.program].name
                bound = position.programs[action.program].calls
                got = calls[program.first_call : program.first_call + program.calls]
                assert [c.kernel for c in got] == [wire.KERNELS[b.kernel].number for b in bound]
                assert [list(c.dim)[: len(b.dim)] for c, b in zip(got, bound, strict=True)] == [
                    list(b.dim) for b in bound
                ]


@pytest.mark.parametrize("damage", ["cut", "grown", "flipped", "magic", "version", "empty"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    data = bytearray(plan_of().to_bytes())
    if damage == "cut":
        del data[-1:]
    elif damage == "grown":
        data += b"\0"
    elif damage == "empty":
        data.clear()
    else:
        data[{"flipped": len(data) // 2, "magic": 0, "version": 8}[damage]] ^= 1
    with pytest.raises(Unreadable, match="compile it again"):
        parse(bytes(data))
    engine = check(tmp_path / "plan", bytes(data))
    assert engine.returncode == 78
    assert len(engine.stderr.strip().splitlines()) == 1 or len(engine.stdout.strip().splitlines()) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_engine_takes_every_plan(tmp_path: Path, family: str, precision: str) -> None:
    over = [f"model.family={family}", f"train.precision={precision}"]
    over += ["model.kv_heads=4"] if family == "gpt2" else []
    plans = [plan_of(*over, mode="infer")]
    for stages in (1, 2, 4):
        for tied in ("true", "false"):
            for schedule in ("1f1b", "gpipe"):
                plans.append(
                    plan_of(*over, f"parallel.stages={stages}", f"model.tied={tied}", f"parallel.schedule={schedule}")
                )
    for plan in plans:
        result = check(tmp_path / "plan", plan.to_bytes())
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_engine_survives_flipped_numbers(tmp_path: Path) -> None:
    """Bytes changed and the digest made to fit again: refused with 78 or taken, never a crash."""
    good = plan_of("parallel.stages=2").to_bytes()
    source = random.Random(3)
    header = ctypes.sizeof(wire.PlanHeader)
    digest_at = wire.PlanHeader.digest.offset
    codes = set()
    for _ in range(120):
        data = bytearray(good)
        for _ in range(source.randint(1, 3)):
            data[source.randrange(64 if source.random() < 0.2 else header, len(data))] = source.randrange(256)
        data[digest_at : digest_at + 32] = hashlib.sha256(data[64:]).digest()
        codes.add(check(tmp_path / "plan", bytes(data)).returncode)
    assert codes <= {0, 78}
    assert 78 in codes
