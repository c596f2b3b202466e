"""What a checkpoint consists of: plain data in, plain data out; nothing here touches a store.

A checkpoint is a table of tensors in global coordinates and the pieces of them that lie in chunk objects. A piece is
a range of elements of one tensor and one kind (param, exp_avg, exp_avg_sq; float32, little-endian) that starts on a
border of the digest's blocks and ends on one, or with the tensor. Each block's digest is in the manifest, so whatever
reads a range of blocks, of whatever layout, can check exactly what it read.

Who calls what, in order
  each agent     plan_chunks(segments) once a layout; at a checkpoint, for each chunk: gather the bytes, Chunk.of,
                 chunk_pieces, create the object; then PartManifest.build(...), create ``keys.part_name`` with its bytes
  one of a group  above 1,000 ranks (agent/groups.py): when its nodes' parts are there: ``join`` -> the group's part,
                 create ``keys.group_name``
  any agent      when all parts (of the nodes, or of the groups) are there: merge(parts) -> Manifest; create
                 ``keys.manifest_name``; append the record with ``checkpoint_body``; whoever loses reads what is there
  who restores   ``read.load_manifest``, then ``read.StateReader`` for the tensors that it owns

Part manifest (sealed msgpack, codec.py; pages.py has how one of any size lies in the store)
    v 1 (2 where a tensor has fewer kinds), run, step, epoch, samples, what (32 bytes), part, parts, meta {text: text},
    tensors [[name, [dims]]...]                        the whole table, in order: the same in every part; after the dims
                                                       2, where there is no exp_avg_sq of the tensor
    chunks  [[name relative to the run, bytes, sha256 (32 bytes)]...]
    pieces  [[tensor, kind, first, elements, chunk, offset]...]   numbers in tensors, KINDS, chunks; offset in bytes
    leaves  the digests of the pieces' blocks, 32 bytes each, piece after piece
Manifest: the same with ``sources`` [[name of the part manifest, bytes, sha256]...] in place of part and parts, pieces
in order of (tensor, kind, first) covering every element once, and so the leaves in the digest's order. A group's part
is a part, number ``part`` of as many groups, with its nodes' chunks and pieces in order of nodes.

Memory: of leaves there is one copy, the bytes that were read; a manifest is written piece by piece (``stream``). A
trillion parameters have 366 MB of leaves.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from checkpoint import codec, keys
from checkpoint.chunks import MAX_CHUNK_BYTES, Chunk, Piece, Tensor
from checkpoint.digest import (
    BLOCK_ELEMENTS,
    DIGEST_BYTES,
    KINDS,
    Leaves,
    blocks,
    raw_leaves,
    raw_root,
    state_root,
)
from checkpoint.errors import Damaged
from checkpoint.pages import WHOLE_BYTES

VERSION, FULL_VERSION = 2, 1
"""Of a manifest, and of one whose tensors all have all kinds, which is what the first version was."""
MAX_TENSORS = 1 << 20
MAX_CHUNKS = 1 << 20
MAX_ELEMENTS = 1 << 48
PARAM, EXP_AVG, EXP_AVG_SQ = range(3)
Tables = list[tuple[list[Any], "tuple[Tensor, ...]"]]
"""Tables of tensors that were checked, as they were read and as they are kept."""


@dataclass(frozen=True)
class PartManifest:
    """What one agent saved of a checkpoint."""

    run: str
    step: int
    epoch: int
    samples: int
    what: bytes
    part: int
    parts: int
    tensors: tuple[Tensor, ...]
    chunks: tuple[Chunk, ...]
    pieces: tuple[Piece, ...]
    meta: Mapping[str, str]

    @classmethod
    def build(
        cls,
        *,
        run: str,
        step: int,
        epoch: int,
        samples: int,
        what: bytes,
        part: int,
        parts: int,
        tensors: Sequence[Tensor],
        saved: Iterable[tuple[Chunk, Sequence[Piece]]],
        meta: Mapping[str, str] | None = None,
    ) -> PartManifest:
        """The part of ``saved`` chunks, each with its pieces (whose ``chunk`` numbers are given anew here).

        ``part`` of ``parts`` is the node's number; ``meta`` is for people and checks: plan, dataset, kernel path.
        """
        chunks: list[Chunk] = []
        pieces: list[Piece] = []
        for chunk, held in saved:
            pieces.extend(Piece(p.tensor, p.kind, p.first, p.elements, len(chunks), p.offset, p.leaves) for p in held)
            chunks.append(chunk)
        made = cls(
            run, step, epoch, samples, what, part, parts, tuple(tensors), tuple(chunks), tuple(pieces), dict(meta or {})
        )
        _check_table(made.tensors, "part manifest")
        _check_pieces(made.tensors, made.chunks, made.pieces, "part manifest")
        return made

    def stream(self) -> Iterator[codec.Data]:
        """Its bytes, in pieces."""
        return _stream(self, {"part": self.part, "parts": self.parts})

    def to_bytes(self) -> bytes:
        return b"".join(self.stream())

    @classmethod
    def parse(cls, data: bytes, what: str = "part manifest", tables: Tables | None = None) -> PartManifest:
        """The part of hostile bytes; Damaged for anything that is not one.

        ``tables``: of the parts that were read before; equal ones are checked once.
        """
        f = codec.Fields(codec.unseal(data, what, max_bytes=WHOLE_BYTES), what)
        common = _parse_common(f, what, tables)
        parts = f.integer("parts", 1, 1 << 20)
        part = f.integer("part", 0, parts - 1)
        f.done()
        return cls(part=part, parts=parts, **common)


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint."""

    run: str
    step: int
    epoch: int
    samples: int
    what: bytes
    tensors: tuple[Tensor, ...]
    chunks: tuple[Chunk, ...]
    pieces: tuple[Piece, ...]  # in order of (tensor, kind, first); every element of every tensor-kind once
    sources: tuple[Chunk, ...]  # the part manifests, as objects
    meta: Mapping[str, str]

    def stream(self) -> Iterator[codec.Data]:
        """Its bytes, in pieces."""
        return _stream(self, {"sources": codec.Stream.rows(self.sources, _object_row)})

    def to_bytes(self) -> bytes:
        return b"".join(self.stream())

    @classmethod
    def parse(cls, data: bytes, what: str = "manifest") -> Manifest:
        """The manifest of hostile bytes; Damaged for anything that is not a whole one."""
        f = codec.Fields(codec.unseal(data, what, max_bytes=WHOLE_BYTES), what)
        common = _parse_common(f, what)
        sources = _parse_objects(f, "sources", "manifests", what)
        f.done()
        made = cls(sources=sources, **common)
        _check_complete(made.tensors, made.pieces, what)
        return made

    @cached_property
    def _index(self) -> dict[tuple[int, int], tuple[Piece, ...]]:
        found: dict[tuple[int, int], list[Piece]] = {}
        for piece in self.pieces:
            found.setdefault((piece.tensor, piece.kind), []).append(piece)
        return {key: tuple(value) for key, value in found.items()}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {t.name: i for i, t in enumerate(self.tensors)}

    def number(self, name: str) -> int:
        """The tensor's place in the table; KeyError where there is none of this name."""
        return self._numbers[name]

    def tensor(self, name: str) -> Tensor:
        return self.tensors[self._numbers[name]]

    def pieces_of(self, name: str, kind: int, first: int = 0, elements: int | None = None) -> tuple[Piece, ...]:
        """The pieces that hold any of the elements [first, first + elements) of a tensor and kind, in order."""
        all_pieces = self._index[self._numbers[name], kind]
        end = self.tensor(name).elements if elements is None else first + elements
        low = max(bisect_right(all_pieces, first, key=lambda p: p.first) - 1, 0)
        return tuple(p for p in all_pieces[low:] if p.first < end and p.first + p.elements > first)

    def leaves(self, name: str, kind: int) -> tuple[bytes, ...]:
        """The digests of all blocks of a tensor and kind."""
        return tuple(leaf for p in self._index[self._numbers[name], kind] for leaf in p.leaves)

    @cached_property
    def total_bytes(self) -> int:
        """Of all chunks."""
        return sum(c.bytes for c in self.chunks)

    @cached_property
    def state_digest(self) -> bytes:
        return state_digest(self)


