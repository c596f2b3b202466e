"""What a model's folder says beside its weights and tokenizer, and an export says again: how a talk is written, at
which tokens an answer ends, how transformers generates.

It lies with the run that holds the weights (``runs/<run>/live/beside``: a map, v 1, ``files``, the text of each by its
name), and whoever trains on from them finds it by his run's parents. No bit of a run depends on it; an import writes it
again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoint import codec, keys
from checkpoint.errors import Damaged, NotFound
from checkpoint.export_to import TEMPLATE
from checkpoint.log import RunLog
from checkpoint.store import Store
from flows.data import may_end, vocab_of
from flows.data.chat_form import form_beside, talk_files
from flows.data.sources.talk import turn_end
from flows.data.tokenizer import id_of, is_token
from trainer.errors import DatasetError, SpecError
from trainer.models.hf_config import end_token_ids, read_config
from trainer.spec_hints import not_utf8

log = logging.getLogger(__name__)

TREES = ("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer_config.json")
MAX_BYTES = 16 << 20
_VERSION = 1
_OF_A_MACHINE = ("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file")
"""Keys of a tokenizer_config.json that say where it once lay."""
_GENERIC = "Backend"
"""How transformers 5 calls what reads a tokenizer's file (TokenizersBackend, MistralCommonBackend) ends, and 4 does not
know it; both know PreTrainedTokenizerFast for a tokenizer.json."""
_SPECIAL, _EXTRA = "additional_special_tokens", "extra_special_tokens"
"""Lists of further tokens: transformers 5 writes the second one, and reads both; 4 takes a table under that name."""

Beside = Mapping[str, str]
"""The text of each file by its name."""


def read_beside(folder: Path) -> Beside:
    """Of a folder; what cannot be read is left out and told."""
    found: dict[str, str] = {}
    for name in (*TREES, TEMPLATE):
        file = folder / name
        try:
            if file.is_file():
                found[name] = file.read_text("utf-8") if name == TEMPLATE else json.dumps(read_config(file))
        except (SpecError, OSError, UnicodeDecodeError) as error:
            why = f"{file}: {not_utf8(error.object, error)}" if isinstance(error, UnicodeDecodeError) else error
            log.warning("%s; exports of the model will not have what it says", why)
    if (folder / "additional_chat_templates").is_dir():
        log.warning("%s/additional_chat_templates: exports have the model's first chat template alone", folder)
    if sum(map(len, found.values())) > MAX_BYTES // 4:
        log.warning("%s: the files beside its weights are too large to be kept; exports will not have them", folder)
        return {}
    return found


def keep_beside(store: Store, run: str, files: Beside) -> None:
    """With the run that holds the weights."""
    if files:
        store.put(keys.beside_key(run), codec.pack_hint({"v": _VERSION, "files": dict(files)}))


def beside_of(store: Store, run: str) -> Beside:
    """Of the weights that a run began from, or its parent, and so on; nothing where nobody brought any."""
    seen: set[str] = set()
    while run not in seen:
        seen.add(run)
        with suppress(NotFound, Damaged):
            data = store.get(keys.beside_key(run), max_bytes=MAX_BYTES)
            files = codec.unpack_hint(data, "what lay beside the weights", max_bytes=MAX_BYTES)["files"]
            return {str(name): str(text) for name, text in files.items()}
        parent = RunLog(store, run).fold(quick=True).parent
        run = run if parent is None else str(parent["run"])
    return {}


def beside_with_talk(store: Store, run: str, dataset: str) -> Beside:
    """``beside_of``, with the chat template of the run's data (their digest), and what it names, where these are
    conversations: a tokenizer_config.json may hold another template."""
    files, talk = beside_of(store, run), talk_files(store, dataset)
    if not talk:
        return files
    config = tree_of(files, TREES[-1]) | tree_of(talk, TREES[-1])
    config.pop("chat_template", None)
    return {**files, TREES[-1]: json.dumps(config), TEMPLATE: talk[TEMPLATE]}


# --- what it means ------------------------------------------------------------------------------------------


def tree_of(files: Beside, name: str) -> dict[str, Any]:
    """A file of JSON; empty where it is not there."""
    return dict(json.loads(files.get(name, "{}")))


def ends_of(files: Beside, tokenizer: Tokenizer, end: int | None) -> list[int]:
    """All tokens at which a text ends: of the data (``end``), then those that the files name and that end texts."""
    vocab = vocab_of(tokenizer)
    said = [n for name in TREES[:2] for n in end_token_ids(tree_of(files, name)) if is_token(n, vocab)]
    for name in reversed(TREES[2:]):
        number = id_of(tokenizer, content_of(tree_of(files, name).get("eos_token")))
        said += [] if number is None else [number]
    with suppress(DatasetError):  # a template that is none is told where somebody talks by it
        form = form_beside(files, tokenizer, end, None)
        turn = None if form is None else id_of(tokenizer, turn_end(form))
        said += [] if turn is None else [turn]
    found = [n for n in said if (token := tokenizer.id_to_token(n)) is not None and may_end(tokenizer, token)]
    return list(dict.fromkeys(([] if end is None else [end]) + found))


def ids_of(files: Beside, tokenizer: Tokenizer, begin: int | None, ends: list[int]) -> dict[str, Any]:
    """The numbers of tokens that config.json and generation_config.json name. ``begin``: what a text begins with, None
    where nothing does; a model's own is kept then, and so is what it fills up with."""
    end = ends[0] if ends else None
    theirs = {**tree_of(files, TREES[0]), **tree_of(files, TREES[1])}
    ids: dict[str, Any] = {"bos_token_id": begin, "eos_token_id": ends if ends[1:] else end, "pad_token_id": None}
    special = tokenizer.get_added_tokens_decoder()
    for key in ("bos_token_id", "pad_token_id"):
        number = theirs.get(key)
        if ids[key] is None:
            ids[key] = number if is_token(number, vocab_of(tokenizer)) and number in special else end
    return ids


