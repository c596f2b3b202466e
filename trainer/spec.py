"""RunSpec: everything that a user says about a run, in two halves.

**What** is trained (``model``, ``data``, ``train``) alone determines the bits; it is immutable for a run and its
digest is the run's identity. **How** (``parallel``, ``checkpoint``, ``launch``, ``recovery``) may change from attempt
to attempt. Three ways lead here: a TOML file with ``--set`` (``load_spec``), the form that Prefect draws from the
model, and plain Python. Every refusal is a ``SpecError`` line that names the value, the limit and the mend.

Example::

    spec = load_spec("examples/demo.toml", ["train.steps=20", "parallel.stages=2"])
    spec = spec.resolve(dataset)            # fills model.vocab, data.packing, train.reduction_groups
    run_id(spec, dataset)                   # "demo-1f0c3a"
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from trainer.dataset import DatasetRef
from trainer.errors import SpecError
from trainer.spec_data import MAX_VOCAB_SIZE, DataSpec
from trainer.spec_fields import MAX_INT32, RULES, shown
from trainer.spec_hints import hint_of, not_utf8, toml_problem, value_meant, written_as
from trainer.spec_how import KEEP_ALL, MAX_HOW_BYTES, RETIRED, SCHEDULES, other_name
from trainer.spec_sections import (
    GUARD,
    HOW_OF_WHAT,
    LATER_WHAT,
    MAX_MICROBATCHES,
    MOMENTUM,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    how_map,
    too_short,
    with_how,
)
from trainer.wire.packed import pack

__all__ = [
    "CLUSTER_KEY",
    "GUARD",
    "HOW_OF_WHAT",
    "MAX_HOW_BYTES",
    "MAX_INT32",
    "MAX_MICROBATCHES",
    "MAX_VOCAB_SIZE",
    "RETIRED",
    "SCHEDULES",
    "DataSpec",
    "ModelSpec",
    "OptimizerSpec",
    "RunSpec",
    "explain",
    "how_map",
    "load_spec",
    "other_name",
    "parse_spec",
    "read_toml",
    "run_id",
    "set_key",
    "too_short",
    "what_bytes",
    "what_digest",
    "what_map",
    "with_how",
]

SPEC_SCHEMA = 1
"""Version of the What half; part of its digest."""

MAX_SPEC_BYTES = 1 << 20
STDIN = "-"
"""In place of a file's name: standard input."""
CLUSTER_KEY = "cluster"
"""Of a spec's file: the machines that ``hotstage plan`` plans for, a table or the path of a file with one."""


def parse_spec(value: Mapping[str, Any], sets: Sequence[str] = (), origin: str = "spec") -> RunSpec:
    """A RunSpec from plain values plus ``a.b=value`` overrides; every problem becomes a line of the SpecError."""
    try:
        tree = _copy(value)
    except RecursionError as error:
        raise SpecError(f"{origin}: its values are nested too deep to be read; flatten them") from error
    for text in sets:
        _apply_set(tree, text)
    bad = sorted(_not_text(tree))
    if bad:
        raise SpecError(
            [f"{origin}: {key} is not text that can be written as UTF-8; write it so, or rename it" for key in bad]
        )
    try:
        return RunSpec.model_validate(tree)
    except ValidationError as error:
        lines = [f"{origin}: {line}" for details in error.errors(include_url=False) for line in explain(details)]
        raise SpecError(lines) from error


def _not_text(tree: Mapping[str, Any]) -> Iterator[str]:
    """Keys whose strings no UTF-8 holds: bytes of a command line or a name that are in another encoding."""
    rest: list[tuple[str, Any]] = list(tree.items())
    while rest:
        key, value = rest.pop()
        if isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
            yield key
        elif isinstance(value, Mapping):
            rest += [(f"{key}.{ascii(below)[1:-1]}"[:200], item) for below, item in value.items()]
        elif isinstance(value, list | tuple):
            rest += [(key, item) for item in value]