def state_digest(manifest: Manifest) -> bytes:
    """The state digest (digest.py) that the manifest's leaves give."""
    roots = (
        raw_root(b"".join([raw_leaves(p.leaves) for p in manifest._index[t, k]]))
        for t in range(len(manifest.tensors))
        for k in range(manifest.tensors[t].kinds)
    )
    return state_root(manifest.step, manifest.samples, manifest.what, roots)


ReadPart = tuple[Chunk, PartManifest]
"""A part manifest: as an object, and what it says."""


def read_part(name: str, data: bytes, tables: Tables | None = None) -> ReadPart:
    """The part manifest of these bytes, which lie under ``name``; Damaged where it is none."""
    return Chunk.of(name, data), PartManifest.parse(data, f"part manifest {name}", tables)


def merge(parts: Iterable[tuple[str, bytes]]) -> Manifest:
    """The manifest of all parts, given as (name relative to the run, bytes); the same bytes whoever merges.

    Damaged where a part is damaged, is of another checkpoint, or where together they do not cover every tensor once.
    """
    tables: Tables = []
    return merge_read([read_part(name, data, tables) for name, data in parts])


def merge_read(parts: Sequence[ReadPart]) -> Manifest:
    """As ``merge``, of parts that were read."""
    read = sorted(parts, key=lambda item: item[1].part)
    if not read:
        raise Damaged("a checkpoint without parts")
    head, meta, chunks, pieces = _together(read, range(read[0][1].parts))
    pieces.sort(key=lambda p: (p.tensor, p.kind, p.first))
    what = f"checkpoint of step {head.step}, epoch {head.epoch}"
    _check_names(chunks, what)
    _check_complete(head.tensors, pieces, what)
    return Manifest(
        head.run, head.step, head.epoch, head.samples, head.what, head.tensors, tuple(chunks), tuple(pieces),
        tuple(source for source, _ in read), meta,
    )  # fmt: skip


