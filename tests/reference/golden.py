"""Reads the golden cases in tests/golden (made by tests/golden/make.py with transformers and torch)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.reference.model import AdamW, Config, Weights

FOLDER = Path(__file__).parents[1] / "golden"
CASES = ("gpt2-tied", "llama-gqa-untied", "llama-mha-tied", "qwen3-tied")


@dataclass(frozen=True)
class Golden:
    """One case; arrays are float64 unless said otherwise."""

    name: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "config.json").read_text()))

    @property
    def config(self) -> Config:
        return Config.from_hf(self.hf_config)

    @cached_property
    def weights32(self) -> dict[str, NDArray[np.float32]]:
        """As transformers saved them, float32."""
        return dict(load_file(self.folder / "model.safetensors"))

    def weights(self) -> Weights:
        """A fresh float64 copy."""
        return {name: w.astype(np.float64) for name, w in self.weights32.items()}

    @cached_property
    def batches(self) -> NDArray[np.int64]:
        """[steps, B, T+1]."""
        return np.asarray(load_file(self.folder / "batches.safetensors")["tokens"])

    @cached_property
    def logits(self) -> NDArray[np.float64]:
        return np.asarray(load_file(self.folder / "first.safetensors")["logits"])

    @cached_property
    def grads(self) -> Weights:
        first = load_file(self.folder / "first.safetensors")
        return {name.removeprefix("grad."): g for name, g in first.items() if name.startswith("grad.")}

    @cached_property
    def after(self) -> Weights:
        return dict(load_file(self.folder / "after.safetensors"))

    @cached_property
    def train(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "train.json").read_text()))

    @property
    def optimizer(self) -> AdamW:
        o = self.train["optimizer"]
        return AdamW(o["lr"], tuple(o["betas"]), o["eps"], o["weight_decay"], o["clip"])

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.train["steps"]]

    @property
    def norms(self) -> list[float]:
        return [step["grad_norm"] for step in self.train["steps"]]
