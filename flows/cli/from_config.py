"""A spec from a Hugging Face config.json: the model as it stands there, and a start for the rest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.safetensors import NoWeights, instead
from flows.data.chat_form import has_template
from trainer.errors import SpecError
from trainer.models import family, names
from trainer.models.hf_config import left_out, name_of, read_config
from trainer.spec import ModelSpec

if TYPE_CHECKING:
    from trainer.models.base import Family

_SEQUENCE = 1024


def spec_text(
    path: Path,
    *,
    weights: bool = False,
    source: str = "python-stdlib",
    tokenizer: str | None = None,
    end_token: str | None = None,
    name: str | None = None,
) -> str:
    """The TOML of a spec with the model of this config.json (or of this folder's). SpecError for what cannot be.

    ``weights``: the model begins from the folder's weights; ``tokenizer`` and ``end_token``: where they are not those
    that the folder's files say.
    """
    if path.is_dir() and not (path / "config.json").exists():
        raise NoWeights(f"{path} has no config.json: {instead(path)}")
    config = read_config(path)
    model = _family_of(config).from_hf_config(config)
    if model.vocab < 1:
        raise SpecError(f"config.json: vocab_size {model.vocab} must be at least 1; raise it")
    folder = path if path.is_dir() else path.parent
    talks = has_template(folder)
    dropout = left_out(config)
    what = "trained on from its weights" if weights else "without its weights (hotstage import brings them)"
    begin = ["", "# the weights to begin from; the run is known by their digest, the folder may move"]
    begin.append(f"init = {_toml(f'hf:{os.path.abspath(folder)}')}")
    lines = [
        f"# {_comment(path)}: its model, {what}",
        *([f"# not computed here: {', '.join(dropout)}"] if dropout else []),
        f"name = {_toml(name or name_of(path))}",
        "",
        "[model]",
        *_model_lines(model),
        *(begin if weights else []),
        "",
        "[data]",
        f"source = {_toml(source)}        # or text:GLOB, jsonl:GLOB",
        *(
            ['# messages = "messages"         # of conversations: the chat template beside it writes them']
            if talks
            else []
        ),
        *_tokenizer_lines(folder, tokenizer, end_token),
        "",
        "[train]",
        "steps = 1000",
        "batch = 8                       # sequences a step",
        "microbatch = 1",
        f"sequence = {min(model.context, _SEQUENCE)}",
        'precision = "bf16"',
        "",
        "[train.optimizer]",
        *(
            ["lr = 3e-5                       # a tenth of what a model from nothing takes"]
            if weights
            else ["lr = 3e-4"]
        ),
        "",
        *(["[train.schedule]", "warmup = 20                     # moments begin at zero", ""] if weights else []),
        "[parallel]",
        "stages = 1",
        "",
    ]
    return "\n".join(lines)


def _family_of(config: Mapping[str, Any]) -> Family:
    """The family that a config.json is of; SpecError where it is none that this version computes."""
    kind, made, known = config.get("model_type"), config.get("architectures"), names()
    if kind in known:
        return family(str(kind))
    mend = "docs/add-a-model.md adds a family"
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and inner.get("model_type") in known:
        mend = f"its language model alone (text_config, a {inner['model_type']}) is: save that into a folder of its own"
    near = [name for name in known if isinstance(kind, str) and kind.lower().replace("-", "").replace("_", "") == name]
    if kind is None:
        near = [n for n in known if isinstance(made, list) and getattr(family(n), "architecture", "") in made]
    if near:
        mend = f'write "model_type": "{near[0]}"'
    raise SpecError(f"config.json: model_type is {kind!r}; this version computes {', '.join(known)}: {mend}")


def _model_lines(model: ModelSpec) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in model.model_dump().items() if value is not None]


def _tokenizer_lines(folder: Path, given: str | None, end: str | None) -> list[str]:
    from flows.data.tokenizer import template_begin
    from flows.drive.their_tokenizer import TOKENIZER, end_of, read_tokenizer

    path = Path(given) if given is not None else folder / TOKENIZER
    if given is None and not path.is_file():
        return ['# tokenizer = "tokenizer.json"  # the model\'s own; else one is trained']
    tokenizer = read_tokenizer(path)
    token = end_of(folder, tokenizer) if end is None else end
    named = [f"end_token = {_toml(token)}"] if token is not None else []
    begins = [tokenizer.id_to_token(number) for number in template_begin(tokenizer)]
    if len(begins) == 1 and begins[0] != token:
        named.append(f"begin_token = {_toml(begins[0])}  # as its template begins a text")
    return [f"tokenizer = {_toml(os.path.abspath(path))}", *named]


def _comment(path: Path) -> str:
    """A path as a comment of one line can hold it."""
    return "".join(c if c.isprintable() else "?" for c in str(path))


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