def join(parts: Sequence[ReadPart], members: range, group: int, groups: int) -> PartManifest:
    """The part of a group of nodes, number ``group`` of ``groups``; the same bytes whoever joins them.

    Damaged where a part is of another checkpoint or node.
    """
    read = sorted(parts, key=lambda item: item[1].part)
    if not read:
        raise Damaged("a group without parts")
    head, meta, chunks, pieces = _together(read, members)
    _check_names(chunks, f"group {group} of the checkpoint of step {head.step}, epoch {head.epoch}")
    return PartManifest(
        head.run, head.step, head.epoch, head.samples, head.what, group, groups, head.tensors, tuple(chunks),
        tuple(pieces), meta,
    )  # fmt: skip


def _together(read: Sequence[ReadPart], wanted: range) -> tuple[PartManifest, dict[str, str], list[Chunk], list[Piece]]:
    """(the first part, meta, chunks, pieces) of parts in order, which must be those of these numbers."""
    head = read[0][1]
    numbers = [part.part for _, part in read]
    if numbers != list(wanted):
        raise Damaged(f"checkpoint of step {head.step}: has the parts {numbers[:20]} of {head.parts}")
    meta: dict[str, str] = {}
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    for source, part in read:
        for name in ("run", "step", "epoch", "samples", "what", "parts", "tensors"):
            mine, theirs = getattr(part, name), getattr(head, name)
            if mine is not theirs and mine != theirs:
                raise Damaged(
                    f"{source.name}: its {name} differs from that of {read[0][0].name}: not of one checkpoint"
                )
        for key, value in part.meta.items():
            if meta.setdefault(key, value) != value:
                raise Damaged(f"{source.name}: its {key} is {value[:80]!r}, another part says {meta[key][:80]!r}")
        base = len(chunks)
        chunks.extend(part.chunks)
        pieces.extend(
            Piece(p.tensor, p.kind, p.first, p.elements, base + p.chunk, p.offset, p.leaves) for p in part.pieces
        )
    return head, meta, chunks, pieces


def checkpoint_body(manifest: Manifest, data: bytes) -> dict[str, Any]:
    """The body of the log record that commits this manifest, under whose name ``data`` lies."""
    return {
        "step": manifest.step,
        "manifest": keys.manifest_name(manifest.step, manifest.epoch),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "state_digest": manifest.state_digest.hex(),
        "parts": len(manifest.sources),
        "data_position": manifest.samples,
    }


# --- bytes ------------------------------------------------------------------------------------------------


def _object_row(c: Chunk) -> object:
    return [c.name, c.bytes, c.sha256]


