"""A run that begins from weights which lie elsewhere: models of transformers, with the numbers that torch gave."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import flows
from checkpoint.export_to import Folder
from checkpoint.log import RunLog
from checkpoint.read import StateReader
from checkpoint.store.base import Data
from checkpoint.store.memory import MemoryStore
from checkpoint.verify import verify_run
from flows.data import load_dataset, load_tokenizer, prepare
from flows.data.shards import write_dataset
from flows.drive.begin import prepare_run
from flows.drive.events import Event
from flows.drive.fork import fork_run
from flows.drive.run import ask_run, create_run, load_run, load_what, ready_store, run_names
from flows.drive.weights import folder_weights
from flows.show.export import Inference, checkpoint_at, export_hf
from flows.show.talk import Text
from tests.e2e import engine_runs
from tests.support.calls import called
from tests.support.imported import IMPORT, Imported, imported
from trainer.errors import DatasetError, SpecError
from trainer.models import family
from trainer.models.hf_config import read_config
from trainer.plan import compile_plan
from trainer.spec import DataSpec, parse_spec, what_digest

__all__ = ["imported"]  # the fixture

CASES = sorted(path.name for path in IMPORT.iterdir())
LOSS = 1e-5
"""Relative; torch's own float32 run is as far from its float64 one after 25 steps as 1e-6."""


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(imported: Imported, name: str) -> None:
    case = imported(name)
    sequence = case.numbers["sequence"]
    with Inference(case.store, case.run) as engine:
        window = np.zeros(engine.context, np.int32)
        window[:sequence] = case.tokens[:sequence]
        ours = engine.logits(window)[:sequence]
    assert ours.shape == case.logits.shape
    assert np.abs(ours - case.logits).max() < 1e-4 < np.abs(case.logits).max()


@pytest.mark.parametrize("name", CASES)
def test_25_steps_from_imported_weights_are_those_of_torch(imported: Imported, name: str, tmp_path: Path) -> None:
    """The engine alone, from the stored checkpoint."""
    case = imported(name)
    spec = case.training()
    numbers, sequence = case.numbers, case.numbers["sequence"]
    count = len(numbers["steps"]) * numbers["batch"]
    samples = np.stack([case.tokens[k * sequence : (k + 1) * sequence + 1] for k in range(count)]).astype(np.int64)
    dataset = engine_runs.write_samples(tmp_path / "data", samples, spec.model.vocab)
    plan = compile_plan(spec.resolve(dataset), dataset, what_digest(spec, dataset))
    _, manifest = checkpoint_at(case.store, case.run, 0)
    reader = StateReader(case.store, manifest)
    tensors = {t.name: np.frombuffer(bytes(reader.read(t.name)), "<f4").reshape(t.shape) for t in manifest.tensors}
    weights = engine_runs.weights_file(plan, tensors, tmp_path / "weights")
    gang = engine_runs.train(plan, tmp_path / "data", tmp_path / "run", weights=weights, dump=False)
    np.testing.assert_allclose(gang.losses, case.losses(), rtol=LOSS)


def test_a_run_that_begins_from_a_folder_trains_as_torch_does(imported: Imported) -> None:
    """The spec says ``init``, everything else is `train`: a gang of two stages, from bfloat16 weights in four files."""
    case = imported("llama-odd-bf16")
    tokenizer = Tokenizer.from_file(str(case.folder / "tokenizer.json"))
    dataset = write_dataset(
        case.store, case.tokens.astype(np.uint32), tokenizer, vocab=case.spec.model.vocab, eot=0, shard_tokens=1 << 20,
        documents=1, inputs="0" * 64, mend=False,
    )  # fmt: skip
    data = {"source": f"dataset:{dataset.digest}", "packing": "across"}  # torch reads the whole sample
    spec = case.training(data=data, parallel={"stages": 2, "threads": 1})
    losses: dict[int, float] = {}

    class Sink:
        def tell(self, event: Event) -> None:
            if event.kind == "step":
                losses[int(event.facts["step"])] = float(event.facts["loss"])

    run = flows.train(spec, store=case.store, sink=Sink(), out=case.work / "out")
    assert run.result().outcome == "succeeded"
    np.testing.assert_allclose([losses[n] for n in sorted(losses)], case.losses(), rtol=LOSS)
    assert load_what(case.store, run.name)["model"]["init"] == f"weights:{case.told['weights_digest']}"
    assert RunLog(case.store, run.name).fold().parent["run"] == case.run  # type: ignore[index]
    assert prepare_run(spec, case.store).run == run.name, "the same spec attaches"


