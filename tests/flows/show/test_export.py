"""From a checkpoint to what others open, and to text: equal to the masters, and to an independent model in float64."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from checkpoint.export_to import Folder
from checkpoint.read import StateReader
from checkpoint.store import Store, open_store
from flows.data import load_dataset, load_tokenizer
from flows.drive.run import load_run, load_what
from flows.show.export import Inference, _hf_data, checkpoint_at, export_hf, opening
from flows.show.talk import Text, generate, pick
from tests.flows.conftest import Trained
from tests.reference.model import Config, Model
from tests.support.place import TEXT, Place
from trainer.errors import DatasetError, SpecError
from trainer.models import family
from trainer.models.base import HfTensor, hf_table
from trainer.spec import ModelSpec

PROMPT = "the quick brown"


@pytest.fixture(scope="module")
def store(trained: Trained) -> Store:
    return open_store(f"file://{trained.place.folder / 'store'}")


@pytest.fixture(scope="module")
def model(trained: Trained, store: Store) -> ModelSpec:
    return ModelSpec.model_validate(load_what(store, trained.run)["model"])


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    said = trained.place.said("ckpt", "export", trained.run, "-o", str(out))
    assert str(out / "model.safetensors") in said
    return out


def test_safetensors_are_the_masters(trained: Trained, store: Store, model: ModelSpec, folder: Path) -> None:
    _, manifest = checkpoint_at(store, trained.run, None)
    reader = StateReader(store, manifest)
    exported = load_file(folder / "model.safetensors")
    table = hf_table(family(model.family), model)
    assert sorted(exported) == sorted(entry.name for entry in table)
    seen: dict[str, int] = {}
    for entry in table:
        shape = manifest.tensor(entry.tensor).shape
        master = np.frombuffer(bytes(reader.read(entry.tensor)), "<f4").reshape(shape)[
            entry.first : entry.first + entry.rows
        ]
        want = master.T if entry.transpose else master
        assert exported[entry.name].dtype == np.float32
        np.testing.assert_array_equal(exported[entry.name], want.reshape(entry.shape))
        seen[entry.tensor] = seen.get(entry.tensor, 0) + master.size
    assert seen == {t.name: t.elements for t in manifest.tensors}  # every element of the state once


def test_config_and_tokenizer(trained: Trained, store: Store, model: ModelSpec, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    again = family(model.family).from_hf_config(config)
    dataset = load_dataset(store, load_what(store, trained.run)["data"]["digest"])
    ends = {"bos_token_id": dataset.eot, "eos_token_id": dataset.eot}
    kind = {"dtype": "float32", "torch_dtype": "float32", "use_cache": True}
    assert dataset.eot is not None
    assert family(model.family).to_hf_config(again) | ends | kind == config
    assert json.loads((folder / "generation_config.json").read_text()) == ends | {"pad_token_id": dataset.eot}
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert (told["bos_token"], told["eos_token"]) == ("<|endoftext|>", "<|endoftext|>")
    assert told["model_input_names"] == ["input_ids", "attention_mask"], "or transformers 4 adds an embedding to each"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.token_to_id(told["eos_token"]) == dataset.eot
    assert tokenizer.get_vocab() == load_tokenizer(store, dataset).get_vocab()
    assert tokenizer.decode(tokenizer.encode(PROMPT).ids) == PROMPT


def test_exporting_twice_gives_the_same_bytes(trained: Trained, store: Store, folder: Path, tmp_path: Path) -> None:
    export_hf(store, trained.run, None, Folder(tmp_path))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("end", ["</s>", ""])
def test_ends_of_a_run_with_a_given_tokenizer(tmp_path: Path, end: str) -> None:
    """Both ids are the dataset's end, or null where it has none: never another program's default (50256, 2)."""
    place = Place(tmp_path / "p")
    words = sorted(set(TEXT.split()))
    given = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*words, "[UNK]", "</s>"])}, unk_token="[UNK]"))
    given.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    given.save(str(place.folder / "t.json"))
    sets = ("data.tokenizer=t.json", f"data.end_token='{end}'", "train.steps=1", "train.sequence=16")
    result = place.train(*sets)
    out = place.folder / "model"
    place.said("ckpt", "export", result["run"], "-o", str(out))
    eot = len(words) + 1 if end else None
    for file, keys in (("config.json", ["bos", "eos"]), ("generation_config.json", ["bos", "eos", "pad"])):
        told = json.loads((out / file).read_text())
        assert [told[f"{key}_token_id"] for key in keys] == [eot] * len(keys)
    assert json.loads((out / "tokenizer_config.json").read_text()).get("eos_token") == (end or None)
    text = place.said("generate", result["run"], "--prompt", "the quick", "--tokens", "3")
    assert "the quick" in text
    place.stop_all()


def test_a_matrix_is_turned_over_in_parts_that_fit_memory() -> None:
    matrix = np.arange(50 * 30, dtype="<f4").reshape(50, 30)
    asked: list[int] = []

    def read(name: str, first: int = 0, elements: int | None = None) -> bytearray:
        assert elements is not None
        asked.append(elements)
        return bytearray(matrix.tobytes()[first * 4 : (first + elements) * 4])

    entry = HfTensor("hf", "ours", 10, 40, True, (30, 40))  # rows 10 to 50
    want = np.ascontiguousarray(matrix[10:].T).tobytes()
    for tile_bytes, passes in ((1 << 20, 1), (40 * 4 * 7, 5), (1, 30)):
        asked.clear()
        assert b"".join(bytes(piece) for piece in _hf_data(entry, 30, tile_bytes)(read)) == want
        assert sum(asked) == passes * 40 * 30


def test_generate_stops_at_the_end_token(trained: Trained, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    eot = load_dataset(store, load_what(store, trained.run)["data"]["digest"]).eot
    picks = iter([5, 6, eot, 7])
    monkeypatch.setattr("flows.show.talk.pick", lambda *_: next(picks))
    generate(store, trained.run, PROMPT, tokens=4)
    assert next(picks) == 7


def test_a_prompt_that_is_no_text(trained: Trained, store: Store) -> None:
    with pytest.raises(SpecError, match="not text in UTF-8"):
        generate(store, trained.run, "caf\udce9")


def test_a_tokenizer_that_knows_few_characters(trained: Trained, store: Store) -> None:
    """Of DNA, say, without a token for what it does not know: what a text begins with is asked of its own tokens."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "A": 2, "C": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    model = load_run(store, trained.run).spec.model
    assert opening(model.model_copy(update={"init": "weights:0"}), tokenizer) == [0]
    with Text(store, trained.run) as text:
        text.tokenizer = tokenizer
        with pytest.raises(DatasetError, match=r"the tokenizer of the model cannot encode this text: .*Missing"):
            text.say("hello")


