"""Weights in Hugging Face's form as a run's beginning: the same bits come out again; the run trains on from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from checkpoint.export_to import Folder
from checkpoint.log import RunLog
from checkpoint.manifest import EXP_AVG, EXP_AVG_SQ
from checkpoint.read import StateReader
from checkpoint.safetensors import NoWeights, digest_of, read_folder
from checkpoint.store import Store
from checkpoint.verify import verify_run
from flows.drive.begin import prepare_run
from flows.drive.begin_from import Imported, import_run
from flows.show.export import checkpoint_at, export_hf
from tests.flows.conftest import Trained
from trainer.errors import SpecError
from trainer.models import family
from trainer.models.base import hf_table
from trainer.spec import RunSpec, parse_spec

Arrays = dict[str, npt.NDArray[np.float32]]


def spec_of(ground: tuple[Store, RunSpec], name: str, **model: object) -> RunSpec:
    tree = ground[1].model_dump(mode="json", exclude_none=True)
    return parse_spec({**tree, "name": name, "model": {**tree["model"], **model}})


def weights(spec: RunSpec, vocab: int, seed: int = 0) -> tuple[Arrays, dict[str, object]]:
    """Random weights of the spec's model in Hugging Face's form, and its config.json."""
    model = spec.model.model_copy(update={"vocab": vocab})
    rng = np.random.default_rng(seed)
    made = {e.name: rng.standard_normal(e.shape).astype("<f4") for e in hf_table(family(model.family), model)}
    return made, family(model.family).to_hf_config(model)


def write(folder: Path, arrays: Arrays, config: dict[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def vocab_of(ground: tuple[Store, RunSpec]) -> int:
    from flows.data import prepare

    return ground[1].resolve(prepare(ground[1].data, ground[0], sequence=ground[1].train.sequence)).model.vocab


@pytest.mark.parametrize(
    ("name", "model"),
    [("imp-g", {}), ("imp-l", {"family": "llama", "kv_heads": 2, "tied": False}), ("imp-q", {"family": "qwen3"})],
)
def test_the_same_bits_come_out_again(
    ground: tuple[Store, RunSpec], tmp_path: Path, name: str, model: dict[str, object]
) -> None:
    store, spec = ground[0], spec_of(ground, name, **model)
    arrays, config = weights(spec, vocab_of(ground))
    made = import_run(store, write(tmp_path / "in", arrays, config), spec)
    export_hf(store, made.parent, 0, Folder(tmp_path / "out"))
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == arrays.keys()
    assert all(back[n].tobytes() == arrays[n].tobytes() for n in arrays)
    assert digest_of(read_folder(tmp_path / "out")) == made.digest
    assert verify_run(store, made.parent, "full").ok
    _, manifest = checkpoint_at(store, made.parent, None)
    reader = StateReader(store, manifest)
    assert (manifest.step, manifest.samples) == (0, 0)
    for tensor in manifest.tensors:
        assert not any(reader.read(tensor.name, EXP_AVG)) and not any(reader.read(tensor.name, EXP_AVG_SQ))  # noqa: PT018
    began = RunLog(store, made.run).fold().parent
    assert began is not None
    assert (began["run"], began["step"], began["state_digest"]) == (made.parent, 0, manifest.state_digest.hex())
    assert made.run == prepare_run(spec, store).run, "the run of the spec itself"
    assert import_run(store, tmp_path / "out", spec) == made, "once more: as it is"


def test_halves_are_widened_without_loss_and_files_may_be_several(
    ground: tuple[Store, RunSpec], tmp_path: Path
) -> None:
    store, spec = ground[0], spec_of(ground, "imp-h")
    arrays, _ = weights(spec, vocab_of(ground))
    names = sorted(arrays)
    folder = tmp_path / "in"
    folder.mkdir()
    half = {n: arrays[n].astype("<f2") for n in names[: len(names) // 2]}
    save_file(half, folder / "model-00001-of-00002.safetensors")
    brain = {n: (arrays[n].view("<u4") >> 16).astype("<u2") for n in names[len(names) // 2 :]}
    save_file(brain, folder / "model-00002-of-00002.safetensors")
    file = folder / "model-00002-of-00002.safetensors"
    data = file.read_bytes()  # NumPy has no bfloat16: the header says U16
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    where = {n: f"model-0000{1 if n in half else 2}-of-00002.safetensors" for n in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    made = import_run(store, folder, spec)
    export_hf(store, made.parent, 0, Folder(tmp_path / "out"))
    back = load_file(tmp_path / "out" / "model.safetensors")
    for n in names:
        want = half[n].astype("<f4") if n in half else (brain[n].astype("<u4") << 16).view("<f4")
        assert back[n].tobytes() == want.tobytes()


def test_what_files_carry_beside_the_weights_is_left_out(ground: tuple[Store, RunSpec], tmp_path: Path) -> None:
    store, spec = ground[0], spec_of(ground, "imp-x")
    arrays, _ = weights(spec, vocab_of(ground))
    bare = {n.removeprefix("transformer."): a for n, a in arrays.items()}  # as the first GPT-2 was published
    bare["h.0.attn.bias"] = np.ones((1, 1, 16, 16), "<f4")
    bare["lm_head.weight"] = arrays["transformer.wte.weight"].copy()
    made = import_run(store, write(tmp_path / "in", bare), spec)
    export_hf(store, made.parent, 0, Folder(tmp_path / "out"))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == arrays.keys()


@pytest.mark.parametrize("before", ["transformer.", ""])
def test_a_tied_model_s_embedding_may_be_stored_as_the_head_alone(
    ground: tuple[Store, RunSpec], tmp_path: Path, before: str
) -> None:
    """Of a tensor with two names those who store it once keep either."""
    store, spec = ground[0], spec_of(ground, f"imp-head{len(before)}")
    arrays, _ = weights(spec, vocab_of(ground))
    named = {before + n.removeprefix("transformer."): a for n, a in arrays.items()}
    named["lm_head.weight"] = named.pop(f"{before}wte.weight")
    made = import_run(store, write(tmp_path / "in", named), spec)
    export_hf(store, made.parent, 0, Folder(tmp_path / "out"))
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == arrays.keys()
    assert back["transformer.wte.weight"].tobytes() == arrays["transformer.wte.weight"].tobytes()


Change = Callable[[Arrays, dict[str, object]], object]
WRONG: list[tuple[str, Change, str]] = [
    ("missing", lambda a, _: a.pop("transformer.wpe.weight"), "wpe.weight is missing"),
    (
        "more",
        lambda a, _: a.update({"transformer.new": a["transformer.wpe.weight"]}),
        r"new \(16 x 32\) is not of the spec's model",
    ),
    ("shape", lambda a, _: a.update({"transformer.wpe.weight": np.ones((3, 3), "<f4")}), "3 x 3, the spec's model has"),
    ("type", lambda a, _: a.update({"transformer.ln_f.bias": np.ones(32, "<f8")}), r"ln_f.bias in .* is of type F64"),  # type: ignore[dict-item]
    (
        "head",
        lambda a, _: a.update({"lm_head.weight": -a["transformer.wte.weight"]}),
        "model is tied: set model.tied = false",
    ),
    (
        "config",
        lambda _, c: c.update({"layer_norm_epsilon": 1e-3}),
        "model.norm_eps is 0.001 there and 1e-05 by the spec; set model.norm_eps = 0.001",
    ),
]


@pytest.mark.parametrize(("change", "says"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_weights_of_another_model_are_refused_and_no_run_is_made(
    ground: tuple[Store, RunSpec], tmp_path: Path, change: Change, says: str
) -> None:
    store, spec = ground[0], spec_of(ground, "imp-wrong")
    arrays, config = weights(spec, vocab_of(ground))
    change(arrays, config)
    with pytest.raises(SpecError, match=says):
        import_run(store, write(tmp_path / "in", arrays, config), spec)
    assert not list(store.list("index/imp-wrong"))


def test_a_run_that_began_by_itself_or_from_other_weights_is_left_alone(
    ground: tuple[Store, RunSpec], tmp_path: Path
) -> None:
    store, spec = ground[0], spec_of(ground, "imp-two")
    vocab = vocab_of(ground)
    first = import_run(store, write(tmp_path / "a", weights(spec, vocab)[0]), spec)
    with pytest.raises(SpecError, match="a fork of step 0 of"):
        import_run(store, write(tmp_path / "b", weights(spec, vocab, seed=1)[0]), spec)
    assert first.run != first.parent
    own = prepare_run(spec_of(ground, "imp-own"), store)
    log = RunLog(store, own.run)
    from flows.drive.run import attempt_body
    from flows.drive.views import Restore

    log.append("attempt", attempt_body(own, "l", Restore(None, 0).to_map(), reason="start", cause=None), log.fold())
    with pytest.raises(SpecError, match="began from its own initial weights"):
        import_run(store, write(tmp_path / "a", weights(spec, vocab)[0]), spec_of(ground, "imp-own"))
    assert not list(store.list("index/imp-own-import"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "a page of HTML"),
        (b"PK\3\4 pytorch_model", "is a zip archive, such as torch.save's: a pickle"),
        (b"\x80\x02}q.", "is a pickle, which is not opened"),
        (b"GGUF\3\0\0\0", "is of llama.cpp, whatever its name"),
        (b"short", "not safetensors, or was cut short"),
        (b"\xff" * 8 + b"{}", "not safetensors, or was cut short"),
        (b"\x02\0\0\0\0\0\0\0[]", "is no map"),
        (b"\x03\0\0\0\0\0\0\0{x}", "no JSON"),
        (header := b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "not safetensors"),
        (len(header).to_bytes(8, "little") + header + b"1234", "it was cut short, fetch it again"),
        (len(header).to_bytes(8, "little") + header + b"12345678abc", "3 bytes behind its last tensor"),
        (
            (2 * len(header) - 1).to_bytes(8, "little") + header[:-1] + b"," + header[1:] + b"12345678",
            "'a' is in it twice",
        ),
        (len(header).to_bytes(8, "little") + header.replace(b"F32", b"I99") + b"12345678", "of type"),
        (len(header).to_bytes(8, "little") + header.replace(b"[2]", b"-2 ") + b"12345678", "no shape"),
        (len(header).to_bytes(8, "little") + header.replace(b"[0,8]", b"[8,0]") + b"12345678", "do not hold"),
    ],
)
def test_files_that_are_none_are_named(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(NoWeights, match=says):
        read_folder(tmp_path)


def test_what_no_program_writes_is_damaged_and_what_some_write_is_read(tmp_path: Path) -> None:
    """No gap between tensors; but tensors of no elements, and of types that are none of the weights'."""

    def write(**tensors: tuple[str, list[int], int, int]) -> None:
        rows = {n: {"dtype": d, "shape": s, "data_offsets": [a, b]} for n, (d, s, a, b) in tensors.items()}
        head = json.dumps(rows).encode()
        end = max(b for *_, b in tensors.values())
        (tmp_path / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(end))

    write(a=("F32", [2], 0, 8), b=("F32", [2], 12, 20))
    with pytest.raises(NoWeights, match=r"'b' lies 4 bytes behind the last: it is damaged"):
        read_folder(tmp_path)
    write(a=("F32", [2], 0, 8), none=("F32", [0], 0, 0), mask=("BOOL", [3], 8, 11), code=("F8_E4M3", [1], 11, 12))
    assert {n: t.elements for n, t in read_folder(tmp_path).items()} == {"a": 2, "none": 0, "mask": 3, "code": 1}


