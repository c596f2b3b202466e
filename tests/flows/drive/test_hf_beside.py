"""What lies beside a model's weights goes with them: into the store, to whoever trains on, and out again."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer

from checkpoint import keys
from checkpoint.dataset import load_dataset_manifest
from checkpoint.errors import StoreRefused
from checkpoint.export_to import Folder
from checkpoint.log import RunLog
from checkpoint.store import Store, open_store
from flows.data import prepare
from flows.data.sources.talk import Message
from flows.drive.begin import prepare_run
from flows.drive.hf_beside import beside_of, beside_with_talk, ends_of, keep_beside, read_beside, tokenizer_config_of
from flows.drive.their_tokenizer import tokenizer_of
from flows.evaluate.validate import validation_data
from flows.show.export import export_hf
from flows.show.talk import Text, generate
from tests.support.calls import called
from tests.support.imported import IMPORT, Imported, imported
from trainer.dataset import HEADER_BYTES, DatasetRef, counts_of, without_mask
from trainer.spec import DataSpec, load_spec

__all__ = ["imported"]  # the fixture

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
ADDED = ("<|begin|>", "<|eot|>", "<|pad|>")


def chat_folder(folder: Path) -> dict[str, Any]:
    """A chat model's: texts begin with one token, end with another, and answers with a third."""
    shutil.copytree(IMPORT / "gpt2-untied-f32", folder)
    tree = json.loads((folder / "tokenizer.json").read_text())
    words = {tree["model"]["vocab"][sign]: (sign, name) for sign, name in zip("!#$", ADDED, strict=True)}
    for number, (sign, name) in words.items():
        del tree["model"]["vocab"][sign]
        tree["model"]["vocab"][name] = number
        tree["added_tokens"].append({**tree["added_tokens"][0], "content": name, "id": number})
    begin_id, eot, pad = words
    token, text = {"SpecialToken": {"id": ADDED[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, text],
        "pair": [token, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {ADDED[0]: {"id": ADDED[0], "ids": [begin_id], "tokens": [ADDED[0]]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": begin_id, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"do_sample": True, "temperature": 0.6, "bos_token_id": begin_id, "eos_token_id": [0, eot, 2]}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"pad_token_id": pad}))
    told = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": ADDED[0], "special": True},
        "eos_token": ADDED[1],
        "pad_token": ADDED[2],
        "unk_token": "<none>",
        "mask_token": "\ud800",
        "additional_special_tokens": [ADDED[1], "<none>"],
        "tokenizer_class": "TokenizersBackend",
        "tokenizer_file": "/somewhere/tokenizer.json",
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return {"begin": begin_id, "eot": eot, "pad": pad, "context": config["n_positions"]}


def test_a_chat_model_goes_out_with_all_that_came_in_beside_it(
    imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, folder, out = imported("gpt2-untied-f32"), tmp_path / "model", tmp_path / "out"
    ids = chat_folder(folder)
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} times?", "text": "the fox" * n}) + "\n" for n in range(1, 40)))
    words = ["import", str(folder), "--store", case.url, "-o", str(tmp_path / "x.toml"), "--data", f"jsonl:{data}"]
    code, said = called(words)
    assert code == 0, said
    assert "a text ends with <|end|>\n           answers end with <|eot|> too" in said
    spec = load_spec(tmp_path / "x.toml", ["data.prompt_field=prompt", "train.sequence=16"])
    child = prepare_run(spec, case.store)
    shutil.rmtree(folder)
    (held,) = {str(RunLog(case.store, child.run).fold().parent["run"])}  # type: ignore[index]
    assert beside_of(case.store, child.run) == beside_of(case.store, held) != {}, "whoever trains on has them"

    stored = without_mask(_tokens(case.store, child.dataset))
    assert stored[0] == ids["begin"]
    assert (stored[1:][stored[:-1] == child.dataset.eot] == ids["begin"]).all(), "each document begins with it"
    assert np.count_nonzero(stored == ids["begin"]) == 39
    assert not counts_of(_tokens(case.store, child.dataset))[stored == ids["begin"]].any(), "it is of the prompt"

    export_hf(case.store, held, 0, Folder(out))
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    ends = {"bos_token_id": ids["begin"], "eos_token_id": [0, ids["eot"]]}
    assert ends.items() <= _tree(out / "config.json").items()
    assert _tree(out / "generation_config.json") == {
        "do_sample": True, "temperature": 0.6, "pad_token_id": ids["pad"], **ends
    }  # fmt: skip
    assert _tree(out / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": ids["context"],
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": ADDED[0], "special": True},
        "eos_token": ADDED[1],
        "pad_token": ADDED[2],
        "additional_special_tokens": [ADDED[1]],
    }
    picks = iter([5, ids["eot"], 7])
    monkeypatch.setattr("flows.show.talk.pick", lambda *_: next(picks))
    generate(case.store, held, "the fox", tokens=3)
    assert next(picks) == 7, "an answer ends at each of them"
    with pytest.raises(StoreRefused, match=r"holds a chat_template.jinja, with which others would talk"):
        export_hf(case.store, case.run, 0, Folder(out))


def test_a_run_has_one_template_that_of_its_data(tmp_path: Path) -> None:
    """A model's tokenizer_config.json may hold another one, by which older readers of an export would talk."""
    template, store = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}", open_store("memory:")
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (tmp_path / "t.jinja").write_text(template)
    talk = [{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "It jumps over the lazy dog."}]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 40)
    tree = {"source": f"jsonl:{tmp_path}/a.jsonl", "messages": "messages", "chat_template": f"{tmp_path}/t.jinja"}
    dataset = prepare(DataSpec.model_validate(tree | {"vocab_size": 280}), store, sequence=None)
    told = {"chat_template": "old", "add_bos_token": True, "eos_token": "<other>"}
    keep_beside(store, "r-0a1b2c", {"tokenizer_config.json": json.dumps(told)})
    found = beside_with_talk(store, "r-0a1b2c", dataset.digest)
    assert found["chat_template.jinja"] == template
    assert json.loads(found["tokenizer_config.json"]) == {"add_bos_token": True, "eos_token": "<|endoftext|>"}


def test_talks_are_written_by_the_template_that_came_with_the_weights(
    imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the data, in validation, in `chat`, and in what is trained on from there, long after the folder is gone."""
    case, folder = imported("gpt2-untied-f32"), tmp_path / "model"
    ids = chat_folder(folder)
    (tmp_path / "a.txt").write_text("the fox " * 90)
    talks = [[{"role": "user", "content": "the fox?"}, {"role": "assistant", "content": "n" * n}] for n in range(1, 40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    words = ["import", str(folder), "--store", case.url, "-o", str(tmp_path / "x.toml")]
    assert called([*words, "--data", f"text:{tmp_path}/a.txt"])[0] == 0
    assert '# messages = "messages"         # of conversations' in (tmp_path / "x.toml").read_text()
    data = [f"data.source=jsonl:{tmp_path}/a.jsonl", "data.messages=messages", "train.sequence=16"]
    held_out = ["validation.every=1", f"validation.source=jsonl:{tmp_path}/a.jsonl", "validation.messages=messages"]
    child = prepare_run(load_spec(tmp_path / "x.toml", [*data, *held_out]), case.store)
    shutil.rmtree(folder)
    talk = load_dataset_manifest(case.store, child.dataset.digest).talk
    assert talk is not None
    assert talk["template"] == TEMPLATE
    tokens = _tokens(case.store, child.dataset)
    counts, stored = counts_of(tokens), without_mask(tokens)
    assert np.count_nonzero(counts & (stored == ids["eot"])) == 39, "each answer's end counts, no question's"
    assert np.count_nonzero(stored == ids["eot"]) == 2 * 39
    assert not counts[stored == child.dataset.eot].any()
    other = validation_data(case.store, child, lambda _: None)
    assert (other.tokens, other.counted) == (child.dataset.tokens, child.dataset.counted)

    (held,) = {str(RunLog(case.store, child.run).fold().parent["run"])}  # type: ignore[index]
    for run in (held, child.run):
        theirs = tokenizer_of(case.store, f"run:{run}@0")
        assert theirs is not None
        assert theirs.beside["chat_template.jinja"] == TEMPLATE

    command = importlib.import_module("flows.cli.chat")
    asked: list[str] = []
    ask = Text.ask

    def noted(text: Text, messages: Sequence[Message]) -> None:
        ask(text, messages)
        asked.append(text.tokenizer.decode(text.ids, skip_special_tokens=False))

    monkeypatch.setattr(Text, "ask", noted)
    letter = int(np.flatnonzero(counts & (stored != ids["eot"]))[0])
    picks = iter([int(stored[letter]), ids["eot"]] * 3)
    monkeypatch.setattr("flows.show.talk.pick", lambda *_: next(picks))
    monkeypatch.setattr(command, "_lines", lambda: iter(["the fox?", "and?", "/new", "the fox?"]))
    code, said = called(["chat", held, "--store", case.url, "--tokens", "2"])
    assert (code, said) == (0, "n\nn\nn\n")
    first = "<|begin|>the fox?<|eot|>"
    assert asked == [first, f"{first}n<|eot|>and?<|eot|>", first]
    monkeypatch.setattr("flows.show.talk.pick", lambda *_: ids["eot"])
    monkeypatch.setattr(command, "_lines", lambda: iter(["the fox?"]))
    assert called(["chat", held, "--store", case.url, "--plain"])[0] == 0
    assert len(asked) == 3


def test_an_answer_ends_where_the_template_ends_it(tmp_path: Path) -> None:
    """Also where no config names the token, as of a run on conversations whose model is from nothing."""
    ids = chat_folder(tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(tmp_path / "m" / "tokenizer.json"))
    assert ends_of({}, tokenizer, 0) == [0]
    assert ends_of({"chat_template.jinja": TEMPLATE}, tokenizer, 0) == [0, ids["eot"]]
    for template in ("{%", "{{ raise_exception('no') }}", "{{ messages[0].content }}"):
        assert ends_of({"chat_template.jinja": template}, tokenizer, 0) == [0]


def test_what_cannot_be_read_beside_a_model_is_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat_folder(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text("{")
    (tmp_path / "m" / "chat_template.jinja").write_bytes(b"\xe9")
    assert set(read_beside(tmp_path / "m")) == {"config.json", "generation_config.json"}
    told = [record.getMessage() for record in caplog.records]
    why = ("tokenizer_config.json: is no JSON", r"chat_template.jinja: line 1 holds the byte 0xE9, which is no UTF-8")
    for words, one in zip(why, told, strict=True):
        assert re.search(rf"{words}.*; exports of the model will not have what it says", one)


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"extra_special_tokens": ["<|end|>", "<none>"]}, {"additional_special_tokens": ["<|end|>"]}),
        ({"extra_special_tokens": ["<none>"], "tokenizer_class": "MistralCommonBackend"}, {}),
        (
            {
                "extra_special_tokens": {"image_token": "<|end|>", "boi_token": "<none>"},
                "tokenizer_class": "GPT2Tokenizer",
            },
            {"extra_special_tokens": {"image_token": "<|end|>"}, "tokenizer_class": "GPT2Tokenizer"},
        ),
        (
            {"extra_special_tokens": ["!", "<|end|>"], "additional_special_tokens": [{"content": "<|end|>"}]},
            {"additional_special_tokens": ["<|end|>", "!"]},
        ),
    ],
)
def test_what_transformers_5_wrote_is_said_so_that_4_opens_it_too(told: dict[str, Any], kept: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_file(str(IMPORT / "gpt2-untied-f32" / "tokenizer.json"))
    assert tokenizer_config_of({"tokenizer_config.json": json.dumps(told)}, tokenizer, None, 37) == kept


def _tree(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _tokens(store: Store, dataset: DatasetRef) -> npt.NDArray[Any]:
    data = store.get(keys.dataset_key(dataset.digest, keys.shard_name(0)))
    return np.frombuffer(data, f"<u{dataset.token_bytes}", offset=HEADER_BYTES)
