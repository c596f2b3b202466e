"""The manifest of a prepared dataset: canonical msgpack under ``data/<digest>/manifest``, whose SHA-256 is the digest.

v 1
vocab, eot        size of the vocabulary; the token that ends a document, or None
begin             the token that begins each document; missing where none does
talk              of conversations, how they are written: {template, tokens {name: token}}; missing where there are none
token_bytes       of a stored token: 2 or 4
shards            [{tokens, bytes, sha256 (hex)}...] of ``00000.bin`` and on
tokenizer_sha256  of ``tokenizer.json`` (hex)
inputs            digest of what it was made of, which names its validation part too (flows/data/shards.py)
and what only says where it is from: documents

v 3, of one where a shard has a mask, so that not each token's prediction counts: v 1, or v 2 (it has ``parts`` then),
with another key in the rows of those shards

counted           tokens of the shard whose prediction counts

v 2, of a mixture: no shards and objects of its own but the tokenizer's, instead of ``shards``

parts             [{digest (hex) of the part's own dataset, shards as above}...]
phases            [{from_batch, weights, one a part}...] (``trainer/engine/wire/shard.h``)

Beside each shard lie the digests of its leaves, pieces of ``leaf_bytes``, so that a part of it can be fetched and
checked alone (``data/<digest>/leaves/00000.bin``, a sealed map: v 1, leaf_bytes, bytes of the shard, digests one after
the other). No digest of a dataset depends on them, and one that was made before there were any has none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from checkpoint import codec, keys
from checkpoint.errors import Damaged
from checkpoint.store.base import Store
from trainer.wire import CYCLE_MAX, PARTS_MAX, PHASES_MAX

VERSION = 1
MIX_VERSION = 2
MASK_VERSION = 3
MAX_STEPS = 1 << 40
MAX_BYTES = 64 << 20
_MAX_SHARDS = 1 << 20
_MAX_TEMPLATE = 1 << 20
LEAF_BYTES = 64 << 10
"""About a block of the shuffle; a multiple of the disk's blocks, so that leaves can be given back alone."""
LEAF_ALIGN = 4096
_LEAVES_VERSION = 1
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class ShardRow:
    """A shard file: its tokens, its bytes with the header, their SHA-256 (hex); ``counted``: of a masked one, the
    tokens that count.
    """

    tokens: int
    bytes: int
    sha256: str
    counted: int | None = None

    def to_map(self) -> dict[str, object]:
        """As a manifest has it."""
        row = {"tokens": self.tokens, "bytes": self.bytes, "sha256": self.sha256}
        return row if self.counted is None else {**row, "counted": self.counted}


