"""A folder of weights that cannot be a model here: what is wrong with it is told, and nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from checkpoint.safetensors import NoWeights
from checkpoint.store import Store, open_store
from flows.cli.from_config import spec_text
from flows.data import load_tokenizer
from flows.drive.begin import prepare_run
from flows.drive.their_tokenizer import end_of, tell_lacking
from flows.drive.weights import folder_weights
from tests.support.calls import called
from tests.support.imported import IMPORT, Imported, imported
from trainer.errors import DatasetError, SpecError
from trainer.spec import RunSpec, parse_spec

__all__ = ["imported"]  # the fixture

Arrays = dict[str, npt.NDArray[Any]]
Change = Callable[[Path, Arrays, dict[str, Any]], object]


def poison(name: str, value: float) -> Change:
    def change(_: Path, arrays: Arrays, __: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name].reshape(-1)[5] = value

    return change


def adapter(folder: Path, *_: object) -> None:
    told = {"peft_type": "LORA", "base_model_name_or_path": "gpt2"}
    (folder / "adapter_config.json").write_text(json.dumps(told))


def adapter_of_no_words(folder: Path, *_: object) -> None:
    os.mkfifo(folder / "adapter_config.json")


def renamed(arrays: Arrays, before: str) -> None:
    for name in list(arrays):
        arrays[before + name] = arrays.pop(name)


def other_tokenizer(folder: Path, *_: object) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    vocab = tree["model"]["vocab"]
    first, second = (next(t for t, n in vocab.items() if n == number) for number in (40, 41))
    vocab[first], vocab[second] = 41, 40
    (folder / "brought.json").write_text(json.dumps(tree))


def long_tokenizer(folder: Path, *_: object) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    more = range(len(tree["model"]["vocab"]), 320)
    tree["model"]["vocab"] |= {f"more{number}": number for number in more}
    (folder / "tokenizer.json").write_text(json.dumps(tree))


WRONG: list[tuple[str, Change, str, int]] = [
    ("nan", poison("transformer.h.1.mlp.c_fc.weight", np.nan), "mlp.c_fc.weight in .* holds nan at element 5", 78),
    ("infinite", poison("transformer.ln_f.weight", np.inf), "ln_f.weight in .* holds inf at element 5", 78),
    ("missing", lambda f, a, c: a.pop("transformer.h.0.ln_1.bias"), "h.0.ln_1.bias is missing", 78),
    (
        "more",
        lambda f, a, c: a.update({"score.weight": np.ones((2, 30), "<f4")}),
        r"score.weight \(2 x 30\) is not of",
        78,
    ),
    (
        "shape",
        lambda f, a, c: a.update({"transformer.wpe.weight": np.ones((38, 30), "<f4")}),
        "wpe.weight is 38 x 30, the spec's model has 37 x 30",
        78,
    ),
    ("field", lambda f, a, c: c.update({"activation_function": "relu"}), "activation_function is 'relu'", 78),
    ("kind", lambda f, a, c: c.update({"model_type": "mamba"}), "model_type is 'mamba'; this version computes", 78),
    ("quantised", lambda f, a, c: c.update({"quantization_config": {"bits": 4}}), "quantization_config is", 78),
    (
        "tied",
        lambda f, a, c: c.update({"tie_word_embeddings": True}),
        "lm_head.weight is not transformer.wte.weight, .*leaves that head out: write .tie_word_embeddings.: false",
        78,
    ),
    ("tied or not", lambda f, a, c: a.pop("lm_head.weight"), "is missing; a head .* .tie_word_embeddings.: true", 78),
    ("no head", lambda f, a, c: (a.pop("lm_head.weight"), c.update({"architectures": ["GPT2Model"]})),
     r"architectures is \['GPT2Model'\], which has no head", 78),
    (
        "rows",
        lambda f, a, c: c.update({"vocab_size": 320}),
        r'wte.weight is 307 x 30, the spec.s model has 320 x 30; .*says "vocab_size": 320: .* write 307 there',
        78,
    ),
    ("double", lambda f, a, c: a.update({n: v.astype("<f8") for n, v in a.items()}),
     r"wte.weight \(and 28 more\) in .* is of type F64; F32, BF16, F16 are taken: write them", 78),
    ("another's", lambda f, a, c: a.pop("transformer.ln_f.bias"), "config.json says .* fetch the folder again", 78),
    ("another's config", lambda f, a, c: c.update({"n_inner": 71}), "config.json says .* fetch the folder again", 78),
    ("no number", lambda f, a, c: c.update({"n_layer": "2"}), "n_layer is '2', it must be a whole number", 78),
    ("code", lambda f, a, c: c.update({"auto_map": {"AutoModel": "x"}}), "this version computes models without", 78),
    ("vocabulary", long_tokenizer,
     r"has 320 tokens \('.*' is token 307\), the weights of .* have rows for 307: .* out of its added_tokens", 65),
    ("an adapter beside", adapter, r"an adapter beside a model \(adapter_config.json: LORA for .gpt2.\), .* merge", 65),
    ("an adapter's name", adapter_of_no_words, r"an adapter beside a model \(adapter_config.json\), and", 65),
    ("turned over", lambda f, a, c: a.update({n: v.T.copy() for n, v in a.items() if "c_attn.weight" in n}),
     r"c_attn.weight is 90 x 30, .* they are turned over", 78),
    ("other layers", lambda f, a, c: c.update({"n_layer": 1}), "says 1 layers, the files have 2: write that", 78),
    ("nothing of it", lambda f, a, c: a.update({"transformer.ln_f.bias": np.ones(0, "<f4")}), "ZeRO-3 had on", 78),
    ("a value head", lambda f, a, c: a.update({"v_head.weight": np.ones((1, 30), "<f4")}), "take a model without", 78),
    ("another's wrapper", lambda f, a, c: renamed(a, "model."), "names begin with 'model.': write them without it", 78),
    ("an adapter's", lambda f, a, c: renamed(a, "base_model.model."), "an adapter is beside them, merge it", 78),
    ("quantised, no word", lambda f, a, c: a.update({"transformer.ln_f.bias": np.ones(30, "i1")}),
     "ln_f.bias .* is of type I8; .* these are quantised", 78),
    ("two of them", lambda f, a, c: (a.pop("transformer.ln_f.bias"), (f / "model.safetensors.index.json").touch()),
     "model.safetensors was read, .* remove it if the files of model.safetensors.index.json", 78),
    ("no tokenizer", lambda f, a, c: (f / "tokenizer.json").unlink(), "has no tokenizer.json", 65),
    ("no text", lambda f, a, c: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "does not load", 65),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says", "code"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_what_cannot_be_a_model_here_is_refused_and_nothing_is_written(
    tmp_path: Path, change: Change, says: str, code: int
) -> None:
    folder = shutil.copytree(IMPORT / "gpt2-untied-f32", tmp_path / "model")
    arrays, config = dict(load_file(folder / "model.safetensors")), json.loads((folder / "config.json").read_text())
    change(folder, arrays, config)
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    store = f"file://{tmp_path}/store"
    found, said = called(["import", str(folder), "--store", store, "-o", str(tmp_path / "made.toml")])
    assert found == code, said
    assert said.startswith("hotstage: ")
    assert re.search(says, said), said
    assert not (tmp_path / "made.toml").exists()
    assert not list(open_store(store).list(""))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "is a pickle, which is not opened"),
        ("consolidated.00.pth", "is a pickle, which is not opened"),
        ("model-00001-of-00002.safetensors", "is one of several files, whose index is missing"),
        ("adapter_model.safetensors", "is an adapter, not a model"),
        ("model-q4.gguf", "is of llama.cpp"),
        ("model.onnx", "is of ONNX"),
        ("params.json", "is of a model in its maker's form"),
        ("__0_0.distcp", "is of a sharded checkpoint of torch"),
        ("zero_to_fp32.py", "is of a sharded checkpoint of DeepSpeed"),
        ("weights.safetensors", "is weights under a name of their own"),
    ],
)
def test_a_folder_without_weights_says_what_lies_there(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(NoWeights, match=re.escape(f"{tmp_path} has no config.json: {name} {says}")):
        spec_text(tmp_path)
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(IMPORT / "gpt2-untied-f32" / file, tmp_path / file)
    code, said = called(
        ["import", str(tmp_path), "--store", f"file://{tmp_path}/store", "-o", str(tmp_path / "x.toml")]
    )
    assert code == 65
    assert f"{name} {says}" in said


@pytest.mark.parametrize(
    ("below", "link", "says"),
    [
        ("checkpoint-500", "", "a model lies below it: give the folder .*/checkpoint-500"),
        ("snapshots/0a1b", "", "a model lies below it: give the folder .*/snapshots/0a1b"),
        ("", "config.json", "config.json is a link to gone, which is not there"),
        ("", "", "it is empty; download the model again"),
    ],
)
def test_a_folder_that_is_no_models_says_where_one_is(tmp_path: Path, below: str, link: str, says: str) -> None:
    if below:
        (tmp_path / below).mkdir(parents=True)
        (tmp_path / below / "config.json").write_text("{}")
    if link:
        (tmp_path / link).symlink_to("gone")
    with pytest.raises(NoWeights, match=f"has no config.json: {says}"):
        spec_text(tmp_path)


def test_a_pointer_of_git_lfs_is_none_of_the_weights(tmp_path: Path) -> None:
    folder = shutil.copytree(IMPORT / "llama-odd-bf16", tmp_path / "model")
    file = folder / "model-00003-of-00004.safetensors"
    whole = file.read_bytes()
    for data, says in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS"),
        (whole[:-7], "it was cut short, fetch it again"),
        (None, "names model-00003-of-00004.safetensors, which is not in its folder"),
    ):
        file.unlink()
        if data is not None:
            file.write_bytes(data)
        arguments = ["import", str(folder), "--store", f"file://{tmp_path}/s", "-o", str(tmp_path / "x.toml")]
        code, said = called(arguments)
        assert code == 65
        assert says in said
        file.write_bytes(b"")


def test_names_with_a_wrappers_word_before_them_are_the_models(imported: Imported, tmp_path: Path) -> None:
    """torch.compile and DistributedDataParallel put theirs before every name; the weights are the same import."""
    case = imported("gpt2-untied-f32")
    folder = shutil.copytree(case.folder, tmp_path / "model")
    arrays = load_file(folder / "model.safetensors")
    for wrapper in ("_orig_mod.", "module.", "module._orig_mod."):
        save_file({f"{wrapper}{name}": value for name, value in arrays.items()}, folder / "model.safetensors")
        assert folder_weights(folder, case.spec.model).digest == case.told["weights_digest"]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("gpt2", "'gpt2' is no folder here, .* hf download gpt2 --local-dir DIR"),
        ("tokenizer.json", "'tokenizer.json' is a file; give the folder that it lies in: ."),
        ("a" * 5000, "a' is no folder here, "),  # no path that there can be
        ("https://hub.example/openai/gpt2/tree/main", "comes by: hf download openai/gpt2 --local-dir DIR"),
        ("hf:gpt2", "comes by: hf download gpt2 --local-dir DIR"),
        ("s3://bucket/model", "is an address, .* fetch the model, and give its folder"),
        ("/none/model", "is no folder here; give the folder that holds"),
        ("", "is no folder here; give the folder that holds"),
        ("model.zip", "is an archive; unpack it"),
    ],
)
def test_what_is_no_folder_is_told_with_the_mend(
    argument: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tokenizer.json", "model.zip"):
        (tmp_path / name).write_text("{}")
    code, said = called(["import", argument])
    assert code == 2
    assert re.search(says, said), said


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train", "."], 2, "'.' is a folder, and a spec is a TOML file; of a model in it `hotstage import .` writes"),
        (["plan", "config.json"], 78, "that is JSON, .*of a model's config.json: hotstage init --from FILE"),
        (["chat", "."], 78, "there is no run '.' .* a run of the model in that folder: hotstage import ."),
        (["init", "config.json"], 2, "there is no preset 'config.json'; .* of a config.json: --from config.json"),
        (["init", "--from="], 2, "--from is empty; give a config.json"),
    ],
)
def test_a_model_in_place_of_a_spec_or_a_run_is_told_its_command(
    words: list[str], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOTSTAGE_STORE", f"file://{tmp_path}/store")
    (tmp_path / "config.json").write_text("{\n}")
    found, said = called(words)
    assert found == code
    assert re.search(says, said), said


@pytest.mark.parametrize("said_by", [2, [2], [2, 0]])
def test_an_ordinary_token_ends_no_text(said_by: Any, tmp_path: Path) -> None:
    """2 is what other programs take where a Llama's config says nothing; of this tokenizer it is a quotation mark."""
    folder = shutil.copytree(IMPORT / "gpt2-untied-f32", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(tree | {"eos_token_id": said_by}))
    assert end_of(folder, tokenizer) == "<|end|>", "as the list or tokenizer_config.json says"
    (folder / "tokenizer_config.json").unlink()
    assert end_of(folder, tokenizer) == ("<|end|>" if said_by == [2, 0] else None)


