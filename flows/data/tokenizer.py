"""The tokenizer of a dataset: trained here, or given and looked through before a token is written.

A given one is a tokenizer.json of the ``tokenizers`` library. What would lose text or documents in silence is refused:
ids that collide, no token that ends a document, text that it drops or cannot encode.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flows.data.sources.base import Document
from flows.data.sources.files import GZIP, format_of
from trainer.errors import DatasetError
from trainer.spec import MAX_VOCAB_SIZE, DataSpec

EOT = "<|endoftext|>"
MAX_BYTES = 256 << 20  # of a tokenizer.json
LONG_WORD = 1024
"""Characters of a word (letters, digits, signs or blanks in a row) after which it is cut, for training the tokenizer
alone: the time of a merge grows with the square of a word's length, and 2 MB of one word would take minutes."""

_ENDS = (
    *(EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|endofdocument|>", "<|end▁of▁sentence|>"),
    *("<｜end▁of▁sentence｜>", "<|eos|>", "<end_of_turn>", "<|return|>", "[EOS]", "[SEP]", "<|end|>", "EOS"),
)
_SPACE = re.compile(r"\s")
_RUN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]+|_+|\s+")
_BLANKS = re.compile(rf"\s{{{LONG_WORD}}}")
SAFE_CUT = re.compile(r"(?<=\S)(?=[ \n])")
"""Where a text may be cut without another token coming of it, for the tokenizer that is trained here: its words end
before a blank or a line's end, and none looks further."""
_LETTER_CUT = re.compile("(?<=[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u0391-\u03a1\u03b1-\u03c9\u0410-\u044f\u3041-\u3096"
                         "\u30a1-\u30fa\u4e00-\u9fff\uac00-\ud7a3])(?=[ \n])")  # fmt: skip
"""The same behind a letter, for tokenizers whose words may end with the line's end behind a sign."""
_CUT_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
"""How Llama 3 and Qwen find words."""
_SPACE_CUT = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
"""A blank between letters, for tokenizers that put a blank before a text: the one that is taken away comes back."""
_BEFORE_SPACE = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")
"""The same for those that put none."""
_MARK = "\u2581"
"""What stands for a blank in tokens of SentencePiece's kind."""
_BYTES = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
"""Those that UTF-8 has."""
_NO_BYTES = {chr(byte) for byte in range(256) if byte not in _BYTES}
"""The letters that stand for the others, in tokens of bytes."""


def train_tokenizer(texts: Sequence[str] | Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: 256 bytes, the end-of-text mark, and merges up to ``vocab_size`` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in cut_long_words(text)), trainer)
    return tokenizer


def cut_long_words(text: str) -> Iterator[str]:
    """The text itself where all its words are shorter than LONG_WORD, else pieces that cut the longer ones."""
    if max(map(len, text.split()), default=0) < LONG_WORD and _BLANKS.search(text) is None:
        yield text
        return
    begin = 0
    for run in _RUN.finditer(text):
        for at in range(run.start() + LONG_WORD, run.end(), LONG_WORD):
            yield text[begin:at]
            begin = at
    yield text[begin:]


_OF_BYTES = '{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}'
_OF_MARKS = f'{{"type": "Metaspace", "replacement": "{_MARK}", "prepend_scheme": "always", "split": true}}'
"""Decoders: of letters that stand for bytes, of a mark that stands for a blank."""


