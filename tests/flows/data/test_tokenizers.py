"""Tokenizers as people have them: without an end, with gaps, with ids that collide, that cannot encode the text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from checkpoint.store import Store, open_store
from flows.data import load_tokenizer, prepare, unseen
from flows.data.tokenizer import template_begin
from flows.show.foretell import compile_for
from tests.support.shards import read_shard
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec, parse_spec

EOT = "<|endoftext|>"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1.txt").write_text("a b")
    (tmp_path / "2.txt").write_text("b a b")
    return tmp_path


def words(*names: str, first: int = 0, unk: str | None = "[UNK]", **ids: int) -> Tokenizer:
    """A tokenizer of whole words."""
    vocab = {name: first + n for n, name in enumerate(names)} | ids
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unk) if unk else models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def given(tokenizer: Tokenizer | dict[str, Any] | str | bytes, store: Store, **settings: Any) -> DatasetRef:
    """The dataset of this folder's texts with this tokenizer."""
    data = tokenizer.to_str() if isinstance(tokenizer, Tokenizer) else tokenizer
    data = json.dumps(data) if isinstance(data, dict) else data
    Path("t.json").write_bytes(data.encode() if isinstance(data, str) else data)
    return prepare(DataSpec.model_validate({"source": "text:*.txt", "tokenizer": "t.json", **settings}), store)


def tokens(store: Store, dataset: DatasetRef) -> list[int]:
    path = store.local_path(f"data/{dataset.digest}/00000.bin")
    assert path is not None
    return [int(token) for token in read_shard(path)]


# --- the end of a document ----------------------------------------------------------------------------------


def test_without_an_end_it_is_refused_with_its_candidates(here: Path, store: Store) -> None:
    for more, told in (
        ([], r"name the token that ends a document: data.end_token"),
        (["</s>"], r'it has </s>: name the one that ends a document, such as data.end_token = "</s>"'),
        (["<eos>", "</s>", "<|im_end|>", "<|end_of_text|>"], r"it has <\|end_of_text\|>, </s>, <eos>, <\|im_end\|>"),
    ):
        with pytest.raises(DatasetError, match=rf"has no token <\|endoftext\|>, so nothing.*{told}"):
            given(words("a", "b", "[UNK]", *more), store)
    assert not list(store.list(""))


@pytest.mark.parametrize("end", [EOT, "</s>", "b"])
def test_the_token_that_the_spec_names_ends_documents(here: Path, store: Store, end: str) -> None:
    dataset = given(words("a", "b", "[UNK]", EOT, "</s>"), store, end_token=end)
    eot = ["a", "b", "[UNK]", EOT, "</s>"].index(end)
    assert dataset.eot == eot
    assert tokens(store, dataset) == [0, 1, eot, 1, 0, 1, eot]


def test_documents_can_be_joined_where_one_says_so(here: Path, store: Store) -> None:
    dataset = given(words("a", "b", "[UNK]"), store, end_token="")
    assert (dataset.eot, tokens(store, dataset)) == (None, [0, 1, 1, 0, 1])
    other = given(words("a", "b", "[UNK]", EOT), store, end_token="")
    assert (other.eot, tokens(store, other)) == (None, [0, 1, 1, 0, 1])


def test_another_end_is_another_dataset(here: Path, store: Store) -> None:
    tokenizer = words("a", "b", "[UNK]", EOT, "</s>")
    made = [given(tokenizer, store, **s) for s in ({}, {"end_token": EOT}, {"end_token": "</s>"}, {"end_token": ""})]
    assert made[0] == made[1]
    assert len({dataset.digest for dataset in made}) == 3


