"""Golden cases from an independent implementation: Hugging Face transformers, computed in float64 on the CPU.

usage: make.py OUT CASE...   (CASE: a name from CASES)
Writes OUT/CASE/: config.json and model.safetensors (float32, as save_pretrained), batches.safetensors (tokens, int64
[steps, B, T+1]), first.safetensors (logits [B, T, V] and the gradient of every parameter for batch 0, float64),
train.json (loss and gradient norm of 10 AdamW steps, float64), after.safetensors (weights after them, float64).
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

OPT = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP, STEPS = 1.0, 10
L = {"attention_dropout": 0.0, "attn_implementation": "eager"}
CASES = {
    "gpt2-tied": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=311,
            n_positions=48,
            n_embd=60,
            n_layer=3,
            n_head=5,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            attn_implementation="eager",
        ),
        3,
        33,
    ),
    "llama-gqa-untied": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=301,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            **L,
        ),
        2,
        37,
    ),
    "llama-mha-tied": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=259,
            hidden_size=48,
            intermediate_size=100,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            rope_theta=500000.0,
            **L,
        ),
        4,
        16,
    ),
    "qwen3-tied": (
        Qwen3ForCausalLM,
        Qwen3Config(
            vocab_size=283,
            hidden_size=56,
            intermediate_size=144,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            use_sliding_window=False,
            **L,
        ),
        2,
        29,
    ),
}


def make(out, name, cases=CASES, quiet=False):
    cls, cfg, B, T = cases[name]
    torch.manual_seed(sum(map(ord, name)))
    m = cls(cfg).train()
    with torch.no_grad():
        for n, p in m.named_parameters():  # norms and biases off their trivial values, so that a dropped one shows
            p.copy_(torch.randn_like(p) * 0.05 + (1.0 if p.dim() == 1 and "weight" in n else 0.0))
    d = pathlib.Path(out) / name
    m.save_pretrained(d)
    m = m.double()
    batches = torch.randint(0, cfg.vocab_size, (STEPS, B, T + 1))
    named = dict(m.named_parameters())
    decay = [p for p in named.values() if p.dim() >= 2]
    rest = [p for p in named.values() if p.dim() < 2]
    opt = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], **OPT)
    log = []
    for s in range(STEPS):
        x, y = batches[s, :, :-1], batches[s, :, 1:]
        logits = m(input_ids=x).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, cfg.vocab_size), y.reshape(-1))
        opt.zero_grad()
        loss.backward()
        if s == 0:
            save_file(
                {
                    "logits": logits.detach().contiguous(),
                    **{f"grad.{n}": p.grad.contiguous() for n, p in named.items()},
                },
                d / "first.safetensors",
            )
        norm = torch.nn.utils.clip_grad_norm_(m.parameters(), CLIP)
        opt.step()
        log.append({"step": s, "loss": loss.item(), "grad_norm": norm.item()})
    save_file({"tokens": batches}, d / "batches.safetensors")
    save_file({n: p.detach().contiguous() for n, p in named.items()}, d / "after.safetensors")
    (d / "train.json").write_text(
        json.dumps(
            {
                "optimizer": {
                    **OPT,
                    "betas": list(OPT["betas"]),
                    "clip": CLIP,
                    "decay": "parameters of two or more dimensions",
                },
                "batch": B,
                "sequence": T,
                "steps": log,
            },
            indent=1,
        )
        + "\n"
    )
    if not quiet:
        print(
            name, f"{log[0]['loss']:.6f} -> {log[-1]['loss']:.6f}", sum(p.numel() for p in named.values()), "parameters"
        )


if __name__ == "__main__":
    for c in sys.argv[2:] or CASES:
        make(sys.argv[1], c)