@pytest.mark.parametrize("name", CASES)
def test_an_export_is_what_came_in_and_comes_in_as_the_same(imported: Imported, name: str, tmp_path: Path) -> None:
    case = imported(name)
    export_hf(case.store, case.run, 0, Folder(tmp_path / "a"))
    there = case.folder / "model.safetensors"
    if there.exists():  # float32
        theirs, ours = load_file(there), load_file(tmp_path / "a" / "model.safetensors")
        assert theirs.keys() == ours.keys()
        assert all(theirs[key].tobytes() == ours[key].tobytes() for key in theirs)
    code, said = called(["import", str(tmp_path / "a"), "--store", case.url, "-o", str(tmp_path / "a.toml"), "--json"])
    assert code == 0, said
    again = json.loads(said)
    assert (again["run"], again["weights_digest"]) == (case.run, case.told["weights_digest"]), "whatever type and files"
    export_hf(case.store, again["run"], 0, Folder(tmp_path / "b"))
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("name", CASES)
def test_a_config_says_the_same_model_when_it_comes_back(imported: Imported, name: str, tmp_path: Path) -> None:
    case = imported(name)
    export_hf(case.store, case.run, 0, Folder(tmp_path))
    theirs, ours = read_config(case.folder), read_config(tmp_path)
    kind = family(case.spec.model.family)
    assert kind.from_hf_config(ours) == kind.from_hf_config(theirs)
    for key in ("bos_token_id", "eos_token_id", "vocab_size", "tie_word_embeddings", "architectures", "model_type"):
        assert ours[key] == theirs[key]
    text = "The quick über fox; 12 + 30"
    first, second = (Tokenizer.from_file(str(p / "tokenizer.json")) for p in (case.folder, tmp_path))
    assert first.encode(text).ids == second.encode(text).ids
    assert second.decode(second.encode(text).ids) == text


def test_import_again_finds_what_is_there_and_keeps_an_edited_spec(imported: Imported, tmp_path: Path) -> None:
    case = imported("qwen3-odd-f16")
    file = case.work / str(case.told["spec"])
    arguments = [*case.arguments, "-o", str(file)]
    before = sorted(run_names(case.store))
    code, said = called(arguments)
    assert code == 0, said
    assert sorted(run_names(case.store)) == before
    for line in ("model      qwen3, 50,520 parameters in 3 layers, F16", f"hotstage chat {case.run}", "hotstage train"):
        assert line in said
    text = file.read_text()
    file.write_text(text.replace("steps = 1000", "steps = 7"))
    code, said = called(arguments)
    assert (code, file.read_text().count("steps = 7")) == (78, 1)
    assert "is there already, and says something else" in said
    file.write_text(text)


def test_other_weights_are_another_run_and_the_same_ones_no_second_copy(imported: Imported, tmp_path: Path) -> None:
    case = imported("gpt2-untied-f32")
    spec = case.training()
    first = prepare_run(spec, case.store)
    held = [n for n in run_names(case.store) if "-import-" in n]
    moved = shutil.copytree(case.folder, tmp_path / "moved")
    tree = spec.model_dump(mode="json", exclude_none=True)

    def begun(**model: Any) -> str:
        return prepare_run(parse_spec({**tree, "model": {**tree["model"], **model}}), case.store).run

    assert begun(init=f"hf:{moved}") == first.run, "the digest names them, not the folder"
    assert begun(init=f"weights:{case.told['weights_digest']}") == first.run, "and it alone is enough"
    slower = {**tree, "train": {**tree["train"], "optimizer": {**tree["train"]["optimizer"], "lr": 1e-5}}}
    other = prepare_run(parse_spec(slower), case.store).run
    assert other != first.run
    assert [n for n in run_names(case.store) if "-import-" in n] == held, "all of them share one import"
    arrays = dict(load_file(moved / "model.safetensors"))
    arrays["transformer.ln_f.bias"] = arrays["transformer.ln_f.bias"] + np.float32(1)
    save_file(arrays, moved / "model.safetensors")
    changed = begun(init=f"hf:{moved}")
    assert changed not in (first.run, other)
    del tree["model"]["init"]
    assert begun() not in (first.run, changed), "and without any it is drawn"
    with pytest.raises(SpecError, match=r"no run of .* holds these weights"):
        begun(init="weights:" + "0" * 64)


