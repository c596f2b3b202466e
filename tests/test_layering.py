"""The arrows of ARCHITECTURE.md: every import and every #include points the allowed way.

The table of rooms there is this test's data. A folder of a row is a room, files named together are one; a file belongs
to the row that names it most closely. What a room may import is what its row names in backticks: each name is looked
for from the row's own folder outwards, and a folder stands for the rooms inside it too, but where the row's own is one.
"""

from __future__ import annotations

import ast
import os.path
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "trainer", "checkpoint", "k8s")
ENGINE = ROOT / "trainer" / "engine"
FOR_TYPES = {"checkpoint/errors.py", "trainer/models/base.py"}
"""They hold a value of a room above, and import its type for readers alone (``if TYPE_CHECKING:``)."""
# what the agent's image carries beside the standard library: it sees trainer.wire alone
AGENT_LIBRARIES = {"boto3", "botocore", "urllib3", "msgpack"}  # urllib3 comes with botocore


@dataclass(frozen=True)
class Rooms:
    """``paths``: folders (with a slash at the end) and files of the table, and the room that each is; ``may``: by room
    the other ones that it may import, and ``says``: by room the names in its row with the rooms that each stands for.
    """

    paths: Mapping[str, str]
    may: Mapping[str, frozenset[str]]
    says: Mapping[str, Mapping[str, frozenset[str]]]

    def of(self, path: str) -> str | None:
        """The room of a file, by the longest path of the table that leads to it."""
        above = [path, *(f"{parent}/" for parent in Path(path).parents)]
        return next((self.paths[p] for p in above if p in self.paths), None)

    def wrong(self, path: str, targets: Iterable[str]) -> list[str]:
        """What a file imports and may not, as lines for people."""
        own = self.of(path)
        if own is None:
            return [f"{path} lies in no room: give it a row in the table of ARCHITECTURE.md"]
        found = {target: self.of(target) for target in targets}
        return [
            f"{path} of {own} may not import {target} of {room}; turn the arrow, or change the table of ARCHITECTURE.md"
            for target, room in sorted(found.items())
            if room != own and room not in self.may[own]
        ]


def read_rooms(text: str) -> Rooms:
    """The table of rooms in ARCHITECTURE.md."""
    paths: dict[str, str] = {}
    named: dict[str, list[str]] = {}
    for line in text.partition("\n## Folders\n")[2].partition("\n## ")[0].splitlines():
        cells = re.split(r" *\| *", line)
        if not line.startswith(tuple(f"| `{package}/" for package in PACKAGES)):
            continue
        assert len(cells) == 6, f"a row of the table has {len(cells) - 2} cells: {line}"
        first, *more = re.findall(r"`([^`]+)`", cells[1])
        folder = first.rstrip("/").rpartition("/")[0]
        for path in (first, *(f"{folder}/{name}" for name in more)):
            assert path not in paths, f"{path} has two rows"
            paths[path] = path if path.endswith("/") else first
            named[paths[path]] = re.findall(r"`([^`]+)`", cells[3])
    says = {room: {name: _meant(name, room, paths) for name in names} for room, names in named.items()}
    may = {room: frozenset().union(*names.values()) - {room} for room, names in says.items()}
    return Rooms(paths, may, says)


def _meant(name: str, own: str, paths: Mapping[str, str]) -> frozenset[str]:
    """The rooms that a name in the row of a room stands for."""
    for folder in Path(f"{own}x" if own.endswith("/") else own).parents:
        full = name if folder == Path() else f"{folder}/{name}"
        if own.startswith(full) and full in paths:
            return frozenset({full})
        if rooms := frozenset(
            room for path, room in paths.items() if path == full or (full.endswith("/") and path.startswith(full))
        ):
            return rooms
    raise AssertionError(f"the table names {name}, which has no row")