def test_texts_that_end_with_the_end_token_already_are_told(
    here: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """As chats that a template has rendered do."""
    (here / "1.txt").write_text(f"a b{EOT}a" + " a" * 40)
    (here / "2.txt").write_text(f"a b{EOT}")
    prepare(DataSpec(source="text:*.txt", vocab_size=260), store)
    assert "1 text(s) of text:*.txt end with the token that ends a document already" in caplog.text


def cutting(how: Any, alphabet: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate((*alphabet, EOT))}, []))
    tokenizer.pre_tokenizer = how
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "decoder"),
    [
        (cutting(pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet()), "ByteLevel"),
        (cutting(pre_tokenizers.Metaspace(prepend_scheme="never"), ["▁", "a", "b"]), "Metaspace"),
        (words("a", "b", "[UNK]", EOT), ""),
    ],
    ids=["bytes", "marks", "words"],
)
def test_a_tokenizer_without_the_decoder_that_it_needs_is_told(
    here: Path, store: Store, tokenizer: Tokenizer, decoder: str
) -> None:
    said: list[str] = []
    spec = DataSpec(source="text:*.txt", tokenizer="t.json", begin_token="")
    tokenizer.save("t.json")
    prepare(spec, store, say=said.append)
    told = [line for line in said if "has no decoder" in line]
    assert len(told) == bool(decoder)
    if decoder:
        mend = json.loads(told[0].partition('write "decoder": ')[2].removesuffix(" there"))
        assert mend["type"] == decoder
        Path("t.json").write_text(json.dumps(json.loads(tokenizer.to_str()) | {"decoder": mend}))
        mended = Tokenizer.from_file("t.json")
        assert mended.decode(mended.encode("a b a").ids).strip() == "a b a"
        prepare(spec, store, say=said.append)
        assert [line for line in said if "has no decoder" in line] == told


def test_a_token_begins_each_document(here: Path, store: Store) -> None:
    """Once, also where a chat's template has rendered it. Without one a dataset is as ever; where the tokenizer's
    template puts one before a text, that is said."""
    tokenizer, said = words("a", "b", "[UNK]", EOT, "<s>"), list[str]()
    bare = given(tokenizer, store)
    assert bare.digest.startswith("da7bf28c"), "as before there was this key"
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 4)])
    tokenizer.save("t.json")
    for token, told in ((None, True), ("", False), ("<s>", False)):
        spec = DataSpec(source="text:*.txt", tokenizer="t.json", begin_token=token)
        said.clear()
        dataset = prepare(spec, store, say=said.append)
        assert any("puts <s> before a text, and documents begin without it here" in line for line in said) == told
        assert tokens(store, dataset) == ([4, 0, 1, 3, 4, 1, 0, 1, 3] if token else [0, 1, 3, 1, 0, 1, 3])
        assert dataset.begin == (4 if token else None)
    (here / "3.txt").write_text("<s> a")
    assert tokens(store, prepare(spec, store))[-3:] == [4, 0, 3]
    tree = json.loads(tokenizer.to_str())
    tree["post_processor"]["special_tokens"]["<s>"]["ids"] = [99_999]
    assert template_begin(Tokenizer.from_str(json.dumps(tree))) == [], "it is no token: hotstage import ended with 70"
    for token, why in (("<x>", "'<x>' is no token of"), (EOT, "ends documents of .* already")):
        with pytest.raises(DatasetError, match=rf"data.begin_token .*{why}"):
            given(tokenizer, store, begin_token=token)


def test_an_end_that_is_no_token(here: Path, store: Store) -> None:
    with pytest.raises(DatasetError, match=r"data.end_token '<end>' is no token of .*it has </s>: name"):
        given(words("a", "b", "[UNK]", "</s>"), store, end_token="<end>")
    with pytest.raises(ValueError, match=r"leave it out"):
        DataSpec(source="text:*.txt", end_token="</s>")
    spec = parse_spec(
        {"name": "x", "model": {"family": "gpt2", "layers": 1, "width": 8, "heads": 1, "context": 8}, "train": {
            "steps": 1, "batch": 1, "microbatch": 1, "sequence": 8}, "data": {"source": "text:*.txt"}},
        ["data.tokenizer=t.json", "data.end_token='</s>'"],
    )  # fmt: skip
    assert spec.data.end_token == "</s>"


# --- ids ----------------------------------------------------------------------------------------------------


def test_a_vocabulary_with_gaps_ends_at_the_largest_id(here: Path, store: Store) -> None:
    tokenizer = words(unk="[UNK]", **{"a": 0, "b": 1, "[UNK]": 3, "zz": 9})
    (here / "3.txt").write_text("zz x")
    dataset = given(tokenizer, store, end_token="")
    assert dataset.vocab == 10
    assert tokens(store, dataset) == [0, 1, 1, 0, 1, 9, 3]
    sparse = words(**{"a": 0, "b": 70_000, "[UNK]": 2, EOT: 5})
    dataset = given(sparse, store)
    assert (dataset.vocab, dataset.token_bytes) == (70_001, 4)


