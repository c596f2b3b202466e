"""What is in the files of a corpus as people have them: encodings, archives, JSON that is none, words of megabytes."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import logging
import lzma
import os
import pickle
import random
import re
import signal
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from checkpoint.store import Store, open_store
from flows.data import documents, load_tokenizer, prepare
from flows.data.prepare import telling
from flows.data.sources import Document, base, files
from flows.data.tokenizer import LONG_WORD, SAFE_CUT, cut_long_words
from tests.support.place import Place, finish
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec

WORDS = "over the lazy dog jumps a quick brown fox and another one follows it into the wood "


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store() -> Store:
    return open_store("memory:")


def fill(*names: str, text: str = WORDS) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def texts(source: str) -> list[str]:
    return [doc.text for doc in documents(source)]


def tokens_digest(store: Store, dataset: DatasetRef) -> str:
    h = hashlib.sha256()
    for number in range(len(dataset.shards)):
        h.update(store.get(f"data/{dataset.digest}/{number:05d}.bin"))
    return h.hexdigest()[:16]


# --- what exists today stays as it is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "inputs", "tokens"),
    [
        ("text:c/*.txt", "4015fb33dd38ed0d", "81562a21a767c83a"),
        ("text:c/crlf*", "6da08f69dac2af89", "55be937610e20e1d"),
        ("text:c/latin*", "c695583ba5bc5138", "187feca2fc04b5e8"),
        ("jsonl:c/*.jsonl", "354fb47a8d24f8ab", "040722e2ec5e7a30"),
    ],
)
def test_datasets_of_before_are_found_again(here: Path, store: Store, source: str, inputs: str, tokens: str) -> None:
    """The digests of November 2026: what a run of that time trained on is the same dataset today."""
    fill("c/a.txt", text="a.txt " + WORDS * 60)
    fill("c/b.txt", text="b.txt " + WORDS * 30)
    Path("c/crlf.md").write_bytes(b"one two\r\nthree\r\nfour\rfive\n" * 50)
    Path("c/latin.md").write_bytes(b"caf\xe9 au lait \n" * 50)
    lines = [json.dumps({"text": WORDS * 20 + "é\u2028\u0000 \U0001f600", "n": n}) + "\n\n" for n in range(3)]
    fill("c/z.jsonl", text="".join(lines))
    dataset = prepare(DataSpec(source=source, vocab_size=300, shard_tokens=1024), store)
    assert [info.key[12:28] for info in store.list("data/inputs/")] == [inputs]
    assert tokens_digest(store, dataset) == tokens


# --- what is in the files -----------------------------------------------------------------------------------


def parquet() -> bytes:
    return b"PAR1" + bytes(40) + b"PAR1"


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bz2.compress(b"x"), "bzip2, .* bunzip2"),
        (lzma.compress(b"x"), "xz, .* unxz"),
        (lzma.compress(b"x", lzma.FORMAT_ALONE), "packed by lzma, .* unlzma"),
        (b"\x02\x21\x4c\x18" + bytes(9), "LZ4"),
        (parquet(), "Parquet"),
        (b"WARC/1.0\r\nWARC-Type: warcinfo", "an archive of web pages .*as JSON lines"),
        (b'<mediawiki xmlns="x">', "a dump of MediaWiki, .*as JSON lines"),
        (b"\x1f\x9d\x90abc", "packed by compress, .* gzip -dc"),
        (rb"{\rtf1\ansi text}", "RTF, .* unrtf --text"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF, .* pdftotext"),
        (b"SQLite format 3\0" + bytes(80), "SQLite"),
        ("some text".encode("utf-16"), "UTF-16, .* iconv -f UTF-16"),
        ("some text".encode("utf-16-be"), "UTF-16 without its mark"),
        (b"\xfe\xff" + "text".encode("utf-16-be"), "UTF-16"),
        ("some text".encode("utf-32"), "UTF-32"),
        (b'{"text": "a"}\n' * 3 + b"\0\0\0", ":4 holds a NUL byte"),
        (bytes(90), ":1 holds a NUL byte: the file is no text"),
        ("some text".encode("utf-16-le"), "iconv -f UTF-16LE"),
        ("some text".encode("utf-16-be"), "iconv -f UTF-16BE"),
        (b"PARE" + bytes(40) + b"PARE", "Parquet, encrypted"),
        (b"FEA1" + bytes(40), "Feather, version 1, .* Parquet"),
        (b"\xff\xff\xff\xff" + bytes(40), "a stream of Arrow, .* Parquet"),
        (b"MMIDIDX\0\0" + bytes(40), "the index of Megatron's tokens, .*; name the texts that they were made of"),
        ((20240520).to_bytes(4, "little") + bytes(40), "a file of llm.c's tokens, .*; name the texts"),
        (pickle.dumps(["x" * 300], 2), "a Python pickle"),
        (bytes([5, 0, 61, 0, 30, 0, 2, 0]) * 9, ":1 holds a NUL byte: the file is no text .*not tokens"),
    ],
    ids=lambda value: value[:12].hex() if isinstance(value, bytes) else "",
)
def test_a_file_that_is_no_text_is_named_with_what_it_is(here: Path, kind: str, data: bytes, words: str) -> None:
    Path("x.jsonl").write_bytes(data)
    with pytest.raises(DatasetError, match=rf"x.jsonl.*{words}"):
        texts(f"{kind}:*.jsonl")


def test_a_zip_and_a_tar(here: Path) -> None:
    with zipfile.ZipFile("a.txt", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(DatasetError, match=r"a.txt is a zip archive"):
        texts("text:a.txt")
    import tarfile

    with tarfile.open("b.txt", "w") as tar:
        tar.add("a.txt")
    with pytest.raises(DatasetError, match=r"b.txt is a tar archive"):
        texts("text:b.txt")


def test_files_with_byte_order_marks_that_were_joined(here: Path) -> None:
    Path("a.jsonl").write_text('\ufeff{"text": "one"}\n\ufeff{"text": "two"}\n\ufeff{"text": "three"}')
    assert texts("jsonl:a.jsonl") == ["one", "two", "three"]


def test_a_byte_order_mark_is_no_text(here: Path) -> None:
    Path("a.txt").write_bytes(b"\xef\xbb\xbfone")
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert texts("text:a.txt") == ["one"]
    assert texts("jsonl:a.jsonl") == ["one", "two"]


def test_bytes_that_are_no_utf8_in_text_are_replaced_and_told(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        Path(f"{number}.txt").write_bytes(b"good\n" * number + b"caf\xe9\n")
    assert texts("text:*.txt")[2] == "good\ngood\ncaf\ufffd\n"
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("0.txt:1 (byte 0xE9): bytes that are no UTF-8")
    assert told[2].startswith("2.txt:3 (byte 0xE9)")
    assert [line.partition(":")[0] for line in told[3:]] == ["2 more"]


@pytest.mark.parametrize("encoding", ["gb18030", "cp1251", "shift-jis"])
def test_a_text_of_which_most_is_no_utf8_is_refused(here: Path, encoding: str) -> None:
    word = "\u043c\u043e\u0440\u0435 " if encoding == "cp1251" else "\u6d77\u7684\u8272 "
    Path("c").mkdir(exist_ok=True)
    Path("c/a.txt").write_bytes((word * 50).encode(encoding, "ignore"))
    with pytest.raises(DatasetError, match=r"c/a.txt is no text in UTF-8: of \d+ characters \d+ stand for other bytes"):
        texts("text:c/*.txt")


def test_a_store_in_the_folder_of_its_corpus_is_no_part_of_it(here: Path) -> None:
    """Or each preparation would make another dataset, and each `train` another run."""
    Path("a.json").write_text("the quick brown fox " * 20)
    store, said = open_store((here / "store").as_uri()), list[str]()
    first, second = (prepare(DataSpec(source="code:.", vocab_size=257), store, say=said.append) for _ in range(2))
    assert first == second
    assert any(" files below " in line and "they are this store's own" in line for line in said)
    with pytest.raises(DatasetError, match="matches files of this store alone"):
        prepare(DataSpec(source="text:store/data/[0-9a-f]*/tokenizer.json"), store)


def test_a_name_that_is_no_utf8_is_told(here: Path, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    Path(os.fsdecode(b"caf\xe9.txt")).write_bytes(b"caf\xe9 " + WORDS.encode())
    prepare(DataSpec(source="text:*.txt", vocab_size=257), store)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(r"caf\udce9.txt:1 (byte 0xE9): bytes that are no UTF-8")


def test_json_lines_that_are_read_as_text_are_told(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("a.jsonl").write_bytes(b'{"text": "a"}')
    Path("a.txt").write_text("b")
    assert texts("text:a.*") == ['{"text": "a"}', "b"]
    (told,) = [record.getMessage() for record in caplog.records]
    assert "1 file(s) are JSON by name, such as 'a.jsonl', and each becomes one text with all its keys" in told


def test_tables_and_pages_that_are_read_as_text_are_told(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.tsv", "b.CSV.gz", "a.html", "b.htm", "b.xml", "a.md"):
        Path(name).write_text("b")
    assert len(texts("text:[ab].*")) == 6
    tables, pages = [record.getMessage() for record in caplog.records]
    assert "2 file(s) are tables by name, such as 'a.tsv', and each becomes one text with all its columns" in tables
    assert "3 file(s) are HTML or XML by name, such as 'a.html', and each becomes one text with all its tags" in pages


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"source": "text:a.txt"}, "data.source 'text:a.txt' has no keys; leave it out, or take jsonl:"),
        ({"mix": [{"source": "text:a.txt", "weight": 1}]}, "in the tables of its parts"),
    ],
    ids=["text", "mix"],
)
def test_a_field_that_nothing_looks_at_is_told(
    here: Path, store: Store, caplog: pytest.LogCaptureFixture, spec: dict[str, Any], words: str
) -> None:
    fill("a.txt")
    prepare(DataSpec(field="content", vocab_size=257, **spec), store)
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("data.field 'content' is not looked at: ")
    assert words in told


def test_json_of_another_encoding_is_refused_with_file_and_line(here: Path) -> None:
    Path("a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DatasetError, match=r"a.jsonl:2 holds the byte 0xE9.*iconv"):
        texts("jsonl:a.jsonl")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (r'{"text":"ab \ud83d cd"}', "ab \ufffd cd"),
        (r'{"text":"ab \ude00 cd"}', "ab \ufffd cd"),
        (r'{"text":"\ude00\ud83d"}', "\ufffd\ufffd"),
        (r'{"text":"\ud83d\ude00"}', "\U0001f600"),
        (r'{"text":"x", "\ud83d": 1}', "x"),
        (r'{"text":"a\u0000b"}', "a\0b"),
        (r'{"text":"x", "score": NaN, "big": ' + "9" * 5000 + "}", "x"),
        (r'{"meta": {"text": 1}, "text":"x", "more": [{"text": 2}]}', "x"),
        (r'{"text":"x' + "y" * 300_000 + '"}', "x" + "y" * 300_000),
    ],
    ids=str,
)
def test_json_that_is_odd_and_right(
    here: Path, store: Store, caplog: pytest.LogCaptureFixture, line: str, text: str
) -> None:
    Path("a.jsonl").write_text('{"text": "first"}\n' + line + "\n")
    caplog.set_level(logging.WARNING)
    assert texts("jsonl:a.jsonl") == ["first", text]
    told = [record.getMessage() for record in caplog.records]
    assert [line.partition(": ")[0] for line in told] == (["a.jsonl:2"] if "\ufffd" in text else [])
    dataset = prepare(DataSpec(source="jsonl:a.jsonl", vocab_size=257), store)
    assert load_tokenizer(store, dataset).decode(load_tokenizer(store, dataset).encode(text).ids) == text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1, 2]", "it is an array; .*jq"),
        ('"text"', "it is a string"),
        ("7", "it is a number"),
        ("null", "it is null"),
        ("{}", "it is empty"),
        ('{"words": "y", "id": 7}', "its keys are 'id', 'words'"),
        (r'{"\ud83d": 1}', "its keys are"),
        ('{"text": null}', "its text is null"),
        ('{"text": NaN}', "its text is a number"),
        ('{"text": true}', "its text is true or false"),
        ('{"text": ["a"]}', "its text is an array"),
        ('{"text": {"a": "b"}}', "its text is an object"),
        ('{"text": "a", "text": "b"}', 'it names "text" twice'),
        ('{"text": "cut sho', "cut short"),
        ('{"text": "a"', "cut short"),
        ('{"text": "a"} {"text": "b"}', "Extra data.*objects are made into lines by: jq -c"),
        ('{"text": "a"},', "Extra data.*take the comma away"),
        ("{\n", "an object stands on one line: objects are made into lines by: jq -c[)]"),
        ("[\n", r"made into lines by: jq -c '\.\[\]'"),
        ('[{"text": "a"},\n{"text": "b"}]', r"an object stands on one line: .*jq -c '\.\[\]'"),
        ("[{\n", r"an object stands on one line: .*jq -c '\.\[\]'"),
        ('{"text": "a",\n"n": 1}', "an object stands on one line: objects are made into lines by: jq -c[)]"),
        ("[INFO] a log's line", "Expecting value at column 2[)]"),
        ('{"content": "some text", "id": "x"}', 'the longest text is data.field = "content"'),
        ('{"data": {"text": "y"}}', r"taken out by: jq -c '\{text: \.data\.text\}'"),
        ('{"turns": [{"said": "a"}]}', "'turns' holds objects: join their texts"),
        ('{"messages": [{"role": "user"}]}', "'messages' is a conversation: name it in data.messages"),
        (
            '{"id": "x1", "conversations": [{"from": "human"}]}',
            "'conversations' is a conversation: name it in data.messages, and it is written",
        ),
        (
            '{"text": [{"role": "user", "content": "a"}]}',
            "its text is an array; a conversation: name it in data.messages",
        ),
        ("<html>", "Expecting value at column 1; it begins with '<html>'"),
        ("# a comment", "it begins with '# a comment'"),
        ("{'text': 'python'}", "Expecting property name.*this is Python's: write it by json.dumps"),
        ('{"text": "a\tb"}', r"control character.*a tab is \\t"),
        ("[" * 100_000, "nested too deep"),
        ('{"text": "a", "b": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    ],
    ids=lambda value: value[:24],
)
def test_json_that_has_no_text_is_refused_with_file_line_and_reason(here: Path, line: str, words: str) -> None:
    Path("a.jsonl").write_text("\n\r\n" + line)
    with pytest.raises(DatasetError, match=rf"(?s)a.jsonl:3 is no JSON object .*{words}.*mend the line") as caught:
        texts("jsonl:a.jsonl")
    str(caught.value).encode()
    assert len(str(caught.value)) < 400


def test_one_that_is_unlike_those_before_it_is_not_told_to_rename_them(here: Path) -> None:
    """Whoever followed the proposal would be refused at the first line, or file, then."""
    Path("a.jsonl").write_text('{"text": "first"}\n{"content": "odd"}\n')
    with pytest.raises(DatasetError, match=r"a.jsonl:2 .*\(its keys are 'content'\); mend the line, or leave it out$"):
        texts("jsonl:a.jsonl")
    for name, key in (("a", "text"), ("b", "content")):
        pyarrow.parquet.write_table(pyarrow.table({key: ["x"]}), f"{name}.parquet")
    with pytest.raises(
        DatasetError, match=r"b.parquet has no column 'text', as the files before it have; .* 'content'"
    ):
        texts("parquet:*.parquet")


# --- words without an end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["ACGT", "7", "#", " ", "é"])
def test_a_word_of_megabytes_takes_seconds(here: Path, store: Store, unit: str) -> None:
    text = "before " + unit * (500_000 // len(unit)) + " after"
    fill("a.txt", text=text)
    dataset = prepare(DataSpec(source="text:a.txt", vocab_size=300), store)
    tokenizer = load_tokenizer(store, dataset)
    assert max(map(len, tokenizer.get_vocab())) > 64  # it has learnt from it
    assert dataset.tokens < 100_000


def test_a_line_and_a_word_of_many_chunks_are_put_together_once(
    here: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work that grows with the square of their length would take minutes."""
    monkeypatch.setattr(files, "CHUNK", 64)
    word = "ACGT" * 500_000
    fill("a.jsonl", text=json.dumps({"text": word}) + "\n" + json.dumps({"text": "b"}))
    assert texts("jsonl:a.jsonl") == [word, "b"]
    parts = (word[at : at + 64] for at in range(0, len(word), 64))
    assert list(Document("d", "", parts=lambda: parts).blocks(SAFE_CUT)) == [word]


