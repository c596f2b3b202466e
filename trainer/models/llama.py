"""Llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases, tied or untied head.

Queries, keys and values are one matrix here, and so are gate and up: fewer, larger products. Hugging Face keeps them
apart; import and export cut them by rows.
"""

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
    hf_rows,
    hf_whole,
)
from trainer.models.hf_config import config_only, config_value, imported, no_window, rope_base
from trainer.spec import ModelSpec

EMBED, NORM, HEAD, LAYER = "model.embed_tokens.weight", "model.norm", "lm_head.weight", "model.layers.{layer}"
QKV, GATE_UP = f"{LAYER}.self_attn.qkv_proj", f"{LAYER}.mlp.gate_up_proj"


class Llama(Family):
    """The family, and the base of its relatives: they override ``qkv`` or a few tensors."""

    name = "llama"
    model_type = "llama"
    architecture = "LlamaForCausalLM"
    hf_defaults: Mapping[str, Any] = {}
    """What transformers takes for keys that a config.json does not have, where that is not what null means."""

    def check(self, model: ModelSpec) -> None:
        if model.size_of_head % 2:
            raise ValueError(
                f"head size {model.size_of_head} is odd; rotary positions turn pairs: take an even head_size"
            )

    def layer_tensors(self, model: ModelSpec) -> tuple[Tensor, ...]:
        """Tensors of one layer, in the table's order."""
        c, f = model.width, model.size_of_hidden
        q, kv = model.heads * model.size_of_head, model.groups * model.size_of_head
        normal, residual = Normal(model.init_std), Normal(model.init_std / (2 * model.layers) ** 0.5)
        return (
            Tensor(f"{LAYER}.input_layernorm.weight", (c,), Const(1.0), "layer"),
            Tensor(f"{QKV}.weight", (q + 2 * kv, c), normal, "layer", stacked=(q, kv, kv)),
            Tensor(f"{LAYER}.self_attn.o_proj.weight", (c, q), residual, "layer"),
            Tensor(f"{LAYER}.post_attention_layernorm.weight", (c,), Const(1.0), "layer"),
            Tensor(f"{GATE_UP}.weight", (2 * f, c), normal, "layer", stacked=(f, f)),
            Tensor(f"{LAYER}.mlp.down_proj.weight", (c, f), residual, "layer"),
        )

    def tensors(self, model: ModelSpec) -> tuple[Tensor, ...]:
        c, v, normal = model.width, model.vocab, Normal(model.init_std)
        return (
            Tensor(EMBED, (v, c), normal, "embed"),
            *self.layer_tensors(model),
            Tensor(f"{NORM}.weight", (c,), Const(1.0), "head"),
            *(() if model.tied else (Tensor(HEAD, (v, c), normal, "head"),)),
        )

    def embed(self, b: Builder) -> View:
        return b.embed(EMBED)

    def queries_and_keys(self, b: Builder, q: View, k: View) -> tuple[View, View]:
        """What happens to queries and keys before they are turned; here nothing."""
        return q, k

    def layer(self, b: Builder, x: View) -> View:
        m = b.model
        h, g, d = m.heads, m.groups, m.size_of_head
        qkv = b.linear(b.rmsnorm(x, f"{LAYER}.input_layernorm"), QKV)
        q, k, v = qkv.split(h * d, g * d, g * d)
        q, k = self.queries_and_keys(b, q, k)
        o = b.attention(b.rope(q, h), b.rope(k, g), v, h, g, d)
        x = b.linear(o, f"{LAYER}.self_attn.o_proj", residual=x)
        gate_up = b.linear(b.rmsnorm(x, f"{LAYER}.post_attention_layernorm"), GATE_UP)
        return b.linear(b.swiglu(gate_up), f"{LAYER}.mlp.down_proj", residual=x)

    def head(self, b: Builder, x: View) -> None:
        b.classify(b.rmsnorm(x, NORM), EMBED if b.model.tied else HEAD, b.model.tied)

    def hf_tensors(self, model: ModelSpec) -> tuple[HfTensor, ...]:
        stated = self.tensors(model)
        kv, f, at, mlp = model.groups * model.size_of_head, model.size_of_hidden, f"{LAYER}.self_attn", f"{LAYER}.mlp"
        queries = {f"{at}.q_proj.weight": model.heads * model.size_of_head}
        cut = {
            f"{QKV}.weight": queries | {f"{at}.k_proj.weight": kv, f"{at}.v_proj.weight": kv},
            f"{GATE_UP}.weight": {f"{mlp}.gate_proj.weight": f, f"{mlp}.up_proj.weight": f},
        }
        entries: list[HfTensor] = []
        for tensor in stated:
            name = tensor.name
            entries += hf_rows(stated, name, cut[name]) if name in cut else (hf_whole(stated, name),)
        return tuple(entries)

    def to_hf_config(self, model: ModelSpec) -> dict[str, Any]:
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "hidden_size": model.width,
            "intermediate_size": model.size_of_hidden,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.groups,
            "head_dim": model.size_of_head,
            "max_position_embeddings": model.context,
            "vocab_size": model.vocab,
            "rms_norm_eps": model.norm_eps,
            "initializer_range": model.init_std,
            "rope_theta": model.rope_base,
            "rope_parameters": {"rope_theta": model.rope_base, "rope_type": "default"},
            "tie_word_embeddings": model.tied,
            "attention_bias": False,
            "attention_dropout": 0.0,
            **({"mlp_bias": False} if self.model_type == "llama" else {}),
        }

    def hf_window(self, config: Mapping[str, Any]) -> int:
        """``model.window`` of a config.json."""
        return no_window(config)

    def from_hf_config(self, config: Mapping[str, Any]) -> ModelSpec:
        config = {**self.hf_defaults, **config}
        config_only(
            config, self.architecture, {"model_type": (self.model_type,), "hidden_act": ("silu", "swish", None)}
        )
        heads = config_value(config, "num_attention_heads", int)
        return imported(
            {
                "layers": "num_hidden_layers",
                "width": "hidden_size",
                "heads": "num_attention_heads",
                "kv_heads": "num_key_value_heads",
                "head_size": "head_dim",
                "hidden": "intermediate_size",
                "vocab": "vocab_size",
                "context": "max_position_embeddings",
                "norm_eps": "rms_norm_eps",
                "window": "sliding_window",
                "rope_base": "rope_theta",
                "init_std": "initializer_range",
            },
            family=self.name,
            layers=config_value(config, "num_hidden_layers", int),
            width=config_value(config, "hidden_size", int),
            heads=heads,
            kv_heads=config_value(config, "num_key_value_heads", int, heads),
            head_size=config.get("head_dim"),
            hidden=config_value(config, "intermediate_size", int),
            vocab=config_value(config, "vocab_size", int),
            context=config_value(config, "max_position_embeddings", int),
            window=self.hf_window(config),
            norm_eps=config_value(config, "rms_norm_eps", float, 1e-6),
            rope_base=rope_base(config, 10_000.0),
            init_std=config_value(config, "initializer_range", float, 0.02),
            tied=config_value(config, "tie_word_embeddings", bool, False),
        )


FAMILY = Llama()
