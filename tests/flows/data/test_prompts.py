"""Prompts: a document's text answers one, and its tokens count; those of the prompt are read and do not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from checkpoint.codec import unpack
from checkpoint.dataset import load_dataset_manifest
from checkpoint.keys import dataset_manifest_key
from checkpoint.store import Store, open_store
from flows.data import documents, load_dataset, load_tokenizer, prepare, validation_of
from tests.support.shards import masked_shard
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec, RunSpec, parse_spec

Chat = Sequence[Mapping[str, Any]]
CHATS: Chat = [
    {"prompt": "Who wrote the book about the quick brown fox?\n", "completion": "Somebody who had seen one."},
    {"prompt": "", "completion": "A text that answers nothing, and counts from its first letter to its end."},
    {"prompt": "Say nothing, please.", "completion": ""},
    {"prompt": "a long story of a lazy dog and more of it " * 9, "completion": "And so it ended."},
    {"prompt": "Who", "completion": " wrote the book about the quick brown fox?\n"},
]


@pytest.fixture
def store(here: Path) -> Store:
    return open_store((here / "store").as_uri())


def fill(name: str, chats: Chat = CHATS) -> None:
    Path(name).write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def spec_with(data: Mapping[str, Any]) -> RunSpec:
    """The least spec around these data."""
    return parse_spec(
        {
            "name": "x",
            "model": {"family": "gpt2", "layers": 1, "width": 8, "heads": 1, "context": 16},
            "data": data,
            "train": {"steps": 9, "batch": 2, "microbatch": 1, "sequence": 16},
        }
    )


def spec_of(source: str = "jsonl:c/*.jsonl", **more: Any) -> DataSpec:
    base = {"source": source, "field": "completion", "prompt_field": "prompt", "vocab_size": 290}
    return DataSpec.model_validate(base | more)


def held(store: Store, dataset: DatasetRef) -> tuple[list[int], list[bool]]:
    """All tokens, and which ones count."""
    tokens: list[int] = []
    counts: list[bool] = []
    for number in range(len(dataset.shards)):
        path = store.local_path(f"data/{dataset.digest}/{number:05d}.bin")
        assert path is not None
        found = masked_shard(path)
        tokens += found[0].tolist()
        counts += found[1].tolist()
    return tokens, counts


def wanted(tokenizer: Tokenizer, eot: int, chats: Chat = CHATS) -> tuple[list[int], list[bool]]:
    tokens: list[int] = []
    counts: list[bool] = []
    for chat in chats:
        prompt, text = (tokenizer.encode(chat[key]).ids for key in ("prompt", "completion"))
        tokens += [*prompt, *text, eot]
        counts += [False] * len(prompt) + [True] * (len(text) + 1)
    return tokens, counts


def test_the_answer_counts_and_the_end_and_nothing_else(here: Path, store: Store) -> None:
    fill("c/a.jsonl")
    said: list[str] = []
    dataset = prepare(spec_of(shard_tokens=100), store, say=said.append)
    tokens, counts = held(store, dataset)
    assert dataset.eot is not None
    assert (tokens, counts) == wanted(load_tokenizer(store, dataset), dataset.eot)
    assert len(dataset.shards) > 1
    assert (dataset.masked, dataset.counted, dataset.token_bytes) == (True, sum(counts), 2)
    assert any(f"{len(tokens):,} tokens, of which {sum(counts):,} count in" in line for line in said)
    rows = load_dataset_manifest(store, dataset.digest).shards
    assert [row.counted for row in rows] == [sum(counts[n : n + 100]) for n in range(0, len(counts), 100)]
    assert unpack(store.get(dataset_manifest_key(dataset.digest)), "it", max_bytes=1 << 20)["v"] == 3
    assert prepare(spec_of(shard_tokens=100), store) == dataset == load_dataset(store, dataset.digest)
    assert dataset.to_map()["counted"] == sum(counts)


@pytest.mark.parametrize("size", [60, 300])
def test_pieces_show_nowhere(here: Path, store: Store, small: Callable[[int], None], size: int) -> None:
    """Pieces and blocks of text that end within prompts and answers."""
    fill(
        "c/a.jsonl",
        [*CHATS, *({**chat, "completion": f"{chat['completion']} {n}"} for n in range(9) for chat in CHATS)],
    )
    whole = prepare(spec_of(piece_mib=1), store)
    other = open_store((here / "other").as_uri())
    small(size)
    pieces = prepare(spec_of(piece_mib=1), other)
    assert pieces == whole
    assert held(other, pieces) == held(store, whole)


def test_the_validation_part_has_its_mask(here: Path, store: Store) -> None:
    chats = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}."} for n in range(60)]
    fill("c/a.jsonl", chats)
    dataset = prepare(spec_of(validation=0.3), store)
    part = validation_of(store, dataset)
    assert part is not None
    tokenizer = load_tokenizer(store, dataset)
    assert dataset.eot is not None
    all_tokens, all_counts = wanted(tokenizer, dataset.eot, chats)
    assert part.tokens + dataset.tokens == len(all_tokens)
    assert (part.counted or 0) + (dataset.counted or 0) == sum(all_counts)


def test_the_prompt_is_part_of_what_a_document_is(here: Path, store: Store) -> None:
    """For duplicates, lengths and predicates."""
    fill("c/a.jsonl", [{"prompt": p, "completion": "yes, it is so."} for p in ("Is it?", "Is it so?", "Is it?", "")])
    spec = spec_of(dedupe={"exact": True}, filter={"min_length": 15})
    assert next((d.prompt, d.text, d.fields) for d in documents(spec)) == ("Is it?", "yes, it is so.", {})
    tokens, _ = held(store, dataset := prepare(spec, store))
    said = load_tokenizer(store, dataset).decode(tokens, skip_special_tokens=False)
    assert said.split("<|endoftext|>") == ["Is it?yes, it is so.", "Is it so?yes, it is so.", ""]


def test_columns_of_tables(here: Path, store: Store) -> None:
    columns = {key: [chat[key] for chat in CHATS] for key in ("prompt", "completion")} | {"id": list(range(5))}
    pyarrow.parquet.write_table(pyarrow.table(columns), "c/a.parquet", row_group_size=2)
    fill("c/a.jsonl")
    assert prepare(spec_of("parquet:c/*.parquet"), store) == prepare(spec_of(), store)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).save_to_disk("hub")
    assert prepare(spec_of("hf:hub"), store) == prepare(spec_of(), store)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            {"completion": "x"},
            r"c/a.jsonl:6 has no prompt \(it has no 'prompt'\); where a document has none give it the",
        ),
        ({"completion": "x", "prompt": None}, r"c/a.jsonl:6 has no prompt \(its prompt is null\)"),
        ({"completion": "x", "prompt": 3}, r"c/a.jsonl:6 has no prompt \(its prompt is a number\)"),
        ({"prompt": "x"}, r'c/a.jsonl:6 is no JSON object with a "completion"'),
    ],
)
def test_a_line_without_a_prompt_is_named(here: Path, store: Store, line: dict[str, Any], words: str) -> None:
    fill("c/a.jsonl", [*CHATS, line])
    with pytest.raises(DatasetError, match=words):
        prepare(spec_of(), store)


def test_a_prompt_that_stands_twice(here: Path, store: Store) -> None:
    Path("c/a.jsonl").write_text('{"prompt": "a", "completion": "b", "prompt": "c"}\n')
    with pytest.raises(DatasetError, match=r'c/a.jsonl:1 .*it names "prompt" twice'):
        prepare(spec_of(), store)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"completion": ["a"], "asked": ["b"]},
            r"c/a.parquet has no column 'prompt'; .* name the one of its prompt: data.prompt_field = \"asked\"",
        ),
        ({"completion": ["a"], "prompt": [3]}, r"column 'prompt' is of type int64.*\(data.prompt_field\)"),
        ({"completion": ["a", "b"], "prompt": ["x", None]}, r"c/a.parquet, row 2 has no prompt \(its prompt is null\)"),
    ],
)
def test_a_table_without_prompts(here: Path, store: Store, columns: dict[str, Any], words: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), "c/a.parquet")
    with pytest.raises(DatasetError, match=words):
        prepare(spec_of("parquet:c/a.parquet"), store)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "text:c/*", "prompt_field": "prompt"}, "has no keys: take jsonl:, parquet: or hf:"),
        ({"source": f"dataset:{'0' * 64}", "prompt_field": "prompt"}, "has no keys"),
        ({"source": "jsonl:c/*", "prompt_field": "text"}, "prompt_field and field are both 'text'"),
        (
            {"prompt_field": "p", "mix": [{"source": "jsonl:c/*", "weight": 1}, {"source": "jsonl:d/*", "weight": 1}]},
            "which part has prompts is not said",
        ),
        ({"mix": [{"source": "text:c/*", "prompt_field": "p", "weight": 1}]}, r"mix\[0\].*has no keys"),
    ],
)
def test_a_spec_that_cannot_be(data: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        spec_with(data)


def test_nothing_but_prompts_is_no_corpus(here: Path, store: Store) -> None:
    """Where each answer is empty, another key was meant."""
    fill("c/a.jsonl", [{"prompt": "x", "completion": ""}] * 3)
    with pytest.raises(DatasetError, match="has no text in it"):
        prepare(spec_of(), store)


def words_tokenizer(entries: int) -> str:
    """Of so many words; w1, w2 and on."""
    vocab = {"<|endoftext|>": 0} | {f"w{n}": n for n in range(1, entries)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save("words.json")
    return "words.json"


def test_a_mask_has_room_and_in_a_mixture_all_parts_do(here: Path, store: Store) -> None:
    """A vocabulary between 32,768 and 65,536, as GPT-2's: 2 bytes a token hold it, and no mask beside it."""
    given = {"tokenizer": words_tokenizer(40_000), "vocab_size": 300}
    fill("c/a.jsonl", [{"prompt": "w39999 w2", "completion": "w39998 w3"}] * 9)
    fill("c/b.jsonl", [{"text": "w39997 w4 w5"}] * 9)
    narrow = prepare(DataSpec.model_validate({"source": "jsonl:c/b.jsonl", **given}), store)
    assert narrow.token_bytes == 2
    parts = [
        {"source": "jsonl:c/b.jsonl", "weight": 1},
        {"source": "jsonl:c/a.jsonl", "field": "completion", "prompt_field": "prompt", "weight": 2},
    ]
    mixed = prepare(DataSpec.model_validate({"mix": parts, **given}), store)
    assert (mixed.token_bytes, mixed.tokens, mixed.counted) == (4, 9 * 4 + 9 * 5, 9 * 4 + 9 * 3)
    assert mixed.mix is not None
    plain, masked = (load_dataset(store, digest) for digest, _ in mixed.mix.parts)
    assert (plain.masked, masked.masked) == (False, True)
    assert held(store, plain) == ([39997, 4, 5, 0] * 9, [True] * 36)
    assert held(store, masked) == ([39999, 2, 39998, 3, 0] * 9, [False, False, True, True, True] * 9)
    assert prepare(DataSpec.model_validate({"mix": parts, **given}), store) == mixed
    for first, second in ((narrow, masked), (masked, narrow)):
        both = [{"source": f"dataset:{d.digest}", "weight": 1} for d in (first, second)]
        with pytest.raises(DatasetError, match=f"dataset:{narrow.digest}.* has tokens of 2 bytes"):
            prepare(DataSpec.model_validate({"mix": both}), store)
    again = [{"source": f"dataset:{masked.digest}", "weight": 2}, parts[0]]
    assert prepare(DataSpec.model_validate({"mix": again, **given}), store).token_bytes == 4