@pytest.mark.parametrize("cut", [None, SAFE_CUT], ids=["whole", "word"])
def test_what_must_be_seen_as_a_whole_has_a_limit(monkeypatch: pytest.MonkeyPatch, cut: re.Pattern[str] | None) -> None:
    monkeypatch.setattr(base, "WHOLE_LETTERS", 1 << 20)
    why = "it may look over any border of words" if cut is None else "a word without an end"
    with pytest.raises(
        DatasetError, match=rf"^a.txt has more than 1 MiB of text in a row .*{why}.*; cut the text into"
    ):
        list(Document("a.txt", "", parts=lambda: iter(["x" * (1 << 20)] * 2)).blocks(cut))


def test_only_long_words_are_cut() -> None:
    dice = random.Random(5)
    for _ in range(200):
        text = "".join(dice.choice("ab1#_ \né") * dice.choice([1, 2, 3, LONG_WORD - 1, LONG_WORD]) for _ in range(9))
        pieces = list(cut_long_words(text))
        assert "".join(pieces) == text
    line = "x1#_ é" * LONG_WORD  # long without a blank, and yet no long word
    assert list(cut_long_words(line)) == [line]
    assert [len(piece) for piece in cut_long_words("x" * (2 * LONG_WORD + 1))] == [LONG_WORD, LONG_WORD, 1]


