"""Mixtures: each part is prepared as a corpus of its own, and a manifest names them, with their weights.

One tokenizer for all: the one that the spec gives, else the first part's. The same parts and weights are the same
dataset, wherever they lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from checkpoint import keys
from checkpoint.codec import pack
from checkpoint.dataset import MASK_VERSION, MIX_VERSION, load_dataset_manifest
from checkpoint.store import Store
from flows.data.chat_form import talk_files
from flows.data.shards import load_dataset, put, tokenizer_json
from flows.data.tokenizer import parse_tokenizer
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec
from trainer.spec_mix import MixPart

Say = Callable[[str], None]


def prepare_mixture(
    spec: DataSpec, store: Store, prepare: Callable[[DataSpec, bool], DatasetRef], *, say: Say, mend: bool
) -> DatasetRef:
    """Make the parts of ``spec.mix``, by ``prepare`` (with room for a mask where one of them has one), and
    the dataset that is mixed of them. Raises what that raises, with the part; DatasetError where the parts were not
    made with one tokenizer.
    """
    parts: list[DatasetRef] = []
    masked = any(_masked(entry, store) for entry in spec.mix)
    with tempfile.TemporaryDirectory(prefix="hotstage-tokenizer-") as folder:
        for number, entry in enumerate(spec.mix):
            what = f"data.mix[{number}] ({entry.source})"
            try:
                part = prepare(_with_tokenizer(spec.part(number), store, parts, Path(folder)), masked)
            except (DatasetError, SpecError) as error:
                raise type(error)(f"{what}: {error}") from error
            if part.mix is not None:
                raise DatasetError(f"{what} is a mixture itself; name its parts in its place")
            if parts and _tokens_of(part) != _tokens_of(parts[0]):
                raise DatasetError(
                    f"{what} was not made with the tokenizer of data.mix[0] ({spec.mix[0].source}): prepare it with "
                    "that one, or name the corpus that it was made of"
                )
            if parts and part.token_bytes != parts[0].token_bytes:
                narrow = what if part.token_bytes == 2 else f"data.mix[0] ({spec.mix[0].source})"
                raise DatasetError(
                    f"{narrow} has tokens of 2 bytes: of a vocabulary of {part.vocab} they have no room for the mask "
                    "that other parts have (4 bytes do); name the corpus that it was made of: it gets room"
                )
            parts.append(part)
    first, tokenizer = parts[0], tokenizer_json(store, parts[0])
    talks = [(number, talk) for number, part in enumerate(parts) if (talk := _talk(store, part)) is not None]
    if any(talk != talks[0][1] for _, talk in talks):
        say(
            "data: the conversations of the mixture's parts are not all written by the same chat template: chat, "
            f"exports and whatever trains on take that of data.mix[{talks[0][0]}] ({spec.mix[talks[0][0]].source})"
        )
    manifest = pack(
        {
            "v": MASK_VERSION if any(part.masked for part in parts) else MIX_VERSION,
            "vocab": first.vocab,
            "token_bytes": first.token_bytes,
            "eot": first.eot,
            **({} if first.begin is None else {"begin": first.begin}),
            **({"talk": talks[0][1]} if talks else {}),
            "parts": [{"digest": part.digest, "shards": _rows(store, part)} for part in parts],
            "phases": [{"from_batch": p.from_batch, "weights": list(p.weights)} for p in spec.phases],
            "tokenizer_sha256": first.tokenizer_digest,
        }
    )
    digest = hashlib.sha256(manifest).hexdigest()
    put(store, keys.tokenizer_key(digest), tokenizer, mend)
    put(store, keys.dataset_manifest_key(digest), manifest, mend)
    made = load_dataset(store, digest)
    say(f"data: a mixture of {len(parts)} parts, {made.size_words}, dataset {digest[:12]}")
    return made


def _with_tokenizer(spec: DataSpec, store: Store, made: list[DatasetRef], folder: Path) -> DataSpec:
    """A part's spec with the tokenizer of the first one, where the spec gives none."""
    if not made or spec.tokenizer is not None or spec.source.startswith("dataset:"):
        return spec
    path, first = folder / "tokenizer.json", made[0]
    data = tokenizer_json(store, first)
    path.write_bytes(data)
    for name, text in talk_files(store, first.digest).items():
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer = parse_tokenizer(data, "the first part's tokenizer")
    end = "" if first.eot is None else tokenizer.id_to_token(first.eot)
    begin = spec.begin_token if first.begin is None else tokenizer.id_to_token(first.begin)
    return spec.model_copy(update={"tokenizer": str(path), "end_token": end, "begin_token": begin})


def _tokens_of(part: DatasetRef) -> tuple[object, ...]:
    """What its tokens mean."""
    return part.tokenizer_digest, part.vocab, part.eot, part.begin


def _masked(entry: MixPart, store: Store) -> bool:
    if not entry.source.startswith("dataset:"):
        return entry.prompt_field is not None or entry.messages is not None
    with contextlib.suppress(DatasetError):  # told with its part, when it is that one's turn
        return load_dataset(store, entry.source.removeprefix("dataset:")).masked
    return False


def _talk(store: Store, part: DatasetRef) -> dict[str, object] | None:
    """How its conversations are written."""
    return load_dataset_manifest(store, part.digest).talk


def _rows(store: Store, part: DatasetRef) -> list[dict[str, object]]:
    return [row.to_map() for row in load_dataset_manifest(store, part.digest).shards]
