"""Reading a Hugging Face config.json: what a family takes from it, and what it must not hold.

A key that changes what is computed in a way that the family does not have is refused with its value; a key that changes
nothing (dropout, caches, names, versions) is let through. Null means what it means to transformers: the default.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from trainer.errors import SpecError

if TYPE_CHECKING:
    from trainer.spec import ModelSpec

# keys of any model's config that change the computation, with the values that leave it as our families compute it
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "auto_map": (None,),  # the model is code of its own
    "quantization_config": (None,),
    "compression_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "is_causal": (True, None),
    "attention_bias": (False, None),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "rotary_pct": (1, None),
    "no_rope_layers": (None, []),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "parallel_attn": (False, None),
    "use_parallel_residual": (False, None),
    "alibi": (False, None),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_DROPOUT = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout")


def read_config(path: Path, mend: str = "give a model's config.json") -> dict[str, Any]:
    """A config.json, or that of a folder; or another file of JSON beside it. SpecError where it is none."""
    file = path / "config.json" if path.is_dir() else path
    try:
        if not file.is_file() and file.exists():
            raise SpecError(f"{file}: is no regular file; {mend}")
        data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
        if data.startswith(b"version https://git-lfs"):
            raise SpecError(f"{file}: is a pointer of Git LFS, not the file: `git lfs pull` in its folder fetches that")
        if data.lstrip().startswith(b"<"):
            raise SpecError(
                f"{file}: is a page of HTML or XML, such as a login or an error: fetch the file itself again"
            )
        tree = json.loads(data)
    except OSError as error:
        raise SpecError(f"{file}: cannot be read: {error.strerror}; {mend}") from error
    except (ValueError, RecursionError) as error:  # of JSON, of its encoding, a NUL byte in the path
        raise SpecError(f"{file}: is no JSON ({str(error)[:100]}); {mend}") from error
    if not isinstance(tree, dict):
        raise SpecError(f"{file}: is no JSON object; {mend}")
    return tree


def by_either_name(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The config with the values of keys that have another name too (``names``: it, and the key). SpecError where both
    are there and differ."""
    made = dict(config)
    for other, key in names.items():
        value, own = config.get(other), config.get(key)
        if value is not None and own is not None and value != own:
            raise SpecError(f"config.json: {key} {_short(own)}, {other} {_short(value)}; which one? leave one of them")
        if value is not None:
            made[key] = value
    return made


