"""Every reader of what a store holds takes its bytes as hostile: an error of ours, bounded memory, and no crash.

A row of `READERS` is a format: good bytes, how a changed value is sealed again (so that the digests are right, and what
is behind them is met), and what reads it and makes use of what was read. Plans, slots, attempt files and messages have
theirs in ``tests/engine``, a node's status in ``tests/flows/drive/test_hints.py``.
"""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest

from checkpoint import codec, keys, pages
from checkpoint.chunks import Chunk
from checkpoint.claims import Place
from checkpoint.curve import Curve
from checkpoint.dataset import ShardLeaves, load_dataset_manifest
from checkpoint.digest import KINDS
from checkpoint.errors import CheckpointError, Damaged, OtherVersion, StoreRefused
from checkpoint.layout import PlanRefused, read_plan
from checkpoint.log import Record, RunLog, RunState, condensed_key
from checkpoint.manifest import Manifest, PartManifest, merge_read
from checkpoint.read import load_manifest
from checkpoint.store import MemoryStore
from tests.checkpoint.samples import DATASET_MANIFEST, TENSORS, attempt_body, save, state_bytes, write_parts
from tests.support.agents import make_run_in, tiny_spec
from tests.support.mutations import bombs, flipped, mutate, sealed

RUN = "demo-0a1b2c"
CAP = 64 << 20
SAID = (Damaged, OtherVersion, PlanRefused, StoreRefused)  # the last: a manifest of another run


@cache
def small() -> tuple[RunLog, RunState]:
    """A run with a record of every kind, two attempts and two checkpoints."""
    log = RunLog(MemoryStore(), RUN, writer="w")
    state = log.append("attempt", attempt_body(numerics=1), log.fold())
    state, _ = save(log.store, log, state, 1, 5)
    state, _ = save(log.store, log, state, 2, 9)
    for kind, body in (
        ("pin", {"name": "mine", "checkpoint": 2}),
        ("unpin", {"name": "mine"}),
        ("damaged", {"checkpoint": 3, "reason": "chunk"}),
        ("tombstone", {"checkpoint": 3}),
        ("intervention", {"kind": "order", "how": {"parallel": {"stages": 2}}, "by": "a", "via": "train"}),
        ("ended", {"outcome": "gave_up", "reason": "x", "step": 9, "state_digest": None, "class": "config"}),
    ):
        state = log.append(kind, body, state)
    return log, log.append("attempt", attempt_body(2, 5), state)


def use_state(state: RunState) -> None:
    for info in state.restore_candidates():
        assert state.find(info.step, info.epoch) == info
        state.numerics(info)
    state.at_step()
    assert RunState.parse(state.to_bytes(), RUN, state.n) == state


@cache
def before(n: int) -> RunState:
    """The state before record ``n``."""
    return RunState(RUN) if n == 1 else before(n - 1).apply(small()[0].read(n - 1))


def read_record(data: bytes, n: int) -> None:
    use_state(before(n).apply(Record.parse(data, n)))


def read_state(data: bytes) -> None:
    use_state(RunState.parse(data, RUN, small()[1].n))


def read_condensed(data: bytes) -> None:
    """A hint: whatever it holds, the fold is what the log gives, or what a state with its digests right says."""
    log, state = small()
    store = MemoryStore()
    for n in range(1, state.n + 1):
        store.create(keys.log_key(RUN, n), record := log.store.get(keys.log_key(RUN, n)))
    store.put(condensed_key(RUN), state.n.to_bytes(8, "little") + hashlib.sha256(record).digest() + data)
    assert RunLog(store, RUN).fold(quick=True).n == state.n


def use_manifest(manifest: Manifest) -> None:
    for tensor in manifest.tensors:
        for kind in range(len(KINDS)):
            manifest.pieces_of(tensor.name, kind)
            manifest.leaves(tensor.name, kind)
    assert len(manifest.state_digest) == 32
    assert Manifest.parse(manifest.to_bytes()) == manifest
    assert manifest.total_bytes == sum(12 * t.elements for t in manifest.tensors)


@cache
def parts() -> tuple[tuple[str, bytes], ...]:
    return tuple(write_parts(MemoryStore(), RUN, state_bytes(1), ((0, 3), (1, 2, 4)), step=7, epoch=1))


def read_part(data: bytes) -> None:
    part = PartManifest.parse(data)
    assert PartManifest.parse(part.to_bytes()) == part
    name, other = parts()[1]
    first = part if part.part == 0 else replace(part, part=0)
    whole = [(Chunk.of(parts()[0][0], data), first), (Chunk.of(name, other), PartManifest.parse(other))]
    use_manifest(merge_read(whole))


