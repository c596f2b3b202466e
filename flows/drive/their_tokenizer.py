"""The tokenizer that weights were made with: where it lies, that it comes along, that a run's own agrees with it.

Rows of an embedding mean the tokens of one tokenizer; with another one a model is as good as untrained, and nothing
would say so.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoint.safetensors import gone
from checkpoint.store import Store
from flows.data import load_dataset, load_tokenizer, may_end, parse_tokenizer, vocab_of
from flows.data.chat_form import BESIDE_TOKENIZER
from flows.data.tokenizer import id_of, is_token
from flows.drive.hf_beside import beside_with_talk
from flows.drive.run import find_run, load_what
from trainer.errors import DatasetError, SpecError
from trainer.models.hf_config import end_token_ids, read_config
from trainer.spec import DataSpec

log = logging.getLogger(__name__)
TOKENIZER = "tokenizer.json"
MENDS = (
    "data.tokenizer in a spec, --tokenizer of `hotstage import`; transformers' "
    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) writes one"
)


def folder_of_init(text: str) -> Path:
    """The folder that ``hf:…`` names. SpecError where there is none."""
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return path
    why = "is a file" if path.exists() else "is not here"
    raise SpecError(
        f"model.init 'hf:{text}': the folder {path} {why}; name the folder of a model in Hugging Face's form (hotstage "
        "downloads nothing: `hf download NAME --local-dir DIR` of huggingface_hub does). A run that has begun goes on "
        "without it: hotstage runs resume RUN"
    )


@dataclass(frozen=True)
class TheirTokenizer:
    """The tokenizer that weights were made with. ``end``: the token that ends a text, None where nobody says it and ""
    where none does; ``begin``: the one that began each of a run's."""

    tokenizer: Tokenizer
    end: str | None
    path: Path | None = None
    begin: str | None = None
    beside: Mapping[str, str] = field(default_factory=dict)
    """Files that say how conversations are written, where they do not lie beside ``path``."""


def tokenizer_of(store: Store, init: str) -> TheirTokenizer | None:
    """The tokenizer that lies beside the weights which ``model.init`` names; None where that is a digest alone.
    DatasetError where none does."""
    kind, _, rest = init.partition(":")
    if kind == "hf":
        folder = folder_of_init(rest)
        found = folder_tokenizer(folder)
        if found is None and (folder / TOKENIZER).is_symlink():
            raise DatasetError(f"{folder / TOKENIZER} is {gone(folder / TOKENIZER)}; download it again")
        if found is None:
            raise DatasetError(
                f"{folder} has no {TOKENIZER}, and weights are of no use without the tokenizer that they were made "
                f"with: name it ({MENDS})"
            )
        return found
    if kind != "run":
        return None
    return run_tokenizer(store, find_run(store, rest.rpartition("@")[0]))


def run_tokenizer(store: Store, run: str) -> TheirTokenizer:
    """The tokenizer of a run's data, and how its conversations are written."""
    digest = str(load_what(store, run)["data"]["digest"])
    files = beside_with_talk(store, run, digest)
    beside = {name: files[name] for name in BESIDE_TOKENIZER if name in files}
    return replace(dataset_tokenizer(store, digest), beside=beside)


def dataset_tokenizer(store: Store, digest: str) -> TheirTokenizer:
    """The tokenizer of a dataset."""
    dataset = load_dataset(store, digest)
    tokenizer = load_tokenizer(store, dataset)
    end, begin = ("" if token is None else tokenizer.id_to_token(token) for token in (dataset.eot, dataset.begin))
    return TheirTokenizer(tokenizer, end, begin=begin)