def test_a_checkpoint_of_a_run_is_a_beginning(imported: Imported) -> None:
    """The weights of ID@STEP at step 0, with moments of zero; and its tokenizer comes along."""
    case = imported("qwen3-odd-f16")
    tree = case.training().model_dump(mode="json", exclude_none=True)
    tree["data"] = {"source": tree["data"]["source"]}
    spec = parse_spec({**tree, "name": "again", "model": {**tree["model"], "vocab": 0, "init": f"run:{case.run}@0"}})
    run = prepare_run(spec, case.store)
    info, manifest = checkpoint_at(case.store, case.run, 0)
    assert load_what(case.store, run.run)["model"]["init"] == f"state:{info.state_digest}"
    began = RunLog(case.store, run.run).fold().parent
    assert began is not None
    _, copied = checkpoint_at(case.store, str(began["run"]), 0)
    assert copied.run != manifest.run
    ours, theirs = (StateReader(case.store, m) for m in (copied, manifest))
    assert all(bytes(ours.read(t.name)) == bytes(theirs.read(t.name)) for t in manifest.tensors)
    assert verify_run(case.store, copied.run, "full").ok
    assert not RunLog(case.store, case.run).fold().pins, "what was pinned for the copy is free again"
    held = load_tokenizer(case.store, load_dataset(case.store, load_what(case.store, case.run)["data"]["digest"]))
    assert load_tokenizer(case.store, run.dataset).get_vocab() == held.get_vocab()
    assert run.spec.model.vocab == case.spec.model.vocab
    for init, says in (
        (f"run:{case.run}@7", "no usable checkpoint at step 7; it has 0"),
        ("run:nobody@0", "there is no run 'nobody'"),
    ):
        with pytest.raises(SpecError, match=says):
            prepare_run(parse_spec({**tree, "model": {**tree["model"], "init": init}}), case.store)
    wide = parse_spec({**tree, "model": {**tree["model"], "hidden": 76, "init": f"run:{case.run}@0"}})
    with pytest.raises(SpecError, match=r"model.hidden is 75 there and 76 by the spec; set model.hidden = 75$"):
        prepare_run(wide, case.store)


def test_a_run_whose_weights_are_not_stored_whole_is_not_driven(imported: Imported) -> None:
    """Killed between its identity and its beginning: no driver may draw weights for it, and `train` goes on."""
    case = imported("gpt2-untied-f32")
    spec = case.training()
    whole = prepare_run(spec.model_copy(update={"name": "whole"}), case.store)
    from dataclasses import replace

    begun = replace(whole, run="half-begun")
    create_run(begun, case.store)
    for drive in (lambda: load_run(case.store, begun.run), lambda: ask_run(case.store, begun.run, [])):
        with pytest.raises(SpecError, match="weights that were not stored to their end"):
            drive()


class Stops(MemoryStore):
    """Makes one object, and dies right after it (``after``), or before the next."""

    left, after = 1 << 30, False

    def create(self, key: str, data: Data, *, sha256: bytes | None = None) -> bool:
        if self.head(key) is None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        made = super().create(key, data, sha256=sha256)
        if self.left == 0 and self.after and made:
            raise KeyboardInterrupt
        return made


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_anywhere_the_next_one_goes_on(imported: Imported, after: bool) -> None:
    """At every object that it makes: the next `train` ends with the same run, which begins from whole weights."""
    case = imported("qwen3-odd-f16")
    spec, store = case.training(), Stops()
    store.after = after
    ready_store(store)
    deaths, seen = 0, set[bool]()
    while True:
        store.left = 1
        try:
            run = prepare_run(spec, store)
            break
        except KeyboardInterrupt:
            deaths += 1
        for name in run_names(store):  # no driver takes up what is half made, the weights' own run neither
            state = RunLog(store, name).fold()
            if state.parent is None and state.at_step() is None:
                seen.add("-import-" in name)
                with pytest.raises(SpecError, match="not stored to their end"):
                    load_run(store, name)
    assert deaths > 15
    assert seen == {False, True}
    store.left = 1 << 30
    began = RunLog(store, run.run).fold().parent
    assert began is not None
    assert verify_run(store, str(began["run"]), "full").ok
    theirs, ours = (checkpoint_at(s, r, 0)[1] for s, r in ((case.store, case.run), (store, str(began["run"]))))
    assert ours.state_digest == theirs.state_digest
    assert load_run(store, run.run).spec.model.init == f"weights:{case.told['weights_digest']}"