def load_spec(path: str | Path, sets: Sequence[str] = ()) -> RunSpec:
    """Read a TOML file and apply ``--set`` overrides (``train.steps=20``; the value is TOML, ``null`` for none, else a
    string).

    A shortened key is taken where one key below fits: ``train.lr`` is ``train.optimizer.lr``. ``cluster`` is left to
    the planner: it says what machines there are, and is of neither half.
    """
    tree = read_toml(Path(path), "a spec")
    return parse_spec({key: value for key, value in tree.items() if key != CLUSTER_KEY}, sets, origin=_said(path))


def read_toml(file: Path, what: str) -> dict[str, Any]:
    """The values of a TOML file that a person wrote. SpecError where it cannot be read; ``what`` it should be."""
    hint = "; 'hotstage init' writes a spec to start from" if what == "a spec" else ""
    try:
        data = _standard_input() if str(file) == STDIN else _first_bytes(file)
        if str(file) == STDIN and not data.strip():
            raise SpecError(f"standard input is empty, and '-' reads {what} from it: pipe one in, or name a file")
        if len(data) > MAX_SPEC_BYTES:
            raise SpecError(f"{file}: is larger than {MAX_SPEC_BYTES} bytes; {what} is a TOML file of a few keys")
        text = data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise SpecError(f"{file}: there is no such file{hint or f'; {what} is a TOML file'}") from error
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else not_utf8(data, error)
        mend = " ('hotstage init' writes one)" if hint else ""
        raise SpecError(f"{file}: cannot be read: {why}; {what} is a TOML file{mend}") from error
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, and a number of thousands of digits
        raise SpecError(f"{file}: is not TOML: {toml_problem(text, error)}") from error
    except RecursionError as error:
        raise SpecError(f"{file}: its values are nested too deep to be read; flatten them") from error


def _said(path: str | Path) -> str:
    return "standard input" if str(path) == STDIN else str(path)


def _first_bytes(file: Path) -> bytes:
    with file.open("rb") as source:  # not to its end: a device may have none
        return source.read(MAX_SPEC_BYTES + 1)


@functools.cache
def _standard_input() -> bytes:
    """Read once: a command may ask for its spec again."""
    return sys.stdin.buffer.read(MAX_SPEC_BYTES + 1)


def what_map(spec: RunSpec, dataset: DatasetRef) -> dict[str, Any]:
    """The What half as plain values: all that determines the bits, and nothing else."""
    resolved = spec.resolve(dataset)
    train = resolved.train.model_dump(mode="json", exclude={GUARD[1]})
    if not train["schedule"]["start"]:
        del train["schedule"]["start"]  # a key that came when runs had names already
    if resolved.train.optimizer.momentum == MOMENTUM:
        del train["optimizer"]["momentum"]  # and another
    return {
        "schema": SPEC_SCHEMA,
        "model": _without_later("model", resolved.model),
        "data": {
            "digest": dataset.digest,
            "shuffled": resolved.data.shuffled,
            "block": resolved.data.block,
            "window": resolved.data.window,
            "packing": resolved.data.packing,
        },
        "train": train,
    }


def _without_later(name: str, section: BaseModel) -> dict[str, Any]:
    """A section's values, without those keys at their default that runs which were there before did not have."""
    fields, later = type(section).model_fields, LATER_WHAT.get(name, ())
    values = section.model_dump(mode="json")
    return {k: v for k, v in values.items() if k not in later or getattr(section, k) != fields[k].default}


def what_bytes(spec: RunSpec, dataset: DatasetRef) -> bytes:
    """Canonical msgpack of ``what_map``: keys sorted at every level, so equal specs give equal bytes."""
    return pack(what_map(spec, dataset))


def what_digest(spec: RunSpec, dataset: DatasetRef) -> bytes:
    """SHA-256 of ``what_bytes``."""
    return hashlib.sha256(what_bytes(spec, dataset)).digest()


def run_id(spec: RunSpec, dataset: DatasetRef) -> str:
    """``<name>-<first 6 hex digits of the What's digest>``."""
    return f"{spec.name}-{what_digest(spec, dataset).hex()[:6]}"


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, Mapping) else value


# --- --set --------------------------------------------------------------------------------------------------