@dataclass
class GivenTokenizer:
    """A tokenizer that the spec names, and what was found out about it."""

    data: bytes
    tokenizer: Tokenizer
    what: str
    end: str | None
    """The token that ends a document; None where the spec says that there is none (``data.end_token = ""``)."""
    tree: dict[str, Any]
    begin: str | None = None
    """The token that begins each document; None: none does."""

    @property
    def model(self) -> dict[str, Any]:
        found: dict[str, Any] = self.tree["model"]
        return found

    @cached_property
    def vocab(self) -> int:
        return vocab_of(self.tokenizer)

    @property
    def unknown(self) -> int | None:
        """The token that stands for what the tokenizer does not know."""
        if self.model.get("unk_id") is not None:
            return int(self.model["unk_id"])
        name = self.model.get("unk_token")
        return None if name is None else self.tokenizer.token_to_id(name)

    @cached_property
    def _before(self) -> tuple[dict[str, Any], ...]:
        """What is done to a text before its model reads it."""
        return (*_steps(self.tree.get("normalizer")), *_steps(self.tree.get("pre_tokenizer")))

    @cached_property
    def of_bytes(self) -> bool:
        """Whether what its model reads are bytes, a letter each."""
        return any(step.get("type") == "ByteLevel" for step in self._before)

    @property
    def undecoded(self) -> str:
        """The decoder that it lacks to give texts back, as its file holds one; empty where it has one or needs none."""
        if self.tree.get("decoder") is not None:
            return ""
        names = ("replacement", "content", "prepend")
        marks = any(_MARK in map(step.get, names) for step in self._before)
        return _OF_BYTES if self.of_bytes else _OF_MARKS if marks else ""

    @cached_property
    def drops(self) -> bool:
        """Whether its model leaves out what it does not know: BPE without an unknown token, whose vocabulary lacks
        some byte."""
        if not isinstance(self.tokenizer.model, models.BPE) or self.model.get("unk_token") is not None:
            return False
        vocab = self.vocabulary
        if self.model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocab for byte in _BYTES):
            return False
        return not (self.of_bytes and vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet()) - _NO_BYTES)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Its model's, without the tokens that are added."""
        return dict(self.tokenizer.get_vocab(with_added_tokens=False))

    @property
    def affixes(self) -> bool:
        """Whether its model writes characters otherwise at a word's begin or end."""
        return bool(self.model.get("continuing_subword_prefix") or self.model.get("end_of_word_suffix"))

    def knows(self, letter: str) -> bool:
        """Whether a model without affixes and without an unknown token has something for a character."""
        fallback = self.model.get("byte_fallback") and (f"<0x{byte:02X}>" for byte in letter.encode())
        return letter in self.vocabulary or bool(fallback and all(byte in self.vocabulary for byte in fallback))

    @cached_property
    def joins(self) -> bool:
        """Whether one unknown token may stand for many characters."""
        plain = isinstance(self.tokenizer.model, models.BPE) and not self.model.get("fuse_unk")
        return self.unknown is not None and not plain

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()

    @property
    def cut(self) -> re.Pattern[str] | None:
        """Where a text may be cut without another token coming of it; None where it is not known, so that a document
        must be encoded whole."""
        tree = self.tree
        added = tree.get("added_tokens") or ()
        if any(
            token.get("lstrip") or token.get("rstrip") or token.get("single_word") or _SPACE.search(token["content"])
            for token in added
        ):
            return None
        words, changes = tree.get("pre_tokenizer") or {}, tree.get("normalizer")
        if changes not in (None, {"type": "NFC"}):  # which joins nothing with a blank or a line's end
            return self._marked_cut(changes, words)
        bytes_of = {"type": "ByteLevel", "add_prefix_space": False}
        if bytes_of.items() <= words.items() and words.get("use_regex", True):
            return SAFE_CUT
        steps = words.get("pretokenizers") or [] if words.get("type") == "Sequence" else []
        if (
            len(steps) == 2
            and steps[0].get("type") == "Split"
            and (steps[0].get("pattern") or {}).get("Regex") in _CUT_WORDS
            and (steps[0].get("behavior"), steps[0].get("invert")) == ("Isolated", False)
            and {**bytes_of, "use_regex": False}.items() <= steps[1].items()
        ):
            return _LETTER_CUT
        return self._marked_cut(changes, words)

    def _marked_cut(self, changes: dict[str, Any] | None, words: dict[str, Any]) -> re.Pattern[str] | None:
        """Where a text may be cut for tokenizers of SentencePiece's kind: between letters, where neither a token nor
        one that is added goes from a letter to a blank."""
        replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _MARK}
        puts = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _MARK}, replaces]}
        whole = True
        if changes == puts and not words:
            cut = _SPACE_CUT
        elif changes == replaces and (
            not words
            or words == {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        ):
            cut = _BEFORE_SPACE
        elif changes is None and (words.get("type"), words.get("replacement")) == ("Metaspace", _MARK):
            puts_one = words.get("prepend_scheme", "always" if words.get("add_prefix_space", True) else "never")
            cut = _BEFORE_SPACE if puts_one == "never" else _SPACE_CUT
            whole = words.get("split", True) is False
        else:
            return None
        ends = "".join(token["content"][:1] + token["content"][-1:] for token in self.tree.get("added_tokens") or ())
        if any(letter.isalnum() or letter == _MARK for letter in ends):
            return None
        if not whole:
            return cut
        plain = isinstance(self.tokenizer.model, models.BPE) and not self.model.get("ignore_merges")
        if not plain or _MARK not in self.vocabulary or any(_MARK in t.lstrip(_MARK) for t in self.vocabulary):
            return None
        return cut


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer, and those that it is made of."""
    if step is not None:
        yield step
        for one in (*step.get("normalizers", ()), *step.get("pretokenizers", ())):
            yield from _steps(one)


def vocab_of(tokenizer: Tokenizer) -> int:
    """The largest id and one: ids may have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def given_tokenizer(spec: DataSpec) -> GivenTokenizer | None:
    """The tokenizer that the spec names, checked; None where one is to be trained. DatasetError where it cannot be."""
    if spec.tokenizer is None:
        return None
    return checked_tokenizer(spec, _contents(os.path.expanduser(spec.tokenizer), f"data.tokenizer {spec.tokenizer!r}"))


def checked_tokenizer(spec: DataSpec, data: bytes) -> GivenTokenizer:
    """The tokenizer that the spec names, of its bytes."""
    return _checked(f"data.tokenizer {spec.tokenizer!r}", spec.end_token, spec.begin_token, data)


@functools.lru_cache(maxsize=2)
def _checked(what: str, end: str | None, begin: str | None, data: bytes) -> GivenTokenizer:
    """Kept: a vocabulary of a quarter of a million takes a second each time."""
    tokenizer, tree = _parsed(data, what)
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    for token in tree.get("added_tokens") or ():
        wanted, got = token.get("id"), tokenizer.token_to_id(token.get("content", ""))
        if wanted != got:
            raise DatasetError(
                f"{what}: added token {token.get('content')!r} has id {wanted} in the file, but the library gives it "
                f"{got} (it counts on from the vocabulary's size, so gaps there make ids collide); give it that id, or "
                "close the gaps"
            )
    if not vocab:
        raise DatasetError(f"{what} has no token; give the tokenizer.json of a trained tokenizer")
    if len(set(vocab.values())) != len(vocab):
        seen: dict[int, str] = {}
        for token, number in sorted(vocab.items()):
            if number in seen:
                raise DatasetError(f"{what}: {seen[number]!r} and {token!r} both have id {number}; give each its own")
            seen[number] = token
    if max(vocab.values()) >= MAX_VOCAB_SIZE:
        raise DatasetError(
            f"{what}: its largest id is {max(vocab.values())}, and embeddings have a row for each id below it; the "
            f"limit is {MAX_VOCAB_SIZE - 1}: number its tokens from 0 without wide gaps"
        )
    end = _end(end, tokenizer, what)
    return GivenTokenizer(data, tokenizer, what, end, tree, _begin(begin, end, tokenizer, what))


def _contents(path: str, what: str) -> bytes:
    mend = "give a tokenizer.json"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb", closefd=True) as file:
            status = os.fstat(descriptor)
            if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES:
                return file.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise DatasetError(f"{what} cannot be read: it is a folder; give the tokenizer.json in it") from error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, FileNotFoundError):
            mend += " of this machine (hotstage downloads none: `hf download NAME tokenizer.json` does)"
        raise DatasetError(f"{what} cannot be read: {why}; {mend}") from error
    if stat.S_ISREG(status.st_mode):
        raise DatasetError(f"{what} has {status.st_size} bytes, the limit is {MAX_BYTES}; {mend}")
    raise DatasetError(f"{what} cannot be read: it is no regular file; {mend}")


