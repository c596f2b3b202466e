"""Models as people have them, made by Hugging Face transformers: what `hotstage import` is tried on.

usage: make_import.py OUT [CASE...]
Writes OUT/CASE/: the folder as transformers saves it (config.json, generation_config.json, weights in the case's type
and number of files, tokenizer), and beside it what torch computed of these very weights in float64:
`numbers.safetensors` (`tokens`: a stream of which sample k is [k*T, k*T+T]; `logits` [T, V] of sample 0) and
`numbers.json` (loss and gradient norm of 25 AdamW steps over the stream, in order).
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

OPT = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP, STEPS, BATCH, SEQUENCE = 1.0, 25, 2, 19
EAGER = {"attn_implementation": "eager"}
CASES = {
    "gpt2-untied-f32": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=307,
            bos_token_id=0,
            eos_token_id=0,
            n_positions=37,
            n_embd=30,
            n_layer=2,
            n_head=3,
            n_inner=70,
            tie_word_embeddings=False,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            **EAGER,
        ),
        torch.float32,
        "1GB",
    ),
    "llama-odd-bf16": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=293,
            hidden_size=42,
            intermediate_size=83,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            max_position_embeddings=41,
            rms_norm_eps=1e-5,
            rope_theta=50_000.0,
            tie_word_embeddings=False,
            **EAGER,
        ),
        torch.bfloat16,
        "40KB",
    ),
    "qwen3-odd-f16": (
        Qwen3ForCausalLM,
        Qwen3Config(
            vocab_size=299,
            hidden_size=36,
            intermediate_size=75,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=14,
            max_position_embeddings=43,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            use_sliding_window=False,
            **EAGER,
        ),
        torch.float16,
        "30KB",
    ),
}
TEXT = "The quick brown fox jumps over the lazy dog, and über the next one; 12 + 30 = 42. " * 40


def tokenizer(context):
    """A byte-level BPE with an end token, as published models have one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=289, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|end|>", bos_token="<|end|>", model_max_length=context
    )


def make(out, name):
    kind, config, dtype, shard = CASES[name]
    torch.manual_seed(sum(map(ord, name)))
    config.bos_token_id = config.eos_token_id = 0
    model = kind(config)
    with torch.no_grad():
        for n, p in model.named_parameters():  # norms and biases off their trivial values
            p.copy_(torch.randn_like(p) * 0.15 + (1.0 if p.dim() == 1 and "weight" in n else 0.0))
    folder = pathlib.Path(out) / name
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer(config.max_position_embeddings).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").train()
    tokens = torch.randint(0, config.vocab_size, (STEPS * BATCH * SEQUENCE + 1,))
    samples = torch.stack([tokens[k * SEQUENCE : k * SEQUENCE + SEQUENCE + 1] for k in range(STEPS * BATCH)])
    named = dict(model.named_parameters())
    decay, rest = ([p for p in named.values() if (p.dim() >= 2) == two] for two in (True, False))
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], **OPT)
    log, logits = [], None
    for step in range(STEPS):
        batch = samples[step * BATCH : step * BATCH + BATCH]
        found = model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), batch[:, 1:].flatten())
        logits = found[0].detach() if logits is None else logits
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        log.append({"loss": loss.item(), "grad_norm": norm.item()})
    numbers = {"tokens": tokens.to(torch.int32), "logits": logits.float().contiguous()}
    save_file(numbers, folder / "numbers.safetensors")
    told = {"optimizer": {**OPT, "clip": CLIP}, "batch": BATCH, "sequence": SEQUENCE, "steps": log}
    (folder / "numbers.json").write_text(json.dumps(told, indent=1) + "\n")
    print(name, f"{log[0]['loss']:.6f} -> {log[-1]['loss']:.6f}, largest logit {logits.abs().max():.2f}")


if __name__ == "__main__":
    for case in sys.argv[2:] or CASES:
        make(sys.argv[1], case)
