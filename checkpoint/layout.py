"""What the checkpoint side needs of a plan file: which rank keeps what of which tensor, and where it lies in a slot.

The plan compiler writes the file (``trainer/engine/wire/plan.h``), the engine runs it, ``trainer/wire/plan.py`` reads
its sections; here its records are read as hostile input, every index and offset against its table.
"""

from __future__ import annotations

import bisect
import ctypes
import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from checkpoint.digest import KINDS
from checkpoint.errors import CheckpointError
from trainer import wire
from trainer.wire.order import MixPhase, Order, bases
from trainer.wire.plan import PlanFile, parse, piece_elements
from trainer.wire.unreadable import Unreadable

MAX_REPLICAS = 1 << 16
MAX_BATCH = 1 << 40
HEADER_BYTES = ctypes.sizeof(wire.ShardHeader)
_ALIGN = 64


class PlanRefused(CheckpointError):
    """The plan file does not hold what its header says, or is not the one that was asked for."""


@dataclass(frozen=True)
class TensorInfo:
    """A state tensor in global terms. ``elements`` is the product of ``shape``."""

    name: str
    shape: tuple[int, ...]
    elements: int
    kinds: int = len(KINDS)
    """How many of KINDS its state has: all, or, where Muon takes it, the first two."""


@dataclass(frozen=True)
class StateSlot:
    """Where a rank keeps its piece of a tensor in its slot: elements [first, first + elements), maybe none.

    ``offset``: of the master weights, in bytes from the data's start; each kind has ``room`` elements, zero after the
    piece. ``saves``: whether it is this rank that stores them; of a whole tensor the first replica's alone does.
    """

    tensor: int
    offset: int
    elements: int
    room: int
    first: int = 0
    saves: bool = True
    kinds: int = len(KINDS)

    def kind_offset(self, kind: int) -> int:
        """Byte offset of KINDS[kind] from the start of the slot's data."""
        return self.offset + kind * round_up(4 * self.room, _ALIGN)


