"""Commented specs to start from: what ``hotstage init NAME`` writes. ``examples/`` holds some of them as files.

Each is complete TOML that loads as it stands; keys that are left out have the defaults of ``trainer/spec_sections.py``
and ``spec_how.py`` (``hotstage schema`` lists them all).
"""

from __future__ import annotations

# --- Sections that presets have in common

_LOCAL = """\
[launch]
target = "local"
"""

_CHUNK = """\
classifier_chunk = 256    # rows of logits at a time: the head reads its matrix once for all of them
"""
_BF16 = """\
precision = "bf16"
seed = 1
"""

_BETAS_AND_CLIP = """\
beta1 = 0.9
beta2 = 0.95
weight_decay = 0.1
clip = 1.0
"""


def _jsonl(vocab_size: int) -> str:
    return f"""\
[data]
source = "jsonl:corpus/*.jsonl"
vocab_size = {vocab_size}
"""


def _train(steps: int, batch: int, microbatch: int, sequence: int) -> str:
    return f"""\
[train]
steps = {steps}
batch = {batch}
microbatch = {microbatch}
sequence = {sequence}
{_CHUNK if microbatch * sequence > 256 else ""}{_BF16}"""


def _adamw(lr: str, min_lr: str, rest: str = "") -> str:
    return f"""\
[train.optimizer]
lr = {lr}
min_lr = {min_lr}
{rest}"""


def _cosine(warmup: int) -> str:
    return f"""\
[train.schedule]
kind = "cosine"
warmup = {warmup}
"""


# --- The presets

_DEMO = """\
# The demo: a small GPT that learns Python from the standard library of the interpreter that runs it, through two
# pipeline stages on one machine. About a minute on two cores.
name = "demo"

# --- What is trained. These three sections alone determine the bits, and the run's identity.

[model]
family = "gpt2"           # LayerNorm, learned positions, GELU
layers = 4
width = 96
heads = 3
context = 128             # longest sequence, in tokens
vocab = 0                 # 0: that of the dataset

[data]
source = "python-stdlib"  # or "text:<glob>", "jsonl:<glob>" (field "text"), "dataset:<digest>"
vocab_size = 2048         # of the byte-level BPE tokenizer that is trained on the text

[train]
steps = 1800
batch = 8                 # sequences a step
microbatch = 1            # sequences at a time: the pipeline is filled with batch / microbatch of them
sequence = 128
precision = "fp32"        # or "bf16": activations and matrices in bfloat16, masters and moments in fp32; or "fp8"
seed = 1

[train.optimizer]
lr = 3e-3
min_lr = 1e-4
beta2 = 0.98
weight_decay = 0.1
clip = 1.0                # limit of the global gradient norm

[train.schedule]
kind = "cosine"
warmup = 200              # steps

# --- How. May change from attempt to attempt without changing a bit of the result.

[parallel]
stages = 2                # runs of layers, a process each
schedule = "1f1b"
threads = 1               # of each process

[checkpoint]
every = 100               # steps between snapshots

[launch]
target = "local"
trace = true              # record when every instruction ran
"""

_GPT2 = f"""\
# GPT-2, 124 million parameters, with the sizes of the original, on text files of your own.
name = "gpt2-124m"

[model]
family = "gpt2"
layers = 12
width = 768
heads = 12
context = 1024            # longest sequence, in tokens
vocab = 50304             # 50257 of the tokenizer, rounded up to a multiple of 64

[data]
source = "text:corpus/**/*.txt"
vocab_size = 50257

[train]
steps = 20000
batch = 32                # sequences a step
microbatch = 4
sequence = 1024
{_CHUNK}{_BF16}
{_adamw("6e-4", "6e-5", _BETAS_AND_CLIP)}
[train.schedule]
kind = "cosine"
warmup = 700              # steps

[parallel]
stages = 2                # the head weighs as much as five layers: the planner splits by cost, not by count
schedule = "1f1b"

[checkpoint]
every = 250               # steps between snapshots
slots = 3                 # snapshots in memory: one is written while another is uploaded

# [checkpoint.keep]       # without it every checkpoint stays, 1.5 GB each
# last = 3                # the newest
# every_steps = 10000     # and the first of each 10,000 steps

{_LOCAL}"""

