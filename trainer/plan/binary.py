"""A plan's file. The format's manual is ``engine/wire/plan.h``, its records and its reader are in ``trainer/wire``.

``to_bytes`` is canonical: equal plans give equal bytes, so the file's digest names the plan.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from trainer import wire
from trainer.dataset import Mixture, samples_of
from trainer.models.base import Tensor
from trainer.plan.places import Position
from trainer.plan.records import ActionList, BoundAction, BoundCall, Channel, Config, PositionPlan, Ref
from trainer.wire.order import bases
from trainer.wire.plan import RECORDS, sections_of

Bytes = bytes | memoryview
_ACTION = np.dtype(wire.PlanAction)


class _Strings:
    """Names, one after the other, each stored once."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.places: dict[str, tuple[int, int]] = {}

    def add(self, text: str) -> tuple[int, int]:
        if text not in self.places:
            raw = text.encode()
            self.places[text] = (len(self.bytes), len(raw))
            self.bytes += raw
        return self.places[text]


def to_bytes(
    config: Config,
    tensors: Sequence[Tensor],
    shards: Sequence[int],
    positions: Sequence[PositionPlan],
    channels: Sequence[Channel],
    mix: Mixture | None = None,
) -> bytes:
    """The file of a plan of these. Beside the file itself it takes the memory of one position's actions."""
    strings = _Strings()
    tables: dict[str, list[bytes]] = {name: [] for name in wire.SECTIONS if name not in ("strings", "actions")}
    tables["config"].append(bytes(_config(config)))
    tables["tensors"] = [bytes(_tensor(tensor, strings)) for tensor in tensors]
    samples = 0
    for tokens in shards:
        tables["shards"].append(bytes(wire.PlanShard(tokens=tokens, first_sample=samples)))
        samples += max(0, tokens - 1) // config.sequence
    if mix is not None:
        tables["parts"], tables["weights"] = _mixture(config, shards, mix)
    actions = _Actions()
    for position in positions:
        tables["positions"].append(bytes(_position(position, tables, actions, strings)))
    for channel in channels:
        record = wire.PlanChannel(to=channel.target, kind=channel.kind, across=channel.across, bytes=channel.bytes)
        record.from_ = channel.source
        tables["channels"].append(bytes(record))
    counts = {name: len(records) for name, records in tables.items()}
    counts |= {"strings": len(strings.bytes), "actions": actions.count}
    sections: dict[str, Iterable[Bytes]] = {**tables, "strings": [bytes(strings.bytes)], "actions": actions.records()}
    return _file(counts, sections)


def _mixture(config: Config, shards: Sequence[int], mix: Mixture) -> tuple[list[bytes], list[bytes]]:
    """The records of its parts and weights."""
    parts, first_shard, first_sample = [], 0, 0
    for (digest, count), own in zip(mix.parts, mix.shards_of(shards), strict=True):
        samples = samples_of(own, config.sequence)
        record = wire.PlanPart(first_shard=first_shard, shards=count, first_sample=first_sample, samples=samples)
        record.digest[:] = bytes.fromhex(digest)
        parts.append(bytes(record))
        first_shard, first_sample = first_shard + count, first_sample + samples
    batch = config.replicas * config.microbatches * config.microbatch
    weights = [
        bytes(wire.PlanWeight(phase.from_batch, base, part, weight))
        for phase, used in zip(mix.phases, bases(mix.phases, batch), strict=True)
        for part, (base, weight) in enumerate(zip(used, phase.weights, strict=True))
    ]
    return parts, weights


class _Actions:
    """The action lists of all positions, noted as they come, made into records when they are written."""

    def __init__(self) -> None:
        self.count = 0
        self.lists: list[tuple[Sequence[BoundAction], Position, dict[str, int]]] = []

    def add(self, actions: Sequence[BoundAction], position: Position, programs: dict[str, int]) -> tuple[int, int]:
        """First record and number of records of a list."""
        self.lists.append((actions, position, programs))
        first, self.count = self.count, self.count + len(actions)
        return first, len(actions)

    def records(self) -> Iterator[Bytes]:
        """The records of one list after the other."""
        for actions, position, programs in self.lists:
            listed = ActionList.of(actions)
            patterns = b"".join(bytes(_action(action, position, programs)) for action in listed.patterns)
            out = np.frombuffer(patterns, _ACTION).take(listed.which)
            out["microbatch"] = listed.microbatch.view(np.uint32)  # -1, no number, is NONE32
            out["slot"] = listed.slot.view(np.uint32)
            yield out.view(np.uint8).data