ROOMS = read_rooms((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- what a file imports --------------------------------------------------------------------------------------


def imported_names(path: str, tree: ast.AST) -> Iterator[str]:
    """Full names that a file of Python imports, relative ones resolved."""
    package = Path(path).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            yield from (
                f"{base}{node.module}.{name.name}" if node.module else f"{base}{name.name}" for name in node.names
            )


def python_files() -> list[Path]:
    return [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


@dataclass(frozen=True)
class Read:
    """Of a file of Python: the full names that it imports, those that no ``if TYPE_CHECKING:`` has alone, and what it
    does that belongs into another file."""

    names: tuple[str, ...]
    run: tuple[str, ...]
    again: tuple[str, ...]
    wanted: tuple[str, ...]


def read_python(path: str, text: str) -> Read:
    tree = ast.parse(text)
    names, again = tuple(imported_names(path, tree)), tuple(said_again(path, tree))
    run = tuple(imported_names(path, without_type_checking(tree)))
    return Read(names, run, again, run if path in FOR_TYPES else names)


@cache
def read_file(path: Path) -> Read:
    """Once for all tests: what they look at in some hundred files."""
    return read_python(name_of(path), path.read_text(encoding="utf-8"))


def imports(path: str, text: str) -> set[str]:
    """The files of these packages that a file of Python imports, wherever in it the import stands."""
    return files_of(read_python(path, text).wanted)


def files_of(names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            module = "/".join(parts[:end])
            file = next((f for f in (f"{module}.py", f"{module}/__init__.py") if (ROOT / f).is_file()), None)
            if file is not None:
                found.add(file)
                break
    return found


def engine_files() -> list[Path]:
    return sorted(p for p in ENGINE.rglob("*") if p.suffix in (".c", ".h", ".cc", ".cu"))


def includes(path: str, text: str) -> set[str]:
    """The files of the engine that a file of C includes, from its own folder or from the engine's."""
    found = set()
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        near, far = os.path.normpath(ROOT / Path(path).parent / name), os.path.normpath(ENGINE / name)
        file = next((f for f in (near, far) if os.path.isfile(f)), None)
        assert file is not None, f"{path} includes {name}, which is not there"
        found.add(name_of(Path(file)))
    return found


# --- the rooms ------------------------------------------------------------------------------------------------


def imports_of(path: Path) -> set[str]:
    """What a file of either language imports or includes."""
    if path.suffix == ".py":
        return files_of(read_file(path).wanted)
    return includes(name_of(path), path.read_text(encoding="utf-8"))


def test_imports_and_includes_point_one_way() -> None:
    files = (*python_files(), *engine_files())
    wrong = [line for path in files for line in ROOMS.wrong(name_of(path), imports_of(path))]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_the_tests() -> None:
    wrong = [name_of(p) for p in python_files() if any(n.split(".")[0] == "tests" for n in read_file(p).names)]
    assert not wrong, f"{wrong} import the tests"


@pytest.mark.parametrize("path", sorted(FOR_TYPES))
def test_a_type_from_above_is_still_needed(path: str) -> None:
    assert ROOMS.wrong(path, files_of(read_file(ROOT / path).names)), f"{path} needs no exception: take it out"


def test_every_row_is_a_room_that_is_there() -> None:
    files = [name_of(path) for path in (*python_files(), *engine_files())]
    used = {ROOMS.of(file) for file in files}
    assert used == set(ROOMS.may), "a file without a room, or a room without a file"
    for path in ROOMS.paths:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), f"there is no {path}"


def test_no_two_rooms_may_import_each_other() -> None:
    found = circle(ROOMS.may)
    assert not found, "the table lets rooms import each other: " + " -> ".join(found)


def test_the_table_allows_no_more_than_is_there() -> None:
    """Each name of a row is needed by a file of that room: what nobody imports is not allowed either."""
    there: dict[str, set[str | None]] = {room: set() for room in ROOMS.may}
    for path in (*python_files(), *engine_files()):
        there[ROOMS.of(name_of(path)) or ""].update(map(ROOMS.of, imports_of(path)))
    idle = {
        room: [name for name, meant in names.items() if not meant & there[room]] for room, names in ROOMS.says.items()
    }
    assert not any(idle.values()), (
        f"rows name what nothing in their room imports: { {r: n for r, n in idle.items() if n} }"
    )


def samples(suffixes: tuple[str, ...]) -> dict[str, str]:
    """By room one of its files, a header where it has one."""
    files = sorted((*python_files(), *engine_files()), key=lambda path: (path.suffix != ".h", path))
    found: dict[str, str] = {}
    for path in files:
        if path.suffix in suffixes:
            found.setdefault(ROOMS.of(name_of(path)) or "", name_of(path))
    return found


def python_spellings(own: str, target: str) -> Iterator[str]:
    module = module_of(target)
    package, _, name = module.rpartition(".")
    yield f"import {module}\n"
    yield f"def f() -> None:\n    from {module} import x\n"
    if own not in FOR_TYPES:
        yield f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {module} as other\n"
    if package:
        yield f"from {package} import {name}\n"
    if package and own.split("/")[0] == target.split("/")[0]:
        yield f"from {'.' * own.count('/')}{package.partition('.')[2]} import {name}\n"


def c_spellings(own: str, target: str) -> Iterator[str]:
    yield f'#include "{Path(target).relative_to("trainer/engine")}"\n'
    yield f'# include "{os.path.relpath(target, Path(own).parent)}"\n'


PYTHON, C = samples((".py",)), samples((".h", ".c"))


@pytest.mark.parametrize("own", [*PYTHON, *C])
def test_a_reversed_arrow_between_any_two_rooms_is_seen(own: str) -> None:
    """Plant, in memory, imports of every other room, in each spelling: seen where the table does not allow it."""
    files, read, spell = (PYTHON, imports, python_spellings) if own in PYTHON else (C, includes, c_spellings)
    file = files[own]
    assert ROOMS.wrong(file, imports_of(ROOT / file)) == []
    for room, target in files.items():
        for planted in spell(file, target) if room != own else ():
            wrong = ROOMS.wrong(file, read(file, planted))
            assert bool(wrong) == (room not in ROOMS.may[own]), f"planted in {file}: {planted!r} gives {wrong}"


def test_a_file_without_a_room_and_a_row_that_is_wrong_are_seen() -> None:
    assert "no room" in ROOMS.wrong("trainer/novel.py", [])[0]
    head = "\n## Folders\n\n| folder | owns | may import | guarded by |\n|---|---|---|---|\n"
    with pytest.raises(AssertionError, match="which has no row"):
        read_rooms(f"{head}| `flows/` | all | `nowhere/` | |\n")
    with pytest.raises(AssertionError, match="two rows"):
        read_rooms(f"{head}| `flows/` | all | | |\n| `flows/` | again | | |\n")
    both = read_rooms(f"{head}| `flows/a/`, `b/` | two | `b/`, `k8s/` | |\n| `k8s/` | all | `flows/` | |\n")
    assert both.may["flows/a/"] == {"flows/b/", "k8s/"}
    assert circle(both.may) == ["flows/a/", "flows/b/", "k8s/", "flows/a/"]


def astray(tests: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Tests that are called after a module and lie in another folder than it."""
    homes: dict[tuple[str, str], set[str]] = {}
    for module in modules:
        folder, _, name = module.rpartition("/")
        homes.setdefault((module.split("/")[0], name), set()).add(folder)
    found = []
    for test in tests:
        folder, _, name = test.removeprefix("tests/").rpartition("/")
        right = homes.get((test.split("/")[1], name.removeprefix("test_")), {folder})
        found += [f"{test} belongs into tests/{'/ or tests/'.join(sorted(right))}/"] if folder not in right else []
    return found


def test_tests_mirror_the_tree() -> None:
    modules = [name_of(path) for path in python_files() if path.name != "__init__.py"]
    tests = [name_of(path) for package in PACKAGES for path in sorted((ROOT / "tests" / package).rglob("test_*.py"))]
    assert astray(tests, modules) == []
    assert astray(["tests/trainer/test_lower.py"], modules) == [
        "tests/trainer/test_lower.py belongs into tests/trainer/plan/"
    ]


# --- no circle between files ----------------------------------------------------------------------------------


def module_of(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def without_type_checking(tree: ast.AST) -> ast.AST:
    """The tree less the bodies of ``if TYPE_CHECKING:``, which no run imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    return tree


def imported_files(sources: Mapping[str, Read]) -> dict[str, set[str]]:
    """By module the modules among ``sources`` that its file imports, wherever in the file the import stands."""
    found: dict[str, set[str]] = {module: set() for module in sources}
    for module, read in sources.items():
        for name in read.run:
            while name and name not in sources:
                name = name.rpartition(".")[0]
            if name and name != module:
                found[module].add(name)
    return found


def circle(arrows: Mapping[str, AbstractSet[str]]) -> list[str]:
    """One circle of arrows, its first end again at the last; empty where there is none."""
    done: set[str] = set()
    for first in sorted(arrows):
        path, rest = [first], [iter(sorted(arrows[first]))]
        while path:
            target = next((m for m in rest[-1] if m not in done), None)
            if target is None:
                done.add(path.pop())
                rest.pop()
            elif target in path:
                return [*path[path.index(target) :], target]
            else:
                path.append(target)
                rest.append(iter(sorted(arrows[target])))
    return []


@cache
def python_arrows() -> dict[str, set[str]]:
    return imported_files({module_of(name_of(path)): read_file(path) for path in python_files()})


def test_no_two_files_import_each_other() -> None:
    """No circle between files, not even one that an import inside a function hides."""
    found = circle(python_arrows())
    assert not found, "a circle of imports: " + " -> ".join(found)


def test_a_circle_is_seen_wherever_it_is_planted() -> None:
    """Turn an arrow of each file round, one at a time, beside the one that is there."""
    arrows = python_arrows()
    for module in arrows:
        for target in sorted(arrows[module])[:1]:
            found = circle({**arrows, target: arrows[target] | {module}})
            assert {module, target} <= set(found), f"{target} imports {module}, which imports it: {found}"


def test_a_circle_is_found_also_where_a_function_hides_it() -> None:
    sources = {
        "flows.a": ("flows/a.py", "from flows import b\n"),
        "flows.b": ("flows/b.py", "def f():\n    from flows.c import g\n"),
        "flows.c": ("flows/c.py", "import flows.a\n"),
        "flows.d": ("flows/d.py", "if TYPE_CHECKING:\n    import flows.e\n"),
        "flows.e": ("flows/e.py", "import flows.d\n"),
    }
    arrows = imported_files({module: read_python(*source) for module, source in sources.items()})
    assert circle(arrows) == ["flows.a", "flows.b", "flows.c", "flows.a"]
    assert circle({module: targets - {"flows.c"} for module, targets in arrows.items()}) == []


def test_the_agent_needs_no_more_than_its_image_carries() -> None:
    for path in sorted((ROOT / "checkpoint").rglob("*.py")):
        for name in read_file(path).names:
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top in {"checkpoint", "trainer"} | AGENT_LIBRARIES, (
                f"{path.name} imports {name}"
            )
    rooms = {room for path, room in ROOMS.paths.items() if path.startswith("checkpoint/")}
    assert {room for own in rooms for room in ROOMS.may[own]} <= {*rooms, "trainer/wire/"}


# what is written once: what else would do it again, and where it stands
ONCE_IMPORTED = {"msgpack": "trainer/wire/packed.py"}
ONCE_CALLED = {
    "os.replace": "trainer/wire/files.py",
    "os.rename": "trainer/wire/files.py",
    "os.link": "trainer/wire/files.py",
    "PlanHeader.from_buffer_copy": "trainer/wire/plan.py",
}
LAST = {call.rpartition(".")[2] for call in ONCE_CALLED}
KEYS, STORE_KEY = "checkpoint/keys.py", re.compile(r"(runs|data|index|manifests|chunks|folds|live)/")
# a launch's folder is called as its claim; what other programs made is moved to its name, folders too
APART = {"trainer/local_launch.py", "k8s/images/build.py", "k8s/images/store.py"}


def said_again(own: str, tree: ast.AST) -> Iterator[str]:
    """What a file does that belongs into another one."""
    for name in imported_names(own, tree):
        if own != ONCE_IMPORTED.get(name.partition(".")[0], own):
            yield f"imports {name}"
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LAST:
            called = f".{ast.unparse(node.func)}"
            for call, place in ONCE_CALLED.items():
                if own != place and called.endswith(f".{call}"):
                    yield f"line {node.lineno}: calls {call}, which belongs into {place}"
        elif isinstance(node, ast.Constant) and id(node) not in docs and STORE_KEY.match(str(node.value)):
            yield f"line {node.lineno}: makes a key of the store, {node.value!r}; {KEYS} makes them all"


def test_what_is_written_once_is_not_written_again() -> None:
    again = {name_of(path): read_file(path).again for path in python_files() if name_of(path) not in (*APART, KEYS)}
    assert not {path: lines for path, lines in again.items() if lines}


def test_a_second_writer_is_found() -> None:
    text = (
        'import msgpack\nos.replace(a, b)\nwire.PlanHeader.from_buffer_copy(d)\nk = f"runs/{run}/spec"\n"""runs/x"""\n'
    )
    assert len(list(said_again("flows/x.py", ast.parse(text)))) == 4


COUNTED = re.compile(r"\b(?:ptr|dim|real)\[\w*\d\w*\]")


def test_kernels_name_their_arguments() -> None:
    """``a->K``, not ``dim[2]``: which argument is which is said once, in wire/kernels.h (kernels/args.h)."""
    wrong = [
        f"{path.name}:{number}: {line.strip()}"
        for path in engine_files()
        if path.is_relative_to(ENGINE / "kernels")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if COUNTED.search(line)
    ]
    assert not wrong, wrong
    assert COUNTED.search("int64_t K = a->dim[2];")
    assert not COUNTED.search("void *ptr[HS_CALL_PTRS];")


INVARIANT = re.compile(r"^ \* I(\d+) {1,3}\S", re.MULTILINE)


def test_numbered_invariants_are_lists() -> None:
    """Each begins a line, from I1 on without a gap; clang-format leaves them so."""
    assert "ReflowComments: false" in (ROOT / ".clang-format").read_text(encoding="utf-8")
    lists = {path: INVARIANT.findall(path.read_text(encoding="utf-8")) for path in engine_files()}
    lists = {path: numbers for path, numbers in lists.items() if "1" in numbers}
    assert len(lists) >= 7, "the invariants of the engine are not where they were"
    for path, numbers in lists.items():
        assert numbers == [str(i + 1) for i in range(len(numbers))], f"{path.name}: invariants {numbers} begin a line"
        inside = re.findall(r"\S.*\bI\d+ {2,3}\S.*", INVARIANT.sub("", path.read_text(encoding="utf-8")))
        assert not inside, f"{path.name}: an invariant inside a line: {inside}"
