"""Mistral: Llama whose layers read within a window. With ``window`` 0 it computes what Llama does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.models.hf_config import config_value, window_of_all
from trainer.models.llama import Llama
from trainer.spec import ModelSpec


class Mistral(Llama):
    """The family."""

    name = "mistral"
    model_type = "mistral"
    architecture = "MistralForCausalLM"
    windows = True
    hf_defaults: Mapping[str, Any] = {"num_key_value_heads": 8, "sliding_window": 4096}

    def to_hf_config(self, model: ModelSpec) -> dict[str, Any]:
        plain = super().to_hf_config(model)
        return {k: v for k, v in plain.items() if k != "attention_bias"} | {"sliding_window": model.window or None}

    def hf_window(self, config: Mapping[str, Any]) -> int:
        return window_of_all(config, config_value(config, "num_hidden_layers", int))


FAMILY = Mistral()