def test_a_long_call_says_where_it_stands() -> None:
    said: list[str] = []
    told = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        told.set()

    with telling(say, lambda: "data: half of it", every_s=0.001):
        assert told.wait(60)
    assert said[0].startswith("data: half of it (")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "p")
    yield made
    made.stop_all()


def test_ctrl_c_is_heard_while_the_tokenizer_is_trained(place: Place) -> None:
    dice = random.Random(3)
    word = "".join(dice.choices("ACGT", k=1 << 20)) * 16  # far more than the moment until the signal comes
    (place.folder / "corpus" / "a.txt").write_text(word)
    process = place.start("data", "prepare", "spec.toml", "--set", "data.vocab_size=4096")
    assert process.stdout is not None
    while b"training a byte-level" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 85, done.err
    assert "stopped while preparing" in done.err
    assert not list((place.folder / "store").glob("data/*/manifest"))


# --- too little ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "settings", "error", "words"),
    [
        ("abc", {}, SpecError, "the whole corpus is shorter than one sequence; shorten the sequence or add text"),
        (WORDS * 9, {"shard_tokens": 16}, SpecError, "raise data.shard_tokens"),
        ("", {}, DatasetError, "the corpus is empty"),
        (" \n\t ", {}, DatasetError, "the corpus is empty"),
    ],
)
def test_a_corpus_shorter_than_a_sequence_is_refused_before_anything_is_written(
    here: Path, store: Store, text: str, settings: dict[str, int], error: type[Exception], words: str
) -> None:
    fill("a.txt", text=text)
    spec = DataSpec(source="text:a.txt", vocab_size=257, **settings)  # type: ignore[arg-type]
    with pytest.raises(error, match=words):
        prepare(spec, store, sequence=64)
    assert not list(store.list(""))
    if error is SpecError:  # it is not refused where nobody says what is needed, and refused again where it is found
        prepare(spec, store)
        with pytest.raises(SpecError, match=words):
            prepare(spec, store, sequence=64)


