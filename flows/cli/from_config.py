"""A spec from a Hugging Face config.json: the model as it stands there, and a start for the rest. No weights:
`hotstage ckpt import` brings them."""

from __future__ import annotations

import json
from pathlib import Path

from trainer.errors import SpecError
from trainer.models import family, names
from trainer.models.hf_config import end_token_id, left_out, name_of, read_config
from trainer.spec import ModelSpec

_SEQUENCE = 1024


def spec_text(path: Path) -> str:
    """The TOML of a spec with the model of this config.json (or of this folder's). SpecError for what cannot be."""
    config = read_config(path)
    kind = config.get("model_type")
    if kind not in names():
        raise SpecError(f"config.json: model_type is {kind!r}; this version computes {', '.join(names())}")
    model = family(str(kind)).from_hf_config(config)
    if model.vocab < 1:
        raise SpecError(f"config.json: vocab_size {model.vocab} must be at least 1; raise it")
    folder = path if path.is_dir() else path.parent
    dropout = left_out(config)
    lines = [
        f"# {path}: its model, without its weights (hotstage ckpt import brings them)",
        *([f"# not computed here: {', '.join(dropout)}"] if dropout else []),
        f'name = "{name_of(path)}"',
        "",
        "[model]",
        *_model_lines(model),
        "",
        "[data]",
        'source = "python-stdlib"        # or text:GLOB, jsonl:GLOB',
        *_tokenizer_lines(folder / "tokenizer.json", end_token_id(config)),
        "",
        "[train]",
        "steps = 1000",
        "batch = 8                       # sequences a step",
        "microbatch = 1",
        f"sequence = {min(model.context, _SEQUENCE)}",
        'precision = "bf16"',
        "",
        "[train.optimizer]",
        "lr = 3e-4",
        "",
        "[parallel]",
        "stages = 1",
        "",
    ]
    return "\n".join(lines)


def _model_lines(model: ModelSpec) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in model.model_dump().items() if value is not None]


def _tokenizer_lines(path: Path, end: int | None) -> list[str]:
    if not path.is_file():
        return ['# tokenizer = "tokenizer.json"  # the model\'s own; else one is trained']
    from flows.data.tokenizer import parse_tokenizer

    token = None if end is None else parse_tokenizer(path.read_bytes(), str(path)).id_to_token(end)
    named = [f"end_token = {_toml(token)}"] if token is not None else []
    return [f"tokenizer = {_toml(str(path))}", *named]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