def read_named_manifest(data: bytes) -> None:
    """As the log names it, with size and digest of these bytes."""
    _, state = small()
    store = MemoryStore()
    info = replace(state.checkpoints[0], bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    store.create(keys.run_key(RUN, info.manifest), data)
    use_manifest(load_manifest(store, RUN, info))


def read_pages(data: bytes) -> None:
    store = MemoryStore()
    for info in paged().list(""):
        store.create(info.key, data if info.key.endswith("/manifest") else paged().get(info.key))
    pages.read(store, RUN, keys.manifest_name(7, 1), "it")


@cache
def paged() -> MemoryStore:
    store, at = MemoryStore(), pages.PAGE_BYTES
    pages.PAGE_BYTES = 600
    try:
        pages.write(store, RUN, keys.manifest_name(7, 1), small_manifest(), "all")
    finally:
        pages.PAGE_BYTES = at
    return store


def small_manifest() -> bytes:
    log, state = small()
    return log.store.get(keys.run_key(RUN, state.checkpoints[0].manifest))


def read_dataset(data: bytes) -> None:
    store, digest = MemoryStore(), hashlib.sha256(data).hexdigest()
    store.create(keys.dataset_manifest_key(digest), data)
    load_dataset_manifest(store, digest)


MIXTURE: dict[str, Any] = {
    "v": 2,
    "vocab": 61,
    "token_bytes": 2,
    "eot": None,
    "parts": [
        {"digest": digest * 64, "shards": [{"tokens": 40, "bytes": 144, "sha256": "0" * 64}] * count}
        for digest, count in (("a", 2), ("b", 1))
    ],
    "phases": [{"from_batch": 1, "weights": [3, 1]}, {"from_batch": 20, "weights": [0, 1]}],
    "talk": {"template": "{{ bos_token }}", "tokens": {"bos_token": "<s>", "eos_token": "</s>"}},
    "tokenizer_sha256": "0" * 64,
}


@dataclass(frozen=True)
class Reader:
    good: Callable[[], bytes]
    read: Callable[[bytes], object]
    seal: Callable[[Any], bytes] | None = None  # of a changed value; None: bytes alone are changed
    open: Callable[[bytes], Any] = lambda data: codec.unseal(data, "it", max_bytes=CAP, max_depth=40)


def seal(value: Any) -> bytes:
    return codec.seal(value, 500)


def hint(value: Any) -> bytes:
    return codec.pack_hint(value)


def unhint(data: bytes) -> Any:
    return codec.unpack_hint(data, "it", max_bytes=CAP)


def record_reader(n: int) -> Reader:
    return Reader(lambda: small()[0].store.get(keys.log_key(RUN, n)), lambda data: read_record(data, n), seal)


def curve() -> bytes:
    made = Curve()
    for step in range(1, 9):
        line = {"epoch": 1, "step": step, "loss": 2.5, "grad_norm": 1.0, "time": 1e9 + step, "tokens_per_s": 9.0}
        made.add(line, 0)
    return made.to_bytes()


def tiny_plan() -> bytes:
    run, plan = make_run_in(MemoryStore(), tiny_spec())
    return run.store.get(keys.plan_key(run.name, plan))


READERS: dict[str, Reader] = {
    **{f"record {n}": record_reader(n) for n in range(1, 11)},
    "folded state": Reader(lambda: small()[1].to_bytes(), read_state, seal),
    "condensed state": Reader(lambda: small()[1].to_bytes(), read_condensed, seal),
    "part": Reader(lambda: parts()[0][1], read_part, seal),
    "manifest": Reader(small_manifest, lambda data: use_manifest(Manifest.parse(data)), seal),
    "manifest that the log names": Reader(small_manifest, read_named_manifest, seal),
    "pages": Reader(lambda: paged().get(keys.run_key(RUN, keys.manifest_name(7, 1))), read_pages, seal),
    "dataset": Reader(
        lambda: DATASET_MANIFEST,
        read_dataset,
        lambda value: codec.pack(value, 500),
        lambda data: codec.unpack(data, "it", max_bytes=CAP),
    ),
    "mixture": Reader(
        lambda: codec.pack(MIXTURE),
        read_dataset,
        lambda value: codec.pack(value, 500),
        lambda data: codec.unpack(data, "it", max_bytes=CAP),
    ),
    "leaves": Reader(
        lambda: ShardLeaves.of([b"x" * 9000], 4096).pack(), lambda data: ShardLeaves.parse(data, "it"), seal
    ),
    "claim": Reader(lambda: Place("h", "b", "s", "/f", "t").to_bytes(), lambda d: Place.parse(d, "it"), hint, unhint),
    "curve": Reader(curve, Curve.parse, hint, unhint),
    "plan": Reader(tiny_plan, read_plan),
}


def tried(reader: Reader, data: bytes) -> str:
    """How it ends: read, or the name of our error."""
    try:
        reader.read(data)
    except SAID as error:
        return type(error).__name__ if str(error) else "nothing said"
    return "read"


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("rounds", [25, pytest.param(6000, marks=pytest.mark.slow)])
def test_bytes_and_values_that_were_changed_are_refused_or_hold(name: str, rounds: int) -> None:
    reader, rng = READERS[name], random.Random(name)
    good = reader.good()
    assert tried(reader, good) == "read"
    ends = [tried(reader, flipped(rng, good)) for _ in range(rounds)]
    if reader.seal is not None:
        value = reader.open(good)
        for _ in range(rounds * 4):
            changed = mutate(rng, mutate(rng, value) if rng.random() < 0.3 else value)
            try:
                data = reader.seal(changed)
            except (ValueError, TypeError, AttributeError, IndexError):
                continue  # nothing that this format could hold
            ends.append(tried(reader, data))
    assert "nothing said" not in ends
    if name not in ("condensed state", "claim", "plan"):  # a hint says nothing; of a plan the digest says all
        assert len(set(ends)) > 1


@pytest.mark.parametrize("name", READERS)
def test_bombs_are_refused_in_bounded_memory(name: str) -> None:
    reader, rng = READERS[name], random.Random(name)
    tried(reader, reader.good())
    for bomb in bombs():
        for data in (bomb, sealed(1, b"\xa1v" + bomb), sealed(2, b"\xa5bytes\x01\xa5pages" + bomb)):
            tracemalloc.start()
            try:
                tried(reader, data)
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert peak < (8 << 20) + 100 * len(data), (name, bomb[:8], peak)
    assert tried(reader, rng.randbytes(4096)) in ("read", "Damaged", "OtherVersion", "PlanRefused")


@pytest.mark.parametrize(
    "name",
    [
        "chunks/../log/1",
        "chunks/a/../../../spec",
        "/chunks/a",
        "chunks//a",
        "chunks/",
        "chunks/.",
        "chunks/.hidden",
        "chunks/a\0b",
        "chunks/a/b/c/d/e/f",
        "log/00000000000000000001",
        "manifests/a",
        "chunks/" + "x" * 201,
        "chunks/a\n",
        "runs/other/chunks/a",
    ],
)
def test_a_key_that_climbs_out_of_its_folder_is_damage(name: str) -> None:
    value = codec.unseal(parts()[0][1], "it", max_bytes=CAP)
    value["chunks"][0][0] = name
    with pytest.raises(Damaged, match="is not a name under chunks/"):
        PartManifest.parse(codec.seal(value))


def boxes(pieces: list[list[int]]) -> dict[str, list[list[int]]]:
    """Pieces that overlap, leave a gap, pass their tensor's end, or overflow."""
    first = pieces[0]
    return {
        "twice": [first, *pieces],
        "overlap": [first, [*first[:3], *pieces[1][3:]], *pieces[2:]],
        "gap": pieces[1:],
        "beyond": [[*first[:2], 1 << 40, *first[3:]], *pieces[1:]],
        "huge": [[*first[:3], (1 << 62) - 1, *first[4:]], *pieces[1:]],
        "sum overflows": [[*first[:2], (1 << 62) - 262144, 1 << 61, *first[4:]], *pieces[1:]],
        "no tensor": [[len(TENSORS), *first[1:]], *pieces[1:]],
        "no kind": [[first[0], 3, *first[2:]], *pieces[1:]],
        "no chunk": [[*first[:4], 99, first[5]], *pieces[1:]],
        "offset": [[*first[:5], 4], *pieces[1:]],
        "empty": [[*first[:3], 0, *first[4:]], *pieces[1:]],
        "negative": [[*first[:2], -262144, *first[3:]], *pieces[1:]],
        "a truth": [[*first[:5], False], *pieces[1:]],
    }


@pytest.mark.parametrize("how", sorted(boxes([[0] * 6, [0] * 6])))
@pytest.mark.parametrize("reader", ["part", "manifest"])
def test_boxes_that_do_not_fit_are_damage(reader: str, how: str) -> None:
    value = codec.unseal(READERS[reader].good(), "it", max_bytes=CAP)
    value["pieces"] = boxes(value["pieces"])[how]
    with pytest.raises(Damaged):
        READERS[reader].read(codec.seal(value))


def test_a_shape_whose_product_overflows_is_damage() -> None:
    value = codec.unseal(parts()[0][1], "it", max_bytes=CAP)
    for shape in ([1 << 48] * 8, [1 << 24, 1 << 25], [0], [-1], [], [1] * 9, [1 << 63], [1.0]):
        value["tensors"][0][1] = shape
        with pytest.raises(Damaged):
            PartManifest.parse(codec.seal(value))


def test_every_error_of_this_package_says_which_exit_code_a_command_ends_with() -> None:
    assert all(issubclass(error, CheckpointError) and error.exit_code in (76, 78, 70) for error in SAID)