def test_added_tokens_beyond_the_vocabulary(here: Path, store: Store) -> None:
    tokenizer = words("a", "b", "[UNK]")
    tokenizer.add_special_tokens([EOT, "<pad>"])
    dataset = given(tokenizer, store)
    assert (dataset.vocab, dataset.eot) == (5, 3)
    assert tokens(store, dataset) == [0, 1, 3, 1, 0, 1, 3]


def test_ids_that_the_library_does_not_give_are_refused(here: Path, store: Store) -> None:
    tree = json.loads(words("a", "b", "[UNK]").to_str())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] = [{"id": 500, "content": EOT, **added}]
    with pytest.raises(DatasetError, match=r"has id 500 in the file, but the library gives it 3"):
        given(tree, store)
    tree["model"]["vocab"] = {"a": 0, "b": 1, "[UNK]": 3, "zz": 9}  # the library counts on from 4: it may collide
    tree["added_tokens"] = [{"id": 10, "content": EOT, **added}]
    with pytest.raises(DatasetError, match=r"has id 10 in the file, but the library gives it 4"):
        given(tree, store)
    tree["model"]["vocab"] = {"a": 0, "b": 2, "[UNK]": 4, "c": 3, "d": 5}
    tree["added_tokens"] = [{"id": 5, "content": EOT, **added}]
    with pytest.raises(DatasetError, match=r"both have id 5"):
        given(tree, store)
    tree["model"]["vocab"] = {"a": 0, "b": 1, "[UNK]": 2, "zz": 4_000_000_000}
    del tree["added_tokens"]
    with pytest.raises(DatasetError, match=r"largest id is 4000000000, .*the limit is 16777215"):
        given(tree, store, end_token="")
    assert not list(store.list(""))


# --- text that it cannot encode -----------------------------------------------------------------------------


