"""The validation loss of a checkpoint: an independent model's, whatever the threads; its windows; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from checkpoint.export_to import Folder
from checkpoint.keys import dataset_key
from checkpoint.store import Store, open_store
from checkpoint.store.memory import MemoryStore
from flows.data import prepare, validation_of
from flows.drive.run import Prepared, read_run
from flows.evaluate.validate import validate, validation_data, windows_of
from flows.show.export import export_hf
from tests.flows.conftest import Trained
from tests.reference.model import Config, Model
from trainer.dataset import DatasetRef, write_shard
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec
from trainer.spec_watch import ValidationSpec


@pytest.fixture(scope="module")
def store(trained: Trained) -> Store:
    return open_store(f"file://{trained.place.folder / 'store'}")


def with_validation(store: Store, run: str, **keys: object) -> Prepared:
    prepared = read_run(store, run)
    spec = prepared.spec.model_copy(update={"validation": ValidationSpec(every=1, **keys)})  # type: ignore[arg-type]
    return Prepared(prepared.run, spec, prepared.dataset, prepared.what, prepared.plan)


@pytest.mark.parametrize("prompts", [False, True])
def test_it_is_an_independent_model_s_whatever_the_threads(
    trained: Trained, store: Store, tmp_path: Path, prompts: bool
) -> None:
    held, text = tmp_path / "held", "a lazy fox is as quick as a dog that jumps over the next brown one. "
    held.write_text(text * 70 if not prompts else json.dumps({"q": text * 40, "a": text * 30}) + "\n")
    source = {"source": f"jsonl:{held}", "field": "a", "prompt_field": "q"} if prompts else {"source": f"text:{held}"}
    prepared = with_validation(store, trained.run, **source, windows=6)
    data = validation_data(store, prepared, lambda _: None)
    assert data.tokenizer_digest == prepared.dataset.tokenizer_digest
    assert data.digest != prepared.dataset.digest
    found = [
        validate(store, prepared, prepared.spec.train.steps, data, threads=threads, stop=lambda: False)
        for threads in (1, 2)
    ]
    assert found[0] == found[1]
    export_hf(store, trained.run, None, Folder(tmp_path / "model"))
    config = Config.from_hf(json.loads((tmp_path / "model" / "config.json").read_text()))
    weights = {n: w.astype(np.float64) for n, w in load_file(tmp_path / "model" / "model.safetensors").items()}
    windows = list(windows_of(store, data, prepared.spec.train.sequence, 6))
    tokens, targets = (np.stack([window[n] for window in windows]).astype(np.int64) for n in (0, 1))
    counts = targets >= 0
    assert counts.all() != prompts
    assert (found[0].windows, found[0].tokens) == (6, counts.sum())
    want = Model(config, weights, tokens, np.maximum(targets, 0), counts).loss
    assert found[0].loss == pytest.approx(want, rel=1e-5)


def test_windows_are_spread_evenly_over_all_shards(tmp_path: Path) -> None:
    store, size, digest = MemoryStore(), 4, "d" * 64
    shards, first = (9, 3, 13), 0
    for number, tokens in enumerate(shards):
        write_shard(tmp_path / "s", np.arange(first, first + tokens), 100)
        store.create(dataset_key(digest, f"{number:05d}.bin"), (tmp_path / "s").read_bytes())
        first += tokens
    data = DatasetRef(digest, 100, 2, shards, "0" * 64)
    every = [(tokens.tolist(), targets.tolist()) for tokens, targets in windows_of(store, data, size, 100)]
    assert every == [([a, a + 1, a + 2, a + 3], [a + 1, a + 2, a + 3, a + 4]) for a in (0, 4, 12, 16, 20)]
    assert [tokens.tolist()[0] for tokens, _ in windows_of(store, data, size, 2)] == [0, 12]
    with pytest.raises(DatasetError, match="no window of 65"):
        list(windows_of(store, data, 64, 2))


def test_it_is_left_where_that_is_asked(trained: Trained, store: Store) -> None:
    prepared = with_validation(store, trained.run, source=f"dataset:{read_run(store, trained.run).dataset.digest}")
    data = validation_data(store, prepared, lambda _: None)
    with pytest.raises(InterruptedError):
        validate(store, prepared, prepared.spec.train.steps, data, stop=lambda: True)


def test_the_part_that_was_split_off_is_what_is_validated_on(tmp_path: Path) -> None:
    """``data.validation``: by the run's own tokenizer, and none of it is trained on."""
    store = open_store(f"file://{tmp_path}/store")
    texts = [f"the {n} quick foxes jump over {n} dogs. " * 20 for n in range(60)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train = prepare(DataSpec(source=f"jsonl:{tmp_path}/c.jsonl", vocab_size=300, validation=0.2), store)
    held = validation_of(store, train)
    assert held is not None
    assert held.tokenizer_digest == train.tokenizer_digest
    assert 0 < held.tokens < train.tokens
    assert len(list(windows_of(store, held, 16, 5))) == 5


def test_windows_of_prompts_alone_are_refused(trained: Trained, store: Store, tmp_path: Path) -> None:
    (tmp_path / "held").write_text(json.dumps({"q": "a quick brown fox " * 90, "a": "x"}) + "\n")
    source = {"source": f"jsonl:{tmp_path}/held", "field": "a", "prompt_field": "q", "windows": 1}
    prepared = with_validation(store, trained.run, **source)
    data = validation_data(store, prepared, lambda _: None)
    with pytest.raises(DatasetError, match="no token counts in 1 windows of"):
        validate(store, prepared, prepared.spec.train.steps, data, threads=1, stop=lambda: False)


def test_nothing_to_validate_on_is_said_with_the_mend(trained: Trained, store: Store) -> None:
    with pytest.raises(SpecError, match=r"^there is nothing to validate on: .*; set validation\.source"):
        validation_data(store, with_validation(store, trained.run), lambda _: None)


def test_a_loss_is_finite(trained: Trained, store: Store) -> None:
    """On the very text that it was trained on it has learnt something: below that of a uniform guess."""
    prepared = with_validation(store, trained.run, source=f"dataset:{read_run(store, trained.run).dataset.digest}")
    data = validation_data(store, prepared, lambda _: None)
    found = validate(store, prepared, prepared.spec.train.steps, data, threads=1, stop=lambda: False)
    assert 0 < found.loss < math.log(prepared.dataset.vocab)
