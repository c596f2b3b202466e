"""``hotstage import``: a model that somebody has, in one command."""

from __future__ import annotations

import os
import re
import shlex
import tomllib
from pathlib import Path

import click

from flows.cli.main import json_option, say, show, store_option, with_store, write_out
from trainer.errors import OutputError


@click.command("import")
@click.argument("folder", metavar="DIR")
@click.option("-o", "--output", metavar="FILE", help="The spec to write (default: NAME.toml).")
@click.option("--name", help="Name of spec and runs (default: the folder's).")
@click.option("--data", "source", metavar="SOURCE", default="python-stdlib", show_default=True, help="data.source.")
@click.option("--tokenizer", metavar="FILE", help="The model's tokenizer.json, where DIR has none.")
@click.option("--end-token", metavar="TOKEN", help='What ends a text, where DIR does not say it; "": nothing.')
@store_option
@json_option
def import_(
    folder: str,
    output: str | None,
    name: str | None,
    source: str,
    tokenizer: str | None,
    end_token: str | None,
    store: str | None,
    as_json: bool,
) -> int:
    """Take the model in DIR, a folder in Hugging Face's form: write a spec that trains on from it, store its weights.

    \b
    DIR: config.json, model.safetensors (or several files and their index) and tokenizer.json of a GPT-2, Llama,
    Mistral or Qwen3. What this version does not compute is refused with the field. Nothing is downloaded, and DIR
    stays as it is.
    The weights become step 0 of a run of their own: `hotstage chat` talks to it, `hotstage train SPEC` begins from it.
    """
    from flows.cli.from_config import spec_text
    from flows.cli.signals import Signals
    from flows.drive.begin_from import import_folder
    from flows.drive.hf_beside import ends_of
    from flows.drive.train import store_at
    from flows.show.facts import state_bytes
    from flows.show.saved import size_words
    from trainer.amounts import count_text
    from trainer.errors import SpecError
    from trainer.spec import parse_spec

    path = Path(folder)
    if not os.path.isdir(folder):  # also what no path can be: too long, with a zero byte
        raise click.UsageError(f"{folder!r} {_no_folder(folder)}")
    text = spec_text(path, weights=True, source=source, tokenizer=tokenizer, end_token=end_token, name=name)
    spec = parse_spec(tomllib.loads(text), origin="the spec")
    file = Path(output or f"{spec.name}.toml")
    if _other_text(file, text):
        raise SpecError(f"{file} is there already, and says something else: choose another file with -o, or remove it")
    opened = store_at(store)

    def tell(line: str) -> None:
        if not as_json:
            say(line)

    run, weights = Signals().run(lambda: import_folder(opened, path, spec, say=tell))
    write_out(file, text)
    if as_json:
        show({"spec": str(file), "run": run, "weights_digest": weights.digest})
        return 0
    state = state_bytes(spec.model, spec.train.optimizer)
    model, many = spec.model, count_text(weights.bytes // 4)
    say(f"model      {model.family}, {many} parameters in {model.layers} layers, {' and '.join(weights.dtypes)}")
    say(f"tokenizer  {spec.data.tokenizer}, a text ends with {spec.data.end_token or 'nothing'}")
    if weights.tokenizer:
        end = None if not spec.data.end_token else weights.tokenizer.token_to_id(spec.data.end_token)
        others = [
            str(weights.tokenizer.id_to_token(n)) for n in ends_of(weights.beside, weights.tokenizer, end) if n != end
        ]
        if others:
            say(f"           answers end with {', '.join(others)} too, as its files say")
    say(f"weights    step 0 of {run} in {opened.describe()} ({size_words(state)} with moments of zero)")
    say(f"spec       {file}, data.source = {spec.data.source!r}: write your own text there")
    for text in (f"chat {run}", f"train {shlex.quote(str(file))}"):
        say(f"next:      hotstage {text}{with_store(store)}")
    return 0


def _no_folder(path: str) -> str:
    """Why an argument is no folder of a model, and the mend."""
    if os.path.isfile(path):
        if re.search(r"\.(zip|tar|tgz|gz|bz2|xz|zst|7z|rar)$", path, re.IGNORECASE):
            return "is an archive; unpack it, and give the folder that comes of it"
        return f"is a file; give the folder that it lies in: {shlex.quote(os.path.dirname(path) or '.')}"
    if named := _URL.fullmatch(path) or _NAME.fullmatch(path):
        asked = f"hf download {shlex.quote(named['name'])} --local-dir DIR"
        return f"is no folder here, and hotstage downloads nothing; a model of the Hub comes by: {asked}"
    if "://" in path:
        return "is an address, and hotstage downloads nothing; fetch the model, and give its folder"
    return "is no folder here; give the folder that holds a model's config.json and model.safetensors"


_URL = re.compile(
    r"(?:https?|hf)://(?:[^/]*\.[^/]*/)?(?P<name>[\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/.*)?/?|\w{2,}://"
)
_NAME = re.compile(r"(?:hf:)?(?P<name>\w[\w.-]*(?:/[\w.-]+)?)")
"""How people name a model of the Hub."""


def _other_text(file: Path, text: str) -> bool:
    """Whether the file is there with other text."""
    try:
        return file.read_text(encoding="utf-8", errors="replace") != text
    except FileNotFoundError:
        return False
    except OSError as error:
        raise OutputError(file, error) from error