@dataclass(frozen=True)
class DatasetManifest:
    """What the manifest says, as far as it is used."""

    bytes: int
    """Of itself."""
    vocab: int
    token_bytes: int
    eot: int | None
    shards: tuple[ShardRow, ...]
    tokenizer_sha256: str
    begin: int | None = None
    inputs: str | None = None
    """Of what it was made (hex)."""
    talk: dict[str, object] | None = None
    """How its conversations are written, as the manifest has it."""
    parts: tuple[tuple[str, int], ...] = ()
    """Of a mixture: the digest of each part, and how many of the shards are its, in order; those lie under its name."""
    phases: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Of a mixture: from which batch on, and the weight of each part."""


def load_dataset_manifest(store: Store, digest: str) -> DatasetManifest:
    """The manifest of the dataset of this digest. NotFound; Damaged where it does not hold; OtherVersion."""
    return parse_dataset_manifest(dataset_manifest_bytes(store, digest), digest)


def dataset_manifest_bytes(store: Store, digest: str) -> bytes:
    """As they are in the store. NotFound."""
    return store.get(keys.dataset_manifest_key(digest), max_bytes=MAX_BYTES)


def parse_dataset_manifest(data: bytes, digest: str) -> DatasetManifest:
    """Damaged where these bytes are not the manifest of the dataset of this digest; OtherVersion."""
    what = f"the manifest of dataset {digest[:12]}"
    if hashlib.sha256(data).hexdigest() != digest:
        raise Damaged(f"{what} does not have the digest that names it")
    f = codec.Fields(codec.unpack(data, what, max_bytes=MAX_BYTES), what)
    version = f.version(MASK_VERSION)
    mixed = version == MIX_VERSION or (version == MASK_VERSION and f.has("parts"))
    parts = _parts(f, what) if mixed else []
    rows = [row for _, own in parts for row in own] if parts else f.array("shards", _MAX_SHARDS)
    if len(rows) > _MAX_SHARDS:
        raise Damaged(f"{what}: {len(rows)} shards, the limit is {_MAX_SHARDS}")
    return DatasetManifest(
        bytes=len(data),
        vocab=f.integer("vocab", 1),
        token_bytes=f.integer("token_bytes", 1),
        eot=f.integer("eot", 0) if f.has("eot") else None,
        begin=f.integer("begin", 0) if f.has("begin") else None,
        shards=tuple(_shard(row, f"{what}, shard {number}") for number, row in enumerate(rows)),
        tokenizer_sha256=f.hex("tokenizer_sha256"),
        inputs=f.text("inputs", 64) if f.has("inputs") else None,
        talk=_talk(f, what) if f.has("talk") else None,
        parts=tuple((digest, len(own)) for digest, own in parts),
        phases=_phases(f, len(parts), what) if parts else (),
    )


def _talk(f: codec.Fields, what: str) -> dict[str, object]:
    talk = codec.Fields(f.map("talk"), f"{what}, talk")
    named = talk.map("tokens")
    tokens = codec.Fields(named, f"{what}, the tokens of its talk")
    return {
        "template": talk.text("template", _MAX_TEMPLATE),
        "tokens": {str(name): tokens.text(name) for name in sorted(map(str, named))},
    }


def _parts(f: codec.Fields, what: str) -> list[tuple[str, list[object]]]:
    found = []
    for number, value in enumerate(f.array("parts", PARTS_MAX)):
        part = codec.Fields(value, f"{what}, part {number}")
        found.append((part.hex("digest"), part.array("shards", _MAX_SHARDS)))
        if not found[-1][1]:
            raise Damaged(f"{what}, part {number}: it has no shard")
    if not found:
        raise Damaged(f"{what}: a mixture of no parts")
    return found


def _phases(f: codec.Fields, parts: int, what: str) -> tuple[tuple[int, tuple[int, ...]], ...]:
    found: list[tuple[int, tuple[int, ...]]] = []
    for number, value in enumerate(f.array("phases", PHASES_MAX)):
        name = f"{what}, phase {number}"
        phase = codec.Fields(value, name)
        weights = phase.array("weights", PARTS_MAX)
        first = phase.integer("from_batch", found[-1][0] + 1 if found else 1, MAX_STEPS if found else 1)
        if len(weights) != parts or any(type(w) is not int or w < 0 for w in weights):
            raise Damaged(f"{name}: {parts} parts do not have the weights {str(weights)[:100]}")
        if not 1 <= sum(weights) <= CYCLE_MAX:
            raise Damaged(f"{name}: weights of {sum(weights)} in all, must be 1 to {CYCLE_MAX}")
        found.append((first, tuple(weights)))
    if not found:
        raise Damaged(f"{what}: a mixture without weights")
    return tuple(found)


def _shard(row: object, what: str) -> ShardRow:
    f = codec.Fields(row, what)
    tokens = f.integer("tokens", 0)
    counted = f.integer("counted", 0, tokens) if f.has("counted") else None
    return ShardRow(tokens, f.integer("bytes", 1), f.hex("sha256"), counted)


@dataclass(frozen=True)
class ShardLeaves:
    """The digests of a shard's leaves.

    >>> table = ShardLeaves.of([b"x" * 5000, b"y" * 5000], leaf_bytes=4096)
    >>> len(table), table.holds(0, b"x" * 4096), table.holds(2, b"y" * 1808), table.holds(2, b"y")
    (3, True, True, False)
    """

    leaf_bytes: int
    shard_bytes: int
    digests: bytes

    @classmethod
    def of(cls, pieces: Iterable[codec.Data], leaf_bytes: int = LEAF_BYTES) -> ShardLeaves:
        """Of a shard that comes in pieces."""
        digests, total = bytearray(), 0
        digest, room = hashlib.sha256(), leaf_bytes
        for piece in pieces:
            rest = memoryview(piece)
            total += rest.nbytes
            while rest.nbytes:
                part, rest = rest[:room], rest[room:]
                digest.update(part)
                room -= part.nbytes
                if not room:
                    digests += digest.digest()
                    digest, room = hashlib.sha256(), leaf_bytes
        if room < leaf_bytes:
            digests += digest.digest()
        return cls(leaf_bytes, total, bytes(digests))

    def __len__(self) -> int:
        return len(self.digests) // _DIGEST

    def holds(self, leaf: int, data: codec.Data) -> bool:
        """Whether these are that leaf's bytes."""
        return hashlib.sha256(data).digest() == self.digests[leaf * _DIGEST : (leaf + 1) * _DIGEST]

    def pack(self) -> bytes:
        return codec.seal(
            {"v": _LEAVES_VERSION, "leaf_bytes": self.leaf_bytes, "bytes": self.shard_bytes, "digests": self.digests}
        )

    @classmethod
    def parse(cls, data: bytes, what: str) -> ShardLeaves:
        """Damaged where it does not hold; OtherVersion."""
        f = codec.Fields(codec.unseal(data, what, max_bytes=MAX_BYTES), what)
        f.version(_LEAVES_VERSION)
        found = cls(f.integer("leaf_bytes", LEAF_ALIGN), f.integer("bytes", 1), f.raw("digests"))
        f.done()
        if found.leaf_bytes % LEAF_ALIGN or len(found.digests) != _DIGEST * -(-found.shard_bytes // found.leaf_bytes):
            raise Damaged(f"{what}: {len(found.digests)} bytes of digests do not go with its leaves")
        return found


def load_leaves(store: Store, digest: str, number: int) -> ShardLeaves:
    """Of a shard of the dataset of this digest. NotFound where it was made without; Damaged; OtherVersion."""
    what = f"the leaves' digests of shard {number} of dataset {digest[:12]}"
    return ShardLeaves.parse(store.get(keys.leaves_key(digest, number), max_bytes=MAX_BYTES), what)
