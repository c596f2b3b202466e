"""Records, logs and checkpoints that the tests of this folder write."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from checkpoint import codec, keys
from checkpoint.chunks import Chunk, Segment, Tensor, chunk_pieces, plan_chunks
from checkpoint.digest import KINDS, leaf_digests, state_root, tree_root
from checkpoint.log import RunLog, RunState
from checkpoint.manifest import Manifest, PartManifest, checkpoint_body, merge
from checkpoint.store import Store
from checkpoint.store.memory import MemoryStore

RUN = "demo-0a1b2c"
WHAT = bytes(range(32))
SHARD, TOKENIZER = bytes(5000), b"{}"
DATASET_MANIFEST = codec.pack(
    {
        "v": 1,
        "vocab": 256,
        "token_bytes": 2,
        "eot": None,
        "shards": [{"tokens": 2480, "bytes": len(SHARD), "sha256": hashlib.sha256(SHARD).hexdigest()}],
        "tokenizer_sha256": hashlib.sha256(TOKENIZER).hexdigest(),
    }
)
DATASET = hashlib.sha256(DATASET_MANIFEST).hexdigest()
TENSORS = (
    Tensor("wte.weight", (1000, 300)),  # two blocks, the second one short
    Tensor("b", (7,)),
    Tensor("h.0.weight", (600, 1000)),
    Tensor("ln.weight", (64,)),
    Tensor("whole.block", (512, 512)),  # exactly one
)


def attempt_body(checkpoint: int | None = None, step: int = 0, **more: object) -> dict[str, Any]:
    return {
        "launch": "l1",
        "nodes": 1,
        "ranks": 2,
        "how": {"parallel": {"stages": 2}},
        "plan": "ab" * 32,
        "what": WHAT.hex(),
        "restore": {"checkpoint": checkpoint, "step": step, "slots": None},
        "reason": "start",
        "cause": None,
        **more,
    }


def point_body(step: int, epoch: int = 1) -> dict[str, Any]:
    """A checkpoint record's body without a checkpoint behind it."""
    return {
        "step": step,
        "manifest": keys.manifest_name(step, epoch),
        "bytes": 1,
        "sha256": "0" * 64,
        "state_digest": "1" * 64,
        "parts": 1,
        "data_position": step * 8,
    }


def state_bytes(seed: int) -> list[list[bytes]]:
    """Of every tensor its three kinds."""
    rng = random.Random(seed)
    return [[rng.randbytes(t.elements * 4) for _ in KINDS] for t in TENSORS]


def write_parts(
    store: Store,
    run: str,
    state: list[list[bytes]],
    owners: Sequence[Sequence[int]],
    *,
    step: int,
    epoch: int,
    limit: int = 2 << 20,
    incarnation: str = "i1",
) -> list[tuple[str, bytes]]:
    """What the agents of nodes that own these tensors do up to their part manifests."""
    parts = []
    for node, owned in enumerate(owners):
        slot, segments = bytearray(), []
        for tensor in owned:
            for kind in range(len(KINDS)):
                segments.append(Segment(tensor, kind, 0, TENSORS[tensor].elements, len(slot)))
                slot += state[tensor][kind]
                slot += bytes(-len(slot) % 64)
        saved = []
        for plan in plan_chunks(segments, limit):
            data = b"".join(slot[s.source : s.source + s.bytes] for s in plan.segments)
            chunk = Chunk.of(keys.chunk_name(step, epoch, node, incarnation, plan.index), data)
            assert store.create(keys.run_key(run, chunk.name), data, sha256=chunk.sha256)
            saved.append((chunk, chunk_pieces(plan, data)))
        part = PartManifest.build(
            run=run, step=step, epoch=epoch, samples=step * 8, what=WHAT, part=node, parts=len(owners),
            tensors=TENSORS, saved=saved, meta={"dataset": DATASET},
        )  # fmt: skip
        name = keys.part_name(step, epoch, node)
        assert store.create(keys.run_key(run, name), part.to_bytes())
        parts.append((name, part.to_bytes()))
    return parts


def write_dataset(store: Store) -> None:
    """What data preparation puts into a store."""
    store.create(f"data/{DATASET}/00000.bin", SHARD)
    store.create(f"data/{DATASET}/tokenizer.json", TOKENIZER)
    store.create(f"data/{DATASET}/manifest", DATASET_MANIFEST)


def save(
    store: Store,
    log: RunLog,
    state: RunState,
    seed: int,
    step: int,
    owners: Sequence[Sequence[int]] = ((0, 1, 2, 3, 4),),
) -> tuple[RunState, Manifest]:
    """A whole checkpoint, committed in the newest epoch."""
    parts = write_parts(store, log.run, state_bytes(seed), owners, step=step, epoch=state.epoch)
    manifest = merge(parts)
    data = manifest.to_bytes()
    assert store.create(keys.run_key(log.run, keys.manifest_name(step, state.epoch)), data)
    return log.append("checkpoint", checkpoint_body(manifest, data), state, epoch=state.epoch), manifest


def digest(seed: int, step: int) -> bytes:
    """What the state digest must be, from the bytes themselves."""
    roots = (tree_root(leaf_digests(kind)) for kinds in state_bytes(seed) for kind in kinds)
    return state_root(step, step * 8, WHAT, roots)


def started(store: Store | None = None) -> tuple[RunLog, RunState]:
    log = RunLog(store or MemoryStore(), RUN, writer="driver")
    return log, log.append("attempt", attempt_body(), log.fold())


def long_log(store: Store, records: int) -> tuple[RunLog, RunState]:
    log, state = started(store)
    rng = random.Random(3)
    while state.n < records:
        kind = rng.choice(["checkpoint"] * 6 + ["attempt", "pin", "damaged", "intervention", "ended", "tombstone"])
        some = rng.choice(state.checkpoints).n if state.checkpoints else None
        body: dict[str, Any] | None = None
        match kind:
            case "checkpoint":
                body = point_body(state.n * 10, state.epoch)
            case "attempt":
                body = attempt_body(some, 5, how={"a": {"b": {"c": [1, {"d": 2.5}]}}}, cause={"code": 75})
            case "pin" if some:
                body = {"name": f"p{rng.randrange(5)}", "checkpoint": some}
            case "damaged" if some:
                body = {"checkpoint": some, "reason": "x"}
            case "tombstone" if some:
                body = {"checkpoint": some}
            case "intervention":
                body = {"kind": "skip", "n": 3}
            case "ended":
                body = {"outcome": "cancelled", "reason": "r", "step": 3, "state_digest": "0" * 64}
        if body is not None:
            state = log.append(kind, body, state, epoch=state.epoch if kind == "checkpoint" else None)
    return log, state
