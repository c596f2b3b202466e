"""PyTorch's side of a case: a process that trains on the CPU, some steps whenever it is asked.

    PYTHONPATH=tests/gpu/peers python torch_peer.py CASE

CASE: JSON of ``cases.py``. Its model is that of ``tests/gpu/peers/torch_train.py``. Asked as
``answering.py`` says. Imports nothing of this project else.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from answering import answer
from torch import Tensor
from torch_train import Model, groups


class Training:
    """``variant``: ``fp32``, ``autocast`` (fp32 weights under bf16 autocast) or ``pure`` (bf16 weights, the optimizer
    on fp32 copies); ``compiled`` by torch.compile or not.
    """

    def __init__(self, case: dict[str, Any]) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(case["threads"])
        torch.set_flush_denormal(True)
        self.model: Any = Model(case["model"], case["sequence"])
        if case.get("weights"):
            with np.load(case["weights"]) as kept:
                self.model.load_state_dict({name: torch.from_numpy(kept[name]) for name in kept.files})
        self.variant = case["variant"]
        self.masters: list[Tensor] = []
        if self.variant == "pure":
            self.masters = [p.detach().clone() for p in self.model.parameters()]
            for master in self.masters:
                master.grad = torch.zeros_like(master)
            self.model.to(torch.bfloat16)
        self.trained = list(self.model.parameters())
        o = case["optimizer"]
        self.clip = o["clip"]
        weights = groups(self.masters or self.trained, o["weight_decay"])
        betas = (o["beta1"], o["beta2"])
        self.optimizer = torch.optim.AdamW(weights, lr=o["lr"], betas=betas, eps=1e-8, fused=True)
        self.loss = torch.compile(self.model) if case["compiled"] else self.model
        self.data = torch.from_numpy(np.load(case["data"]))  # [steps, batch, sequence + 1]
        self.at = 0

    def step(self) -> float:
        batch = self.data[self.at % len(self.data)]
        self.at += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=self.variant == "autocast"):
            loss = self.loss(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        loss.backward()
        if self.masters:
            torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in self.trained])
        torch.nn.utils.clip_grad_norm_(self.masters or self.trained, self.clip, foreach=True)
        self.optimizer.step()
        for p in self.trained:
            p.grad = None
        if self.masters:
            with torch.no_grad():
                torch._foreach_copy_(self.trained, self.masters)
        return float(loss)


def main() -> int:
    return answer(Training(json.loads(sys.argv[1])).step, torch.__version__)


if __name__ == "__main__":
    sys.exit(main())
