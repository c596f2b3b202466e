"""GPT-2: LayerNorm, learned positions, GELU (tanh form), biases. Names are Hugging Face's, whose Conv1D matrices are
[in, out]: ours are [out, in], so import and export transpose them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.models.base import (
    Builder,
    Const,
    Family,
    HfTensor,
    Normal,
    Tensor,
    View,
    hf_whole,
)
from trainer.models.hf_config import by_either_name, config_only, config_value, imported, no_window
from trainer.spec import ModelSpec

WTE, WPE, NORM, LAYER = "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f", "transformer.h.{layer}"
HEAD = "lm_head.weight"
_ALIASES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
"""Other names of a config.json's keys, which transformers takes too."""


class Gpt2(Family):
    """The family."""

    name = "gpt2"
    architecture = "GPT2LMHeadModel"

    def check(self, model: ModelSpec) -> None:
        if model.kv_heads not in (None, model.heads):
            raise ValueError(
                f"kv_heads {model.kv_heads}: gpt2 has as many key/value heads as heads ({model.heads}); leave "
                "kv_heads out or take family = 'llama'"
            )
        if model.size_of_head * model.heads != model.width:
            raise ValueError(
                f"head_size {model.head_size}: gpt2 needs heads * head_size = width, {model.heads} * "
                f"{model.head_size} is not {model.width}; leave head_size out"
            )
        if model.rope_base != ModelSpec.model_fields["rope_base"].default:
            raise ValueError(
                f"rope_base {model.rope_base:g}: gpt2 learns its positions and turns nothing; leave rope_base out, or "
                "take family = 'llama'"
            )

    def tensors(self, model: ModelSpec) -> tuple[Tensor, ...]:
        c, f, v = model.width, model.size_of_hidden, model.vocab
        normal, residual = Normal(model.init_std), Normal(model.init_std / (2 * model.layers) ** 0.5)
        one, zero = Const(1.0), Const(0.0)
        stacked = {"attn.c_attn.weight": (c, c, c)}
        layer = (
            ("ln_1.weight", (c,), one),
            ("ln_1.bias", (c,), zero),
            ("attn.c_attn.weight", (3 * c, c), normal),
            ("attn.c_attn.bias", (3 * c,), zero),
            ("attn.c_proj.weight", (c, c), residual),
            ("attn.c_proj.bias", (c,), zero),
            ("ln_2.weight", (c,), one),
            ("ln_2.bias", (c,), zero),
            ("mlp.c_fc.weight", (f, c), normal),
            ("mlp.c_fc.bias", (f,), zero),
            ("mlp.c_proj.weight", (c, f), residual),
            ("mlp.c_proj.bias", (c,), zero),
        )
        return (
            Tensor(WTE, (v, c), normal, "embed"),
            Tensor(WPE, (model.context, c), normal, "embed"),
            *(
                Tensor(f"{LAYER}.{name}", shape, init, "layer", stacked=stacked.get(name, ()))
                for name, shape, init in layer
            ),
            Tensor(f"{NORM}.weight", (c,), one, "head"),
            Tensor(f"{NORM}.bias", (c,), zero, "head"),
            *(() if model.tied else (Tensor(HEAD, (v, c), normal, "head"),)),
        )

    def embed(self, b: Builder) -> View:
        return b.embed(WTE, WPE)

    def layer(self, b: Builder, x: View) -> View:
        m = b.model
        qkv = b.linear(b.layernorm(x, f"{LAYER}.ln_1"), f"{LAYER}.attn.c_attn")
        q, k, v = qkv.split(m.width, m.width, m.width)
        o = b.attention(q, k, v, m.heads, m.heads, m.size_of_head)
        x = b.linear(o, f"{LAYER}.attn.c_proj", residual=x)
        h = b.gelu(b.linear(b.layernorm(x, f"{LAYER}.ln_2"), f"{LAYER}.mlp.c_fc"))
        return b.linear(h, f"{LAYER}.mlp.c_proj", residual=x)

    def head(self, b: Builder, x: View) -> None:
        b.classify(b.layernorm(x, NORM), WTE if b.model.tied else HEAD, b.model.tied)

    def hf_tensors(self, model: ModelSpec) -> tuple[HfTensor, ...]:
        stated = self.tensors(model)
        return tuple(hf_whole(stated, t.name, transpose=t.part == "layer" and len(t.shape) == 2) for t in stated)

    def to_hf_config(self, model: ModelSpec) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "n_embd": model.width,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_inner": model.size_of_hidden,
            "n_positions": model.context,
            "vocab_size": model.vocab,
            "layer_norm_epsilon": model.norm_eps,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tied,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        }

    def from_hf_config(self, config: Mapping[str, Any]) -> ModelSpec:
        config = by_either_name(config, _ALIASES)
        config_only(
            config,
            self.architecture,
            {
                "model_type": ("gpt2",),
                "activation_function": (
                    "gelu_new",
                    "gelu_pytorch_tanh",
                    "gelu_fast",
                    "gelu_accurate",
                    "gelu_python_tanh",
                    None,
                ),
                "scale_attn_weights": (True, None),
                "scale_attn_by_inverse_layer_idx": (False, None),
            },
        )
        no_window(config)
        return imported(
            {
                "layers": "n_layer",
                "width": "n_embd",
                "heads": "n_head",
                "hidden": "n_inner",
                "vocab": "vocab_size",
                "context": "n_positions",
                "norm_eps": "layer_norm_epsilon",
                "init_std": "initializer_range",
            },
            family="gpt2",
            layers=config_value(config, "n_layer", int),
            width=config_value(config, "n_embd", int),
            heads=config_value(config, "n_head", int),
            hidden=config.get("n_inner"),
            vocab=config_value(config, "vocab_size", int),
            context=config_value(config, "n_positions", int),
            norm_eps=config_value(config, "layer_norm_epsilon", float, 1e-5),
            init_std=config_value(config, "initializer_range", float, 0.02),
            tied=config_value(config, "tie_word_embeddings", bool, True),
        )


FAMILY = Gpt2()
