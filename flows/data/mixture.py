"""Mixtures: each part is prepared as a corpus of its own, and a manifest names them, with their weights.

One tokenizer for all: the one that the spec gives, else the first part's. The same parts and weights are the same
dataset, wherever they lie.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from checkpoint import keys
from checkpoint.codec import pack
from checkpoint.dataset import MIX_VERSION, load_dataset_manifest
from checkpoint.store import Store
from flows.data.shards import load_dataset, put, tokenizer_json
from flows.data.tokenizer import parse_tokenizer
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec

Say = Callable[[str], None]


def prepare_mixture(
    spec: DataSpec, store: Store, prepare: Callable[[DataSpec, Store], DatasetRef], *, say: Say, mend: bool
) -> DatasetRef:
    """Make the parts of ``spec.mix``, by ``prepare``, and the dataset that is mixed of them. Raises what that raises,
    with the part; DatasetError where the parts were not made with one tokenizer.
    """
    parts: list[DatasetRef] = []
    with tempfile.TemporaryDirectory(prefix="hotstage-tokenizer-") as folder:
        for number, entry in enumerate(spec.mix):
            what = f"data.mix[{number}] ({entry.source})"
            try:
                part = prepare(_with_tokenizer(spec.part(number), store, parts, Path(folder)), store)
            except (DatasetError, SpecError) as error:
                raise type(error)(f"{what}: {error}") from error
            if part.mix is not None:
                raise DatasetError(f"{what} is a mixture itself; name its parts in its place")
            if parts and _tokens_of(part) != _tokens_of(parts[0]):
                raise DatasetError(
                    f"{what} was not made with the tokenizer of data.mix[0] ({spec.mix[0].source}): prepare it with "
                    "that one, or name the corpus that it was made of"
                )
            parts.append(part)
    first, tokenizer = parts[0], tokenizer_json(store, parts[0])
    manifest = pack(
        {
            "v": MIX_VERSION,
            "vocab": first.vocab,
            "token_bytes": first.token_bytes,
            "eot": first.eot,
            "parts": [{"digest": part.digest, "shards": _rows(store, part)} for part in parts],
            "phases": [{"from_batch": p.from_batch, "weights": list(p.weights)} for p in spec.phases],
            "tokenizer_sha256": first.tokenizer_digest,
        }
    )
    digest = hashlib.sha256(manifest).hexdigest()
    put(store, keys.tokenizer_key(digest), tokenizer, mend)
    put(store, keys.dataset_manifest_key(digest), manifest, mend)
    made = load_dataset(store, digest)
    say(f"data: a mixture of {len(parts)} parts, {made.tokens:,} tokens, dataset {digest[:12]}")
    return made


def _with_tokenizer(spec: DataSpec, store: Store, made: list[DatasetRef], folder: Path) -> DataSpec:
    """A part's spec with the tokenizer of the first one, where the spec gives none."""
    if not made or spec.tokenizer is not None or spec.source.startswith("dataset:"):
        return spec
    path, first = folder / "tokenizer.json", made[0]
    data = tokenizer_json(store, first)
    path.write_bytes(data)
    tokenizer = parse_tokenizer(data, "the first part's tokenizer")
    end = "" if first.eot is None else tokenizer.id_to_token(first.eot)
    return spec.model_copy(update={"tokenizer": str(path), "end_token": end})


def _tokens_of(part: DatasetRef) -> tuple[object, ...]:
    """What its tokens mean."""
    return part.tokenizer_digest, part.vocab, part.token_bytes, part.eot


def _rows(store: Store, part: DatasetRef) -> list[dict[str, object]]:
    rows = load_dataset_manifest(store, part.digest).shards
    return [{"tokens": row.tokens, "bytes": row.bytes, "sha256": row.sha256} for row in rows]
