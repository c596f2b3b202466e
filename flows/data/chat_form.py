"""How conversations are written: where the chat template of a spec's data is found, and what it may name.

One that the spec names, else the one beside its tokenizer, as models are kept: ``chat_template.jinja``, or in
tokenizer_config.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checkpoint.dataset import load_dataset_manifest
from checkpoint.export_to import TEMPLATE
from checkpoint.store import Store
from flows.data.sources.talk import BEGIN, END, ChatForm, form_template
from flows.data.tokenizer import EOT, GivenTokenizer, known_ends, special_tokens
from trainer.errors import DatasetError, SpecError
from trainer.models.hf_config import read_config
from trainer.spec import DataSpec
from trainer.spec_fields import shown

CHATML = "chatml"
"""The template that needs no file."""
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_IM = ("<|im_start|>", "<|im_end|>")
_TREES = ("special_tokens_map.json", "tokenizer_config.json")
"""Where the tokens are named that a template may name; the second file is right."""
BESIDE_TOKENIZER = (*_TREES, TEMPLATE)
"""The files that are looked for beside a tokenizer."""
MAX_TEMPLATE = 1 << 20
"""Bytes of a template."""


def form_of(spec: DataSpec, given: GivenTokenizer | None) -> ChatForm | None:
    """The form of the spec's conversations, ``given`` its tokenizer; None where it names none. DatasetError where there
    is no template, or it is none."""
    if spec.messages is None:
        return None
    folder = None if spec.tokenizer is None else Path(os.path.expanduser(spec.tokenizer)).parent
    trees = {} if folder is None else {name: read_config(folder / name) for name in _TREES if (folder / name).is_file()}
    what, template = _template(spec, folder, trees.get(_TREES[1], {}))
    if given is None:
        return _made(template, {"eos_token": EOT}, (EOT,), EOT, (), what)
    named = {"eos_token": given.end, "bos_token": given.begin} | _tokens(trees.values())
    if spec.chat_template == CHATML and (
        missing := [mark for mark in _IM if mark not in special_tokens(given.tokenizer)]
    ):
        raise _no_marks(missing, given.what)
    return _made(template, named, special_tokens(given.tokenizer), given.end, known_ends(given.tokenizer), what)


def form_beside(files: Mapping[str, str], tokenizer: Tokenizer, end: int | None, begin: int | None) -> ChatForm | None:
    """The form that the files beside a tokenizer name (``BESIDE_TOKENIZER``, the text of each); None where none does.
    DatasetError where it is none."""
    trees = {name: json.loads(files[name]) for name in _TREES if name in files}
    template = files.get(TEMPLATE, _default(trees.get(_TREES[1], {})))
    if template is None:
        return None
    ends, begins = (None if token is None else tokenizer.id_to_token(token) for token in (end, begin))
    named = {"eos_token": ends, "bos_token": begins} | _tokens(trees.values())
    what = "the model's chat template (`hotstage chat --plain` does without it)"
    return _made(template, named, special_tokens(tokenizer), ends, known_ends(tokenizer), what)


def _made(
    template: str,
    named: Mapping[str, str | None],
    marks: tuple[str, ...],
    end: str | None,
    others: tuple[str, ...],
    what: str,
) -> ChatForm:
    tokens = tuple(sorted((key, token) for key, token in named.items() if token))
    form = ChatForm(template, tokens, marks, end, others, what)
    form_template(form)
    return form


def _tokens(trees: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What a template may name."""
    found = {}
    for tree in trees:
        for key, value in tree.items():
            token = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(token, str) and token.isprintable():
                found[key] = token
    return found


def _no_marks(missing: Sequence[str], what: str) -> DatasetError:
    return DatasetError(
        f'data.chat_template "{CHATML}" writes {" and ".join(missing)}, and {what} has no such special token: take a '
        "tokenizer that has them (data.tokenizer), or name the file of a template with tokens of this one"
    )


def _template(spec: DataSpec, folder: Path | None, config: Mapping[str, Any]) -> tuple[str, str]:
    """What the template is called, and its text."""
    if spec.chat_template == CHATML:
        if spec.tokenizer is None:
            raise _no_marks(_IM, "the tokenizer that is trained here")
        return f'data.chat_template "{CHATML}"', _CHATML
    if spec.chat_template is not None:
        return f"data.chat_template {shown(spec.chat_template)}", _text(Path(os.path.expanduser(spec.chat_template)))
    if folder is not None and (folder / TEMPLATE).is_file():
        return str(folder / TEMPLATE), _text(folder / TEMPLATE)
    said = _default(config)
    if said is not None:
        where = f"chat_template in {folder / _TREES[1] if folder else ''}"
        return where, _bounded(said, where)
    beside = (
        ""
        if folder is None
        else f", and none lies beside data.tokenizer in {folder} ({TEMPLATE}, tokenizer_config.json)"
    )
    raise DatasetError(
        f"data.messages {shown(spec.messages or '')}: no chat template says how conversations are written{beside}: "
        f'name one, data.chat_template = "FILE.jinja" or "{CHATML}"'
    )


def has_template(folder: Path) -> bool:
    """Whether one lies in a model's folder."""
    with contextlib.suppress(SpecError):  # told by whoever reads it
        config = folder / _TREES[1]
        return (folder / TEMPLATE).is_file() or (config.is_file() and _default(read_config(config)) is not None)
    return False


def _default(config: Mapping[str, Any]) -> str | None:
    """The template in a tokenizer_config.json."""
    said = config.get("chat_template")
    if isinstance(said, list):  # several, by name
        named = (one for one in said if isinstance(one, Mapping) and one.get("name") == "default")
        said = next((one.get("template") for one in named), None)
    return said if isinstance(said, str) else None


def _text(path: Path) -> str:
    mend = "name a file with a template in Jinja, as transformers keeps it (chat_template.jinja)"
    try:
        if path.exists() and not path.is_file():
            raise DatasetError(f"{path} is no regular file; {mend}")
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE + 1)
        text = data.decode()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DatasetError(f"{path} cannot be read: {why}; {mend}") from error
    if text.lstrip().startswith('{"') or text.lstrip().startswith("{\n"):
        raise DatasetError(
            f"{path} is JSON, not a template; write the text of its chat_template into a file of its own"
        )
    return _bounded(text.removeprefix("\ufeff"), str(path))


def _bounded(text: str, what: str) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE:
        raise DatasetError(f"{what} has more than {MAX_TEMPLATE} bytes, the limit of a chat template; shorten it")
    if re.search(f"[{BEGIN}{END}\ud800-\udfff]", text):
        raise DatasetError(
            f"{what} holds U+FDD0, U+FDD1 or half a surrogate pair, which are no characters; take it out"
        )
    return text


def talk_files(store: Store, digest: str) -> dict[str, str]:
    """The files beside a tokenizer that say how a dataset's conversations are written; none where it has none."""
    talk = load_dataset_manifest(store, digest).talk
    return {} if talk is None else {TEMPLATE: str(talk["template"]), _TREES[1]: json.dumps(talk["tokens"])}
