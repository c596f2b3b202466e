"""What the documentation tells people to type is there: commands with their options, make's targets, modules, keys of
a spec."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest

from flows.cli.main import _COMMANDS, cli
from trainer.presets import PRESETS, for_cuda
from trainer.spec import RunSpec, parse_spec

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# in a line of a shell a command ends where another begins, in a pipe, or in a comment
COMMAND = re.compile(r"(?:^|[;|&(] *)(?:\w+=\S+ +)*(hotstage [^#|;>&\n]*)", re.MULTILINE)


def typed(text: str) -> Iterator[str]:
    """Commands of ``hotstage`` in a page: lines of its blocks, and words in backticks."""
    for _, block in FENCE.findall(text):
        yield from COMMAND.findall(block.replace("\\\n", " "))
    yield from re.findall(r"`(hotstage [^`]*)`", FENCE.sub("", text))


def options(command: click.Command) -> set[str]:
    return {"-h", "--help"}.union(*([*option.opts, *option.secondary_opts] for option in command.params))


def subcommand(command: click.Command, word: str) -> click.Command | None:
    return command.get_command(click.Context(command), word) if isinstance(command, click.Group) else None


def unknown(line: str) -> list[str]:
    """Words of a command's line that it does not know: of subcommands (``a|b``: each of them), and of options."""
    command: click.Command = cli
    known, wrong = options(cli), []
    for word in line.replace("[", " ").replace("]", " ").split()[1:]:
        if word.startswith("-"):
            wrong += [name for name in re.findall(r"^--?[a-z][\w-]*", word) if name not in known]
        elif isinstance(command, click.Group) and word.isidentifier() | word.islower():
            found = [subcommand(command, name) for name in word.split("|")]
            if None in found:
                return [*wrong, word]
            command = next(one for one in found if one is not None)
            known = known.union(*(options(one) for one in found if one is not None))
    return wrong


def every_option(command: click.Command) -> set[str]:
    if not isinstance(command, click.Group):
        return options(command)
    below = (subcommand(command, name) for name in command.list_commands(click.Context(command)))
    return options(command).union(*(every_option(one) for one in below if one is not None))


SCHEMA = RunSpec.model_json_schema()
SECTIONS = SCHEMA["properties"].keys() - {"name"}


def below(node: dict[str, Any], key: str) -> dict[str, Any] | None:
    """What a key of a table is in the schema; None where there is no such key."""
    if "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rpartition("/")[2]]
    if key in node.get("properties", {}):
        found: dict[str, Any] = node["properties"][key]
        return found
    ways = [*node.get("anyOf", ()), *node.get("oneOf", ()), *([node["items"]] if "items" in node else ())]
    found_below = [found for way in ways if (found := below(way, key)) is not None]
    more = node.get("additionalProperties")
    return found_below[0] if found_below else more if isinstance(more, dict) else None


def is_key(name: str) -> bool:
    node: dict[str, Any] | None = SCHEMA
    for part in name.split("."):
        node = node and below(node, part)
    return node is not None


def keys(table: dict[str, Any], before: str = "") -> Iterator[str]:
    """Full names of the values of a table of TOML."""
    for name, value in table.items():
        for one in value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]:
            if isinstance(one, dict):
                yield from keys(one, f"{before}{name}.")
            else:
                yield f"{before}{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_their_options_are_there(page: Path) -> None:
    wrong = {line: words for line in typed(page.read_text(encoding="utf-8")) if (words := unknown(line))}
    assert wrong == {}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "gpu-session.md"], ids=lambda p: p.name)
def test_options_that_stand_alone_are_there(page: Path) -> None:
    found = set(re.findall(r"`(--[a-z][\w-]*)", FENCE.sub("", page.read_text(encoding="utf-8"))))
    assert found - every_option(cli) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_targets_and_modules_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) - targets == set()
    modules = set(re.findall(r"python3? -m ([\w.]+)", text))
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_keys_of_a_spec_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+)(?: =[^`]*)?`", FENCE.sub("", text)))
    written = [tomllib.loads(block) for kind, block in FENCE.findall(text) if kind == "toml"]
    named |= {name for table in written if SECTIONS & table.keys() for name in keys(table)}  # else a sheet of machines
    files = {name for name in named if name.endswith((".py", ".safetensors"))}
    assert sorted(name for name in named - files if not is_key(name)) == []


WRITES = re.compile(r"hotstage init ([\w-]+)(?: --device (\w+))? > (\S+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_what_is_set_of_a_preset_s_spec_is_taken(page: Path) -> None:
    for _, block in FENCE.findall(page.read_text(encoding="utf-8")):
        specs = {
            file: for_cuda(PRESETS[name]) if device == "cuda" else PRESETS[name]
            for name, device, file in WRITES.findall(block)
        }
        for command in COMMAND.findall(block):
            words = command.split()
            sets = [value.strip("'") for word, value in pairwise(words) if word == "--set"]
            for file in specs.keys() & words:
                parse_spec(tomllib.loads(specs[file]), sets)


def test_the_example_of_set_is_taken_by_every_preset() -> None:
    train = subcommand(cli, "train")
    assert train is not None
    (example,) = re.findall(r"e\.g\. (\S+)\. ", " ".join(train.get_help(click.Context(train)).split()))
    for text in PRESETS.values():
        parse_spec(tomllib.loads(text), [example])


def test_runs_of_the_readme_are_called_as_its_spec_names_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ((preset, _, _),) = WRITES.findall(text)
    called = re.findall(r"^hotstage (?:replay|ckpt export|generate|chat) (\S+)", text, re.MULTILINE)
    assert called == [tomllib.loads(PRESETS[preset])["name"]] * 4


def test_the_root_s_help_says_of_a_group_what_the_group_says() -> None:
    groups = {name: found for name in _COMMANDS if isinstance(found := subcommand(cli, name), click.Group)}
    assert {name: group.help for name, group in groups.items()} == {name: _COMMANDS[name][1] for name in groups}


def test_every_option_says_what_it_is() -> None:
    def untold(command: click.Command) -> Iterator[str]:
        yield from (
            f"{command.name} {option.opts[-1]}"
            for option in command.params
            if isinstance(option, click.Option) and not option.hidden and not option.help
        )
        for name in command.commands if isinstance(command, click.Group) else ():
            yield from untold(command.commands[name])

    roots = [found for name in _COMMANDS if (found := subcommand(cli, name)) is not None]
    assert [line for root in roots for line in untold(root)] == []


def test_what_is_not_there_is_found() -> None:
    assert unknown("hotstage train my.toml --set a=1 --gone") == ["--gone"]
    assert unknown("hotstage runs gone --all") == ["gone"]
    assert unknown("hotstage ckpt pin|unpin RUN") == []
    assert list(typed("`hotstage x`\n```sh\nA=1 hotstage plan \\\n  a.toml | hotstage gone # hotstage no\n```\n")) == [
        "hotstage plan    a.toml ",
        "hotstage gone ",
        "hotstage x",
    ]
    assert is_key("train.optimizer.lr")
    assert not is_key("train.optimizer.gone")
