"""Records of a run's log: the kinds, what the body of each holds, and the sealed bytes of one.

Pure. Every reader here takes bytes and maps as hostile: anything but what a kind needs is Damaged.

Versions. Each kind has its own, in the record's ``v``; it says who may read the record. What an older reader may ignore
(an entry more in the body of an attempt, an intervention or an end) does not raise it. What it must not ignore does,
by a row of `NEEDS`: a record carries the lowest version that reads it rightly, and whoever knows a lower one says
OtherVersion and writes nothing. A new kind starts at version 2. ``numerics`` of an attempt says what its bits mean
(``trainer/engine/wire/plan.h``; without it: 1), and so those of the checkpoints of its epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from checkpoint import codec, keys
from checkpoint.amendments import NONE, Amendments
from checkpoint.errors import Damaged, OtherVersion
from trainer import wire
from trainer.wire.unreadable import check_version

MAX_RECORD_BYTES = 64 << 10
MAX_STATE_BYTES = 256 << 20
FOLD_EVERY = 256
KINDS = ("attempt", "checkpoint", "damaged", "intervention", "pin", "unpin", "tombstone", "ended", "fold")
Body = Mapping[str, Any]
NEEDS: Mapping[str, tuple[Callable[[Body], bool], ...]] = {
    "attempt": (lambda body: body.get("numerics", 1) != 1, lambda body: "amendments" in body),
    # other bits, or another place to go on from
    "intervention": (lambda body: "amendments" in body or (body.get("kind") == "order" and "step" in body),),
    "tombstone": (lambda body: "checkpoint" not in body,),  # of a step that is not committed: its commit is void
}
"""Of a kind: which bodies need version 2, which need version 3, and so on. Rows are added, never changed."""
OLD_FALLBACK = "fewer nodes"
"""How the reason of an attempt with fewer stages began before records had ``fallback``: read here, and nowhere else."""
OUTCOMES = ("succeeded", "cancelled", "gave_up", "preempted")


def known_version(kind: object) -> int:
    """The newest version of this kind that is read here; 1 for a kind that is not known."""
    return 1 + len(NEEDS.get(kind, ())) if isinstance(kind, str) else 1


def needed_version(kind: str, body: Body) -> int:
    """The lowest version of this kind in which nothing of this body is ignored."""
    return max((v for v, needs in enumerate(NEEDS.get(kind, ()), 2) if needs(body)), default=1)


@dataclass(frozen=True, slots=True)
class Record:
    """One record, as read."""

    n: int
    kind: str
    epoch: int
    writer: str  # a name, a colon and a token of this one append: who won an unclear create
    time: float  # Unix seconds by the writer's clock; never compared
    body: Body

    @property
    def v(self) -> int:
        """The version that it carries."""
        return needed_version(self.kind, self.body)

    def to_bytes(self) -> bytes:
        """Sealed bytes; ValueError where they pass 64 KiB."""
        data = codec.seal(
            {
                "v": self.v,
                "n": self.n,
                "kind": self.kind,
                "epoch": self.epoch,
                "writer": self.writer,
                "time": self.time,
                "body": self.body,
            },
            codec.RECORD_DEPTH,
        )
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(
                f"a {self.kind} record of {len(data)} bytes; the limit is {MAX_RECORD_BYTES}: "
                "put the bulk in an object and name it"
            )
        return data

    @classmethod
    def parse(cls, data: bytes, n: int) -> Record:
        """The record of these bytes, which lay at number ``n``; else Damaged, or OtherVersion for a newer one."""
        what = f"log record {n}"
        value = codec.unseal(data, what, max_bytes=MAX_RECORD_BYTES, max_depth=codec.RECORD_DEPTH)
        f = codec.Fields(value, what)
        version = f.version(known_version(value.get("kind")))  # before all else: a newer one may look as it likes
        found = f.integer("n", 1)
        if found != n:
            raise Damaged(f"{what}: it says that it is record {found}")
        kind = f.text("kind", 40)
        if kind not in KINDS:
            raise Damaged(f"{what}: unknown kind {kind!r}")
        if (kind == "fold") != (n % FOLD_EVERY == 0):
            raise Damaged(
                f"{what}: a {kind} where numbers that are multiples of {FOLD_EVERY}, and only those, are folds"
            )
        record = cls(
            n, kind, f.integer("epoch", 0, n), f.text("writer", 200), f.real("time"), MappingProxyType(f.map("body"))
        )
        f.done()
        if version < record.v:
            raise Damaged(f"{what}: a {kind} of version {version}, with what only version {record.v} has")
        return record


@dataclass(frozen=True, slots=True)
class AttemptInfo:
    """An attempt record; its epoch is its number."""

    n: int
    time: float
    launch: str
    nodes: int
    ranks: int
    plan: str  # hex digest
    what: str  # hex digest
    checkpoint: int | None  # number of the checkpoint record that it restores
    step: int  # steps done at its restore point
    slots: Mapping[str, int] | None  # {"step", "epoch"}: newer state held in every agent's slots
    reason: str
    body: Mapping[str, Any]  # the whole body: how, cause, and what a driver adds
    order: int = 0  # number of the order that it follows; 0: of none
    fell_back: bool = False  # the driver itself changed the layout, for want of room
    numerics: int = 1  # what the bits of its steps mean
    amendments: Amendments = NONE

    @property
    def epoch(self) -> int:
        return self.n

    @property
    def how(self) -> Mapping[str, Any]:
        """Its layout: the How half of the spec."""
        how: Mapping[str, Any] = self.body["how"]
        return how


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint record."""

    n: int
    epoch: int
    time: float
    step: int
    manifest: str  # name relative to the run
    bytes: int  # of the manifest object
    sha256: str  # of the manifest object, hex
    state_digest: str  # hex
    parts: int
    data_position: int  # samples consumed

    def body(self) -> dict[str, Any]:
        """As it stands in the record."""
        return {
            "step": self.step,
            "manifest": self.manifest,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "state_digest": self.state_digest,
            "parts": self.parts,
            "data_position": self.data_position,
        }


