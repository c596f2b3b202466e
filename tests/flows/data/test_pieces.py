"""A corpus worked on piece by piece: the same bytes whatever the pieces, who works on them, and who is killed."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from checkpoint.store import Store, open_store
from flows.data import encoding, prepare, validation_of
from flows.data.pieces import cut
from flows.data.runners import InTurn
from flows.data.shards import spread
from flows.data.sources import Borne, Document, Entry, base, documents, open_source
from flows.data.tokenizer import EOT, GivenTokenizer, cut_long_words, given_tokenizer, train_tokenizer
from tests.flows.data.test_prepare import WORDS, objects
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError
from trainer.spec import DataSpec

ODD = (
    *(
        "",
        " ",
        "\n",
        "word",
        " two words",
        "tab\tand\u00a0space",
        "e\u0301 \u3000wide",
        "don't we'll",
        "x" * 90,
        "1234 5",
    ),
    *(
        "a.\n\nb",
        "\n\n\n",
        "  lead",
        "trail  ",
        "\u4e2d\u6587 \u3002\n",
        "\U0001f600 \U0001f600",
        "f(x);\n\ty",
        EOT,
        "\x1c \x85",
    ),
)


def text_of(dice: random.Random, pieces_: int) -> str:
    return "".join(dice.choice(ODD) + dice.choice(["", " ", "\n", " and "]) for _ in range(pieces_))


def never() -> float:
    """A clock by which no file has settled."""
    return 0.0


def new_store(folder: Path, name: str) -> Store:
    return open_store(f"file://{folder / name}" if name == "file" else "memory:")


# --- cutting ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 30), st.randoms())
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_corpus_in_order(sizes: list[int], size: int, dice: random.Random) -> None:
    entries = [Entry(f"{n}", s, "") for n, s in enumerate(sizes)]
    divides = {e.name: dice.random() < 0.5 for e in entries}
    made = cut(entries, lambda e: divides[e.name], size)
    assert [piece.number for piece in made] == list(range(len(made)))
    covered = []
    for piece in made:
        held = entries[piece.begin : piece.end]
        assert held
        assert len(held) == 1 or (sum(e.size for e in held) <= size and (piece.first, piece.last) == (0, -1))
        for entry in held:
            last = entry.size if piece.last < 0 else piece.last
            assert piece.last < 0 or divides[entry.name]
            covered += [(int(entry.name), piece.first, last)]
    for entry_no, group in itertools.groupby(covered, key=lambda row: row[0]):
        spans = list(group)
        assert spans[0][1] == 0
        assert spans[-1][2] == sizes[entry_no]
        assert all(a[2] == b[1] for a, b in itertools.pairwise(spans))
    assert sorted({row[0] for row in covered}) == list(range(len(entries)))


@given(st.lists(st.integers(0, 20), max_size=9), st.integers(1, 15))
@settings(max_examples=50, deadline=None)
def test_shards_are_the_tokens_in_order(counts: list[int], size: int) -> None:
    parts = {f"p{n}": [(n, i) for i in range(count)] for n, count in enumerate(counts)}
    shards = spread([(name, len(held)) for name, held in parts.items()], size)
    flat = [t for spans in shards for s in spans for t in parts[s.name][s.first : s.first + s.count]]
    assert flat == [t for held in parts.values() for t in held]
    assert all(sum(s.count for s in spans) == size for spans in shards[:-1])


@given(st.integers(0, 1 << 30), st.integers(1, 60), st.booleans())
@settings(max_examples=25, deadline=None)
def test_ranges_of_json_lines_give_each_line_once(tmp_path_factory: Any, seed: int, size: int, carriage: bool) -> None:
    dice = random.Random(seed)
    ends = ["\n", "\r\n", "\r", "\n\n"] if carriage else ["\n"]
    lines = [json.dumps({"text": f"{n} " + "é" * dice.randrange(20)}) for n in range(dice.randrange(1, 9))]
    data = "".join(line + dice.choice(ends) for line in lines)
    data = data if dice.random() < 0.5 else data.rstrip()
    path = tmp_path_factory.mktemp("ranges") / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if dice.random() < 0.3 else b"") + data.encode())
    source = open_source(DataSpec(source=f"jsonl:{path}"))
    (entry,) = source.look()
    whole = [(doc.text, doc.name) for doc in source.read(entry, 0, -1, Borne())]
    assert [text.split()[0] for text, _ in whole] == [str(n) for n in range(len(lines))]
    parts: list[tuple[str, str]] = []
    for piece in cut([entry], source.divides, size):
        parts += [(doc.text, doc.name) for doc in source.read(entry, piece.first, piece.last, Borne())]
    assert parts == whole


# --- blocks -------------------------------------------------------------------------------------------------


LLAMA = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {
                "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            },
            "behavior": "Isolated",
            "invert": False,
        },
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    dice = random.Random(1)
    return train_tokenizer([text_of(dice, 400) for _ in range(6)], 500)


@pytest.fixture(scope="module")
def marked() -> dict[str, Any]:
    """The model of a tokenizer of SentencePiece's kind: ``\u2581`` stands for a blank, bytes for what it lacks."""
    dice = random.Random(2)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=names, limit_alphabet=60)
    tokenizer.train_from_iterator([text_of(dice, 400) for _ in range(6)], trainer)
    tree = dict(json.loads(tokenizer.to_str()))
    return tree | {"added_tokens": tree["added_tokens"][:2], "pre_tokenizer": None}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