def _tensor_row(t: Tensor) -> object:
    return [t.name, t.shape] if t.kinds == len(KINDS) else [t.name, t.shape, t.kinds]


def _stream(m: PartManifest | Manifest, own: Mapping[str, object]) -> Iterator[codec.Data]:
    rows, raw = codec.Stream.rows, codec.Stream.raw
    return codec.seal_stream(
        {
            "v": VERSION if any(t.kinds < len(KINDS) for t in m.tensors) else FULL_VERSION,
            "run": m.run,
            "step": m.step,
            "epoch": m.epoch,
            "samples": m.samples,
            "what": m.what,
            "meta": dict(m.meta),
            "tensors": rows(m.tensors, _tensor_row),
            "chunks": rows(m.chunks, _object_row),
            "pieces": rows(m.pieces, lambda p: [p.tensor, p.kind, p.first, p.elements, p.chunk, p.offset]),
            "leaves": raw(
                sum(len(p.leaves) for p in m.pieces) * DIGEST_BYTES, (raw_leaves(p.leaves) for p in m.pieces)
            ),
            **own,
        }
    )


def _parse_common(f: codec.Fields, what: str, tables: Tables | None = None) -> dict[str, Any]:
    f.version(VERSION)
    run = f.text("run", 100)
    step, epoch, samples = f.integer("step", 0), f.integer("epoch", 1), f.integer("samples", 0)
    digest = f.raw("what", DIGEST_BYTES)
    meta = f.map("meta")
    if len(meta) > 64 or not all(isinstance(v, str) and len(k) + len(v) <= 1000 for k, v in meta.items()):
        raise Damaged(f"{what}: 'meta' must be at most 64 short texts")
    rows = f.array("tensors", MAX_TENSORS)
    tensors = next((table for known, table in tables or () if known == rows), None)
    if tensors is None:
        tensors = _parse_table(rows, what)
        if tables is not None:
            tables.append((rows, tensors))
    chunks = _parse_objects(f, "chunks", "chunks", what)
    _check_names(chunks, what)
    leaves, at = f.raw("leaves"), 0
    pieces = []
    for row in f.array("pieces", MAX_TENSORS * len(KINDS) + MAX_CHUNKS):
        if not (isinstance(row, list) and len(row) == 6 and all(type(x) is int and 0 <= x < 1 << 62 for x in row)):
            raise Damaged(f"{what}: a row of 'pieces' is not six numbers")
        count = blocks(row[3])
        if count * DIGEST_BYTES > len(leaves) - at:
            raise Damaged(f"{what}: 'leaves' is too short for its pieces")
        tensor, kind, first, elements, chunk, offset = row
        own = Leaves(leaves, at // DIGEST_BYTES, count)
        pieces.append(Piece(tensor, kind, first, elements, chunk, offset, own))
        at += count * DIGEST_BYTES
    if at != len(leaves):
        raise Damaged(f"{what}: 'leaves' is longer than its pieces need")
    _check_pieces(tensors, chunks, pieces, what)
    return {
        "run": run,
        "step": step,
        "epoch": epoch,
        "samples": samples,
        "what": digest,
        "meta": meta,
        "tensors": tensors,
        "chunks": chunks,
        "pieces": tuple(pieces),
    }


def _parse_table(rows: Sequence[Any], what: str) -> tuple[Tensor, ...]:
    tensors = []
    for row in rows:
        if not (isinstance(row, list) and len(row) in (2, 3) and isinstance(row[0], str) and isinstance(row[1], list)):
            raise Damaged(f"{what}: a row of 'tensors' is not a name and its dimensions")
        if not all(isinstance(d, int) and not isinstance(d, bool) for d in row[1]):
            raise Damaged(f"{what}: tensor {row[0][:80]!r} has a dimension that is no number")
        if row[2:] and (type(row[2]) is not int or row[2] != 2):
            raise Damaged(f"{what}: tensor {row[0][:80]!r} has neither all kinds nor 2")
        tensors.append(Tensor(row[0], tuple(row[1]), *row[2:]))
    _check_table(tensors, what)
    return tuple(tensors)


def _parse_objects(f: codec.Fields, key: str, folder: str, what: str) -> tuple[Chunk, ...]:
    found = []
    for row in f.array(key, MAX_CHUNKS):
        if not (
            isinstance(row, list)
            and len(row) == 3
            and isinstance(row[0], str)
            and type(row[1]) is int
            and 0 < row[1] <= MAX_CHUNK_BYTES
            and isinstance(row[2], bytes)
            and len(row[2]) == DIGEST_BYTES
        ):
            raise Damaged(f"{what}: a row of {key!r} is not a name, 1 to {MAX_CHUNK_BYTES} bytes and a SHA-256")
        found.append(Chunk(keys.check_relative(row[0], folder, what), row[1], row[2]))
    return tuple(found)


# --- what must hold ---------------------------------------------------------------------------------------


def _check_table(tensors: Sequence[Tensor], what: str) -> None:
    """M1: names are unique, 1 to 500 bytes; 1 to 8 dimensions from 1 up; no product passes 2^48."""
    if not tensors or len({t.name for t in tensors}) != len(tensors):
        raise Damaged(f"{what}: the table of tensors is empty, or has a name twice")
    for t in tensors:
        if not 1 <= len(t.name.encode()) <= 500 or not 1 <= len(t.shape) <= 8:
            raise Damaged(f"{what}: tensor {t.name[:80]!r} needs a name of 1 to 500 bytes and 1 to 8 dimensions")
        if any(not 1 <= d <= MAX_ELEMENTS for d in t.shape) or t.elements > MAX_ELEMENTS:
            raise Damaged(f"{what}: tensor {t.name[:80]!r} of shape {t.shape} has no size that can be")


def _check_names(chunks: Sequence[Chunk], what: str) -> None:
    """M2: no object is named twice."""
    if len({c.name for c in chunks}) != len(chunks):
        raise Damaged(f"{what}: a chunk is named twice")


def _check_pieces(tensors: Sequence[Tensor], chunks: Sequence[Chunk], pieces: Sequence[Piece], what: str) -> None:
    """M3: a piece lies in its tensor, on block borders, with its leaves. M4: its pieces fill a chunk, without gaps."""
    ends = [0] * len(chunks)
    for p in pieces:
        if not (p.tensor < len(tensors) and p.kind < tensors[p.tensor].kinds and p.chunk < len(chunks)):
            raise Damaged(
                f"{what}: a piece names tensor {p.tensor}, kind {p.kind}, chunk {p.chunk}, which are not there"
            )
        name, whole = tensors[p.tensor].name[:80], tensors[p.tensor].elements
        end = p.first + p.elements
        if p.elements < 1 or end > whole or p.first % BLOCK_ELEMENTS or (end % BLOCK_ELEMENTS and end != whole):
            raise Damaged(
                f"{what}: elements {p.first} to {end} of tensor {name!r} ({whole}) are not on block borders inside it"
            )
        count = blocks(p.elements)
        if len(p.leaves) != count or len(raw_leaves(p.leaves)) != count * DIGEST_BYTES:
            raise Damaged(f"{what}: a piece of tensor {name!r} has {len(p.leaves)} digests for {count} blocks")
    for p in sorted(pieces, key=lambda p: (p.chunk, p.offset)):
        if p.offset != ends[p.chunk]:
            raise Damaged(
                f"{what}: the pieces of chunk {chunks[p.chunk].name} overlap or leave a gap at byte {ends[p.chunk]}"
            )
        ends[p.chunk] += p.bytes
    for chunk, end in zip(chunks, ends, strict=True):
        if end != chunk.bytes or end > MAX_CHUNK_BYTES:
            raise Damaged(
                f"{what}: chunk {chunk.name} has {chunk.bytes} bytes, its pieces {end}, the limit is {MAX_CHUNK_BYTES}"
            )


def _check_complete(tensors: Sequence[Tensor], pieces: Sequence[Piece], what: str) -> None:
    """M5: in order of (tensor, kind, first), every element of every tensor-kind comes exactly once."""
    at = iter(pieces)
    for number, tensor in enumerate(tensors):
        for kind, label in enumerate(KINDS[: tensor.kinds]):
            covered = 0
            while covered < tensor.elements:
                p = next(at, None)
                if p is None or (p.tensor, p.kind, p.first) != (number, kind, covered):
                    raise Damaged(
                        f"{what}: {label} of tensor {tensor.name[:80]!r} is not covered from element {covered} on"
                    )
                covered += p.elements
    if next(at, None) is not None:
        raise Damaged(f"{what}: a piece comes twice, or out of order")