@dataclass(frozen=True, slots=True)
class EndedInfo:
    """How the run ended; an attempt after it opens the run again."""

    n: int
    epoch: int
    time: float
    outcome: str
    reason: str
    step: int
    state_digest: str | None
    cls: str = ""  # of the cause, where it gave up (trainer/failures.py); records of before this field have none

    @property
    def failure(self) -> str:
        """The class of the cause, also of an old record, whose reason began with it; "" or a word that is none."""
        return self.cls or self.reason.partition(":")[0]


class StartPoint(NamedTuple):
    """Where an order has the run go on: after the step of this checkpoint record; None: where the run began."""

    checkpoint: int | None
    step: int


@dataclass(frozen=True, slots=True)
class Intervention:
    """A change that a person or the driver logged: ``body["kind"]`` says which.

    ``order``: what a person, or the driver by the spec's policy (``own``), asked of the run: the whole How (the map
    ``how``), the whole of its amendments, and where it goes on (``start``, docs/adr/0015); ``by`` and ``via``: who,
    with which command; ``again``: the run goes on although it had ended; ``anew``: it may begin at its start again.
    The newest order wins.
    ``parent``: the checkpoint of another run that this one begins from, and what it keeps of that one's amendments.
    """

    n: int
    epoch: int
    time: float
    body: Mapping[str, Any]
    amendments: Amendments = NONE
    start: StartPoint | None = None


def parse_attempt(n: int, time: float, body: Any) -> AttemptInfo:
    what = f"log record {n} (attempt)"
    f = codec.Fields(dict(body) if isinstance(body, Mapping) else body, what)
    r = codec.Fields(f.map("restore"), f"{what}, restore")
    slots: Mapping[str, int] | None = None
    if r.has("slots"):
        s = codec.Fields(r.map("slots"), f"{what}, restore.slots")
        slots = MappingProxyType({"step": s.integer("step", 0), "epoch": s.integer("epoch", 1, n - 1)})
    f.map("how")
    return AttemptInfo(
        n=n,
        time=time,
        launch=f.text("launch", 200),
        nodes=f.integer("nodes", 1, 1 << 20),
        ranks=f.integer("ranks", 1, 1 << 20),
        plan=f.hex("plan"),
        what=f.hex("what"),
        checkpoint=r.integer("checkpoint", 1, n - 1) if r.has("checkpoint") else None,
        step=r.integer("step", 0),
        slots=slots,
        reason=f.text("reason"),
        body=MappingProxyType(dict(body)),
        order=f.integer("order", 1, n - 1) if f.has("order") else 0,
        fell_back=f.has("fallback") or f.text("reason").startswith(OLD_FALLBACK),
        numerics=_numerics(f, what),
        amendments=Amendments.parse(f.map("amendments") if f.has("amendments") else None, f"{what}, amendments"),
    )