def test_data_prepare_refuses_what_train_would(place: Place) -> None:
    (place.folder / "corpus" / "a.txt").write_text("abc")
    done = place.here("data", "prepare", "spec.toml")
    assert done.code == 78, done.err
    assert "train.sequence 16 needs a shard of 17 tokens, the longest has" in done.err
    assert not list((place.folder / "store").glob("data/*"))
    (place.folder / "corpus" / "a.txt").write_text(WORDS * 20)
    done = place.here("data", "prepare", "spec.toml", "--set", "model.vocab=280")
    assert done.code == 78, done.err
    assert "model.vocab 280 is smaller" in done.err
    place.said("data", "prepare", "spec.toml", "--set", "train.sequence=8")


def test_files_that_are_there_packed_and_unpacked_are_told(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`gunzip -k` leaves both, and each text would be trained on twice in silence."""
    Path("c").mkdir(exist_ok=True)
    for name, data in (("a.txt", b"one"), ("b.txt", b"two"), ("a.txt.gz", gzip.compress(b"one"))):
        Path("c", name).write_bytes(data)
    assert sorted(doc.whole() for doc in documents("text:c/*")) == ["one", "one", "two"]
    assert "1 file(s) are there packed and unpacked, such as 'c/a.txt' and 'c/a.txt.gz', and both are" in caplog.text


def test_zstandard_with_a_dictionary_is_named(here: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    samples = [("the quick brown fox jumps over the lazy dog " + str(n) * 7).encode() * 3 for n in range(500)]
    trained = zstandard.train_dictionary(4096, samples)
    Path("a.zst").write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(b"".join(samples)))
    with pytest.raises(
        DatasetError, match=r"a.zst was packed with a dictionary \(zstd -D\), .*; pack it again without"
    ):
        [doc.whole() for doc in documents("text:a.zst")]
