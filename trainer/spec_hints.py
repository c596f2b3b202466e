"""What a spec that is refused was probably meant to say: keys by the names that other programs have for them, and lines
that are no TOML. Pure; decides nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from fractions import Fraction

_LR, _STEPS, _WARMUP = "train.optimizer.lr", "train.steps", "train.schedule.warmup"
_LENGTH = "train.steps, each of train.batch * train.sequence tokens"
_ACCUMULATED = "train.batch, sequences a step, of which train.microbatch are computed at a time"
_BY_NAME: Mapping[str, str] = {
    "n_layer n_layers num_layers num_hidden_layers depth": "model.layers",
    "n_embd d_model hidden_size hidden_dim dim embed_dim embedding_size": "model.width",
    "n_head n_heads num_heads num_attention_heads": "model.heads",
    "n_kv_head n_kv_heads num_kv_heads num_key_value_heads num_query_groups": "model.kv_heads",
    "head_dim kv_channels": "model.head_size",
    "intermediate_size ffn_dim ffn_hidden_size d_ff n_inner": "model.hidden",
    "block_size n_positions n_ctx max_position_embeddings max_seq_len context_length context_size": "model.context",
    "rope_theta rotary_base": "model.rope_base",
    "rms_norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon": "model.norm_eps",
    "initializer_range init_method_std": "model.init_std",
    "tie_word_embeddings tie_embeddings weight_tying": "model.tied",
    "sliding_window": "model.window",
    "model_type architecture arch": "model.family",
    "learning_rate max_lr base_lr": _LR,
    "grad_clip clip_grad max_grad_norm gradient_clipping gradient_clip_val": "train.optimizer.clip",
    "adam_beta1 beta_1": "train.optimizer.beta1",
    "betas adam_betas": "train.optimizer.beta1 and train.optimizer.beta2",
    "adam_beta2 beta_2": "train.optimizer.beta2",
    "adam_epsilon adam_eps epsilon": "train.optimizer.eps",
    "warmup_steps warmup_iters num_warmup_steps lr_warmup_steps": _WARMUP,
    "warmup_ratio warmup_fraction warmup_pct warmup_epochs": f"{_WARMUP}, a number of steps",
    "lr_scheduler lr_scheduler_type lr_decay_style scheduler": "train.schedule.kind",
    "batch_size global_batch_size": "train.batch",
    "micro_batch_size microbatch_size per_device_train_batch_size": "train.microbatch",
    "gradient_accumulation_steps grad_accum accumulate_grad_batches": _ACCUMULATED,
    "seq_len seq_length sequence_length max_length max_seq_length": "train.sequence",
    "max_steps max_iters train_iters num_steps total_steps num_train_steps iterations": _STEPS,
    "epochs num_epochs num_train_epochs max_epochs max_tokens num_tokens train_tokens total_tokens": _LENGTH,
    "dtype torch_dtype mixed_precision": "train.precision",
    "bf16 fp16": 'train.precision = "bf16"',
    "fp8": 'train.precision = "fp8"',
    "dataset dataset_path data_path train_data train_file train_files files path paths": "data.source",
    "text_field text_column text_key json_key field_output completion_field response_field": "data.field",
    "prompt_key prompt_column field_instruction completion_only_loss train_on_inputs mask_prompt": "data.prompt_field",
    "field_messages messages_field messages_column conversations conversation_column": "data.messages",
    "chat_template_path chat_template_jinja": "data.chat_template",
    "tokenizer_path tokenizer_file tokenizer_name": "data.tokenizer",
    "eos_token eod_token eot_token": "data.end_token",
    "bos_token bod_token add_bos_token": "data.begin_token",
    "eval_steps eval_interval eval_every eval_freq eval_strategy evaluation_strategy val_check_interval": (
        "validation.every, counted in steps"
    ),
    "val_split test_size val_set_size validation_split split": "data.validation",
    "save_steps save_interval save_every checkpoint_interval save_freq": "checkpoint.every",
    "save_total_limit keep_last keep_last_n": "checkpoint.keep.last",
    "pp pipeline_parallel_size pipeline_model_parallel_size pipeline_stages num_stages": "parallel.stages",
    "dp ddp data_parallel data_parallel_size world_size gpus num_gpus n_gpus": "parallel.stages and parallel.replicas",
    "gradient_checkpointing activation_checkpointing recompute_granularity": "parallel.recompute",
    "virtual_pipeline_model_parallel_size num_model_chunks": "parallel.chunks",
}
_NOT_HERE: Mapping[str, str] = {
    "dropout attn_pdrop resid_pdrop embd_pdrop attention_dropout": "this version trains without dropout",
    "tp tensor_parallel_size tensor_model_parallel_size cp context_parallel_size ep expert_parallel_size "
    "sequence_parallel": "this version runs stages and replicas, no such parallelism",
    "num_experts moe top_k_experts": "this version has no experts",
}
_THEIRS = {name: f"here that is {key}" for names, key in _BY_NAME.items() for name in names.split()}
_THEIRS |= {name: f"{why}: leave it out" for names, why in _NOT_HERE.items() for name in names.split()}


def hint_of(name: str) -> str | None:
    """What another program's key ``name`` is here, as the end of a refusal; None where it is not known.

    >>> hint_of("learning-rate"), hint_of("colour")
    ('here that is train.optimizer.lr', None)
    """
    return _THEIRS.get(name.lower().replace("-", "_"))


_VALUES: Mapping[str, str] = {
    "bfloat16 bf16mixed bf16true": "bf16",
    "float32 f32 single 32true": "fp32",
    "float8 f8 fp8e4m3 float8e4m3fn": "fp8",
    "float16 fp16 f16 half 16mixed 16true": "bf16",
    "k8s kube": "kubernetes",
    "interleaved": "interleaved1f1b",
    "zbvzerobubble": "zbv",
    "warmupstabledecay": "wsd",
    "constantwithwarmup": "constant",
    "cosinewithwarmup cosineannealing cosineannealinglr": "cosine",
}
_ALSO = {name: value for names, value in _VALUES.items() for name in names.split()}


def value_meant(value: object, known: Sequence[str]) -> str:
    """Which of the known words was meant, as the end of a refusal; empty where that is not sure.

    >>> value_meant("BFloat16", ("fp32", "bf16")), value_meant("LlamaForCausalLM", ("gpt2", "llama"))
    (": write 'bf16'", ": write 'llama'")
    >>> value_meant("k8s", ("local", "kubernetes")), value_meant("ZBVZeroBubble", ("1f1b", "zb-v"))
    (": write 'kubernetes'", ": write 'zb-v'")
    """
    if not isinstance(value, str):
        return ""
    plain = re.sub(r"[^a-z0-9]", "", value.lower())
    plain = _ALSO.get(plain, re.sub("(forcausallm|lmheadmodel)$", "", plain))
    found = next((word for word in known if re.sub(r"[^a-z0-9]", "", word) == plain), None)
    return f": write {found!r}" if found else ""


_UNITS = {"_mb_s": "MB/s", "_gbit_s": "Gbit/s", "_gbyte_s": "GB/s", "_gib": "GiB", "_mib": "MiB", "_s": "seconds"}


def written_as(key: str, wanted: str, value: object) -> str:
    """How to write ``wanted`` (a number, true or false, ...) at a key where ``value`` stands.

    >>> written_as("checkpoint.deadline_s", "a number", "10m"), written_as("train.steps", "a whole number", 1000.0)
    ('write a number of seconds', 'write 1000')
    """
    if wanted == "a whole number" and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"write {int(value)}"
    if wanted == "a whole number" and isinstance(value, str) and re.fullmatch(r"-?\d{1,15}", value):
        return f"write {int(value)}, without quotes"
    unit = next((unit for end, unit in _UNITS.items() if key.endswith(end)), None)
    if unit is None and "number" in wanted and isinstance(value, str):
        wanted = _number_meant(value.strip(), "whole" in wanted) or wanted
    return f"write {wanted}" + (f" of {unit}" if unit and "number" in wanted else "")


def _number_meant(text: str, whole: bool) -> str:
    """The number that a text with separators, a percent sign or a unit means; empty where that is not sure.

    >>> _number_meant("1,000", True), _number_meant("0.1%", False), _number_meant("4k", True)
    ('1000', '0.001', 'it without a unit: 4000 (or 4096)')
    """
    if re.fullmatch(r"\d{1,3}([,_ ]\d{3}){1,4}", text, re.ASCII) and (whole or "," not in text):
        return re.sub(r"\D", "", text)
    if whole and (found := re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?([kKMBG])", text, re.ASCII)):  # m may be minutes
        full = Fraction(found[1]) * {"K": 10**3, "M": 10**6}.get(found[2].upper(), 10**9)
        binary = f" (or {full * 1024 / 1000})" if found[2] in "kK" and full % 125 == 0 else ""
        return f"it without a unit: {full}{binary}" if full.denominator == 1 else ""
    number = text.removesuffix("%").rstrip() if text.endswith("%") else re.sub(r"^(\d+),(\d+)$", r"\1.\2", text)
    if not re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?(e-?\d{1,2})?", number, re.IGNORECASE | re.ASCII):
        return ""
    if whole:
        return str(int(Fraction(number))) if text == number and Fraction(number).denominator == 1 else ""
    return str(float(Fraction(number) / (100 if text.endswith("%") else 1)))


_NOT_TEXT = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"), (b"PK\3\4", "a zip archive"), (b"\x1f\x8b", "gzip"))


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """What a file holds that is no text in UTF-8, and the mend."""
    found = next((what for magic, what in _NOT_TEXT if data.startswith(magic)), None)
    if found is not None:
        return f"it is {found}, not text in UTF-8; save it as UTF-8"
    line = data.count(b"\n", 0, error.start) + 1
    return f"line {line} holds the byte 0x{data[error.start]:02X}, which is no UTF-8; save the file as UTF-8"


_LINES: tuple[tuple[str, str], ...] = (
    (r"---\s*$", "that begins YAML, and a spec is TOML: key = value below [section]"),
    (r"\s*(//|--|;|%)", "a comment begins with #"),
    (
        r"\s*\{",
        "that is JSON, and a spec is TOML: key = value below [section] (of a model's config.json: "
        "hotstage init --from FILE)",
    ),
    (r"\s*[\w.-]+\s*:(\s|$)", "a key and its value are joined by =, not by a colon"),
    (r"[^=]*=\s*(True|False|TRUE|FALSE)\b", "true and false are written in lower case"),
    (r"[^=]*=\s*(None|null|nil|NULL)\b", "there is no null: leave the key out"),
    (r"[^=]*=\s*0\d", "a whole number does not begin with 0"),
    (r"[^=]*=\s*\d{1,3}(,\d{3})+\s*(#|$)", "thousands are written 1_000 or 1000"),
    (r"[^=]*=\s*[-+]?[\d._]+(e[-+]?\d+)?\s*[A-Za-z%]", "a number stands alone, without a unit"),
    (r"[^=]*=\s*[A-Za-z_/~.]", "text stands in quotes"),
    (r"[^=]*=\s*(#|$)", "a value is missing"),
    (r".*=\s*\{.*,\s*\}", "no comma stands before the closing brace"),
    (r".*\{[^}]*$", "a table in braces stands on one line"),
    (r".*[,;]\s*$", "nothing follows a value on its line"),
    (r"\s*\[[^\]]*$", "a section's name ends with ]"),
    (r"\s*[\w.-]+\s*$", "a key has a value: key = value"),
)


def toml_problem(text: str, error: ValueError) -> str:
    """What is wrong with a text that is no TOML: the reader's words, the line, and the mend where it is plain.

    >>> toml_problem("tied = True", ValueError("Invalid value (at line 1, column 8)"))
    "Invalid value (at line 1, column 8): 'tied = True'; true and false are written in lower case"
    """
    said = str(error)[:300]
    place = re.search(r"\(at line (\d+), column \d+\)", said)
    if place is None:
        return said
    rows = text.split("\n")
    line = rows[int(place[1]) - 1].rstrip("\r") if int(place[1]) <= len(rows) else ""
    told = f"{said}: {line.strip()[:120]!r}" if line.strip() else said
    mend = _mend(said, line)
    return f"{told}; {mend}" if mend else told


_CURLY = "\u2018\u2019\u201a\u201c\u201d\u201e\u00ab\u00bb"  # quotes of text programs


def _mend(said: str, line: str) -> str | None:
    if "\r" in line:
        return "its lines end in CR alone: write them with LF"
    for letter in line:
        if (
            (not letter.isprintable() and letter != "\t")
            or (letter.isspace() and not letter.isascii())
            or letter in _CURLY
        ):
            name = unicodedata.name(letter, "a control character")
            return f"the line holds U+{ord(letter):04X} ({name.lower()}): write it with plain quotes and blanks"
    if "twice" in said:
        return "a section stands once: put its keys together"
    if "overwrite" in said:
        return "a key has one value: leave one of the two out"
    if "Illegal character '\\n'" in said:
        return "a text in quotes ends on its line: close the quotes"
    if '"' in line and "\\" in line:
        return "in double quotes a backslash begins an escape: put the text in single quotes"
    return next((mend for form, mend in _LINES if re.match(form, line)), None)