SPACED: dict[str, dict[str, Any]] = {
    "llama 2": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}},
    "gemma": {"normalizer": REPLACE, "pre_tokenizer": SPLIT},
    **{
        f"metaspace {scheme} {split}": {
            "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}
        }
        for scheme in ("first", "always", "never")
        for split in (True, False)
    },
}


@pytest.mark.parametrize("kind", [*SPACED, "a token across", "a mark across", "merges ignored", "unicode"])
def test_a_text_cut_at_blanks_has_the_same_tokens(
    marked: dict[str, Any], small: Callable[[int], None], kind: str
) -> None:
    tree = json.loads(json.dumps(marked | SPACED.get(kind, SPACED["llama 2"])))
    if kind == "a token across":
        tree["model"]["vocab"]["e\u2581"] = 600
    if kind == "a mark across":
        tree["added_tokens"][1]["content"] = "fox"
    if kind == "merges ignored":
        tree["model"]["ignore_merges"] = True
    if kind == "unicode":
        tree["normalizer"]["normalizers"].append({"type": "NFKC"})
    tokenizer = GivenTokenizer(b"", Tokenizer.from_str(json.dumps(tree)), "it", None, tree)
    pattern, dice, several = tokenizer.cut, random.Random(7), 0
    assert (pattern is not None) == (kind in SPACED)
    for _ in range(150 if pattern else 0):
        text = text_of(dice, 30) + dice.choice(["<s>", " <s>", "<s> ", "<s>\n", ""]) + text_of(dice, 30)
        blocks = list(Document("d", text).blocks(pattern))
        several += len(blocks) > 1
        cut_ids = [i for block in blocks for i in tokenizer.tokenizer.encode(block, add_special_tokens=False).ids]
        assert cut_ids == tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    assert (several > 60) == (pattern is not None)


@pytest.mark.parametrize("kind", ["bytes", "llama", "qwen", "numbers", "added"])
def test_a_text_cut_in_blocks_has_the_same_tokens(
    trained: Tokenizer, small: Callable[[int], None], tmp_path: Path, kind: str
) -> None:
    tree = json.loads(trained.to_str())
    if kind in ("llama", "qwen"):
        tree["pre_tokenizer"] = LLAMA
    if kind == "qwen":
        tree["normalizer"] = {"type": "NFC"}
    if kind == "numbers":
        tree["pre_tokenizer"] = {"type": "Digits", "individual_digits": True}
    if kind == "added":
        tree["added_tokens"][0]["rstrip"] = True
    path = tmp_path / "t.json"
    path.write_text(json.dumps(tree))
    tokenizer = given_tokenizer(DataSpec(tokenizer=str(path)))
    assert tokenizer is not None
    pattern, dice, several = tokenizer.cut, random.Random(7), 0
    assert (pattern is None) == (kind in ("numbers", "added"))
    for _ in range(150):
        text = text_of(dice, 30)
        blocks = list(Document("d", text).blocks(pattern))
        several += len(blocks) > 1
        assert "".join(blocks) == text
        cut_ids = [i for block in blocks for i in tokenizer.tokenizer.encode(block, add_special_tokens=False).ids]
        assert cut_ids == tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        if kind == "bytes":
            long = text + "x" * 3000 + "\n" + text
            assert words_of(b for b in Document("d", long).blocks(pattern)) == words_of([long])
    assert (several > 100) == (pattern is not None)