def _file(counts: dict[str, int], sections: dict[str, Iterable[Bytes]]) -> bytes:
    version = wire.PLAN_VERSION if counts["parts"] else wire.PLAN_PLAIN
    names = wire.SECTIONS[: sections_of(version)]
    header = wire.PlanHeader(version=version, sections=len(names))
    header.magic[:] = wire.PLAN_MAGIC
    end = ctypes.sizeof(header)
    for number, name in enumerate(names):
        record = RECORDS.get(name)
        header.section[number].offset, header.section[number].count = _up(end), counts[name]
        end = _up(end) + counts[name] * (1 if record is None else ctypes.sizeof(record))
    header.file_bytes = _up(end)
    file, digest = io.BytesIO(), hashlib.sha256()

    def write(data: Bytes) -> None:
        file.write(data)
        digest.update(data)

    file.write(bytes(header)[:64])
    write(bytes(header)[64:])
    for section, name in zip(header.section, names, strict=False):
        write(bytes(section.offset - file.tell()))
        for data in sections[name]:
            write(data)
    write(bytes(header.file_bytes - file.tell()))
    file.seek(wire.PlanHeader.digest.offset)
    file.write(digest.digest())
    return file.getvalue()  # the buffer itself, not a copy


def _up(size: int) -> int:
    return -(-size // 64) * 64


def _config(c: Config) -> wire.PlanConfig:
    record = wire.PlanConfig()
    for name in c.__dataclass_fields__:
        value = getattr(c, name)
        if name in ("dataset_digest", "what_digest"):
            getattr(record, name)[:] = value
        else:
            setattr(record, name, int(value) if isinstance(value, bool) else value)
    return record


def _tensor(tensor: Tensor, strings: _Strings) -> wire.PlanTensor:
    offset, length = strings.add(tensor.name)
    record = wire.PlanTensor(
        name_offset=offset,
        name_length=length,
        rank=len(tensor.shape),
        decay=int(tensor.decay),
        elements=tensor.elements,
    )
    record.shape[:] = (*tensor.shape, 1, 1, 1, 1)[:4]
    return record


def _or64(value: int | None) -> int:
    return wire.NONE64 if value is None else value


def _or32(value: int | None) -> int:
    return wire.NONE32 if value is None else value


def _position(p: PositionPlan, tables: dict[str, list[bytes]], lists: _Actions, strings: _Strings) -> wire.PlanPosition:
    record = wire.PlanPosition(
        position=p.position,
        step_prefix=p.step_prefix,
        step_checks=p.step_checks,
        arena_bytes=p.arena_bytes,
        act_offset=p.act_offset,
        act_stride=p.act_stride,
        act_slots=p.act_slots,
        mb_count=p.mb_count,
        mb_offset=p.mb_offset,
        mb_stride=p.mb_stride,
        tokens_offset=_or64(p.tokens_offset),
        targets_offset=_or64(p.targets_offset),
        loss_offset=_or64(p.loss_offset),
        sumsq_offset=_or64(p.sumsq_offset),
        control_offset=_or64(p.control_offset),
        logits_offset=_or64(p.logits_offset),
        slot_bytes=p.slot_bytes,
        first_state=len(tables["states"]),
        states=len(p.states),
    )
    for state in p.states:
        tables["states"].append(
            bytes(
                wire.PlanState(
                    tensor=state.tensor,
                    pieces=state.pieces,
                    master_offset=state.master,
                    m_offset=_or64(state.m),
                    v_offset=_or64(state.v),
                    grad_offset=_or64(state.grad),
                    slot_offset=state.slot,
                )
            )
        )
    numbers: dict[str, int] = {}
    for name, program in p.programs.items():
        numbers[name] = len(tables["programs"])
        offset, length = strings.add(program.name)
        first = len(tables["calls"])
        tables["calls"] += [bytes(_call(call)) for call in program.calls]
        tables["programs"].append(
            bytes(wire.PlanProgram(first_call=first, calls=len(program.calls), name_offset=offset, name_length=length))
        )
    for name in ("init", "load", "step", "redo"):
        first, count = lists.add(getattr(p, name), p.position, numbers)
        setattr(record, f"first_{name}", first)
        setattr(record, f"{name}s", count)
    record.bytes_by_kind[:] = [p.bytes_by_kind[kind] for kind in wire.MEMORY_KINDS]
    return record


def _ref(ref: Ref | None) -> tuple[int, int, int, int]:
    return (wire.SPACE_NONE, 0, 0, 0) if ref is None else (ref.space, ref.across, ref.offset, ref.bytes)


def _call(call: BoundCall) -> wire.PlanCall:
    """The record, its fields by their places: a large plan has a hundred thousand calls."""
    kernel = wire.KERNELS[call.kernel].number
    return wire.PlanCall(kernel, call.dtype, _or32(call.layer), tuple(map(_ref, call.ptr)), call.dim, call.real)


def _action(action: BoundAction, position: Position, programs: dict[str, int]) -> wire.PlanAction:
    return wire.PlanAction(
        kind=action.kind,
        op=ord(action.op),
        program=wire.NONE32 if action.program is None else programs[action.program],
        channel=_or32(action.channel),
        stage=position if action.stage is None else action.stage,
        microbatch=_or32(action.microbatch),
        slot=_or32(action.slot),
        ref=wire.PlanRef(*_ref(action.ref)),
    )