def generation_of(files: Beside, ids: dict[str, Any]) -> dict[str, Any]:
    """A generation_config.json: theirs, with these ids."""
    return tree_of(files, TREES[1]) | ids


def tokenizer_config_of(files: Beside, tokenizer: Tokenizer, begin: int | None, context: int) -> dict[str, Any]:
    """What of theirs holds with this tokenizer: tokens that it has, and nothing of code or places elsewhere.
    ``begin``: what a text begins with, where something does."""
    told = {key: value for name in TREES[2:] for key, value in tree_of(files, name).items()}
    code = told.pop("auto_map", None)
    kept = {key: value for key, value in told.items() if key not in _OF_A_MACHINE and _holds(key, value, tokenizer)}
    further = [one for key in (_SPECIAL, _EXTRA) if isinstance(kept.get(key), list) for one in kept.pop(key)]
    if held := {content_of(one): one for one in further if id_of(tokenizer, content_of(one)) is not None}:
        kept[_SPECIAL] = list(held.values())
    if isinstance(named := kept.get(_EXTRA), Mapping):
        kept[_EXTRA] = {name: one for name, one in named.items() if id_of(tokenizer, content_of(one)) is not None}
    if isinstance(rows := kept.get("added_tokens_decoder"), Mapping):
        kept["added_tokens_decoder"] = {
            number: row for number, row in rows.items() if str(id_of(tokenizer, content_of(row))) == number
        }
    if code is not None or str(kept.get("tokenizer_class")).endswith(_GENERIC):
        kept.pop("tokenizer_class", None)
    if begin is not None and content_of(kept.get("bos_token")) != tokenizer.id_to_token(begin):
        kept.pop("bos_token", None)
    longest = kept.get("model_max_length")
    if isinstance(longest, int | float):
        kept["model_max_length"] = min(longest, context)
    return kept


def content_of(said: Any) -> str | None:
    """The token that a file names, alone or with how it is found in a text."""
    token = said.get("content") if isinstance(said, Mapping) else said
    return token if isinstance(token, str) else None


def _holds(key: str, value: Any, tokenizer: Tokenizer) -> bool:
    names_one = key.endswith("_token") and content_of(value) is not None
    return not names_one or id_of(tokenizer, content_of(value)) is not None
