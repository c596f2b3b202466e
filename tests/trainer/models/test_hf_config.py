"""config.json as people have them: what changes the computation is refused by key and value, the rest let through."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from flows.cli.from_config import spec_text
from trainer import models
from trainer.errors import SpecError
from trainer.models.hf_config import name_of
from trainer.spec import ModelSpec, load_spec, parse_spec

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "vocab_size": 300,
    "rms_norm_eps": 1e-5,
}
QWEN3 = LLAMA | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,
    "num_key_value_heads": 4,
}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 300}


def read(config: dict[str, Any]) -> ModelSpec:
    return models.family(config["model_type"]).from_hf_config(config)


@pytest.mark.parametrize("base", [LLAMA, QWEN3], ids=["llama", "qwen3"])
@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"rope_parameters": {"type": "linear", "factor": 4}}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 32}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}}, "llama3"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling"),
        ({"rope_scaling": {"type": "default", "rope_type": "yarn", "factor": 4}}, "yarn"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": 4}, "rope_scaling"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}, "sliding_attention"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}},
            "into rope_parameters itse",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "which one"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"num_key_value_heads": -1}, "num_key_value_heads -1"),
        ({"num_key_value_heads": 3}, "kv_heads 3"),
        ({"num_key_value_heads": 8}, "kv_heads 8"),
        ({"num_key_value_heads": "4"}, "num_key_value_heads is '4'"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"num_key_value_heads": 2.0}, "num_key_value_heads is 2.0"),
        ({"head_dim": 0}, "head_dim 0"),
        ({"head_dim": 15}, "15 is odd"),
        ({"head_dim": "x"}, "head_dim 'x'"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"num_attention_heads": 7, "head_dim": None}, "heads 7"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": 0}, "intermediate_size 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"vocab_size": 10**30}, "vocab_size"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"mlp_bias": 1}, "mlp_bias is 1"),
        ({"sliding_window": 64}, "sliding_window is 64"),
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": 5}, "layer_types is 5; it must be a list"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries, and the model 2 layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"architectures": 3}, "architectures is 3; it must be a list"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"compression_config": {"quant_method": "x"}}, "compression_config"),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"logits_scaling": 8}, "logits_scaling is 8"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is True"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_changes_the_computation_is_refused(base: dict[str, Any], more: dict[str, Any], key: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(base | more)
    text = str(caught.value)
    assert text.startswith("config.json: ")
    assert key in text


@pytest.mark.parametrize(
    ("more", "fields"),
    [
        ({"num_key_value_heads": None}, {"kv_heads": 4}),
        ({"num_key_value_heads": 2}, {"kv_heads": 2}),
        ({"num_key_value_heads": 1}, {"kv_heads": 1}),
        ({"head_dim": None}, {"size_of_head": 16}),
        ({"head_dim": 32}, {"size_of_head": 32}),
        ({"rope_scaling": None}, {"rope_base": 1e4}),
        ({"rope_scaling": {}}, {"rope_base": 1e4}),
        ({"rope_scaling": {"rope_type": "default"}}, {"rope_base": 1e4}),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 5e5}, {"rope_base": 5e5}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1.0}}, {"rope_base": 1e4}),
        ({"rope_parameters": None, "rope_theta": 1_000_000}, {"rope_base": 1e6}),
        ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_base": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5}, {"rope_base": 5e5}),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, {"rope_base": 1e4}),
        ({"rope_theta": None}, {"rope_base": 1e4}),
        ({"partial_rotary_factor": 1}, {}),
        ({"hidden_act": "swish"}, {}),
        ({"hidden_act": None}, {}),
        ({"attention_bias": None, "mlp_bias": False}, {}),
        ({"sliding_window": None}, {}),
        ({"sliding_window": 4096, "use_sliding_window": False}, {}),
        ({"sliding_window": 4096}, {}),  # longer than the context: it hides nothing
        ({"layer_types": ["full_attention"] * 2}, {}),
        ({"tie_word_embeddings": True}, {"tied": True}),
        ({"tie_word_embeddings": False}, {"tied": False}),
        ({}, {"tied": False}),
        ({"quantization_config": None}, {}),
        ({"attention_dropout": 0.1, "use_cache": True, "pretraining_tp": 1, "torch_dtype": "bfloat16"}, {}),
        ({"transformers_version": "9", "_name_or_path": "x", "something_new": {"a": 1}}, {}),
        ({"bos_token_id": 1, "eos_token_id": [2, 3]}, {}),
        ({"architectures": None}, {}),
        ({"rms_norm_eps": None}, {"norm_eps": 1e-6}),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_what_changes_nothing_is_let_through(more: dict[str, Any], fields: dict[str, Any]) -> None:
    spec = read(LLAMA | more)
    assert {key: getattr(spec, key) for key in fields} == fields
    plain = read(LLAMA)
    unmoved = [f for f in ModelSpec.model_fields if f not in fields and f not in ("kv_heads", "head_size")]
    assert [getattr(spec, f) for f in unmoved] == [getattr(plain, f) for f in unmoved]


MISTRAL = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 4,
    "sliding_window": 32,
}


@pytest.mark.parametrize(
    ("base", "without", "field", "value"),
    [
        (MISTRAL, "sliding_window", "window", 4096),
        (MISTRAL, "num_key_value_heads", "kv_heads", 8),
        (QWEN3, "num_key_value_heads", "kv_heads", 32),
        (QWEN3, "head_dim", "head_size", 128),
        (LLAMA, "num_key_value_heads", "kv_heads", 32),
    ],
)
def test_a_key_that_is_not_there_means_what_transformers_takes(
    base: dict[str, Any], without: str, field: str, value: int
) -> None:
    sizes = {"num_attention_heads": 32, "max_position_embeddings": 32768}
    assert getattr(read({k: v for k, v in (base | sizes).items() if k != without}), field) == value
    assert getattr(read(base | sizes | {without: None}), field) in (0, None, 32), "null is no default"


@pytest.mark.parametrize(
    ("more", "window"),
    [
        ({}, 32),
        ({"sliding_window": None}, 0),
        ({"sliding_window": 128}, 0),  # as long as the context: it hides nothing
        ({"layer_types": ["sliding_attention"] * 2}, 32),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": None}, 0),
    ],
)
def test_a_window_of_all_layers_comes_and_goes(more: dict[str, Any], window: int) -> None:
    model = read(MISTRAL | more)
    assert (model.family, model.window) == ("mistral", window)
    told = models.family("mistral").to_hf_config(model)
    assert told["sliding_window"] == (window or None)
    assert read(told) == model.model_copy(update={"head_size": model.size_of_head})


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention' in all 2 layers only"),
        ({"layer_types": ["sliding_attention"] * 2, "sliding_window": None}, "'full_attention' in all 2 layers only"),
        ({"layer_types": "sliding_attention"}, "layer_types is 'sliding_attention'"),
        ({"num_hidden_layers": 2**70}, "num_hidden_layers 1180591620717411303424 must be at most"),
        ({"layer_types": ["sliding_attention"] * 3}, "in all 2 layers only"),
        ({"sliding_window": 0}, "sliding_window is 0, it must be at least 1"),
        ({"sliding_window": "32"}, "sliding_window is '32', it must be a whole number"),
        ({"sliding_window": True}, "sliding_window is True, it must be a whole number"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ],
)
def test_windows_that_are_not_computed_are_refused(more: dict[str, Any], key: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(MISTRAL | more)
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_inner": 0}, "n_inner 0"),
        ({"n_head": 5}, "heads 5"),
        ({"n_positions": 0}, "n_positions 0"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, "architectures"),
        ({"num_attention_heads": 8}, "n_head 4, num_attention_heads 8; which one?"),
        ({"layer_norm_epsilon": 2}, "layer_norm_epsilon 2"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_gpt2_refuses(more: dict[str, Any], key: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(GPT2 | more)
    assert key in str(caught.value)


def test_gpt2_takes_what_its_own_config_holds() -> None:
    theirs = {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "n_ctx": 128,
              "bos_token_id": 50256, "eos_token_id": 50256, "n_inner": None, "reorder_and_upcast_attn": False,
              "scale_attn_weights": True, "summary_type": "cls_index", "use_cache": True}  # fmt: skip
    spec = read(GPT2 | theirs)
    assert (spec.size_of_hidden, spec.tied) == (256, True)
    by_other_names = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
                      "max_position_embeddings": 128, "model_type": "gpt2", "architectures": ["GPT2Model"]}  # fmt: skip
    assert read(by_other_names | {"activation_function": "gelu_accurate"}) == spec


def test_a_spec_is_written_from_a_config(tmp_path: Path) -> None:
    folder = tmp_path / "My Model-1.5B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | {"attention_dropout": 0.1, "eos_token_id": [7, 8]}))
    for path in (folder, folder / "config.json"):
        text = spec_text(path)
        assert "# not computed here: attention_dropout 0.1" in text
        spec = parse_spec(tomllib.loads(text))
        assert spec.name == "my-model-1-5b"
        assert spec.model == read(LLAMA)
        assert spec.train.sequence == 128
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    Tokenizer(kinds.WordLevel({"a": 0, "</s>": 7}, unk_token="a")).save(str(folder / "tokenizer.json"))
    (tmp_path / "made.toml").write_text(spec_text(folder))
    data = load_spec(tmp_path / "made.toml").data
    assert (data.tokenizer, data.end_token) == (str(folder / "tokenizer.json"), "</s>")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("models--openai-community--gpt2/snapshots/607a30d783dfa663caf39e06633721c8d4cfcd7e", "gpt2"),
        ("snapshots/3b", "model-3b"),
        ("Qwen3-0.6B", "qwen3-0-6b"),
    ],
)
def test_a_name_from_a_folder(tmp_path: Path, folder: str, name: str) -> None:
    assert name_of(tmp_path / folder / "config.json") == name


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"[" * 99_999, "is no JSON"),
        (b"\xff\xfe{}", "is no JSON"),
        (b"[]", "is no JSON object"),
        (b"{}", "model_type is None"),
        (b'{"model_type": "bert"}', "model_type is 'bert'; this version computes gpt2"),
        (b'{"model_type": ["llama"]}', "model_type is ['llama']"),
        (b'{"model_type": "GPT-2"}', 'qwen3: write "model_type": "gpt2"'),
        (b'{"architectures": ["Qwen3ForCausalLM"]}', 'is None; .*: write "model_type": "qwen3"'),
        (b'{"model_type": "llava", "text_config": {"model_type": "llama"}}', r"language model alone \(text_config, a"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        (b"\n<!DOCTYPE html>", "is a page of HTML"),
        (b'{"model_type": "hf_config"}', "model_type is 'hf_config'"),
        (b'{"model_type": "llama"}', "num_attention_heads is missing"),
        (json.dumps(LLAMA | {"vocab_size": 0}).encode(), "vocab_size 0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_are_no_config(tmp_path: Path, data: bytes | None, says: str) -> None:
    path = tmp_path / "config.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(SpecError) as caught:
        spec_text(path)
    assert says in str(caught.value) or re.search(says, str(caught.value))
    with pytest.raises(SpecError):
        spec_text(Path("/dev/null"))
