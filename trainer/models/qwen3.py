"""Qwen3: Llama with RMSNorm on the queries and keys of every head, and a head size apart from width / heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.models.base import Builder, Const, Tensor, View
from trainer.models.llama import LAYER, Llama
from trainer.spec import ModelSpec

Q_NORM, K_NORM = f"{LAYER}.self_attn.q_norm", f"{LAYER}.self_attn.k_norm"


class Qwen3(Llama):
    """The family."""

    name = "qwen3"
    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    hf_defaults: Mapping[str, Any] = {"num_key_value_heads": 32, "head_dim": 128}

    def layer_tensors(self, model: ModelSpec) -> tuple[Tensor, ...]:
        norm = (model.size_of_head,)  # one vector for all heads of a layer
        return (
            *super().layer_tensors(model),
            Tensor(f"{Q_NORM}.weight", norm, Const(1.0), "layer"),
            Tensor(f"{K_NORM}.weight", norm, Const(1.0), "layer"),
        )

    def queries_and_keys(self, b: Builder, q: View, k: View) -> tuple[View, View]:
        return b.rmsnorm(q, Q_NORM, groups=b.model.heads), b.rmsnorm(k, K_NORM, groups=b.model.groups)

    def to_hf_config(self, model: ModelSpec) -> dict[str, Any]:
        return super().to_hf_config(model) | {"use_sliding_window": False, "max_window_layers": model.layers}


FAMILY = Qwen3()