def words_of(texts: Iterable[str]) -> Counter[str]:
    """What the tokenizer is trained on."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return Counter(word for t in texts for part in cut_long_words(t) for word, _ in split.pre_tokenize_str(part))


# --- one dataset, however it is worked on -------------------------------------------------------------------


def corpus(folder: Path) -> dict[str, list[str]]:
    """The same texts as files, as JSON lines, packed and not."""
    dice = random.Random(5)
    texts = [f"{n} {text_of(dice, dice.choice([1, 3, 80]))}{WORDS}" for n in range(40)]
    texts = [t.replace("\r", "").encode("utf-8", "replace").decode() for t in texts]
    for number, text in enumerate(texts):
        (folder / f"t{number:03d}.txt").write_text(text, newline="")
    lines = [json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts)]
    (folder / "all.jsonl").write_text("".join(lines))
    first, rest = "".join(lines[:13]).encode(), "".join(lines[13:]).encode()
    (folder / "p0.jsonl.gz").write_bytes(gzip.compress(first[:100]) + gzip.compress(first[100:]) + b"\0" * 9)
    (folder / "p1.jsonl.zst").write_bytes(zstandard.compress(rest[:5000]) + zstandard.compress(rest[5000:]))
    (folder / "one.txt").write_text("\n".join(texts), newline="")
    (folder / "one.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    return {
        "many": ["text:c/t*.txt", "jsonl:c/all.jsonl", "jsonl:c/p*"],
        "one": ["text:c/one.txt", "text:c/one.txt.gz"],
    }


class Shuffled(InTurn):
    """Works on pieces in any order."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def map(self, function: Any, items: Sequence[Any], *more: Any) -> Iterator[dict[str, Any]]:
        order = list(range(len(items)))
        self.dice.shuffle(order)
        done = {number: function(items[number], *more) for number in order}
        return (done[number] for number in range(len(items)))


