"""Data preparation: the same inputs give the same bytes, once; what is wrong with a corpus or a dataset is said."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoint.dataset import load_leaves
from checkpoint.store import Store, open_store
from flows.data import documents, load_dataset, load_tokenizer, prepare, stdlib_documents
from flows.data.tokenizer import EOT
from tests.support.place import ROOT, Place
from tests.support.shards import read_shard
from tests.support.wait import wait_for
from trainer.dataset import HEADER_BYTES, DatasetRef
from trainer.errors import DatasetError
from trainer.spec import DataSpec

WORDS = "over the lazy dog jumps a quick brown fox and another one follows it into the wood "


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, times in (("a.txt", 60), ("b.txt", 30)):
        (folder / name).write_text(f"{name} " + WORDS * times)
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(f"file://{tmp_path / 'store'}")


def spec_of(corpus: Path, **more: object) -> DataSpec:
    return DataSpec.model_validate({"source": f"text:{corpus}/*.txt", "vocab_size": 300, "shard_tokens": 1024, **more})


def objects(store: Store, prefix: str = "data/") -> dict[str, bytes]:
    """What lies there, but for how a corpus looked: that is kept only once its files have settled."""
    return {i.key: store.get(i.key) for i in store.list(prefix) if not i.key.startswith("data/seen/")}


def tokens_of(store: Store, dataset: DatasetRef) -> list[int]:
    out: list[int] = []
    for number in range(len(dataset.shards)):
        path = store.local_path(f"data/{dataset.digest}/{number:05d}.bin")
        assert path is not None
        out += read_shard(path).tolist()
    return out


def test_shards_hold_the_text_and_nothing_else(corpus: Path, store: Store) -> None:
    dataset = prepare(spec_of(corpus), store)
    tokens = tokens_of(store, dataset)
    assert len(dataset.shards) > 1
    assert (dataset.token_bytes, dataset.eot) == (2, load_tokenizer(store, dataset).token_to_id(EOT))
    texts = load_tokenizer(store, dataset).decode(tokens, skip_special_tokens=False).split(EOT)
    assert texts == [(corpus / "a.txt").read_text(), (corpus / "b.txt").read_text(), ""]
    assert load_dataset(store, dataset.digest) == dataset


def test_a_second_time_finds_it(corpus: Path, store: Store) -> None:
    said: list[str] = []
    first = prepare(spec_of(corpus), store)
    before = objects(store)
    assert prepare(spec_of(corpus), store, say=said.append) == first
    assert len(said) == 1
    assert "already there" in said[0]
    assert objects(store) == before


def test_the_digest_is_of_the_content(corpus: Path, store: Store, tmp_path: Path) -> None:
    first = prepare(spec_of(corpus), store)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(corpus, elsewhere)
    assert prepare(spec_of(elsewhere), open_store(f"file://{tmp_path / 'other'}")) == first
    (corpus / "b.txt").write_text("another text " + WORDS)
    assert prepare(spec_of(corpus), store).digest != first.digest
    assert prepare(spec_of(elsewhere, vocab_size=290), store).digest != first.digest


@pytest.mark.parametrize(
    ("files", "source", "words"),
    [
        ({}, "text:corpus/*.txt", "matches no file"),
        ({"a.txt": " \n"}, "text:corpus/*.txt", "empty"),
        ({"a.jsonl": ""}, "jsonl:corpus/*.jsonl", "empty"),
        ({"a.jsonl": '{"text": "x"}\n{"words": "y"}\n'}, "jsonl:corpus/*.jsonl", "a.jsonl:2 is no JSON object"),
        ({"a.jsonl": '{"text": null}\n'}, "jsonl:corpus/*.jsonl", "a.jsonl:1 is no JSON object"),
        ({"a.jsonl": "not json\n"}, "jsonl:corpus/*.jsonl", "a.jsonl:1 is no JSON object"),
        ({}, "dataset:" + "0" * 64, "is not in"),
    ],
)
def test_a_corpus_that_is_none(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], source: str, words: str
) -> None:
    (tmp_path / "corpus").mkdir()
    for name, text in files.items():
        (tmp_path / "corpus" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=words):
        prepare(DataSpec(source=source), store)
    assert not objects(store)


def test_the_command_refuses_a_corpus_that_is_none(place: Place) -> None:
    done = place.here("train", "spec.toml", "--no-prefect", "--set", "data.source='text:nothing/*.txt'")
    assert done.code == 65, done.err
    assert done.err.startswith("hotstage: data.source 'text:nothing/*.txt' matches no file")
    assert not list((place.folder / "store").glob("runs/*"))


def test_jsonl(tmp_path: Path, store: Store) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": WORDS * 20, "n": n}) + "\n\n" for n in range(3)))
    dataset = prepare(DataSpec(source=f"jsonl:{path}", vocab_size=280), store)
    assert tokens_of(store, dataset).count(dataset.eot or 0) == 3


def given_tokenizer(path: Path, entries: int) -> Path:
    """A tokenizer of whole words with so many entries, which asks for truncation and padding."""
    words = ["[UNK]", EOT, *dict.fromkeys(WORDS.split())]
    vocab = {w: n for n, w in enumerate([*words, *(f"word{n}" for n in range(entries - len(words)))])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(("entries", "token_bytes"), [(65536, 2), (65537, 4)])
def test_a_given_tokenizer(corpus: Path, store: Store, tmp_path: Path, entries: int, token_bytes: int) -> None:
    path = given_tokenizer(tmp_path / "tokenizer.json", entries)
    dataset = prepare(spec_of(corpus, tokenizer=str(path)), store)
    assert (dataset.vocab, dataset.token_bytes, dataset.eot) == (entries, token_bytes, 1)
    tokens = np.asarray(tokens_of(store, dataset))
    assert len(tokens) == 90 * len(WORDS.split()) + 2 * 4  # "a", ".", "txt", the end; neither cut nor padded
    assert tokens.max() < 30
    info = store.head(f"data/{dataset.digest}/00000.bin")
    assert info is not None
    assert info.bytes == HEADER_BYTES + 1024 * token_bytes


def test_a_tokenizer_that_does_not_load(corpus: Path, store: Store, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        prepare(spec_of(corpus, tokenizer=str(tmp_path / "none.json")), store)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DatasetError, match="does not load"):
        prepare(spec_of(corpus, tokenizer=str(tmp_path / "bad.json")), store)


@pytest.mark.parametrize("which", ["manifest", "tokenizer.json", "00000.bin", "inputs"])
def test_damage_is_found_and_mended(corpus: Path, store: Store, which: str) -> None:
    spec = spec_of(corpus)
    dataset = prepare(spec, store)
    good = objects(store)
    (key,) = [k for k in good if (k.endswith(which) and "/leaves/" not in k) or k.startswith(f"data/{which}/")]
    path = store.local_path(key)
    assert path is not None
    path.chmod(0o644)
    path.write_bytes(good[key][:-1])
    with pytest.raises(DatasetError, match="--again"):
        prepare(spec, store)
    assert prepare(spec, store, again=True) == dataset
    assert objects(store) == good


def test_a_flipped_byte_of_a_shard_is_found_when_it_is_made_again(corpus: Path, store: Store) -> None:
    dataset = prepare(spec_of(corpus), store)
    key = f"data/{dataset.digest}/00001.bin"
    path = store.local_path(key)
    assert path is not None
    good = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    prepare(spec_of(corpus), store, again=True)
    assert store.get(key) == good


def test_what_is_missing_is_made_again(corpus: Path, store: Store) -> None:
    dataset = prepare(spec_of(corpus), store)
    good = objects(store)
    for key in good:
        store.delete(key)
        # a dataset of before there were leaves is one: they are made when it is made anew
        assert prepare(spec_of(corpus), store, again="/leaves/" in key) == dataset
        assert objects(store) == good


def test_the_digests_of_a_shards_leaves_are_beside_it(corpus: Path, store: Store) -> None:
    dataset = prepare(spec_of(corpus), store)
    for number in range(len(dataset.shards)):
        shard, table = store.get(f"data/{dataset.digest}/{number:05d}.bin"), load_leaves(store, dataset.digest, number)
        assert (table.shard_bytes, len(table)) == (len(shard), 1)
        assert table.holds(0, shard)


def test_racing_prepares_agree(corpus: Path, store: Store) -> None:
    results: list[DatasetRef] = []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        results.append(prepare(spec_of(corpus), store))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert len(set(results)) == 1
    assert prepare(spec_of(corpus), store, again=True) == results[0]


def test_killed_while_it_writes_leaves_nothing_half_written(corpus: Path, store: Store, tmp_path: Path) -> None:
    dataset = prepare(spec_of(corpus, shard_tokens=1024), open_store(f"file://{tmp_path / 'good'}"))
    good = objects(open_store(f"file://{tmp_path / 'good'}"))
    program = (
        "import sys; from flows.data import prepare; from checkpoint.store import open_store; "
        "from trainer.spec import DataSpec; prepare(DataSpec.model_validate_json(sys.argv[1]), open_store(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, spec_of(corpus).model_dump_json(), store.url], cwd=ROOT, stderr=subprocess.PIPE
    )
    try:
        wait_for(lambda: process.poll() is not None or any(True for _ in store.list("data/")), "the first object", 60)
    finally:
        process.kill()
        process.communicate()
    for key, data in objects(store).items():
        assert data == good[key], key
    assert prepare(spec_of(corpus), store) == dataset
    assert objects(store) == good


def test_the_standard_library_is_the_same_text_each_time() -> None:
    docs = list(stdlib_documents())
    names = [doc.name for doc in docs]
    assert names == sorted(names)
    assert len(set(names)) == len(names) > 300
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "encodings", "site-packages", "topics.py", "_pydecimal.py"}
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)

    def digest(some: object) -> str:
        return hashlib.sha256(repr(some).encode()).hexdigest()

    assert digest(list(islice(documents("python-stdlib"), 50))) == digest(docs[:50])


def test_an_unknown_source() -> None:
    with pytest.raises(DatasetError, match="known are python-stdlib"):
        list(documents("csv:x"))