def config_value(config: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A value of a config.json, checked for its type; the default where it is missing or null. SpecError otherwise."""
    value = config.get(key)
    value = default if value is None else value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1 << 1000 else value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        what = (
            f"is {_short(value)}, it must be {_WORDS.get(kind, kind.__name__)}"
            if value is not None
            else "is missing; it has no default"
        )
        raise SpecError(f"config.json: {key} {what}")
    return value


def config_only(config: Mapping[str, Any], architecture: str, allowed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses a config.json that computes what the family does not have. ``allowed``: the family's own keys."""
    for key, values in {**_NEUTRAL, **allowed}.items():
        if key in config and not any(type(config[key]) in _like(v) and config[key] == v for v in values):
            only = next((v for v in values if v is not None), None)
            told = f"this family computes {only!r} only" if only is not None else "this version computes models without"
            raise SpecError(f"config.json: {key} is {_short(config[key])}; {told}")
    made = config.get("architectures")
    made = [made] if isinstance(made, str) else made
    if made is not None and not isinstance(made, list):
        raise SpecError(f"config.json: architectures is {_short(made)}; it must be a list of names, or null")
    bare = re.sub("(ForCausalLM|LMHeadModel)$", "Model", architecture)
    if made and architecture not in made and bare not in made:
        raise SpecError(f"config.json: architectures is {_short(made)}; this family computes {architecture} only")


def no_window(config: Mapping[str, Any]) -> int:
    """0, a ``model.window``. SpecError where a config.json asks for one."""
    if config.get("use_sliding_window") not in (False, None):
        used = _short(config["use_sliding_window"])
        raise SpecError(f"config.json: use_sliding_window is {used}; this family computes False only")
    layers = config.get("layer_types")
    if layers is not None and not isinstance(layers, list):
        raise SpecError(f"config.json: layer_types is {_short(layers)}; it must be a list of each layer's, or null")
    if layers and any(kind != "full_attention" for kind in layers):
        raise SpecError(f"config.json: layer_types is {_short(layers)}; this family computes 'full_attention' only")
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if layers and isinstance(count, int) and len(layers) != count:
        raise SpecError(f"config.json: layer_types has {len(layers)} entries, and the model {count} layers; which one?")
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    inside = isinstance(window, int) and isinstance(context, int) and window >= context
    if window is not None and config.get("use_sliding_window") is not False and not inside:
        raise SpecError(
            f"config.json: sliding_window is {_short(window)}; this family attends to all that came before: it must be "
            "null, or use_sliding_window false"
        )
    return 0


def window_of_all(config: Mapping[str, Any], layers: int) -> int:
    """``model.window`` of a config.json whose layers all read within ``sliding_window``, or none. SpecError where some
    do and some do not."""
    window, context, kinds = (config.get(key) for key in ("sliding_window", "max_position_embeddings", "layer_types"))
    wanted = "full_attention" if window is None else "sliding_attention"
    if kinds not in (None, []) and not (
        isinstance(kinds, list) and len(kinds) == layers and set(map(str, kinds)) == {wanted}
    ):
        raise SpecError(
            f"config.json: layer_types is {_short(kinds)} with sliding_window {_short(window)}; this family computes "
            f"{wanted!r} in all {layers} layers only"
        )
    if window is None:
        return 0
    width = config_value(config, "sliding_window", int)
    if width < 1:
        raise SpecError(f"config.json: sliding_window is {width}, it must be at least 1, or null")
    return 0 if isinstance(context, int) and width >= context else width  # it hides nothing


def rope_base(config: Mapping[str, Any], default: float) -> float:
    """The base of the rotary angles, from where transformers 4 or 5 writes it; SpecError for angles that are scaled."""
    bases = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if value is None or value == {}:
            continue
        if not isinstance(value, Mapping):
            raise SpecError(f"config.json: {key} is {_short(value)}; it must be an object or null")
        if any(str(name).endswith("_attention") for name in value):  # transformers passes them over here
            raise SpecError(
                f"config.json: {key} is {_short(value)}; this family has one kind of layers: write rope_type and "
                f"rope_theta into {key} itself"
            )
        kind = value.get("rope_type", value.get("type"))
        scaled = {k: v for k, v in value.items() if k not in ("rope_type", "type", "rope_theta")}
        plain = kind == "default" or (kind is None and not scaled)
        if not (plain or (kind == "linear" and scaled.get("factor") in (1, 1.0) and len(scaled) == 1)):
            raise SpecError(f"config.json: {key} is {_short(value)}; this family computes the rope_type 'default' only")
        if scaled.get("partial_rotary_factor", 1) not in (1, None):
            part = _short(scaled["partial_rotary_factor"])
            raise SpecError(f"config.json: {key} has partial_rotary_factor {part}; this family computes 1.0 only")
        if value.get("rope_theta") is not None:
            bases[f"{key}.rope_theta"] = config_value(value, "rope_theta", float)
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = config_value(config, "rope_theta", float)
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{key} {value:g}" for key, value in bases.items())
        raise SpecError(f"config.json: {told}; which one? leave one of them")
    return next(iter(bases.values()), default)


def imported(names: Mapping[str, str], **fields: Any) -> ModelSpec:
    """A ModelSpec of a config's values. ``names``: what the config calls a field, for refusals (SpecError)."""
    from trainer.spec import ModelSpec, explain

    try:
        return ModelSpec(**fields)
    except ValidationError as error:
        lines = []
        for details in error.errors(include_url=False):
            field = str(details["loc"][0]) if details["loc"] else ""
            (line,) = explain(details)
            lines.append(f"config.json: {line.replace(field, names.get(field, field), 1) if field else line}")
        raise SpecError(lines) from error


def left_out(config: Mapping[str, Any]) -> list[str]:
    """Words on what the config asks of training and this version does not do: dropout."""
    rates = [(key, config.get(key)) for key in _DROPOUT]
    return [f"{key} {rate}" for key, rate in rates if isinstance(rate, int | float) and rate]


def end_token_ids(config: Mapping[str, Any]) -> list[Any]:
    """What the config says of the ids that end a text, whole numbers or not: transformers allows several."""
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [said for said in values if said is not None]


def _like(value: Any) -> tuple[type, ...]:
    """Types that may equal a value: 1 and 1.0 are one number, False is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return (type(value),)
    return (int, float)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def name_of(path: Path) -> str:
    """A run's name from the folder that a config lies in."""
    whole = Path(os.path.abspath(path if path.is_dir() else path.parent))
    folder = whole.name.lower()
    if whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--"):  # Hugging Face's cache
        folder = whole.parent.parent.name.rpartition("--")[2].lower()
    kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder).strip("-")[:40].strip("-")
    return kept if kept[:1].isalpha() else f"model-{kept}"[:40].strip("-")