def bpe(vocab: Sequence[str], **settings: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({name: n for n, name in enumerate(vocab)}, [], **settings))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (
            bpe(["q", "w"]),
            "cannot encode 1.txt: it has no unknown token and leaves out 2 character.*LATIN SMALL LETTER",
        ),
        (bpe(["a", "q"]), r"cannot encode 1.txt: .*leaves out 1 character\(s\) of it, 1 of them 'b'"),
        (words("a", unk=None), r"cannot encode 1.txt: .*UNK"),
        (words("a", "q", unk="[NONE]"), r"cannot encode 1.txt"),
        (words("q", "[UNK]"), r"every token of it is the unknown one"),
        (Tokenizer(models.WordPiece({"q": 0}, unk_token="[UNK]")), r"cannot encode 1.txt: .*UNK"),
        (Tokenizer(models.WordPiece({"q": 0, "[UNK]": 1}, unk_token="[UNK]")), r"every token .* unknown"),
        (Tokenizer(models.Unigram([("q", -1.0), ("w", -2.0)])), r"cannot encode 1.txt"),
        (Tokenizer(models.Unigram([("<unk>", 0.0), ("w", -2.0)], unk_id=0)), r"every token .* unknown"),
        (bpe(["q", "[UNK]"], unk_token="[UNK]"), r"every token .* unknown"),
        (bpe(["<0x61>", "a"], byte_fallback=True), r"cannot encode 1.txt: .*leaves out 1 character\(s\) of it, .*'b'"),
    ],
    ids=lambda value: type(value.model).__name__ if isinstance(value, Tokenizer) else value[:20],
)
def test_a_tokenizer_that_cannot_encode_the_text(here: Path, store: Store, tokenizer: Tokenizer, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        given(tokenizer, store, end_token="")
    assert not list(store.list(""))


def bytes_of(*, without: str, typed: bool = True) -> dict[str, Any]:
    """A tokenizer of bytes whose vocabulary has them all but those which these letters stand for."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(without))
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate([*letters, EOT])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tree = dict(json.loads(tokenizer.to_str()))
    if not typed:  # as files of 2020
        del tree["model"]["type"]
    return tree


@pytest.mark.parametrize(
    ("without", "typed", "letter", "lost"),
    [
        ("\u010a", True, "\n", r"2 character\(s\) of it, 2 of them '\\n';"),
        ("\u00c3", True, "é", r"1 character\(s\) of it, 1 of them 'é' \(LATIN"),
        ("\u0120", False, " ", r"3 character\(s\) of it, 3 of them ' '"),
        ("\u00c0\u00ff", True, "", None),
    ],
    ids=["a line's end", "half a character", "an old file", "what UTF-8 lacks"],
)
def test_bytes_that_a_tokenizer_leaves_out(
    here: Path, store: Store, without: str, typed: bool, letter: str, lost: str | None
) -> None:
    """Real ones lack some: trained line by line, or without the alphabet of bytes."""
    (here / "1.txt").write_text("a © é b\nc\n")
    if lost is None:
        dataset = given(bytes_of(without=without), store)
        assert load_tokenizer(store, dataset).decode(tokens(store, dataset)[:12]) == "a © é b\nc\n"
        return
    tokenizer = Tokenizer.from_str(json.dumps(bytes_of(without=without)))
    assert unseen(tokenizer, "a © é b\nc d\n") == ([letter], 0)
    with pytest.raises(DatasetError, match=r"cannot encode 1.txt: it has no unknown token and leaves out " + lost):
        given(bytes_of(without=without, typed=typed), store)


def test_an_unknown_token_that_stands_for_much_says_so(
    here: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """Of WordPiece a word above 100 characters is one."""
    (here / "1.txt").write_text("a " * 1000 + "acgt" * 500)
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "b": 1, "[UNK]": 2, EOT: 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    given(tokenizer, store)
    assert "0.1 % of the tokens are unknown to it (token 2), which stand for 49.9 % of the text" in caplog.text


def test_one_that_knows_little_says_so(here: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    given(words("a", "[UNK]", EOT), store)
    assert "60.0 % of the tokens are unknown to it (token 1)" in caplog.text


@pytest.mark.parametrize("kind", ["bytes", "fallback", "lowercase", "accents", "template"])
def test_tokenizers_that_can(here: Path, store: Store, kind: str) -> None:
    (here / "3.txt").write_text("ÀÉ 字 \U0001f600 b\t\n A")
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=[EOT], initial_alphabet=alphabet)
        tokenizer.train_from_iterator(["a b"], trainer)
    elif kind == "fallback":
        tokenizer = bpe([*(f"<0x{n:02X}>" for n in range(256)), "a", EOT], byte_fallback=True)
    else:
        tokenizer = bpe(["a", "b", "e", "字", "\U0001f600", "<u>", EOT])
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
        )
        if kind == "template":
            tokenizer.post_processor = processors.TemplateProcessing("<u> $A <u>", "$A $B", [("<u>", 5)])
    dataset = given(tokenizer, store)
    assert dataset.eot is not None
    got = tokens(store, dataset)
    assert got.count(dataset.eot) == 3
    if kind in ("lowercase", "accents", "template"):
        assert got == [0, 1, 6, 1, 0, 1, 6, 0, 2, 3, 4, 1, 0, 6]  # and nothing that the template would add


def test_what_a_tokenizer_means_to_remove_is_no_loss(here: Path, store: Store) -> None:
    (here / "1.txt").write_text("a|b|")
    tokenizer = bpe(["a", "b", EOT])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("|", "removed"), pre_tokenizers.WhitespaceSplit()]
    )
    assert tokens(store, given(tokenizer, store)) == [0, 1, 2, 1, 0, 1, 2]


# --- files that are no tokenizer.json -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "it is empty"),
        (b"{", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[]", 'it has no "model"'),
        (b"{}", 'it has no "model"'),
        (b'{"model": "x"}', 'it has no "model"'),
        (b'{"model": {}}', "does not load"),
        (b'{"model": {"type": "Nothing"}}', "does not load"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has no token"),
        (b'{"a": 0, "b": 1}', "it is a vocab.json"),
        (b'{"tokenizer_class": "X"}', "it is a tokenizer_config.json"),
        (b'{"eos_token": "</s>"}', "it is a special_tokens_map.json"),
        (b'{"model_type": "llama"}', "it is a model's config.json"),
        (b'{"config": {}, "vocab": []}', "it is a tekken.json"),
        (b'{"model": {"vocab": {"a": 0,', "it is no JSON to its end; was it cut short"),
        (b"[PAD]\n[unused0]\n", "it is a vocab.txt"),
        (b"<unk>\t0\n<s>\t0\n", "it is a vocab.txt"),
        (b"#version: 0.2\na b\n", "merges.txt"),
        (b"\n\x0e\n\x05<pad>\x15\0\0\0\0\x18\x03\n\x0e\n\x04</s>\x15", "SentencePiece"),
        (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n\x0c", "SentencePiece"),
        (b"IQ== 0\nIg== 1\n", "tiktoken"),
        (b'\xff\xfe{"model"', "it is text in UTF-16; convert it: iconv"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS, .* git lfs pull"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "it is packed by gzip; unpack it"),
        (b'{"model": "caf\xe9"}', "it is no JSON"),
    ],
    ids=lambda value: value[:16].hex() if isinstance(value, bytes) else "",
)
def test_a_file_of_another_kind_is_named(here: Path, store: Store, data: bytes, says: str) -> None:
    with pytest.raises(DatasetError, match=says) as caught:
        given(data, store)
    assert "t.json" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_byte_order_mark_before_it(here: Path, store: Store) -> None:
    assert given(b"\xef\xbb\xbf" + words("a", "b", "[UNK]", EOT).to_str().encode(), store).vocab == 4


def test_a_path_that_is_no_file(here: Path, store: Store) -> None:
    os.mkfifo("pipe")
    (here / "folder").mkdir()
    for path, says in (
        ("none.json", "No such file"),
        ("folder", "it is a folder; give the tokenizer.json in it"),
        ("pipe", "it is no regular file"),
        ("/dev/zero", "it is no regular file"),
        ("a\0b", "cannot be read"),
        ("/proc/self/mem", "cannot be read"),
    ):
        with pytest.raises(DatasetError, match=rf"data.tokenizer .* cannot be read.*{says}|{says}"):
            prepare(DataSpec(source="text:*.txt", tokenizer=path), store)


def test_what_is_stored_is_what_was_given(here: Path, store: Store) -> None:
    tokenizer = words("a", "b", "[UNK]", EOT)
    assert load_tokenizer(store, given(tokenizer, store)).to_str() == tokenizer.to_str()


def test_dropout_of_a_tokenizer_is_left_out(here: Path, store: Store) -> None:
    """It is of a tokenizer's training: a text would have other tokens each time."""
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, EOT: 3}, [("a", "b")], dropout=1.0))
    Path("1.txt").write_text("abab")
    Path("2.txt").unlink()
    dataset = given(tokenizer, store)
    assert tokens(store, dataset) == [2, 2, 3]
    assert load_tokenizer(store, dataset).encode("abab").ids == [2, 2]