def test_a_mixture_whose_tokens_have_room_prepares_no_part_anew(here: Path, store: Store) -> None:
    fill("c/b.jsonl", [{"text": "some text without a prompt, and more of it"}] * 9)
    fill("c/a.jsonl")
    plain = prepare(DataSpec(source="jsonl:c/b.jsonl", vocab_size=290), store)
    parts = [
        {"source": "jsonl:c/b.jsonl", "weight": 1},
        {"source": "jsonl:c/a.jsonl", "field": "completion", "prompt_field": "prompt", "weight": 2},
    ]
    mixed = prepare(DataSpec.model_validate({"mix": parts, "vocab_size": 290}), store)
    assert mixed.mix is not None
    assert mixed.mix.parts[0][0] == plain.digest
    assert np.array_equal(mixed.shards[:1], plain.shards)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_an_answer_depends_on_and_nobody_reads_is_told(
    store: Store, here: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Alpaca's `input`: answers alone, without the text that they are about, would be learned in silence."""
    rows = [
        {"instruction": f"Sum up {n}.", "input": "" if n % 2 else "A long story.", "output": "Of a fox."}
        for n in range(9)
    ]
    if kind == "jsonl":
        fill("a.jsonl", rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    source = f"{kind}:a.{kind}"
    asked = spec_of(source, field="output", prompt_field="instruction")
    prepare(asked, store)
    place = "a.jsonl:1" if kind == "jsonl" else "a.parquet, row 1"
    assert f"{place}: 'input' or 'context' or 'system' beside the prompt is not read" in caplog.text
    assert "2 more: 'input' or" in caplog.text
    caplog.clear()
    prepare(spec_of(source, field="output", prompt_field="input"), store)
    assert "beside the prompt" not in caplog.text