def set_key(text: str) -> tuple[str, ...]:
    """The whole key that a ``--set KEY=VALUE`` means, of which it may say the end alone. SpecError where there is none.

    >>> set_key("lr=1e-3"), set_key('"train".seed = 2')
    (('train', 'optimizer', 'lr'), ('train', 'seed'))
    """
    key, sep, _ = text.partition("=")
    if not sep or not key.strip():
        raise SpecError(f"--set {text!r}: write it as section.key=value, for example train.seed=2")
    parts = re.findall(r'\s*("[^"]*"|[^.]*)\s*(?:\.|\Z)', key)[:-1] if '"' in key else key.split(".")
    parts = parts if len(parts) > 1 else parts[0].strip().strip('"').split(".")
    return _full_path(tuple(part.strip().strip('"') for part in parts), text)


def _apply_set(tree: dict[str, Any], text: str) -> None:
    path, raw = set_key(text), text.partition("=")[2]
    if path[:2] in _TABLES and len(path) > 3:
        path = (*path[:2], ".".join(path[2:]))
    node = tree
    for number, part in enumerate(path[:-1], 1):
        below = node.setdefault(part, {})
        if path[:number] in _SHORT and isinstance(below, str):
            below = node[part] = {_SHORT[path[:number]]: below}
        if path[:number] == _KEEP and below in (None, KEEP_ALL):
            below = node[part] = {}
        if not isinstance(below, dict):
            raise SpecError(f"--set {text!r}: {part} is a value, not a section")
        node = below
    if raw.strip() == UNSET:
        node.pop(path[-1], None)
        return
    try:
        read = tomllib.loads(f"v = {raw.strip()}")
        if len(read) > 1:
            raise SpecError(f"--set {text!r}: more follows the value of one key; give each key a --set of its own")
        node[path[-1]] = read["v"]
    except ValueError:  # TOMLDecodeError, and a number of thousands of digits
        node[path[-1]] = raw.strip()
    except RecursionError as error:
        raise SpecError(f"--set {text[:80]!r}…: its value is nested too deep to be read; flatten it") from error


UNSET = "null"
"""After ``--set key=``: the key is left out, so that its default holds."""
_TABLES = tuple(("launch", key) for key in ("resources", "agent_resources", "node_selector", "labels", "annotations"))
"""Tables whose keys hold dots."""
_OPEN_KEYS = ("pod_patch", "resources", "node_selector", "labels", "annotations")
_SHORT: dict[tuple[str, ...], str] = {("parallel", "recompute"): "kind"}
"""Sections that one of their keys stands for alone."""
_KEEP = ("checkpoint", "keep")
"""A section that may be unset, or a word."""


def _full_path(path: tuple[str, ...], text: str) -> tuple[str, ...]:
    known = list(_paths(RunSpec))
    if path in known or path in (*_SHORT, _KEEP) or any(p == path[: len(p)] for p in known if p[-1] in _OPEN_KEYS):
        return path
    if path[-2:-1] == ("agent_resources",):
        return path
    fits = [p for p in known if p[-1] == path[-1] and p[: len(path) - 1] == path[:-1]]
    if len(fits) == 1:
        return fits[0]
    names = [".".join(p) for p in known]
    inside = [n for n in names if n.startswith(".".join(path) + ".")]
    if inside:
        raise SpecError(f"--set {text!r}: {'.'.join(path)} is a section; set a key of it: {_below(path, inside)}")
    for n in range(1, len(path)):
        if path[:n] in known:
            whole = ".".join(path[:n])
            raise SpecError(
                f"--set {text!r}: {whole} has no keys: it is set whole, or as a table [[{whole}]] of the file where it "
                "is a list of tables"
            )
    near = [".".join(p) for p in fits] or [n for n in names if n.endswith("." + path[-1])]
    if (theirs := hint_of(path[-1])) is not None and not near:
        raise SpecError(f"--set {text!r}: there is no key {'.'.join(path)}; {theirs}")
    section = [n for n in names if n.startswith(".".join(path[:-1]) + ".")]
    near = (
        near
        or difflib.get_close_matches(".".join(path).lower(), section, n=1)
        or difflib.get_close_matches(".".join(path).lower(), names, n=3)
    )
    hint = f"; did you mean {' or '.join(near)}?" if near else "; 'hotstage schema' lists all keys"
    if section and not any(n in section for n in near):
        hint += f" ({'.'.join(path[:-1])} has {_below(path[:-1], section)})"
    raise SpecError(f"--set {text!r}: there is no key {'.'.join(path)}{hint}")