_LLAMA_1B = f"""\
# A llama of 1.2 billion parameters (the sizes of Llama 3.2 1B), with grouped-query attention and a tied head.
name = "llama-1b"

[model]
family = "llama"          # RMSNorm, rotary positions, SwiGLU
layers = 16
width = 2048
heads = 32
kv_heads = 8              # each serves four query heads
head_size = 64
hidden = 8192
context = 8192
vocab = 128256
norm_eps = 1e-5
rope_base = 500000.0
tied = true

{_jsonl(128000)}
{_train(50000, 256, 1, 2048)}
{_adamw("3e-4", "3e-5", _BETAS_AND_CLIP)}
[train.schedule]
kind = "wsd"              # warm up, stay, decay linearly at the end
warmup = 2000
decay = 10000

[parallel]
stages = 8
schedule = "1f1b"

[checkpoint]
every = 500

[launch]
target = "kubernetes"
nodes = 8
namespace = "training"
image = "hotstage-engine:0.1.0"
agent_image = "hotstage-agent:0.1.0"
store_secret = "hotstage-store"
resources = {{ cpu = "16", memory = "64Gi" }}
"""

_LLAMA_TINY = f"""\
# A llama small enough for a laptop: grouped-query attention, an untied head, bf16, four stages.
name = "llama-tiny"

[model]
family = "llama"          # RMSNorm, rotary positions, SwiGLU
layers = 4
width = 128
heads = 4
kv_heads = 2              # each serves two query heads
hidden = 384
context = 256
tied = false              # the head has weights of its own

[data]
source = "python-stdlib"
vocab_size = 2048

{_train(300, 16, 2, 128)}
{_adamw("3e-3", "3e-4")}
{_cosine(20)}
[parallel]
stages = 4
schedule = "1f1b"
threads = 1

[checkpoint]
every = 50

{_LOCAL}"""

_QWEN3 = f"""\
# Qwen3 0.6B: a llama with norms on queries and keys, and a head size apart from width / heads.
name = "qwen3-0-6b"

[model]
family = "qwen3"
layers = 28
width = 1024
heads = 16
kv_heads = 8
head_size = 128
hidden = 3072
context = 4096
vocab = 151936
norm_eps = 1e-6
rope_base = 1000000.0
tied = true

{_jsonl(151643)}
{_train(20000, 128, 1, 2048)}
{_adamw("3e-4", "3e-5")}
{_cosine(1000)}
[parallel]
stages = 4

[checkpoint]
every = 500

{_LOCAL}"""

_CUDA = (
    (_CHUNK, ""),
    ("precision = ",
     "classifier_chunk = 4096   # rows of logits at a time: the head moves its matrix once for all\nprecision = "),
    ("microbatch = 4\nsequence = 1024\n", "microbatch = 32           # all at once\nsequence = 1024\n"),
    ("stages = 2                # the head weighs as much as five layers: the planner splits by cost, not by count\n",
     "stages = 1                # one GPU\n"),
    ("[parallel]\n", "[parallel]\ndevice = \"cuda\"           # auto: the CPU where there is no GPU\n"),
)  # fmt: skip
"""Lines of presets, and what stands there for GPUs."""


def for_cuda(text: str) -> str:
    """A preset, or another spec's text of these lines, for NVIDIA GPUs.

    >>> "classifier_chunk = 4096" in for_cuda(PRESETS["gpt2-124m"])
    True
    """
    for here, there in _CUDA:
        text = text.replace(here, there, 1)
    return text


PRESETS: dict[str, str] = {
    "gpt2-124m": _GPT2,
    "gpt2-demo": _DEMO,
    "llama-1b": _LLAMA_1B,
    "llama-tiny": _LLAMA_TINY,
    "qwen3-0.6b": _QWEN3,
}
"""By the name that ``hotstage init`` takes."""