@dataclass(frozen=True)
class RankLayout:
    """A rank's part of the state and the size of its slots, in bytes: equal at the ranks of one position, but for the
    pieces of tensors that each replica has.
    """

    position: int
    slot_bytes: int
    data_bytes: int
    states: tuple[StateSlot, ...]
    replica: int = 0

    @property
    def chunks(self) -> int:
        """Checksummed chunks of a slot's data (``slot.h``)."""
        return -(-self.data_bytes // wire.SLOT_CHUNK)

    @property
    def data_offset(self) -> int:
        """Where the data starts in the slot: after the header and the table of checksums."""
        return wire.SLOT_HEADER_BYTES + round_up(8 * self.chunks, wire.SLOT_HEADER_BYTES)


@dataclass(frozen=True)
class Owned:
    """A tensor whose state a position keeps: its number, byte offset in a slot, elements, pieces and kinds."""

    tensor: int
    offset: int
    elements: int
    pieces: int = 1
    kinds: int = len(KINDS)


@dataclass(frozen=True)
class PositionLayout:
    """What the ranks of a position have in common."""

    position: int
    slot_bytes: int
    data_bytes: int
    owned: tuple[Owned, ...]

    def of(self, replica: int) -> RankLayout:
        """The part of its rank in this replica."""
        states = []
        for own in self.owned:
            first, elements, room = piece(own.elements, own.pieces, replica)
            saves = elements > 0 and own.pieces > replica
            states.append(StateSlot(own.tensor, own.offset, elements, room, first, saves, own.kinds))
        return RankLayout(self.position, self.slot_bytes, self.data_bytes, tuple(states), replica)


def piece(elements: int, pieces: int, replica: int) -> tuple[int, int, int]:
    """Of a tensor in so many pieces: the first element of this replica's, how many it has, and room for how many.

    In one piece, every replica has all of it.

    >>> [piece(600_000, 2, r) for r in (0, 1)], piece(600_000, 4, 3)
    ([(0, 524288, 524288), (524288, 75712, 524288)], (600000, 0, 262144))
    """
    room = piece_elements(elements, pieces)
    first = 0 if pieces == 1 else min(replica * room, elements)
    return first, min(room, elements - first), room


@dataclass(frozen=True)
class DataPart:
    """A dataset that a plan reads: its hex digest, and how many of the plan's shards are its, in order."""

    digest: str
    shards: int


@dataclass(frozen=True)
class DataLayout:
    """Which data a plan reads, where it lies, and who reads it."""

    order: Order
    sequence: int
    token_bytes: int
    shards: tuple[int, ...]
    """Tokens of each, in order."""
    parts: tuple[DataPart, ...]
    mixed: bool
    """The shards of each part lie in a folder of its name; else those of the one part where the attempt says."""
    replicas: int
    readers: frozenset[int]
    """Positions whose ranks read tokens."""

    def replicas_of(self, ranks: range, positions: int) -> tuple[int, ...]:
        """Those whose samples the readers among these ranks read."""
        found = (divmod(rank, positions) for rank in ranks)
        return tuple(dict.fromkeys(replica for replica, position in found if position in self.readers))

    @cached_property
    def _firsts(self) -> tuple[int, ...]:
        firsts, count = [], 0
        for tokens in self.shards:
            firsts.append(count)
            count += max(0, tokens - 1) // self.sequence
        return tuple(firsts)

    def place(self, sample: int) -> tuple[int, int, int]:
        """The shard of a sample, and where its bytes begin and end there."""
        shard = bisect.bisect_right(self._firsts, sample) - 1
        first = HEADER_BYTES + (sample - self._firsts[shard]) * self.sequence * self.token_bytes
        return shard, first, first + (self.sequence + 1) * self.token_bytes

    def places(self, batch: int, replica: int) -> range:
        """Of the run's samples, those that a replica reads in this 1-based batch."""
        count = self.order.batch // self.replicas
        first = (batch - 1) * self.order.batch + replica * count
        return range(first, first + count)


@dataclass(frozen=True)
class PlanLayout:
    """A plan, as far as checkpoints care. Digests are raw 32 bytes."""

    digest: bytes
    what_digest: bytes
    dataset_digest: bytes
    numerics: int
    """What the bits of its steps mean."""
    replicas: int
    steps: int
    slots: int
    batch: int
    """Samples of an optimizer step, of all replicas."""
    shards: tuple[int, ...]
    """Tokens of each shard, in order."""
    token_bytes: int
    tensors: tuple[TensorInfo, ...]
    positions: tuple[PositionLayout, ...]
    data: DataLayout | None = None
    """None: of a plan that reads none."""

    @property
    def ranks(self) -> int:
        """Of the gang."""
        return len(self.positions) * self.replicas

    def rank(self, rank: int) -> RankLayout:
        """A rank's part: rank = replica x positions + position."""
        replica, position = divmod(rank, len(self.positions))
        return self.positions[position].of(replica)


def round_up(value: int, to: int) -> int:
    """The least multiple of ``to`` that is not below ``value``."""
    return -(-value // to) * to


def read_plan(data: bytes, *, digest: bytes | None = None) -> PlanLayout:
    """Read a plan file; with ``digest`` refuse any other plan.

    Raises PlanRefused, naming what fails first.
    """
    try:
        file = parse(data)
        c = file.config
        tensors = tuple(_tensor(t, file.name(t)) for t in file.records("tensors", wire.PlanTensor))
    except Unreadable as error:
        raise PlanRefused(str(error)) from error
    if digest is not None and file.digest != digest.hex():
        raise PlanRefused(f"the plan has digest {file.digest}, the attempt names {digest.hex()}")
    states, replicas = file.records("states", wire.PlanState), c.replicas
    if not 1 <= replicas <= MAX_REPLICAS:
        raise PlanRefused(f"the plan has {replicas} replicas, it must have 1 to {MAX_REPLICAS}")
    positions = tuple(
        _position(number, p, states, tensors, replicas)
        for number, p in enumerate(file.records("positions", wire.PlanPosition))
    )
    kinds = {own.tensor: own.kinds for p in positions for own in p.owned}
    if sorted(own.tensor for p in positions for own in p.owned) != list(range(len(tensors))):
        raise PlanRefused("the plan does not give every tensor exactly one owner")
    if c.positions != len(positions) or not positions:
        raise PlanRefused(f"the plan has {len(positions)} positions, its configuration says {c.positions}")
    return PlanLayout(
        digest=bytes.fromhex(file.digest),
        what_digest=bytes(c.what_digest),
        dataset_digest=bytes(c.dataset_digest),
        numerics=c.numerics_version,
        replicas=replicas,
        steps=c.steps,
        slots=c.slots,
        batch=c.microbatches * c.microbatch * replicas,
        shards=tuple(s.tokens for s in file.records("shards", wire.PlanShard)),
        token_bytes=c.token_bytes,
        tensors=tuple(replace(tensor, kinds=kinds[number]) for number, tensor in enumerate(tensors)),
        positions=positions,
        data=_data(file) if c.data_samples else None,
    )


def _data(file: PlanFile) -> DataLayout:
    c, shards = file.config, tuple(s.tokens for s in file.records("shards", wire.PlanShard))
    least = {"sequence": c.sequence, "data_block": c.data_block, "data_window": c.data_window}
    for name, value in least.items():
        if value < 1:
            raise PlanRefused(f"the plan's {name} is {value}, it must be at least 1")
    if c.token_bytes not in (2, 4):
        raise PlanRefused(f"the plan's tokens have {c.token_bytes} bytes, it must be 2 or 4")
    counts = [max(0, tokens - 1) // c.sequence for tokens in shards]
    if sum(counts) != c.data_samples:
        raise PlanRefused(f"the plan's shards have {sum(counts)} samples, its configuration says {c.data_samples}")
    batch = max(1, c.microbatches * c.microbatch * c.replicas)
    mixed = file.records("parts", wire.PlanPart)
    parts = tuple(DataPart(bytes(p.digest).hex(), p.shards) for p in mixed)
    if not parts:
        parts = (DataPart(bytes(c.dataset_digest).hex(), len(shards)),)
    if len(parts) > wire.PARTS_MAX or sum(part.shards for part in parts) != len(shards):
        raise PlanRefused(f"the plan's parts have not its {len(shards)} shards, or are more than {wire.PARTS_MAX}")
    ends = list(accumulate(part.shards for part in parts))
    samples = tuple(sum(counts[end - part.shards : end]) for part, end in zip(parts, ends, strict=True))
    if min(samples) < 1:
        raise PlanRefused("a part of the plan's data holds no sample")
    firsts = [(end - part.shards, sum(counts[: end - part.shards])) for part, end in zip(parts, ends, strict=True)]
    if mixed and [(p.first_shard, p.first_sample, p.samples) for p in mixed] != [
        (*first, count) for first, count in zip(firsts, samples, strict=True)
    ]:
        raise PlanRefused("a part of the plan's mixture does not begin, or end, where its shards do")
    none, positions = wire.NONE64, file.records("positions", wire.PlanPosition)
    return DataLayout(
        order=Order(
            parts=samples,
            phases=_phases(file, len(mixed), batch) if mixed else (),
            batch=batch,
            seed=c.seed,
            shuffled=bool(c.data_shuffled),
            block=c.data_block,
            window=c.data_window,
        ),
        sequence=c.sequence,
        token_bytes=c.token_bytes,
        shards=shards,
        parts=parts,
        mixed=bool(mixed),
        replicas=c.replicas,
        readers=frozenset(n for n, p in enumerate(positions) if (p.tokens_offset, p.targets_offset) != (none, none)),
    )


def _phases(file: PlanFile, parts: int, batch: int) -> tuple[MixPhase, ...]:
    """Of a mixture."""
    rows = file.records("weights", wire.PlanWeight)
    if not rows or len(rows) % parts or len(rows) // parts > wire.PHASES_MAX:
        raise PlanRefused(f"the plan's mixture of {parts} parts has {len(rows)} weights")
    found = [rows[at : at + parts] for at in range(0, len(rows), parts)]
    phases = tuple(MixPhase(row[0].from_batch, tuple(w.weight for w in row)) for row in found)
    firsts = [phase.from_batch for phase in phases]
    if firsts[0] != 1 or any(a >= b for a, b in pairwise(firsts)) or firsts[-1] > MAX_BATCH:
        raise PlanRefused(
            f"the phases of the plan's mixture begin with batches {firsts[:8]}, which do not ascend from 1"
        )
    if not all(1 <= phase.cycle <= wire.CYCLE_MAX for phase in phases):
        raise PlanRefused("the weights of a phase of the plan's mixture are out of range")
    for row, used in zip(found, bases(phases, batch), strict=True):
        if [(w.part, w.base, w.from_batch) for w in row] != [
            (k, base, row[0].from_batch) for k, base in enumerate(used)
        ]:
            raise PlanRefused("a phase of the plan's mixture does not go on where the one before ends")
    return phases


def _tensor(t: wire.PlanTensor, name: str) -> TensorInfo:
    if not 1 <= t.rank <= 4:
        raise PlanRefused(f"tensor {name} of the plan has {t.rank} dimensions, it must have 1 to 4")
    shape = tuple(t.shape)[: t.rank]
    if min(shape) < 1 or math.prod(shape) != t.elements or t.elements > 1 << 48:
        raise PlanRefused(f"tensor {name} of the plan, of shape {shape}, cannot have {t.elements} elements")
    return TensorInfo(name, shape, t.elements)


def _position(
    number: int,
    p: wire.PlanPosition,
    states: tuple[wire.PlanState, ...],
    tensors: tuple[TensorInfo, ...],
    replicas: int,
) -> PositionLayout:
    if p.first_state + p.states > len(states):
        raise PlanRefused(f"position {number} of the plan owns states beyond the table")
    owned = []
    for s in states[p.first_state : p.first_state + p.states]:
        if s.tensor >= len(tensors):
            raise PlanRefused(f"position {number} of the plan owns tensor {s.tensor} of {len(tensors)}")
        tensor = tensors[s.tensor]
        if s.pieces not in (1, replicas):
            raise PlanRefused(
                f"position {number} of the plan keeps tensor {tensor.name} in {s.pieces} pieces; with {replicas} "
                "replicas it is whole, or in as many"
            )
        kinds = len(KINDS) - (s.v_offset == wire.NONE64)
        owned.append(Owned(s.tensor, s.slot_offset, tensor.elements, s.pieces, kinds))
    layout = PositionLayout(number, p.slot_bytes, 0, tuple(owned))
    needed = max((state.kind_offset(state.kinds) for state in layout.of(0).states), default=0)
    layout = replace(layout, data_bytes=needed)
    first = layout.of(0)
    if first.data_offset + needed > p.slot_bytes:
        raise PlanRefused(
            f"a slot of position {number} has {p.slot_bytes} bytes; its state needs {first.data_offset + needed}"
        )
    return layout