def _below(section: tuple[str, ...], names: Sequence[str]) -> str:
    return ", ".join(name.removeprefix(".".join(section) + ".") for name in names)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds, or a list of them."""
    forms = (field.annotation, *get_args(field.annotation))  # a section that may be unset has two
    return next((f for f in forms if isinstance(f, type) and issubclass(f, BaseModel)), None)


def _paths(model: type[BaseModel], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        section = _section_of(field)
        if section is not None and get_origin(field.annotation) is not tuple:
            yield from _paths(section, (*prefix, name))
        else:
            yield (*prefix, name)


# --- refusals -----------------------------------------------------------------------------------------------

_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_TYPES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string in quotes",
    "tuple_type": "a list in brackets",
    "list_type": "a list in brackets",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}


def explain(details: ErrorDetails) -> list[str]:
    """A pydantic error as lines for people: value, limit, mend."""
    kind, value = details["type"], shown(details["input"])
    place = [str(part)[:100] for part in details["loc"]]
    where = ".".join(part for part in place if part != "int" and not part.startswith("tuple["))  # forms of one key
    context = details.get("ctx", {})
    if kind == "extra_forbidden":
        return [_unknown_key(tuple(str(part) for part in details["loc"]), isinstance(details["input"], Mapping))]
    if kind == "missing":
        return [f"{where} is missing; it has no default: add it"]
    if kind in _BOUNDS:
        key, word = _BOUNDS[kind]
        mend = "raise it" if key in ("gt", "ge") else "lower it"
        return [f"{where} {value} must be {word} {context[key]}; {mend}"]
    if kind in ("model_type", "model_attributes_type") and (keys := _section(details["loc"])):
        return [f"{where} {value} is no section: it is one table, [{where}], with some of {', '.join(keys)}"]
    if kind == "string_too_short":
        return [f"{where} is empty; write it, or leave it out"]
    if kind in ("string_too_long", "too_long"):
        what = "characters" if kind == "string_too_long" else "entries"
        return [f"{where} has {len(details['input'])} {what}, at most {context['max_length']}; shorten it"]
    if kind in _TYPES:
        return [f"{where} {value} is not {_TYPES[kind]}; {written_as(where, _TYPES[kind], details['input'])}"]
    if kind == "literal_error":
        meant = value_meant(details["input"], re.findall("'([^']*)'", context["expected"]))
        return [f"{where} {value} is unknown; take one of {context['expected']}{meant}"]
    if kind == "string_pattern_mismatch":
        return [f"{where} {value} is no name; take {RULES[context['pattern']]}"]
    if kind == "value_error":
        return [f"{where}.{context['error']}" if where else str(context["error"])]
    return [f"{where} {value}: {details['msg']}; correct it"]


def _section(loc: Sequence[int | str]) -> list[str]:
    """The keys of the section at a place of a spec; none where there is no section of its own."""
    model: type[BaseModel] = RunSpec
    for part in loc:
        field = model.model_fields.get(str(part))
        found = None if field is None else _section_of(field)
        if found is None:
            return []
        model = found
    return list(model.model_fields)


def _unknown_key(loc: tuple[str, ...], section: bool) -> str:
    model: type[BaseModel] = RunSpec
    for part in loc[:-1]:
        if part.isdigit():
            continue  # of a list, whose kind of section is known by now
        model = _section_of(model.model_fields[part]) or model
    keys = list(model.model_fields)
    near = difflib.get_close_matches(loc[-1], keys, n=1)
    paths = {p[:n]: None for p in _paths(RunSpec) for n in (range(1, len(p)) if section else (len(p),))}
    elsewhere = [".".join(p) for p in paths if p[-1] == loc[-1]]
    hint = f"did you mean {near[0]}?" if near else f"it belongs at {elsewhere[0]}" if elsewhere else "remove it"
    if not elsewhere:
        hint = hint_of(loc[-1]) or hint
    return f"{'.'.join(loc)} is an unknown key; {hint} (known here: {', '.join(keys)})"