def test_a_text_that_has_no_pairs_for_the_vocabulary_says_so(here: Path, store: Store) -> None:
    said: list[str] = []
    made = prepare(DataSpec(source="text:*.txt", vocab_size=5000), store, say=said.append)
    assert any(f"pairs for {made.vocab:,} entries only" in line for line in said), said


def test_a_plan_has_the_vocabulary_of_the_tokenizer_that_is_given(here: Path) -> None:
    tree: dict[str, Any] = {
        "name": "x",
        "model": {"family": "gpt2", "layers": 1, "width": 8, "heads": 1, "context": 8},
        "data": {"source": "text:*.txt", "tokenizer": "t.json"},
        "train": {"steps": 1, "batch": 1, "microbatch": 1, "sequence": 8},
    }
    _, spec, note = compile_for(parse_spec(tree), None)
    assert (spec.model.vocab, "tokenizer is not here" in note) == (4096, True)
    Path("t.json").write_text(words(EOT, *(f"w{n}" for n in range(76))).to_str())
    _, spec, note = compile_for(parse_spec(tree), None)
    assert (spec.model.vocab, note) == (77, "")
    with pytest.raises(SpecError, match=r"model\.vocab 50"):
        compile_for(parse_spec({**tree, "model": {**tree["model"], "vocab": 50}}), None)


@pytest.mark.parametrize(
    ("source", "words_said"),
    [
        ("c/*.txt", "if text:c/.* is meant"),
        ("json:c/a.json", "if jsonl:c/a.json is meant"),
        ("file:c/a.jsonl.gz", "if jsonl:c/a.jsonl.gz is meant"),
        ("csv:a.csv", "csv is not read, so write its texts as JSON lines"),
        ("https://example.org/a.txt", "it is an address"),
        ("c", "is unknown; take"),
    ],
)
def test_a_source_without_a_kind_is_told_with_the_one_that_is_meant(source: str, words_said: str) -> None:
    with pytest.raises(ValidationError, match=words_said):
        DataSpec(source=source)