def folder_tokenizer(folder: Path) -> TheirTokenizer | None:
    """The tokenizer.json of a folder, and its end token; None where there is none."""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    tokenizer = read_tokenizer(path)
    return TheirTokenizer(tokenizer, end_of(folder, tokenizer), path)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file. DatasetError where it is none."""
    try:
        return parse_tokenizer(path.read_bytes(), str(path))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}; give a tokenizer.json") from error


def end_of(folder: Path, tokenizer: Tokenizer) -> str | None:
    """The token that ends a text, as the folder's files say it.

    An id whose token is an ordinary one is a default of other programs (2 of Llama's), and passed over.
    """
    vocab = vocab_of(tokenizer)
    for file, number in _end_ids(folder):
        if not is_token(number, vocab):
            log.warning(
                "%s: eos_token_id %.100r is passed over: the tokenizer's ids are 0 to %d", file, number, vocab - 1
            )
            continue
        token = tokenizer.id_to_token(number)
        if token is not None and may_end(tokenizer, token):
            return token
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        said = _beside(folder / name).get("eos_token") if (folder / name).is_file() else None
        token = said.get("content") if isinstance(said, Mapping) else said
        if isinstance(token, str) and id_of(tokenizer, token) is not None:
            return token
        if said is not None:
            log.warning("%s: eos_token %.100r is passed over: the tokenizer has no such token", folder / name, said)
    return None


def tell_lacking(folder: Path, tokenizer: Tokenizer) -> None:
    """A warning where files beside tokenizer.json add tokens that it has not: transformers adds them, and encodes
    otherwise than it alone."""
    for name in ("added_tokens.json", "tokenizer_config.json"):
        try:
            tree = _beside(folder / name) if (folder / name).is_file() else {}
        except SpecError:  # told where it is needed
            continue
        pairs: list[tuple[Any, Any]] = list(tree.items())
        if name == "tokenizer_config.json":
            rows = tree.get("added_tokens_decoder")
            items = rows.items() if isinstance(rows, Mapping) else ()
            pairs = [(row.get("content"), number) for number, row in items if isinstance(row, Mapping)]
        lacking = [(t, n) for t, n in pairs if isinstance(t, str) and str(id_of(tokenizer, t)) != str(n)]
        if lacking:
            log.warning(
                "%s: %r is token %s there%s, and not of %s, which encodes texts: where the model was trained with it, "
                "write that file anew (transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR))",
                folder / name,
                *lacking[0],
                f" (and {len(lacking) - 1} more)" if lacking[1:] else "",
                TOKENIZER,
            )
            return


def _end_ids(folder: Path) -> Iterator[tuple[Path, Any]]:
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            for number in end_token_ids(_beside(folder / name)):
                yield folder / name, number


def _beside(file: Path) -> dict[str, Any]:
    """A file of JSON that says which token ends a text. SpecError where it is none."""
    return read_config(file, f"fetch {file.name} anew, or remove it and name the token that ends a text (--end-token)")


@contextmanager
def with_tokenizer(data: DataSpec, found: TheirTokenizer | None) -> Iterator[DataSpec]:
    """The data, with the tokenizer that was found where they name none of their own."""
    if found is None or data.tokenizer is not None or data.source.startswith("dataset:"):
        yield data
        return
    with tempfile.TemporaryDirectory(prefix="hotstage-tokenizer-") as folder:
        path = found.path or Path(folder) / TOKENIZER
        if found.path is None:
            path.write_text(found.tokenizer.to_str(), encoding="utf-8")
            for name, text in found.beside.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
        named = {"tokenizer": str(path), "end_token": found.end, "begin_token": found.begin}
        yield data.model_copy(update=named)


def check_tokenizer(place: str, rows: int, theirs: Tokenizer | None, tokenizer: Tokenizer, vocab: int) -> None:
    """DatasetError where a run's tokenizer numbers tokens otherwise than ``theirs``, with which its weights were made,
    or has more of them than these have rows. ``place``: whose weights they are, for people."""
    if vocab > rows:
        beyond = {n: t for t, n in tokenizer.get_vocab(with_added_tokens=True).items() if n >= rows}
        first = f" ({beyond[min(beyond)]!r} is token {min(beyond)})" if beyond else ""
        raise DatasetError(
            f"the tokenizer has {vocab} tokens{first}, the weights of {place} have rows for {rows}: give the tokenizer "
            "that they were made with (data.tokenizer), or leave out of its added_tokens what was added since"
        )
    if theirs is None:
        return
    there = theirs.get_vocab(with_added_tokens=True)
    names = {number: token for token, number in there.items()}
    for token, number in sorted(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
        if there.get(token, number) != number or names.get(number, token) != token:
            other = f"{token!r} is token {there[token]}" if token in there else f"token {number} is {names[number]!r}"
            raise DatasetError(
                f"the weights of {place} were made with another tokenizer: {other} there, and {token!r} is token "
                f"{number} of this one; leave data.tokenizer out (theirs is taken), or name theirs"
            )
