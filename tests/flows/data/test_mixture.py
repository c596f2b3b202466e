"""Mixtures: parts prepared as corpora of their own with one tokenizer; what is wrong with one is said with its part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoint.store import Store, open_store
from flows.data import load_dataset, prepare, tokenizer_json
from flows.show.mixture import foretold, read_so_far
from tests.support.token_data import put_tokens
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec, RunSpec, parse_spec, run_id, what_map
from trainer.wire.order import MixPhase

WORDS = "over the lazy dog jumps a quick brown fox and another one follows it into the wood "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text(WORDS * 60)
    lines = [json.dumps({"body": WORDS[n:] + WORDS[:n]}) for n in range(40)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "short.txt").write_text("a fox")
    return tmp_path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


def spec(*parts: dict[str, Any], **data: Any) -> RunSpec:
    return parse_spec(
        {
            "name": "mix",
            "model": {"family": "gpt2", "layers": 1, "width": 8, "heads": 1, "context": 16},
            "data": {"vocab_size": 280, "mix": list(parts), **data},
            "train": {"steps": 9, "batch": 2, "microbatch": 1, "sequence": 16},
        }
    )


def text(folder: Path, weight: Any = 3, **more: Any) -> dict[str, Any]:
    return {"source": f"text:{folder}/a/*.txt", "weight": weight, **more}


def rows(folder: Path, weight: Any = 1, **more: Any) -> dict[str, Any]:
    return {"source": f"jsonl:{folder}/b.jsonl", "field": "body", "weight": weight, **more}


def test_parts_are_datasets_of_their_own_under_one_tokenizer(folder: Path, store: Store) -> None:
    two = spec(text(folder, (3, 1), steps=(5,)), rows(folder))
    made = prepare(two.data, store, sequence=16)
    assert made.mix is not None
    assert made.mix.phases == (MixPhase(1, (3, 1)), MixPhase(5, (1, 1)))
    parts = [load_dataset(store, digest) for digest, _ in made.mix.parts]
    assert made.shards == (*parts[0].shards, *parts[1].shards)
    alone = prepare(DataSpec(source=f"text:{folder}/a/*.txt", vocab_size=280), store)
    assert parts[0] == alone
    assert {tokenizer_json(store, ref) for ref in (made, *parts)} == {tokenizer_json(store, alone)}
    assert {(ref.vocab, ref.eot) for ref in (made, *parts)} == {(alone.vocab, alone.eot)}
    assert prepare(two.data, store, again=True) == made
    resolved = two.resolve(made)
    assert what_map(resolved, made)["data"]["digest"] == made.digest
    known = parse_spec(two.model_dump(mode="json") | {"data": {"source": f"dataset:{made.digest}"}})
    assert run_id(known, load_dataset(store, made.digest)) == run_id(two, made)
    other = prepare(spec(text(folder, 2), rows(folder)).data, store)
    assert other.digest != made.digest
    assert other.mix is not None
    assert other.mix.parts == made.mix.parts  # prepared once


def test_a_dataset_may_be_a_part_and_its_tokenizer_is_the_others(folder: Path, store: Store) -> None:
    first = prepare(DataSpec(source=f"text:{folder}/a/*.txt", vocab_size=280), store)
    made = prepare(spec({"source": f"dataset:{first.digest}", "weight": 1}, rows(folder)).data, store)
    assert made.mix is not None
    assert made.mix.parts[0] == (first.digest, 1)
    assert made.tokenizer_digest == first.tokenizer_digest
    with pytest.raises(DatasetError, match=r"data.mix\[0\] .* is a mixture itself"):
        prepare(spec({"source": f"dataset:{made.digest}", "weight": 1}).data, store)
    foreign = put_tokens(store, [400])
    with pytest.raises(DatasetError, match=r"data.mix\[1\] .* was not made with the tokenizer of data.mix\[0\]"):
        prepare(spec(text(folder), {"source": f"dataset:{foreign.digest}", "weight": 1}).data, store)


def test_what_is_wrong_with_a_part_is_said_with_it(folder: Path, store: Store) -> None:
    short = {"source": f"text:{folder}/short.txt", "weight": 1}
    with pytest.raises(SpecError, match=r"data.mix\[1\] \(text:.*short.txt\): .*train.sequence 16 needs a shard of 17"):
        prepare(spec(text(folder), short).data, store, sequence=16)
    made = prepare(spec(text(folder), short).data, store)
    with pytest.raises(SpecError, match=r"data.mix\[1\]: train.sequence 16 needs"):
        spec(text(folder), short).resolve(made)
    with pytest.raises(DatasetError, match=r"data.mix\[1\] \(text:.*none"):
        prepare(spec(text(folder), {"source": f"text:{folder}/none/*", "weight": 1}).data, store)


def test_what_is_read_of_each_part_is_foretold_and_told(folder: Path, store: Store) -> None:
    two = spec(text(folder, (3, 1), steps=(5,)), rows(folder), block=2)
    assert foretold(two) == [
        f"mixed: text:{folder}/a/*.txt: 75%, 50% from step 5 on; 0.00 M tokens in all",
        f"mixed: jsonl:{folder}/b.jsonl: 25%, 50% from step 5 on; 0.00 M tokens in all",
    ]
    made = prepare(two.data, store)
    what = what_map(two, made)
    begun, half, done = (read_so_far(store, what, samples) for samples in (0, 8, 18))
    assert [(row["samples"], row["weight"], row["of"]) for row in begun] == [(0, 3, 4), (0, 1, 4)]
    assert [(row["samples"], row["weight"], row["of"]) for row in half] == [(6, 3, 4), (2, 1, 4)]
    assert [(row["samples"], row["weight"], row["of"]) for row in done] == [(11, 1, 2), (7, 1, 2)]
    assert all(0 < row["passes"] < 1 for row in done)
    alone = prepare(DataSpec(source=f"text:{folder}/a/*.txt", vocab_size=280), store)
    assert read_so_far(store, {**what, "data": {**what["data"], "digest": alone.digest}}, 8) == []
    assert read_so_far(store, {**what, "data": {**what["data"], "digest": "0" * 64}}, 8) == []


@pytest.mark.parametrize(
    ("parts", "data", "words"),
    [
        (({"source": "text:a", "weight": 0.7},), {}, "weight"),
        (({"source": "text:a", "weight": -1},), {}, "weight -1 must be a whole number from 0 to 65536"),
        (({"source": "text:a"},), {}, "weight is missing"),
        (({"source": "text:a", "weight": 1, "share": 2},), {}, "share"),
        (({"source": "text:a", "weight": 0},), {}, "weight is 0 from the first to the last step"),
        (({"source": "text:a", "weight": [1, 2]},), {}, "weight has 2 numbers and steps 0"),
        (({"source": "text:a", "weight": [1, 2], "steps": [1]},), {}, "must ascend from 2"),
        (({"source": "text:a", "weight": [1, 2, 3], "steps": [9, 9]},), {}, "must ascend from 2"),
        (({"source": "text:a", "weight": [1, 0], "steps": [7]},), {}, "the weights from step 7 on are 0 together"),
        (({"source": "text:a", "weight": 65536}, {"source": "text:b", "weight": 1}), {}, "are 65537 together"),
        (({"source": "ftp:a", "weight": 1},), {}, r"mix\[0\].source 'ftp:a' is unknown"),
        (({"source": "text:a", "weight": 1},), {"source": "text:b"}, "leave source out, or make it a part"),
        (({"source": "text:a", "weight": 1},), {"validation": 0.1}, r"validation 0.1 with mix"),
        (
            ({"source": "text:a", "weight": [1] * 257, "steps": list(range(2, 258))},),
            {},
            "change at 256 steps",
        ),
    ],
)
def test_a_mixture_that_is_none_is_refused(parts: tuple[dict[str, Any], ...], data: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        spec(*parts, **data)