def parse_tokenizer(data: bytes, what: str) -> Tokenizer:
    """A tokenizer from its JSON, without the truncation, padding and dropout that it may ask for: a text has one way to
    be encoded."""
    return _parsed(data, what)[0]


def _parsed(data: bytes, what: str) -> tuple[Tokenizer, dict[str, Any]]:
    try:
        tree = json.loads(data.removeprefix(b"\xef\xbb\xbf").decode())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{what} does not load: {_other_format(data)}; give a tokenizer.json") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise DatasetError(
            f"{what} does not load: {_other_json(tree)}; give a tokenizer.json of the tokenizers library"
        )
    with of_library(f"{what} does not load", "give a tokenizer.json of the tokenizers library"):
        tokenizer = Tokenizer.from_str(data.removeprefix(b"\xef\xbb\xbf").decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
    return tokenizer, tree


def _other_format(data: bytes) -> str:
    if re.match(rb"\n[\x06-\x7f]\n[\x01-\x7e].{1,126}?\x15", data, re.DOTALL):
        return (
            "it is a SentencePiece model, not JSON (transformers' convert_slow_tokenizer makes a tokenizer.json of it)"
        )
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return "it is a tiktoken table, not JSON"
    if data.startswith(b"#version"):
        return "it is the merges.txt of a tokenizer"
    if re.match(rb"(\[PAD\]|\[UNK\]|\[CLS\]|<s>|<pad>|<unk>|<\|endoftext\|>)(\t\S+)?\r?\n", data):
        return "it is a vocab.txt, a list of tokens alone (transformers' save_pretrained writes a tokenizer.json)"
    if data.lstrip().startswith(b"<"):
        return "it is a page of HTML or XML, such as a login or an error; fetch the file itself again"
    what, mend = ("packed by gzip", "unpack it: gunzip -k") if data.startswith(GZIP) else format_of(data[:512])
    if what:
        return f"it is {what}; {mend}"
    if not data.strip():
        return "it is empty"
    return "it is no JSON" if data.rstrip().endswith(b"}") else "it is no JSON to its end; was it cut short?"


def _other_json(tree: object) -> str:
    for keys, name in (
        ({"tokenizer_class"}, "tokenizer_config.json"),
        ({"model_type"}, "model's config.json"),
        ({"eos_token", "unk_token", "bos_token", "pad_token"}, "special_tokens_map.json"),
        ({"chat_template"}, "chat_template.json"),
    ):
        if isinstance(tree, dict) and keys & tree.keys():
            return f"it is a {name}; the file beside it is meant"
    if isinstance(tree, dict) and {"config", "vocab"} <= tree.keys():
        return "it is a tekken.json of Mistral's library; the tokenizer.json that transformers reads is meant"
    if isinstance(tree, dict) and tree and all(isinstance(value, int) for value in tree.values()):
        return "it is a vocab.json, a table of tokens alone"
    return 'it has no "model"'


def _end(wanted: str | None, tokenizer: Tokenizer, what: str) -> str | None:
    if wanted == "":
        return None
    if wanted is not None:
        if tokenizer.token_to_id(wanted) is None:
            raise DatasetError(f"data.end_token {wanted!r} is no token of {what}; {_candidates(tokenizer)}")
        return wanted
    if tokenizer.token_to_id(EOT) is None:
        raise DatasetError(
            f"{what} has no token {EOT}, so nothing would end a document; {_candidates(tokenizer)}, or say "
            'data.end_token = "" to join documents without anything between'
        )
    return EOT


def _begin(wanted: str | None, end: str | None, tokenizer: Tokenizer, what: str) -> str | None:
    if wanted and tokenizer.token_to_id(wanted) is None:
        raise DatasetError(
            f"data.begin_token {wanted!r} is no token of {what}; name the one that its model's texts begin with, or "
            "leave it out"
        )
    if wanted and wanted == end:
        raise DatasetError(
            f"data.begin_token {wanted!r} ends documents of {what} already, and one stands between two of them; leave "
            "data.begin_token out"
        )
    return wanted or None


def template_begin(tokenizer: Tokenizer) -> list[int]:
    """The tokens that a tokenizer's own template puts before a text; none where it lacks one of them."""
    known = (tokenizer.decode([number]) for number in range(tokenizer.get_vocab_size()))
    for text in itertools.chain("a", known):  # one that this tokenizer can encode
        with contextlib.suppress(DatasetError), of_library("", ""):
            bare, whole = (list(tokenizer.encode(text, add_special_tokens=special).ids) for special in (False, True))
            if bare:
                found = next((whole[:n] for n in range(len(whole)) if whole[n : n + len(bare)] == bare), [])
                return [] if any(tokenizer.id_to_token(number) is None for number in found) else found
    return []


def may_end(tokenizer: Tokenizer, token: str) -> bool:
    """Whether a token is one that texts do not hold by themselves: added to the vocabulary, or of a name for ends."""
    return token in _ENDS or any(added.content == token for added in tokenizer.get_added_tokens_decoder().values())


def id_of(tokenizer: Tokenizer, token: str | None) -> int | None:
    """The number of a token that a file names, where the tokenizer has it. Half a surrogate pair is in none."""
    if token is None or any("\ud800" <= letter <= "\udfff" for letter in token):
        return None
    found: int | None = tokenizer.token_to_id(token)
    return found


def is_token(number: Any, vocab: int) -> bool:
    """Whether a file's value is the number of a token."""
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < vocab


def special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens that are no text."""
    added = tokenizer.get_added_tokens_decoder()
    return tuple(added[number].content for number in sorted(added) if added[number].special)


def known_ends(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens by which texts are known to end, of those that it has."""
    return tuple(name for name in _ENDS if tokenizer.token_to_id(name) is not None)


def _candidates(tokenizer: Tokenizer) -> str:
    have = known_ends(tokenizer)
    if not have:
        return "name the token that ends a document: data.end_token"
    return (
        f'it has {", ".join(have)}: name the one that ends a document, such as data.end_token = "{have[0]}" (import: '
        "--end-token)"
    )


@contextlib.contextmanager
def of_library(what: str, mend: str) -> Iterator[None]:
    """What the tokenizers library raises (plain exceptions, and panics that are not even those) as DatasetError."""
    try:
        yield
    except DatasetError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DatasetError(f"{what}: {str(error)[:300]}; {mend}") from error
        raise


@dataclass(frozen=True)
class EncodedText:
    """``unknown``: how often the tokenizer's unknown token stands in it; ``letters``: for how many characters.
    ``offsets``: of each id, where they were asked for."""

    ids: list[int]
    unknown: int
    letters: int
    offsets: Sequence[tuple[int, int]] = ()


def encode(
    given: GivenTokenizer | None, tokenizer: Tokenizer, docs: Sequence[Document], offsets: bool = False
) -> list[EncodedText]:
    """The ids of each document, and where in it they are (``offsets``). DatasetError, with the document's name, where
    a given tokenizer cannot encode it."""
    mend = "give one that has an unknown token or byte fallback, or clean the text"
    texts, dropping = [doc.text for doc in docs], given if given is not None and given.drops else None
    try:
        with of_library("", ""):
            # the fast one gives no offsets, and the same ids
            placed = offsets or (dropping is not None and dropping.affixes)
            batch = tokenizer.encode_batch if placed else tokenizer.encode_batch_fast
            encodings = batch(texts, add_special_tokens=False)
    except DatasetError:
        for doc in docs:  # which one is it?
            with of_library(f"{given.what if given else 'the tokenizer'} cannot encode {doc.name}", mend):
                tokenizer.encode(doc.text, add_special_tokens=False)
        raise
    if dropping is not None:
        for doc, encoding in zip(docs, encodings, strict=True):
            lost = _dropped(dropping, doc.text, encoding.offsets)
            if lost:
                letter, count = max(lost.items(), key=lambda item: (item[1], item[0]))
                name = f" ({unicodedata.name(letter)})" if unicodedata.name(letter, "") else ""
                raise DatasetError(
                    f"{dropping.what} cannot encode {doc.name}: it has no unknown token and leaves out "
                    f"{sum(lost.values())} character(s) of it, {count} of them {letter!r}{name}; {mend}"
                )
    found = [_encoded(given, doc.text, encoding.ids) for doc, encoding in zip(docs, encodings, strict=True)]
    if not offsets:
        return found
    return [replace(one, offsets=encoding.offsets) for one, encoding in zip(found, encodings, strict=True)]


def _encoded(given: GivenTokenizer | None, text: str, ids: list[int]) -> EncodedText:
    if given is None or given.unknown is None:
        return EncodedText(ids, 0, 0)
    unknown = letters = ids.count(given.unknown)
    if unknown and given.joins:  # how much of the text that is only the offsets say
        found = given.tokenizer.encode(text, add_special_tokens=False)
        letters = sum(
            end - begin for token, (begin, end) in zip(ids, found.offsets, strict=True) if token == given.unknown
        )
    return EncodedText(ids, unknown, letters)


@functools.lru_cache(maxsize=1)
def _of_dataset(tokenizer: Tokenizer) -> GivenTokenizer:
    return GivenTokenizer(b"", tokenizer, "", None, json.loads(tokenizer.to_str()))


def unseen(tokenizer: Tokenizer, text: str) -> tuple[list[str], int]:
    """The characters of a text that a dataset's tokenizer leaves out, and how many its unknown token stands for."""
    given = _of_dataset(tokenizer)
    found = tokenizer.encode(text, add_special_tokens=False)
    lost = list(_dropped(given, text, found.offsets)) if given.drops else []
    return lost, _encoded(given, text, found.ids).letters


def _dropped(given: GivenTokenizer, text: str, offsets: list[tuple[int, int]]) -> dict[str, int]:
    """Characters that no token covers, and how often, but for what the tokenizer means to remove.

    Each is looked up; where a model writes characters otherwise at a word's begin or end the offsets say which (those
    behind one that is left out are not right).
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    if given.affixes:
        steps = np.zeros(len(text) + 1, dtype=np.int64)
        if offsets:
            ends = np.asarray(offsets, dtype=np.int64)
            np.add.at(steps, ends[:, 0], 1)
            np.add.at(steps, ends[:, 1], -1)
        codes = codes[np.cumsum(steps[:-1]) == 0]
    letters, counts = np.unique(codes, return_counts=True)
    normalizer, cutter = given.tokenizer.normalizer, given.tokenizer.pre_tokenizer
    lost = {}
    for code, count in zip(letters.tolist(), counts.tolist(), strict=True):
        letter = chr(code)
        shown = normalizer.normalize_str(letter) if normalizer is not None else letter
        pieces = [shown] if cutter is None else [piece for piece, _ in cutter.pre_tokenize_str(shown)]
        if any(given.affixes or not given.knows(one) for piece in pieces for one in piece):
            lost[letter] = count
    return lost