def test_a_link_to_weights_that_are_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../blobs/abc")
    with pytest.raises(NoWeights, match=r"is a link to \.\./blobs/abc, which is not there"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (None, "neither model.safetensors nor"),
        ({}, "weight_map"),
        ({"weight_map": {"a": "../model.safetensors"}}, "is no file of this folder"),
        ({"weight_map": {"a": "none.safetensors"}}, "names none.safetensors, which is not in its folder"),
        ({"weight_map": {"a": "n" * 5000}}, "names n*, which is not in its folder"),
    ],
)
def test_an_index_that_is_none_is_named(tmp_path: Path, index: object, says: str) -> None:
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NoWeights, match=says):
        read_folder(tmp_path)


def test_a_run_trains_on_from_the_weights_that_another_exported(trained: Trained, tmp_path: Path) -> None:
    """By the commands alone: what was trained 60 steps begins again at step 0 with a loss that is as low."""
    place, out = trained.place, tmp_path / "model"
    place.said("ckpt", "export", trained.run, "-o", str(out))
    sets = ("--set", "name=again", "--set", "train.steps=2", "--set", "parallel.stages=1")
    told = json.loads(place.said("ckpt", "import", str(out), "spec.toml", *sets, "--json"))
    assert Imported(told["parent"], told["run"], told["weights_digest"]).run.startswith("again-")
    said = place.run("train", "spec.toml", *sets, "--json", "--no-prefect")
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    result = json.loads(place.said("runs", "show", told["run"], "--json"))
    assert (result["state"], result["saved_step"]) == ("succeeded", 2), lines
    begins = json.loads(place.said("ckpt", "digest", told["parent"], "--json"))
    assert begins["step"] == 0
    place.said("ckpt", "export", told["parent"], "-o", str(tmp_path / "again"))
    assert digest_of(read_folder(tmp_path / "again")) == told["weights_digest"] == digest_of(read_folder(out))
