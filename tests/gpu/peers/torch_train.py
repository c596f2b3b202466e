"""PyTorch's side of the figures: the same model, batch and optimizer, as fast as plain PyTorch does it.

    python torch_train.py WORKLOAD VARIANT [--device cpu] [--steps N]

WORKLOAD: JSON of tests/gpu/workloads.py. VARIANT: ``autocast`` (fp32 weights, bf16 autocast) or ``pure`` (bf16 weights,
the optimizer on fp32 copies), both compiled, with fused AdamW, and with the faster attention of PyTorch's own (flash,
cuDNN), which is tried first. Prints a line of JSON. Imports nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from typing import Any

BEGAN = time.time()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402


class Attention(nn.Module):
    def __init__(self, c: dict[str, Any], bias: bool) -> None:
        super().__init__()
        self.heads = c["heads"]
        self.kv = c.get("kv_heads") or c["heads"]
        self.size = c.get("head_size") or c["width"] // c["heads"]
        self.qkv = nn.Linear(c["width"], (self.heads + 2 * self.kv) * self.size, bias=bias)
        self.out = nn.Linear(self.heads * self.size, c["width"], bias=bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).split([self.heads * self.size, self.kv * self.size, self.kv * self.size], dim=2)
        q, k, v = (y.view(b, t, -1, self.size).transpose(1, 2) for y in (q, k, v))
        if rope is not None:
            q, k = (rotated(y, *rope) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv != self.heads)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class GPT2Block(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        w = c["width"]
        self.n1, self.n2 = nn.LayerNorm(w), nn.LayerNorm(w)
        self.attention = Attention(c, bias=True)
        self.up, self.down = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)

    def forward(self, x: Tensor, rope: None) -> Tensor:
        x = x + self.attention(self.n1(x), None)
        return x + self.down(F.gelu(self.up(self.n2(x)), approximate="tanh"))


class LlamaBlock(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        w, hidden = c["width"], c["hidden"]
        self.n1, self.n2 = nn.RMSNorm(w, eps=1e-5), nn.RMSNorm(w, eps=1e-5)
        self.attention = Attention(c, bias=False)
        self.gate_up, self.down = nn.Linear(w, 2 * hidden, bias=False), nn.Linear(hidden, w, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.n1(x), rope)
        gate, up = self.gate_up(self.n2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """Token embeddings are the head's weights too."""

    def __init__(self, c: dict[str, Any], sequence: int) -> None:
        super().__init__()
        gpt2 = c["family"] == "gpt2"
        self.tokens = nn.Embedding(c["vocab"], c["width"])
        self.places = nn.Embedding(c["context"], c["width"]) if gpt2 else None
        self.blocks = nn.ModuleList((GPT2Block if gpt2 else LlamaBlock)(c) for _ in range(c["layers"]))
        self.norm = nn.LayerNorm(c["width"]) if gpt2 else nn.RMSNorm(c["width"], eps=1e-5)
        size = c.get("head_size") or c["width"] // c["heads"]
        self.gpt2 = gpt2
        if not gpt2:
            angles = torch.outer(
                torch.arange(sequence).float(), c["rope_base"] ** (-torch.arange(0, size, 2).float() / size)
            )
            self.register_buffer("cos", angles.cos(), persistent=False)
            self.register_buffer("sin", angles.sin(), persistent=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0.0, 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(tokens)
        if self.places is not None:
            x = x + self.places.weight[: tokens.shape[1]]
        rope = None if self.gpt2 else (self.cos.float(), self.sin.float())
        for block in self.blocks:
            x = block(x, rope)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def groups(parameters: Iterable[Tensor], decay: float) -> list[dict[str, Any]]:
    """For the optimizer: matrices and embeddings decay, biases and norms do not."""
    listed = list(parameters)
    return [
        {"params": [p for p in listed if p.dim() >= 2], "weight_decay": decay},
        {"params": [p for p in listed if p.dim() < 2], "weight_decay": 0.0},
    ]


def seconds_of(work: Any, device: str, rounds: int = 5) -> float:
    """Median, after a round that warms up."""
    took = []
    for _ in range(rounds + 1):
        synchronise(device)
        began = time.perf_counter()
        work()
        synchronise(device)
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def fastest_attention(w: dict[str, Any], device: str) -> tuple[list[SDPBackend], dict[str, float | str]]:
    """Of PyTorch's, at the workload's sizes, forward and backward."""
    if device != "cuda":
        return [SDPBackend.MATH], {}
    c = w["model"]
    kv, size = c.get("kv_heads") or c["heads"], c.get("head_size") or c["width"] // c["heads"]
    told: dict[str, float | str] = {}
    times: dict[SDPBackend, float] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        q, k, v = (
            torch.randn(
                w["microbatch"], n, w["sequence"], size, device=device, dtype=torch.bfloat16, requires_grad=True
            )
            for n in (c["heads"], kv, kv)
        )

        def work(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv != c["heads"])
            y.backward(y)

        try:
            with sdpa_kernel([backend]):
                times[backend] = seconds_of(work, device)
                told[backend.name] = times[backend] * 1e3
        except RuntimeError as error:
            told[backend.name] = str(error)[:200]
    best = sorted(times, key=lambda b: times[b])
    return best or [SDPBackend.MATH], told


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("workload")
    parser.add_argument("variant", choices=["autocast", "pure"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()
    w: dict[str, Any] = json.loads(options.workload)
    device, steps = options.device, options.steps or w["steps"]
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    attention, tried = fastest_attention(w, device)
    model: Any = Model(w["model"], w["sequence"]).to(device)
    pure = options.variant == "pure"
    masters: list[Tensor] = []
    if pure:
        masters = [p.detach().float().clone() for p in model.parameters()]
        for master in masters:
            master.grad = torch.zeros_like(master)
        model.to(torch.bfloat16)
    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(groups(masters or trained, 0.1), lr=1e-4, betas=(0.9, 0.95), fused=device == "cuda")
    compiled = model if options.eager else torch.compile(model)
    vocab, t, micro = w["model"]["vocab"], w["sequence"], w["microbatch"]
    parts = w["batch"] // micro
    data = torch.randint(0, vocab, (parts, micro, t + 1), device=device)
    data_in, data_out = data[:, :, :-1].contiguous(), data[:, :, 1:].contiguous()

    def step() -> Tensor:
        total = torch.zeros((), device=device)
        for tokens, targets in zip(data_in, data_out, strict=True):
            with torch.autocast(device, torch.bfloat16, enabled=not pure):
                loss = compiled(tokens, targets) / parts
            loss.backward()
            total += loss.detach()
        if pure:
            # gradients of bf16 weights are bf16; the optimizer's are fp32, as its weights are
            torch._foreach_copy_([master.grad for master in masters], [p.grad for p in trained])
        torch.nn.utils.clip_grad_norm_(masters or trained, 1.0, foreach=True)
        optimizer.step()
        for p in trained:
            p.grad = None
        if pure:
            with torch.no_grad():
                torch._foreach_copy_(trained, masters)
        return total

    losses, took = [], []
    first = 0.0
    with sdpa_kernel(attention[:1]):  # of several PyTorch would take the first of its own order
        for _ in range(w["warm"] + steps):
            synchronise(device)
            began = time.perf_counter()
            loss = step()
            synchronise(device)
            took.append(time.perf_counter() - began)
            losses.append(float(loss))
            first = first or time.time() - BEGAN
    measured = took[w["warm"] :]
    middle = statistics.median(measured)
    print(
        json.dumps(
            {
                "tokens_per_s": w["batch"] * t / middle,
                "step_ms": middle * 1e3,
                "spread": (max(measured) - min(measured)) / middle,
                "start_s": first,
                "torch_reserved_mib": torch.cuda.max_memory_reserved() / 2**20 if device == "cuda" else None,
                "attention": attention[0].name,
                "attention_ms": tried,
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "version": torch.__version__,
                "compiled": not options.eager,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
