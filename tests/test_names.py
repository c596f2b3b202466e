"""One meaning a name: a class or function of two modules is the same thing, or it is called by what it is."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "trainer", "checkpoint", "k8s")
SAME: Mapping[str, str] = {
    "Tensor": "a tensor of the state by its global name and shape, for the planner and, apart from it, in a manifest",
    "Voice": "what the demo asks of whoever speaks for it, and the command's, which is one",
    "main": "where a process begins: the command, the agent, the builder of images",
    "say": "a line for the person at the terminal: the command's, and of k8s/images, which is run by itself",
    "simulate": "a step played through: by the plan's costs, and by those of this machine",
    "translate": "where foreign errors become ours: of a file system, of the SDK for S3, of the Kubernetes API",
    "unpack": "bytes to a value: of msgpack, and as the checkpoint package says it (Damaged)",
    "unpack_hint": "the same, of hints",
}


def own_names(tree: ast.Module) -> Iterator[str]:
    """Classes and functions of a module that others may use. A command is called by its word on the command line."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_command = any(".command(" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not node.name.startswith("_") and not is_command:
                yield node.name


def shared(modules: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that stand in several of the modules, given as (path, text); where."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path, text in modules:
        for name in own_names(ast.parse(text)):
            found[name].append(path)
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_a_name_means_one_thing() -> None:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = shared((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in paths)
    assert {name: where for name, where in found.items() if name not in SAME} == {}
    assert not SAME.keys() - found.keys(), "these are one by now: strike them off the list"


def test_a_second_meaning_is_found() -> None:
    command = "@cli.command()\ndef go() -> None: ...\n"
    modules = [
        ("a", "class Run: ...\n" + command),
        ("b", "def Run() -> None: ...\ndef go() -> None: ...\nclass _A: ...\n"),
    ]
    assert shared(modules) == {"Run": ["a", "b"]}