@pytest.mark.parametrize("beyond", [-1, 293, 10**20, "0", True, 0.0])
def test_an_end_token_that_the_vocabulary_has_not_is_passed_over_and_told(
    beyond: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(IMPORT / "gpt2-untied-f32", tmp_path / "model")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"eos_token_id": beyond}))
    (folder / "generation_config.json").unlink()
    assert end_of(folder, Tokenizer.from_file(str(folder / "tokenizer.json"))) == "<|end|>"
    assert f"config.json: eos_token_id {beyond!r} is passed over: the tokenizer's ids are 0 to" in caplog.text


@pytest.mark.parametrize("said", ["</none>", 5, ["<|end|>"]])
def test_an_end_token_of_the_older_file_is_taken(
    said: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(IMPORT / "gpt2-untied-f32", tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": said}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
    assert end_of(folder, Tokenizer.from_file(str(folder / "tokenizer.json"))) == "<|end|>"
    assert f"tokenizer_config.json: eos_token {said!r} is passed over: the tokenizer has no such token" in caplog.text


@pytest.mark.parametrize("data", [b"{bad", b"[]", b"\xff\xfe{}"])
def test_a_broken_file_beside_the_tokenizer_is_named_with_its_mend(data: bytes, tmp_path: Path) -> None:
    folder = shutil.copytree(IMPORT / "gpt2-untied-f32", tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(tree | {"eos_token_id": 2}))
    (folder / "tokenizer_config.json").write_bytes(data)
    with pytest.raises(
        SpecError, match=r"tokenizer_config.json: is no JSON.*; fetch tokenizer_config.json anew, or rem"
    ):
        end_of(folder, Tokenizer.from_file(str(folder / "tokenizer.json")))


def test_an_end_token_that_no_file_says_is_asked_for(tmp_path: Path) -> None:
    folder = shutil.copytree(IMPORT / "gpt2-untied-f32", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    for name, keys in (("config.json", ["bos_token_id", "eos_token_id"]), ("tokenizer_config.json", ["eos_token"])):
        tree = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({key: value for key, value in tree.items() if key not in keys}))
    arguments = ["import", str(folder), "--store", f"file://{tmp_path}/store", "-o", str(tmp_path / "x.toml")]
    code, said = called(arguments)
    assert code == 65
    assert "so nothing would end a document" in said
    for end, told in (("<|end|>", "a text ends with <|end|>"), ("", "a text ends with nothing")):
        (tmp_path / "x.toml").unlink(missing_ok=True)
        code, said = called([*arguments, "--end-token", end])
        assert code == 0, said
        assert told in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("added_tokens.json", {"<|im_end|>": 291, "<|end|>": 0}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"291": {"content": "<|im_end|>"}, "0": {"content": "x"}}}),
    ],
)
def test_tokens_that_the_tokenizer_lacks_and_a_file_beside_it_adds_are_told(
    name: str, said: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(IMPORT / "gpt2-untied-f32", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tell_lacking(folder, tokenizer)
    assert not caplog.records, "of what transformers wrote"
    (folder / name).write_text(json.dumps(said))
    tell_lacking(folder, tokenizer)
    (told,) = [record.getMessage() for record in caplog.records]
    assert re.search(r"'<\|im_end\|>' is token 291 there.*, and not of tokenizer.json, which encodes texts", told)


def test_further_tokens_that_end_a_text_are_told(tmp_path: Path) -> None:
    """As chats of Llama 3 have them: a text ends with one, an answer with another."""
    folder = shutil.copytree(IMPORT / "gpt2-untied-f32", tmp_path / "model")
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"].append({**tree["added_tokens"][0], "content": "!", "id": tree["model"]["vocab"]["!"]})
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    config = json.loads((folder / "config.json").read_text())
    ends = {"eos_token_id": [config["eos_token_id"], tree["model"]["vocab"]["!"], 2, 10**9]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    words = ["import", str(folder), "--store", f"file://{tmp_path}/store", "-o", str(tmp_path / "x.toml")]
    code, said = called(words)
    assert code == 0, said
    assert "a text ends with <|end|>" in said
    assert "answers end with ! too" in said


def test_a_tokenizer_of_another_model_is_refused(imported: Imported, tmp_path: Path) -> None:
    """Also where nobody names one and the data has its own."""
    case = imported("gpt2-untied-f32")
    folder = shutil.copytree(case.folder, tmp_path / "model")
    other_tokenizer(folder)
    tree = case.training().model_dump(mode="json", exclude_none=True)
    model = {**tree["model"], "init": f"hf:{folder}"}
    data = {"source": f"text:{case.work}/a.txt", "tokenizer": str(folder / "brought.json"), "end_token": "<|end|>"}
    spec = parse_spec({**tree, "model": model, "data": data})
    with pytest.raises(DatasetError, match=r"were made with another tokenizer: .* is token 41 there, and"):
        prepare_run(spec, case.store)
    del data["tokenizer"], data["end_token"]
    brought = prepare_run(parse_spec({**tree, "model": model, "data": data}), case.store)
    assert load_tokenizer(case.store, brought.dataset).token_to_id("<|end|>") == brought.dataset.eot == 0
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        DatasetError, match=r"has no tokenizer.json, and weights are of no use without .*data.tokenizer"
    ):
        prepare_run(parse_spec({**tree, "model": model, "data": data}), case.store)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ("hf:", "init 'hf:' is unknown; take 'hf:DIR'"),
        ("gpt2", "init 'gpt2' is unknown; take 'hf:DIR'"),
        ("run:x", "init 'run:x' is unknown"),
        ("weights:12", "init 'weights:12' is unknown"),
    ],
)
def test_an_init_that_is_none_is_refused(imported: Imported, init: str, says: str) -> None:
    tree = imported("gpt2-untied-f32").training().model_dump(mode="json", exclude_none=True)
    with pytest.raises(SpecError, match=says):
        parse_spec({**tree, "model": {**tree["model"], "init": init}})


def test_a_folder_that_is_not_here_says_that_nothing_is_downloaded(ground: tuple[Store, RunSpec]) -> None:
    store, spec = ground
    asked = spec.model_copy(update={"model": spec.model.model_copy(update={"init": "hf:gpt2-large"})})
    with pytest.raises(SpecError, match=r"'hf:gpt2-large': the folder gpt2-large is not here; .* downloads nothing"):
        prepare_run(asked, store)