def test_a_prompt_that_is_longer_than_a_sequence_is_told(
    trained: Trained, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    generate(store, trained.run, PROMPT, tokens=1)
    assert not caplog.records
    generate(store, trained.run, PROMPT * 99, tokens=1)
    (told,) = [record.getMessage() for record in caplog.records]
    assert re.match(r"the prompt has \d+ tokens, and the model sees the newest \d+ of them alone", told)


def test_a_folder_that_cannot_be_written(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = trained.place.here("ckpt", "export", trained.run, "-o", str(tmp_path / "file" / "below"))
    assert done.code == 78, done.err
    assert "choose a folder" in done.err


def test_logits_are_those_of_a_float64_model(trained: Trained, store: Store, folder: Path) -> None:
    config = Config.from_hf(json.loads((folder / "config.json").read_text()))
    weights = {name: w.astype(np.float64) for name, w in load_file(folder / "model.safetensors").items()}
    with Inference(store, trained.run) as engine:
        tokens = np.random.default_rng(5).integers(0, engine.vocab, engine.context, dtype=np.int32)
        eot = load_dataset(store, load_what(store, trained.run)["data"]["digest"]).eot
        tokens[tokens == eot] = 5  # the float64 model reads all of them: one document
        ours = engine.logits(tokens).astype(np.float64)
    batch = tokens[None].astype(np.int64)
    theirs = Model(config, weights, batch, batch).logits[0]
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_temperature_zero_takes_what_the_float64_model_finds_likeliest(
    trained: Trained, store: Store, folder: Path
) -> None:
    config = Config.from_hf(json.loads((folder / "config.json").read_text()))
    weights = {name: w.astype(np.float64) for name, w in load_file(folder / "model.safetensors").items()}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = list(tokenizer.encode(PROMPT).ids)
    eot = load_dataset(store, load_what(store, trained.run)["data"]["digest"]).eot
    for _ in range(20):
        batch = np.asarray([ids], dtype=np.int64)
        ids.append(int(Model(config, weights, batch, batch).logits[0, -1].argmax()))
        if ids[-1] == eot:
            break
    text = generate(store, trained.run, PROMPT, tokens=20, temperature=0.0)
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_seed_gives_the_same_text(trained: Trained, store: Store) -> None:
    texts = [generate(store, trained.run, PROMPT, tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    said = trained.place.said(
        *("generate", trained.run, "--prompt", PROMPT, "--tokens", "12", "--temperature", "1.5", "--seed", "1")
    )
    assert said.rstrip("\n") == texts[0].rstrip("\n")


def test_a_prompt_longer_than_the_context(trained: Trained, store: Store) -> None:
    long = "the quick brown fox jumps over the lazy dog " * 20
    text = generate(store, trained.run, long, tokens=3, temperature=0.0)
    assert text.startswith(long)
    assert generate(store, trained.run, "", tokens=3, temperature=0.0)


def test_pick_keeps_to_the_best() -> None:
    row = np.asarray([0.0, 5.0, 4.0, -3.0])
    rng = np.random.default_rng(0)
    assert pick(row, 0.0, 40, rng) == 1
    assert {pick(row, 1.0, 2, rng) for _ in range(200)} == {1, 2}
    assert {pick(row, 100.0, 1, rng) for _ in range(20)} == {1}


def test_a_step_without_a_checkpoint(trained: Trained, store: Store) -> None:
    with pytest.raises(SpecError, match="no usable checkpoint at step 3"):
        checkpoint_at(store, trained.run, 3)
