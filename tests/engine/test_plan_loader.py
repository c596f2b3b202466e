"""The engine refuses a plan that does not hold: exit 78, one line that names the failure, never a crash."""

from __future__ import annotations

import random
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checkpoint.layout import PlanRefused, read_plan
from tests.engine.engine_build import engine
from tests.engine.plans import GPT2, LLAMA, edited, mixture, replicated, sealed, small_plan
from trainer import wire
from trainer.errors import SpecError
from trainer.wire.order import MixPhase
from trainer.wire.plan import parse

__all__ = ["engine"]  # the fixture

Check = Callable[[bytes], tuple[int, str]]


@pytest.fixture
def check(engine: Path, tmp_path: Path) -> Check:
    """Gives bytes to ``check-plan``: its exit code and what it said."""

    def run(data: bytes) -> tuple[int, str]:
        path = tmp_path / "plan"
        path.write_bytes(data)
        done = subprocess.run([engine, "check-plan", path], capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    return run


@pytest.fixture(scope="module")
def good() -> bytes:
    return small_plan(stages=2).to_bytes()


@pytest.fixture(scope="module")
def pair() -> bytes:
    return replicated()


def _set(**values: Any) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        for name, value in values.items():
            setattr(record, name, value)

    return change


def test_a_plan_without_a_mixture_is_as_ever_and_one_with_it_is_of_a_newer_version(check: Check, good: bytes) -> None:
    mixed = mixture()
    assert check(mixed) == (0, "")
    heads = [wire.PlanHeader.from_buffer_copy(data) for data in (good, mixed)]
    assert [(head.version, head.sections) for head in heads] == [(2, 10), (3, 12)]
    assert bytes(good[224:256]) == bytes(32)
    with pytest.raises(PlanRefused, match="other sections than its version"):
        read_plan(relabelled(mixed, 2))
    for data, version, words in (
        (mixed, 2, "12 sections, this version has 10"),
        (good, 3, "10 sections, this version has 12"),
    ):
        code, said = check(relabelled(data, version))
        assert (code, words in said) == (78, True), said
    whole = (MixPhase(1, (1, 1, 1)), *(MixPhase(step, (step % 7, 1, 65_000)) for step in range(2, 257)))
    assert check(mixture(*whole)) == (0, "")
    assert read_plan(mixture(*whole)).data is not None


@pytest.mark.parametrize(
    ("model", "train", "words"),
    [
        ({"width": 512, "heads": 1}, {}, ""),
        ({"width": 1026, "heads": 2}, {}, "width / heads = 513 elements; attention takes at most 512: take heads = 3"),
        (LLAMA | {"head_size": 512}, {}, ""),
        (LLAMA | {"head_size": 514}, {}, "model.head_size 514 must be at most 512"),
        ({}, {"optimizer": {"clip": 1e30, "beta1": 0.999999999, "beta2": 0.999999999, "eps": 1e-37}}, ""),
        ({}, {"optimizer": {"clip": 1.1e30}}, "clip 1.1e+30 must be at most 1e+30"),
        ({}, {"optimizer": {"beta1": 1 - 1e-10}}, "beta1 0.9999999999 must be at most 0.999999999"),
        ({}, {"optimizer": {"beta2": 1 - 1e-10}}, "beta2 0.9999999999 must be at most 0.999999999"),
        ({}, {"optimizer": {"eps": 1e-46}}, "eps 1e-46 must be at least 1e-37"),  # 0 in float32, and 0 / 0 a step later
        ({"norm_eps": 1e-46}, {}, "norm_eps 1e-46 must be at least 1e-37"),
        ({}, {"batch": 1 << 20, "microbatch": 1 << 20}, ""),
        ({}, {"batch": 1 << 21, "microbatch": 1 << 21}, "microbatch 2097152 must be at most 1048576"),
    ],
)
def test_what_a_spec_takes_at_its_limits_the_engine_takes(
    check: Check, model: dict[str, Any], train: dict[str, Any], words: str
) -> None:
    """A run that the loader refuses has been launched, and is told to be compiled again."""
    if words:
        with pytest.raises(SpecError, match=re.escape(words)):
            small_plan(model=GPT2 | model, **train)
    else:
        assert check(small_plan(model=GPT2 | model, **train).to_bytes()) == (0, "")


def relabelled(data: bytes, version: int) -> bytes:
    changed = bytearray(data)
    changed[8:12] = version.to_bytes(4, "little")
    return sealed(changed)


MIXED: list[tuple[str, Any, int, Callable[[Any], None], str]] = [
    ("parts", wire.PlanPart, 0, _set(first_shard=1), "part 0: 4 shards from 1 on; those before end at 0 of 12"),
    ("parts", wire.PlanPart, 1, _set(shards=0), "part 1: 0 shards from 4 on"),
    ("parts", wire.PlanPart, 1, _set(shards=1 << 31), "part 1: 2147483648 shards"),
    ("parts", wire.PlanPart, 2, _set(shards=1), "part 2: 2 samples from 10 on; its shards have those from 10 to 11"),
    ("parts", wire.PlanPart, 1, _set(first_sample=5), "part 1: 6 samples from 5 on"),
    ("parts", wire.PlanPart, 1, _set(samples=1 << 60), "part 1: 1152921504606846976 samples"),
    ("parts", wire.PlanPart, 0, _set(reserved=1), "part 0: reserved is not 0"),
    ("weights", wire.PlanWeight, 0, _set(weight=1 << 20), "phase 0: its weights are 1048578 in all, outside 1..65536"),
    ("weights", wire.PlanWeight, 0, _set(from_batch=2), "phase 0 begins with batch 2, outside 1..1"),
    ("weights", wire.PlanWeight, 1, _set(from_batch=2), "phase 0, part 1: it says part 1 from batch 2"),
    ("weights", wire.PlanWeight, 1, _set(part=7), "phase 0, part 1: it says part 7"),
    ("weights", wire.PlanWeight, 0, _set(base=1), "phase 0, part 0: it says part 0 from batch 1 and place 1 on"),
    ("weights", wire.PlanWeight, 3, _set(from_batch=1), "phase 1 begins with batch 1, outside 2..1099511627776"),
    ("weights", wire.PlanWeight, 3, _set(from_batch=1 << 62), "phase 1 begins with batch 4611686018427387904"),
    ("weights", wire.PlanWeight, 3, _set(base=0), "phase 1, part 0: it says part 0 from batch 3 and place 0 on"),
    ("weights", wire.PlanWeight, 2, _set(weight=3), "phase 1, part 2: it says part 2 from batch 3 and place 4 on"),
]


@pytest.mark.parametrize(("section", "kind", "record", "change", "words"), MIXED, ids=[row[4] for row in MIXED])
def test_a_mixture_that_does_not_hold_is_refused_by_engine_and_agent(
    check: Check, section: str, kind: Any, record: int, change: Callable[[Any], None], words: str
) -> None:
    data = edited(mixture(), section, record, kind, change)
    code, said = check(data)
    assert code == 78
    assert words in said
    if "reserved" not in words:
        with pytest.raises(PlanRefused):
            read_plan(data)


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_compiled_plans_are_taken(check: Check, stages: int, model: dict[str, Any], precision: str) -> None:
    assert check(small_plan(stages=stages, model=model, precision=precision).to_bytes()) == (0, "")


@pytest.mark.parametrize(("stages", "schedule"), [(4, "interleaved-1f1b"), (3, "gpipe")])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_compiled_plans_with_several_stages_a_position_are_taken(
    check: Check, stages: int, schedule: str, model: dict[str, Any]
) -> None:
    parallel = {"chunks": 2, "schedule": schedule}
    plan = small_plan(stages=stages, model=model | {"layers": 4}, parallel=parallel)
    assert len(plan.positions) == 2
    assert check(plan.to_bytes()) == (0, "")


@pytest.mark.parametrize("mode", ["infer", "losses"])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_compiled_inference_plans_are_taken(check: Check, model: dict[str, Any], mode: str) -> None:
    assert check(small_plan(model=model, mode=mode).to_bytes()) == (0, "")


@pytest.mark.parametrize(("mode", "field"), [("infer", "logits_offset"), ("losses", "loss_offset")])
def test_inference_gives_one_of_logits_and_losses(check: Check, mode: str, field: str) -> None:
    plan = small_plan(mode=mode).to_bytes()
    code, words = check(edited(plan, "positions", 0, wire.PlanPosition, _set(**{field: 2**64 - 1})))
    assert code == 78
    assert "not with one of logits and losses" in words


@pytest.mark.parametrize(("replicas", "stages", "precision"), [(2, 1, "bf16"), (4, 2, "fp32")])
def test_compiled_plans_of_several_replicas_are_taken(check: Check, replicas: int, stages: int, precision: str) -> None:
    data = replicated(replicas, stages, precision)
    assert check(data) == (0, "")
    assert any(state.pieces == replicas for state in parse(data).records("states", wire.PlanState))


@pytest.mark.parametrize("shared", [1, 2])
def test_compiled_plans_of_a_head_in_blocks_are_taken(check: Check, shared: int) -> None:
    plan = small_plan(stages=2, parallel={"vocab_stages": shared}, vocab_blocks=2)
    assert check(plan.to_bytes()) == (0, "")


def test_cut_at_every_section_and_around(check: Check, good: bytes) -> None:
    header = wire.PlanHeader.from_buffer_copy(good)
    places = {0, 1, 63, 64, 223, len(good) - 1} | {s.offset + d for s in header.section for d in (-1, 0, 1)}
    for place in sorted(p for p in places if p < len(good)):
        code, words = check(good[:place])
        assert code == 78, (place, words)
        assert "refused" in words or "cannot be read" in words


def test_a_longer_file_is_refused(check: Check, good: bytes) -> None:
    code, words = check(good + b"\0" * 64)
    assert code == 78
    assert "cut or grown" in words


@pytest.mark.parametrize(("version", "mend"), [(7, ""), (1, "compile it again")])
def test_another_version_is_named(check: Check, good: bytes, version: int, mend: str) -> None:
    data = bytearray(good)
    data[8:12] = version.to_bytes(4, "little")
    code, words = check(sealed(data))
    assert code == 78
    assert f"version {version}, this engine reads 2" in words
    assert mend in words


def test_a_missing_file_is_refused(engine: Path, tmp_path: Path) -> None:
    done = subprocess.run([engine, "check-plan", tmp_path / "no"], capture_output=True, text=True, check=False)
    assert done.returncode == 78
    assert "No such file" in done.stderr


def test_a_flipped_bit_anywhere_is_refused(check: Check, good: bytes) -> None:
    dice = random.Random(1)
    for _ in range(100):
        data = bytearray(good)
        at = dice.randrange(len(data))
        data[at] ^= 1 << dice.randrange(8)
        code, words = check(bytes(data))
        assert code == 78, (at, words)


def _ref(operand: int, **values: Any) -> Callable[[Any], None]:
    def change(call: Any) -> None:
        _set(**values)(call.ptr[operand])

    return change


def _ref_of(**values: Any) -> Callable[[Any], None]:
    def change(action: Any) -> None:
        _set(**values)(action.ref)

    return change


def _dim(number: int, value: int) -> Callable[[Any], None]:
    def change(call: Any) -> None:
        call.dim[number] = value

    return change


def _find(data: bytes, section: str, kind: Any, wanted: Callable[[Any], bool]) -> int:
    header = wire.PlanHeader.from_buffer_copy(data)
    part = header.section[wire.SECTIONS.index(section)]
    records = (kind * part.count).from_buffer_copy(data, part.offset)
    return next(number for number, record in enumerate(records) if wanted(record))


CONFIG, TENSOR, POSITION, STATE = wire.PlanConfig, wire.PlanTensor, wire.PlanPosition, wire.PlanState
CALL, ACTION, CHANNEL, PROGRAM, SHARD = (
    wire.PlanCall,
    wire.PlanAction,
    wire.PlanChannel,
    wire.PlanProgram,
    wire.PlanShard,
)

REFUSALS: list[tuple[str, Any, Callable[[Any], bool] | None, Callable[[Any], None], str]] = [
    ("config", CONFIG, None, _set(mode=9), "config mode is 9"),
    ("config", CONFIG, None, _set(token_bytes=3), "token_bytes is 3"),
    ("config", CONFIG, None, _set(dtype=5), "config dtype is 5, not f32 (1), bf16 (2) or fp8 (7)"),
    ("config", CONFIG, None, _set(dtype=8), "config dtype is 8, outside 1..7"),
    ("config", CONFIG, None, _set(numerics_version=3), "config numerics_version is 3, and dtype 1 has 1"),
    ("config", CONFIG, None, _set(numerics_version=9), "config numerics_version is 9, outside 1..3"),
    ("config", CONFIG, None, _set(replicas=0), "config replicas is 0, outside 1..65536"),
    ("config", CONFIG, None, _set(replicas=2), "1 reduction groups and 2 replicas of 2 microbatches"),
    ("config", CONFIG, None, _set(reduction_groups=4), "4 reduction groups and 1 replicas of 2 microbatches"),
    ("config", CONFIG, None, _set(reduction_groups=3), "both are powers of two"),
    ("config", CONFIG, None, _set(reserved0=1), "config: reserved is not zero"),
    ("config", CONFIG, None, _set(beta1=1.0), "beta1 1"),
    ("config", CONFIG, None, _set(lr=float("nan")), "lr nan"),
    ("config", CONFIG, None, _set(positions=3), "3 positions, the table has 2"),
    ("config", CONFIG, None, _set(data_samples=5), "data_samples is 5, the shards have 12"),
    ("shards", SHARD, None, _set(tokens=1 << 60), "shard 0"),
    ("tensors", TENSOR, None, _set(elements=7), "7 elements, its shape has"),
    ("tensors", TENSOR, None, _set(rank=5), "rank 5"),
    ("tensors", TENSOR, None, _set(name_offset=1 << 30), "its name at"),
    ("tensors", TENSOR, None, _set(name_length=0), "has no name"),
    ("positions", POSITION, None, _set(arena_bytes=1 << 60), "an arena of"),
    ("positions", POSITION, None, _set(arena_bytes=4096), "passes the arena"),
    ("positions", POSITION, None, _set(act_stride=1 << 62), "act area"),
    ("positions", POSITION, None, _set(tokens_offset=1 << 40), "tokens at"),
    ("positions", POSITION, None, _set(slot_bytes=64), "slot_bytes 64, its states take"),
    ("positions", POSITION, None, _set(first_step=1 << 31), "step actions"),
    ("positions", POSITION, None, _set(first_redo=1 << 31, redos=1), "redo actions"),
    ("positions", POSITION, None, _set(step_prefix=1000), "a prefix of 1000 and a check of 0 of"),
    ("positions", POSITION, None, _set(reserved0=1), "position 0: reserved is not 0"),
    ("positions", POSITION, None, _set(step_prefix=1), "a prefix of 1, a check of 0 and a redo of 0 actions"),
    ("positions", POSITION, None, _set(step_prefix=2, step_checks=1000), "a prefix of 2 and a check of 1000 of"),
    ("states", STATE, None, _set(pieces=0), "in 0 pieces of 1 replicas"),
    ("states", STATE, None, _set(pieces=2), "in 2 pieces of 1 replicas"),
    ("states", STATE, None, _set(tensor=999), "tensor 999"),
    ("states", STATE, None, _set(tensor=1), "is owned by positions"),
    ("states", STATE, None, _set(master_offset=1 << 50), "passes the arena"),
    ("states", STATE, None, _set(slot_offset=1 << 45), "slot_offset"),
    ("programs", PROGRAM, None, _set(first_call=1 << 20), "program 0: calls"),
    ("calls", CALL, None, _set(kernel=99), "no kernel 99"),
    ("calls", CALL, None, _set(dtype=3), "dtype 3"),
    ("calls", CALL, lambda c: c.kernel == 9, _ref(0, bytes=4), "its reference holds 4"),
    ("calls", CALL, lambda c: c.kernel == 9, _ref(0, offset=1 << 40), "passes its space"),
    ("calls", CALL, lambda c: c.kernel == 9, _ref(0, across=1), "a reference across 1 of 1 replicas"),
    ("calls", CALL, lambda c: c.kernel == 9, _ref(0, space=5), "no space 5"),
    ("calls", CALL, lambda c: c.kernel == 9, _ref(0, space=wire.SPACE_PIECE, across=1), "across 1 of 1 replicas"),
    ("calls", CALL, lambda c: c.kernel == 9, _ref(2, space=0, offset=0, bytes=0), "operand 2 is missing"),
    ("calls", CALL, lambda c: c.kernel == 9, _dim(2, 1 << 62), "call"),
    ("calls", CALL, lambda c: c.kernel == 9, _dim(15, 1), "unused dim 15"),
    ("calls", CALL, lambda c: c.kernel == 1, _ref(1, space=1, offset=0), "is not this position's tokens"),
    ("calls", CALL, lambda c: c.kernel == 1, _dim(2, 29), "a vocabulary of 29, the plan's is 30"),
    ("positions", POSITION, None, _set(targets_offset=0), "targets at 0 lie over tokens at 0"),
    ("calls", CALL, lambda c: c.kernel == 3, _ref(1, space=wire.SPACE_MB, offset=0), "it writes mean at 0"),
    ("calls", CALL, lambda c: c.kernel == 26, _ref(5, offset=0), "operand ctl is not its control block"),
    ("positions", POSITION, None, _set(position=1), "position 0: it says 1"),
    ("actions", ACTION, None, _set(kind=77), "no kind 77"),
    ("actions", ACTION, lambda a: a.op == ord("F"), _set(stage=65536), "stage 65536 in the list of position 0"),
    ("actions", ACTION, lambda a: a.kind == wire.A_REPORT, _set(stage=1), "stage 1 in the list of position 0"),
    ("actions", ACTION, lambda a: a.op == ord("F"), _set(stage=1), "runs F of stage 0, it already runs F of stage 1"),
    (
        "actions",
        ACTION,
        lambda a: a.op == ord("F") and a.kind == wire.A_SEND,
        _set(stage=1),
        "stage 1 at position 1, it already runs at position 0",
    ),
    ("actions", ACTION, None, _set(program=999), "program 999"),
    ("actions", ACTION, lambda a: a.kind == wire.A_RUN and a.slot == 0, _set(slot=99), "slot 99"),
    ("actions", ACTION, lambda a: a.kind == wire.A_RUN and a.slot == 0, _set(slot=wire.NONE32), "names none"),
    ("actions", ACTION, lambda a: a.kind == wire.A_SEND, _set(channel=99), "channel 99"),
    ("actions", ACTION, lambda a: a.kind == wire.A_SEND, _set(kind=wire.A_RECV), "does not end at position"),
    ("actions", ACTION, lambda a: a.kind == wire.A_COMBINE, _set(kind=wire.A_APPLY), "comes before"),
    ("actions", ACTION, lambda a: a.kind == wire.A_DECIDE, _set(kind=wire.A_COMBINE), "its block takes"),
    ("actions", ACTION, lambda a: a.kind == wire.A_DECIDE, _ref_of(offset=64), "of the report at 64, position 0"),
    ("actions", ACTION, lambda a: a.kind == wire.A_DECIDE, _set(kind=wire.A_MERGE), "kind 9 of the report at"),
    ("actions", ACTION, lambda a: a.kind == wire.A_SNAPSHOT, _set(kind=wire.A_COUNT), "no kind 13"),
    ("actions", ACTION, lambda a: a.kind == wire.A_APPLY, _ref_of(offset=0), "it applies what is not position 0's"),
    ("channels", CHANNEL, None, _set(to=7), "channel 0"),
    ("channels", CHANNEL, None, _set(bytes=4), "carries 4"),
    ("channels", CHANNEL, None, _set(kind=10), "kind 10"),
    ("channels", CHANNEL, None, _set(kind=wire.CH_REDUCE), "kind 7 at position 1 across 0 of 1 replicas"),
    ("channels", CHANNEL, None, _set(across=1), "across 1"),
    ("channels", CHANNEL, None, _set(to=1, across=1), "at position 1 across 1 of 1 replicas"),
]


@pytest.mark.parametrize(("section", "kind", "wanted", "change", "words"), REFUSALS, ids=[r[4] for r in REFUSALS])
def test_each_check_names_what_it_found(
    check: Check,
    good: bytes,
    section: str,
    kind: Any,
    wanted: Callable[[Any], bool] | None,
    change: Callable[[Any], None],
    words: str,
) -> None:
    record = _find(good, section, kind, wanted) if wanted else 0
    code, said = check(edited(good, section, record, kind, change))
    assert code == 78
    assert words in said
    assert said.count("\n") == 1


def _optimistic(change: Callable[[Any], None], of: Callable[[Any], bool]) -> Callable[[bytes], bytes]:
    """What changes the first action of a kind in a plan."""

    def edit(data: bytes) -> bytes:
        return edited(data, "actions", _find(data, "actions", ACTION, of), ACTION, change)

    return edit


def _longer(record: int, **more: int) -> Callable[[bytes], bytes]:
    """What adds to fields of a position."""

    def change(position: Any) -> None:
        for name, value in more.items():
            setattr(position, name, getattr(position, name) + value)

    return lambda data: edited(data, "positions", record, POSITION, change)


OPTIMISTIC: list[tuple[Callable[[bytes], bytes], str]] = [
    (_longer(0, step_prefix=1), "has no place in the prefix of position 0"),
    (_longer(0, step_prefix=-1), "has no place in the check of position 0"),
    (_longer(0, step_checks=1), "has no place in the check of position 0"),
    (_longer(1, step_checks=-1), "has no place in the rest of position 1"),
    (_longer(1, step_prefix=-2, step_checks=2), "has no place in the check of position 1"),
    (_optimistic(_set(kind=wire.A_APPLY), lambda a: a.kind == wire.A_CHECK), "comes before what it needs"),
    (_optimistic(_ref_of(offset=0), lambda a: a.kind == wire.A_CHECK), "it applies what is not position 0's"),
    (_optimistic(_ref_of(offset=0), lambda a: a.kind == wire.A_FORESEE), "what it foresees lies elsewhere"),
    (_optimistic(_set(kind=wire.A_DATA), lambda a: a.kind == wire.A_SNAPSHOT), "and 0 snapshots; one each"),
]


@pytest.mark.parametrize(("edit", "words"), OPTIMISTIC, ids=[str(n) for n in range(len(OPTIMISTIC))])
def test_parts_of_an_optimistic_step(check: Check, edit: Callable[[bytes], bytes], words: str) -> None:
    good = small_plan(stages=2, parallel={"optimizer": "optimistic"}).to_bytes()
    assert check(good) == (0, "")
    code, said = check(edit(good))
    assert code == 78
    assert words in said
    assert said.count("\n") == 1


def test_a_message_of_a_prefix_has_both_its_ends_there(check: Check) -> None:
    """The last receive of position 1's prefix, and its forward, are left to what follows the check."""
    plan = small_plan(stages=2, parallel={"optimizer": "optimistic", "schedule": "gpipe"})
    position = plan.positions[1]
    end, checked = position.step_prefix, position.step_prefix + position.step_checks
    at = max(k for k in range(end) if position.step[k].kind == wire.A_RECV)
    late = [a for a in position.step[at:end] if a.op == "F"]
    prefix = [*position.step[:at], *(a for a in position.step[at:end] if a.op != "F")]
    step = (*prefix, *position.step[end:checked], *late, *position.step[checked:])
    moved = replace(position, step=step, step_prefix=len(prefix))
    code, said = check(replace(plan, positions=(plan.positions[0], moved)).to_bytes())
    assert code == 78
    assert "2 sends and 1 receives in one prefix" in said


def test_a_prefix_changes_no_gradient(check: Check) -> None:
    plan = small_plan(stages=2, parallel={"optimizer": "optimistic"})
    calls = (*plan.positions[0].programs["F"].calls, plan.positions[0].programs["B"].calls[-1])
    programs = {**plan.positions[0].programs, "F": replace(plan.positions[0].programs["F"], calls=calls)}
    code, said = check(
        replace(plan, positions=(replace(plan.positions[0], programs=programs), plan.positions[1])).to_bytes()
    )
    assert code == 78
    assert "it changes state or gradients in the prefix of position 0" in said


def test_what_goes_with_an_operand_is_missing_where_that_is_there(check: Check) -> None:
    """A bias' gradient reads what nothing else of the call does."""
    number = wire.KERNELS["linear8_wgrad"].number
    for model, taken in ((GPT2, False), (LLAMA, True)):
        data = small_plan(model=model, precision="fp8").to_bytes()
        at = _find(data, "calls", CALL, lambda call: bool(call.kernel == number))
        code, said = check(edited(data, "calls", at, CALL, _ref(6, space=0, offset=0, bytes=0)))
        assert (code == 0) == taken
        assert taken or "operand 6 is missing" in said


def _across(kind: int) -> Callable[[Any], bool]:
    return lambda action: bool(action.kind == kind and action.channel != wire.NONE32 and action.ref.space == PIECE)


def _action(kind: int) -> Callable[[Any], bool]:
    return lambda action: bool(action.kind == kind)


def _channel(kind: int) -> Callable[[Any], bool]:
    return lambda channel: bool(channel.kind == kind)


def _shrink(record: Any) -> None:
    record.ref.bytes //= 2


def _send_where_it_lands(action: Any) -> None:
    """Receives the own piece, which the exchange sends."""
    action.ref.across ^= 1


PIECE = wire.SPACE_PIECE
REFUSALS_OF_REPLICAS: list[tuple[str, Any, Callable[[Any], bool], Callable[[Any], None], str]] = [
    ("config", CONFIG, bool, _set(replicas=4), "4 replicas"),
    ("config", CONFIG, bool, _set(replicas=3), "3 replicas"),
    ("config", CONFIG, bool, _set(replicas=1), "of 1 replicas"),
    ("config", CONFIG, bool, _set(reduction_groups=1), "1 reduction groups and 2 replicas"),
    ("config", CONFIG, bool, _set(reduction_groups=32), "32 reduction groups and 2 replicas of 8 microbatches"),
    ("states", STATE, lambda s: s.pieces == 2, _set(pieces=4), "in 4 pieces of 2 replicas"),
    ("states", STATE, lambda s: s.pieces == 2, _set(pieces=1), "the tensor before ends at"),
    ("states", STATE, lambda s: s.pieces == 1, _set(pieces=2), "elements in 2 pieces of 2 replicas"),
    ("actions", ACTION, _across(wire.A_SEND), _ref_of(across=2), "across 2 of 2 replicas, in space 4"),
    ("actions", ACTION, _across(wire.A_SEND), _ref_of(space=1, across=1), "across 1 of 1 replicas, in space 1"),
    ("actions", ACTION, _across(wire.A_SEND), _ref_of(offset=1 << 40), "passes its space (4)"),
    ("actions", ACTION, _across(wire.A_SEND), _shrink, "an exchange sends"),
    ("actions", ACTION, _across(wire.A_RECV), _send_where_it_lands, "or into what it sends"),
    ("actions", ACTION, _across(wire.A_SEND), _set(microbatch=0), "an exchange sends"),
    ("actions", ACTION, _across(wire.A_SEND), _set(kind=wire.A_RECV), "do not follow one another"),
    ("actions", ACTION, _across(wire.A_RECV), _set(kind=wire.A_SEND), "do not follow one another"),
    ("actions", ACTION, _action(wire.A_COMBINE), _set(kind=wire.A_MERGE), "kind 9 of the report at"),
    ("actions", ACTION, _action(wire.A_MERGE), _set(kind=wire.A_DECIDE), "kind 10 of the report at"),
    ("actions", ACTION, _action(wire.A_MERGE), _ref_of(bytes=8), "its block takes"),
    ("actions", ACTION, _action(wire.A_DECIDE), _set(kind=wire.A_MERGE), "kind 9 of the report at"),
    ("channels", CHANNEL, _channel(wire.CH_REDUCE), _set(across=2), "across 2 of 2 replicas"),
    ("channels", CHANNEL, _channel(wire.CH_REDUCE), _set(across=0), "across 0"),
    ("channels", CHANNEL, _channel(wire.CH_REDUCE), _set(kind=wire.CH_FORWARD), "kind 1 at position 0 across 1"),
    ("channels", CHANNEL, _channel(wire.CH_REDUCE), _set(bytes=64), "carries 64"),
    ("channels", CHANNEL, _channel(wire.CH_REPORT), _set(bytes=1 << 20), "carries 1048576"),
]


@pytest.mark.parametrize(
    ("section", "kind", "wanted", "change", "words"), REFUSALS_OF_REPLICAS, ids=[r[4] for r in REFUSALS_OF_REPLICAS]
)
def test_each_check_of_replicas_names_what_it_found(
    check: Check,
    pair: bytes,
    section: str,
    kind: Any,
    wanted: Callable[[Any], bool],
    change: Callable[[Any], None],
    words: str,
) -> None:
    code, said = check(edited(pair, section, _find(pair, section, kind, wanted), kind, change))
    assert code == 78
    assert words in said
    assert said.count("\n") == 1