def test_two_at_once_make_one(imported: Imported) -> None:
    case = imported("llama-odd-bf16")
    spec, store = case.training(), MemoryStore()
    with ThreadPoolExecutor(4) as pool:
        runs = {run.run for run in pool.map(lambda _: prepare_run(spec, store), range(4))}
    assert len(runs) == 1
    assert len([name for name in run_names(store) if "-import-" in name]) == 1
    (run,) = runs
    assert RunLog(store, run).fold().n == 1


def test_each_firing_of_a_schedule_begins_from_them(imported: Imported) -> None:
    case = imported("gpt2-untied-f32")
    spec = case.training()
    names = [prepare_run(spec, case.store, suffix=suffix).run for suffix in ("t1", "t2")]
    parents = [RunLog(case.store, name).fold().parent for name in names]
    assert names[0].removesuffix("-t1") == names[1].removesuffix("-t2")
    assert parents[0] == parents[1]
    assert parents[0] is not None
    code, said = called(["runs", "show", names[0], "--store", case.url])
    assert (code, f"it begins from step 0 of {parents[0]['run']}" in said) == (0, True)


def test_a_fork_begins_from_its_parent_alone_and_keeps_its_tokenizer(imported: Imported, tmp_path: Path) -> None:
    case = imported("gpt2-untied-f32")
    with pytest.raises(SpecError, match="a fork begins from its parent's checkpoint"):
        fork_run(case.store, case.run, 0, ["model.init=hf:elsewhere"])
    with pytest.raises(SpecError, match=r"train\.optimizer\.name 'muon': the parent's is 'adamw'"):
        fork_run(case.store, case.run, 0, ["train.optimizer.name=muon", "name=other"])
    (tmp_path / "other.txt").write_text("And quite another text, of which a tokenizer would make other tokens. " * 40)
    told: list[str] = []
    child = fork_run(case.store, case.run, 0, [f"data.source=text:{tmp_path}/other.txt", "name=other"], say=told.append)
    assert told[0].startswith("data: 1 document, "), "of the fork's own data"
    theirs = folder_weights(case.folder, case.spec.model).tokenizer
    assert theirs is not None
    assert load_tokenizer(case.store, child.dataset).get_vocab() == theirs.get_vocab()
    alone = prepare(DataSpec(source=f"text:{tmp_path}/other.txt", vocab_size=300), case.store)
    with pytest.raises(DatasetError, match="were made with another tokenizer"):
        fork_run(case.store, case.run, 0, [f"data.source=dataset:{alone.digest}", "name=wrong"])


def test_a_text_begins_as_the_template_of_the_weights_tokenizer_says(imported: Imported, tmp_path: Path) -> None:
    """Published Llamas want their first token in front of a text; what is trained here from nothing never saw one."""
    case = imported("gpt2-untied-f32")
    folder = shutil.copytree(case.folder, tmp_path / "model")
    tree = json.loads((folder / "tokenizer.json").read_text())
    token = {"SpecialToken": {"id": "!", "type_id": 0}}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [token, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"!": {"id": "!", "ids": [1], "tokens": ["!"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    code, said = called(["import", str(folder), "--store", case.url, "-o", str(tmp_path / "x.toml"), "--json"])
    assert code == 0, said
    run = json.loads(said)["run"]
    assert run != case.run, "another tokenizer is another import"
    with Text(case.store, run) as text:
        text.say("The quick")
        assert text.ids[0] == 1 != text.ids[1]
        more = len(text.ids)
        text.say("The quick")
        assert len(text.ids) == 2 * more - 1, "at the beginning alone"
        text.begin()
        text.say("!The quick")
        assert text.ids[0] == 1 != text.ids[1], "a prompt that has it already gets no second one"
    with Text(case.store, case.run) as text:
        text.say("The quick")
        assert len(text.ids) == more - 1
    export_hf(case.store, run, 0, Folder(tmp_path / "out"))
    told = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (told["bos_token"], told["eos_token"]) == ("!", "<|end|>")
    assert (read_config(tmp_path / "out")["bos_token_id"], read_config(tmp_path / "out")["eos_token_id"]) == (1, 0)