def _numerics(f: codec.Fields, what: str) -> int:
    """What bits mean; OtherVersion for a meaning that a newer hotstage gave them."""
    found = f.integer("numerics", 1) if f.has("numerics") else 1
    check_version(f"{what}: its numerics", found, wire.NUMERICS_VERSION, OtherVersion)
    return found


def parse_checkpoint(n: int, epoch: int, time: float, body: Any) -> CheckpointInfo:
    what = f"log record {n} (checkpoint)"
    f = codec.Fields(dict(body) if isinstance(body, Mapping) else body, what)
    info = CheckpointInfo(
        n=n,
        epoch=epoch,
        time=time,
        step=f.integer("step", 0),
        manifest=keys.check_relative(f.text("manifest", 400), "manifests", what),
        bytes=f.integer("bytes", 1),
        sha256=f.hex("sha256"),
        state_digest=f.hex("state_digest"),
        parts=f.integer("parts", 1, 1 << 20),
        data_position=f.integer("data_position", 0),
    )
    f.done()
    return info


def parse_ended(n: int, epoch: int, time: float, body: Any) -> EndedInfo:
    what = f"log record {n} (ended)"
    f = codec.Fields(dict(body) if isinstance(body, Mapping) else body, what)
    outcome = f.text("outcome", 40)
    if outcome not in OUTCOMES:
        raise Damaged(f"{what}: outcome {outcome!r} is none of {', '.join(OUTCOMES)}")
    digest = f.hex("state_digest") if f.has("state_digest") else None
    cls = f.text("class", 40) if f.has("class") else ""
    return EndedInfo(n, epoch, time, outcome, f.text("reason"), f.integer("step", 0), digest, cls)


def ended_map(ended: EndedInfo) -> dict[str, Any]:
    body = {"outcome": ended.outcome, "reason": ended.reason, "step": ended.step, "state_digest": ended.state_digest}
    return {**body, "class": ended.cls} if ended.cls else body


def parse_intervention(n: int, epoch: int, time: float, body: Any) -> Intervention:
    what = f"log record {n} (intervention)"
    f = codec.Fields(dict(body) if isinstance(body, Mapping) else body, what)
    start = None
    if f.text("kind", 80) == "order":
        f.map("how")
        f.text("by", 200)
        f.text("via", 200)
        if f.has("step"):
            named = f.integer("checkpoint", 1, n - 1) if f.has("checkpoint") else None
            start = StartPoint(named, f.integer("step", 0))
    amendments = Amendments.parse(f.map("amendments") if f.has("amendments") else None, f"{what}, amendments")
    return Intervention(n, epoch, time, MappingProxyType(dict(body)), amendments, start)


class FoldTarget(NamedTuple):
    """The object that a fold record names: relative to the run, its bytes, its SHA-256 in hex."""

    state: str
    bytes: int
    sha256: str

    @classmethod
    def parse(cls, value: Any, what: str) -> FoldTarget:
        f = codec.Fields(dict(value) if isinstance(value, Mapping) else value, what)
        found = cls(
            keys.check_relative(f.text("state", 400), "folds", what),
            f.integer("bytes", 1, MAX_STATE_BYTES),
            f.hex("sha256"),
        )
        f.done()
        return found


def fold_target(record: Record) -> FoldTarget:
    """What a fold record names; Damaged where its body is none."""
    return FoldTarget.parse(record.body, f"log record {record.n} (fold)")
