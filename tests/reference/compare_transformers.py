"""The engine against Hugging Face transformers itself, live. Prints the table of docs/numerics.md.

An environment of its own, because torch is large and nothing else here needs it (the tests use the golden cases that
``tests/golden/make.py`` made the same way):

    python3 -m venv /tmp/compare
    /tmp/compare/bin/pip install torch transformers safetensors numpy pydantic msgpack
    HOTSTAGE_ENGINE=<the engine> /tmp/compare/bin/python -m tests.reference.compare_transformers [CASE...]

from the root of the repository. For every case of ``tests/golden/make.py`` it makes the model anew in transformers
(float64, on the CPU), lets torch train it in float32 for a yardstick, trains it with the engine from the same weights,
and takes the worst difference of each: losses (relative), logits of the first batch, gradients of the first batch,
weights after ten AdamW steps (each over the largest element of its tensor). Then the way out: the weights that the
engine trained become a Hugging Face folder, transformers opens it, and its logits are compared with the engine's.
Exits with 1 where a difference is beyond ten times that of tests/golden/README.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.e2e import engine_runs
from tests.e2e.golden_runs import (
    GRADIENT,
    LOGITS,
    LOSS,
    WEIGHTS,
    compile_golden,
    spec_of,
    train_golden,
    worst,
)
from tests.golden import make
from tests.reference import golden as golden_module
from tests.reference.golden import Golden
from trainer import models

Numbers = dict[str, float]


def difference(golden: Golden, ours: Mapping[str, Any]) -> Numbers:
    """Worst differences of ``ours`` (losses, logits, grads, after) from the float64 run."""
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(ours["losses"], golden.losses, strict=True)),
        "logits": worst(ours["logits"], golden.logits),
        "gradients": max(worst(ours["grads"][name], theirs) for name, theirs in golden.grads.items()),
        "weights": max(worst(*without_key_bias(name, ours["after"][name], w)) for name, w in golden.after.items()),
    }


def without_key_bias(name: str, *arrays: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """GPT-2's bias on keys has a true gradient of zero: AdamW steps on rounding noise there, in torch as here."""
    if not name.endswith("attn.c_attn.bias"):
        return arrays
    return tuple(np.delete(x, np.s_[len(x) // 3 : 2 * len(x) // 3]) for x in arrays)


def torch_float32(golden: Golden) -> dict[str, Any]:
    """torch's own float32 run of the case: what another good implementation differs by."""
    model = (
        transformers.AutoModelForCausalLM.from_pretrained(golden.folder, attn_implementation="eager").float().train()
    )
    named = dict(model.named_parameters())
    o = golden.optimizer
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
    out: dict[str, Any] = {"losses": []}
    for batch in torch.from_numpy(golden.batches):
        logits = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        if not out["losses"]:
            out["logits"] = logits.detach().numpy()
            out["grads"] = {name: p.grad.clone().numpy() for name, p in named.items() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip)
        adamw.step()
        out["losses"].append(loss.item())
    out["after"] = {name: p.detach().numpy() for name, p in named.items()}
    return out


def engine_run(golden: Golden, folder: Path) -> tuple[dict[str, Any], float]:
    """The engine's run on two stages; and how far transformers' logits of what it exports are from the engine's."""
    spec = spec_of(golden, stages=2)
    gang = train_golden(golden, spec, folder)
    infer = compile_golden(golden, spec_of(golden, stages=1), folder, mode="infer")
    tokens = golden.batches[0][:, :-1]

    def logits(tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        weights = engine_runs.weights_file(infer, tensors, folder / "weights-infer")
        return engine_runs.infer(infer, weights, tokens[:, None], folder)[:, 0]

    trained = gang.weights(len(golden.losses))
    ours: dict[str, Any] = {
        "losses": gang.losses,
        "logits": logits(engine_runs.from_hf(spec.model, golden.weights32)),
        "grads": engine_runs.to_hf(spec.model, gang.grads(1)),
        "after": engine_runs.to_hf(spec.model, trained),
    }
    out = folder / "export"
    out.mkdir()
    family = models.family(spec.model.family)
    (out / "config.json").write_text(json.dumps(family.to_hf_config(spec.model)))
    tensors = {name: np.ascontiguousarray(value) for name, value in ours["after"].items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    opened, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not report["unexpected_keys"], report
    with torch.no_grad():
        theirs = opened.double()(input_ids=torch.from_numpy(np.ascontiguousarray(tokens))).logits.numpy()
    return ours, worst(logits(trained), theirs)


def main(cases: list[str]) -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    limits = {"loss": LOSS, "logits": LOGITS, "gradients": GRADIENT, "weights": WEIGHTS, "export": LOGITS}
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| Case | Run | Losses | Logits | Gradients | Weights after 10 steps | Export opened by transformers |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    beyond = []
    with tempfile.TemporaryDirectory() as base:
        golden_module.FOLDER = Path(base) / "golden"
        for case in cases or list(make.CASES):
            make.make(golden_module.FOLDER, case, quiet=True)
            golden = Golden(case)
            yardstick = difference(golden, torch_float32(golden))
            ours, export = engine_run(golden, Path(base) / case)
            found = difference(golden, ours) | {"export": export}
            beyond += [
                f"{case}: {key} {value:.1e}, limit {limits[key]:.1e}"
                for key, value in found.items()
                if value > limits[key]
            ]
            for name, row in (("torch float32", yardstick), ("hotstage fp32, 2 stages", found)):
                cells = " | ".join(f"{row[key]:.1e}" if key in row else "" for key in limits)
                print(f"| {case} | {name} | {cells} |")
    print("\n" + ("\n".join(["BEYOND THE LIMIT", *beyond]) if beyond else "all within the limits"))
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