@pytest.mark.parametrize("which", ["many", "one"])
def test_the_dataset_is_the_same_whatever_the_pieces(
    here: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    sources = corpus(here / "c")[which]
    for sample in (1 << 40, 9000):
        monkeypatch.setattr(encoding, "SAMPLE_LETTERS", sample)
        small(1 << 20)
        spec = DataSpec(
            source=sources[0], vocab_size=400, shard_tokens=500, piece_mib=1, validation=0.2 if which == "many" else 0.0
        )
        good = new_store(here, f"good-{sample}")
        want = prepare(spec, good)
        wanted = objects(good)
        assert len(want.shards) > 3
        for number, (source, size) in enumerate(itertools.product(sources, (300, 7000))):
            small(size)
            monkeypatch.setattr(base, "LONG_LETTERS", size)
            store = new_store(here, f"{sample}-{number}")
            got = prepare(spec.model_copy(update={"source": source}), store, runner=Shuffled(number), clock=never)
            assert got == want, (source, size)
            assert objects(store) == wanted


def test_a_long_text_that_is_packed_or_not_is_never_held(
    here: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(here / "c")
    monkeypatch.setattr(base, "LONG_LETTERS", 100)
    monkeypatch.setattr("flows.data.sources.text.LONG_LETTERS", 100)
    for source in ("text:c/one.txt", "text:c/one.txt.gz"):
        (doc,) = documents(source)
        assert doc.parts is not None
        assert doc.text == ""
        assert doc.whole().encode() == (here / "c" / "one.txt").read_bytes()
        assert list(doc.parts()) == list(doc.parts())


class Killed(BaseException):
    """As a kill: nothing is cleaned up."""


@pytest.mark.parametrize("seed", range(10))
def test_a_kill_at_any_write_loses_a_piece_at_most(here: Path, small: Callable[[int], None], seed: int) -> None:
    """Killed at seeded writes, again and again, until it comes through: one digest, and no piece is worked on twice but
    the one that was being worked on."""
    corpus(here / "c")
    small(1500)
    spec = DataSpec.model_validate(
        {
            "source": "jsonl:c/*.jsonl*",
            "vocab_size": 400,
            "shard_tokens": 700,
            "piece_mib": 1,
            "dedupe": {},
            "validation": 0.2,
        }
    )
    good = new_store(here, "good")
    want = prepare(spec, good, runner=InTurn(), clock=never)
    store, dice = new_store(here, "store"), random.Random(seed)
    kills, writes = 0, []

    class Deadly:
        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        def create(self, key: str, data: Any, **more: Any) -> bool:
            if dice.random() < 0.04:
                raise Killed
            made = store.create(key, data, **more)
            assert bytes(store.get(key)) == bytes(data), key
            if re.search(r"/(read|sample|encode)/\d+$", key):
                writes.append(key)  # a piece is done
            return made

    while True:
        try:
            got = prepare(spec, Deadly(), runner=InTurn(), clock=never)  # type: ignore[arg-type]
            break
        except Killed:
            kills += 1
    assert kills
    assert got == want
    assert objects(store) == objects(good)
    assert max(Counter(writes).values()) == 1


def decoded(store: Store, dataset: DatasetRef) -> list[str]:
    """The documents of a dataset, from its tokens."""
    tokenizer = Tokenizer.from_str(store.get(f"data/{dataset.digest}/tokenizer.json").decode())
    tokens: list[int] = []
    for number, count in enumerate(dataset.shards):
        data = store.get(f"data/{dataset.digest}/{number:05d}.bin")
        tokens += np.frombuffer(data[-count * dataset.token_bytes :], f"<u{dataset.token_bytes}").tolist()
    *texts, rest = tokenizer.decode(tokens, skip_special_tokens=False).split(EOT)
    assert not rest
    return texts


def test_two_datasets_of_one_corpus(here: Path, small: Callable[[int], None]) -> None:
    corpus(here / "c")
    small(1500)
    store = new_store(here, "store")
    spec = DataSpec(source="jsonl:c/all.jsonl", vocab_size=400, validation=0.2, piece_mib=1)
    train = prepare(spec, store)
    held = validation_of(store, train)
    assert held is not None
    assert (held.vocab, held.eot, held.tokenizer_digest) == (train.vocab, train.eot, train.tokenizer_digest)
    parts = [set(decoded(store, train)), set(decoded(store, held))]
    assert not parts[0] & parts[1]
    assert len(parts[1]) > 2
    assert prepare(spec, store) == train
    assert validation_of(store, train) == held
    assert validation_of(store, held) is None
    assert validation_of(store, prepare(spec.model_copy(update={"validation": 0.0}), store)) is None
    with pytest.raises(DatasetError, match="leaves no document for validation"):
        prepare(spec.model_copy(update={"validation": 1e-6}), store)


# --- the second look ----------------------------------------------------------------------------------------


def test_a_second_look_reads_no_byte(here: Path, small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(here / "c")
    store = new_store(here, "store")
    spec = DataSpec(source="jsonl:c/all.jsonl", vocab_size=300)
    soon, later = (lambda: (here / "c/all.jsonl").stat().st_ctime + 1), (lambda: 1e12)
    want = prepare(spec, store, clock=soon)
    assert not list(store.list("data/seen/"))  # it may change again within this moment
    assert prepare(spec, store, clock=later) == want
    assert len(list(store.list("data/seen/"))) == 1
    monkeypatch.setattr("flows.data.sources.files._Local.read", lambda *_: pytest.fail("a byte was read"))
    for changed in ({}, {"piece_mib": 7, "block": 5}):
        assert prepare(spec.model_copy(update=changed), store, clock=later) == want


@pytest.mark.parametrize("change", ["bytes", "times", "one more", "settings", "again", "gone"])
def test_what_changes_is_looked_at_again(here: Path, change: str) -> None:
    corpus(here / "c")
    store, path = new_store(here, "file"), here / "c/all.jsonl"
    spec, clock = DataSpec(source="jsonl:c/a*.jsonl", vocab_size=300), lambda: 1e12
    want = prepare(spec, store, clock=clock)
    (seen,) = store.list("data/seen/")
    text = path.read_text()
    if change == "bytes":
        path.write_text(text.replace("lazy", "busy"))
        assert prepare(spec, store, clock=clock) != want
    elif change == "times":
        path.write_text(text)
        assert prepare(spec, store, clock=clock) == want
    elif change == "one more":
        (here / "c/also.jsonl").write_text(text.replace("lazy", "busy"))
        assert prepare(spec, store, clock=clock) != want
    elif change == "settings":
        assert prepare(spec.model_copy(update={"vocab_size": 299}), store, clock=clock) != want
    elif change == "again":  # a look that lies is mended
        local = store.local_path(seen.key)
        assert local is not None
        local.chmod(0o644)
        local.write_bytes(b"0" * 64)
        assert prepare(spec, store, clock=clock, again=True) == want
        assert store.get(seen.key) != b"0" * 64
        return
    else:
        store.delete(f"data/{want.digest}/00000.bin")
        assert prepare(spec, store, clock=clock) == want
        assert store.head(f"data/{want.digest}/00000.bin") is not None
        return
    assert len(list(store.list("data/seen/"))) == 2
