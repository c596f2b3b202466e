"""The arrows of ARCHITECTURE.md: every import and every #include points the allowed way."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "trainer", "checkpoint", "k8s")
ALLOWED = {
    "flows": {"flows", "k8s", "checkpoint", "trainer"},
    "k8s": {"k8s", "trainer"},
    "checkpoint": {"checkpoint", "trainer"},
    "trainer": {"trainer"},
}
# the rooms of flows/, and which of its other rooms each may import ("" is the top: flows, their hosting, the demo)
ROOMS = {
    "data": {"data"},
    "drive": {"drive", "data"},
    "show": {"show", "drive", "data"},
    "": {"", "show", "drive", "data"},
    "cli": {"cli", "", "show", "drive", "data"},
}
# what the agent's image carries beside the standard library: it sees trainer.wire alone
AGENT_LIBRARIES = {"boto3", "botocore", "urllib3", "msgpack"}  # urllib3 comes with botocore

ENGINE = ROOT / "trainer" / "engine"
ENGINE_ALLOWED = {
    "core": {"core"},
    "wire": {"wire", "core"},
    "kernels": {"kernels", "wire", "core"},
    "comm": {"comm", "wire", "core"},
    "data": {"data", "wire", "core"},
    "snapshot": {"snapshot", "wire", "core"},
    "run": {"run", "snapshot", "data", "comm", "kernels", "wire", "core"},
    "main.c": {"run", "data", "wire", "core"},
}


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, relative ones resolved."""
    yield from imported_names(path, ast.parse(path.read_text(encoding="utf-8")))


def imported_names(path: Path, tree: ast.AST) -> Iterator[str]:
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = base + (node.module or "")
            yield from (f"{module}.{name.name}" for name in node.names)


def python_files() -> list[Path]:
    return [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_python_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        if top in PACKAGES:
            assert top in ALLOWED[own], f"{path.name} of {own} imports {name}"
        assert top != "tests", f"{path} imports the tests"
        if own == "checkpoint" and top == "trainer":
            assert name.startswith("trainer.wire"), f"{path.name}: checkpoint may import trainer.wire only, not {name}"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def without_type_checking(tree: ast.AST) -> ast.AST:
    """The tree less the bodies of ``if TYPE_CHECKING:``, which no run imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    return tree


def imported_files(sources: Mapping[str, tuple[Path, str]]) -> dict[str, set[str]]:
    """By module the modules among ``sources`` that its file imports, wherever in the file the import stands."""
    found: dict[str, set[str]] = {module: set() for module in sources}
    for module, (path, text) in sources.items():
        for name in imported_names(path, without_type_checking(ast.parse(text))):
            while name and name not in sources:
                name = name.rpartition(".")[0]
            if name and name != module:
                found[module].add(name)
    return found


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """One circle of imports, its first module again at its end; empty where there is none."""
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


def test_no_two_files_import_each_other() -> None:
    """No circle between files, not even one that an import inside a function hides."""
    sources = {module_of(path): (path, path.read_text(encoding="utf-8")) for path in python_files()}
    found = circle(imported_files(sources))
    assert not found, "a circle of imports: " + " -> ".join(found)


def test_a_circle_is_found_also_where_a_function_hides_it() -> None:
    sources = {
        "flows.a": (ROOT / "flows/a.py", "from flows import b\n"),
        "flows.b": (ROOT / "flows/b.py", "def f():\n    from flows.c import g\n"),
        "flows.c": (ROOT / "flows/c.py", "import flows.a\n"),
        "flows.d": (ROOT / "flows/d.py", "if TYPE_CHECKING:\n    import flows.e\n"),
        "flows.e": (ROOT / "flows/e.py", "import flows.d\n"),
    }
    arrows = imported_files(sources)
    assert circle(arrows) == ["flows.a", "flows.b", "flows.c", "flows.a"]
    assert circle({module: targets - {"flows.c"} for module, targets in arrows.items()}) == []


def room_of(name: str) -> str | None:
    """The room of flows/ that a module's name lies in; None: it is not one of flows/ at all, or flows/__init__.py."""
    parts = name.split(".")
    if parts[0] != "flows" or len(parts) < 2:
        return None
    return parts[1] if (ROOT / "flows" / parts[1]).is_dir() else ""


@pytest.mark.parametrize("path", sorted((ROOT / "flows").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_rooms_of_flows_point_one_way(path: Path) -> None:
    own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own in ROOMS, f"{path}: flows/{own}/ is no room that the table knows"
    if path == ROOT / "flows" / "__init__.py":
        return  # the face: it names what is in the rooms
    wrong = {name: room for name in imports(path) if (room := room_of(name)) is not None and room not in ROOMS[own]}
    assert not wrong, f"{path.name} of room {own!r} imports {wrong}"


def test_every_room_has_its_row() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line) for line in text.splitlines() if line.startswith("| `flows/")]
    named = {row[1].removeprefix("`flows/").rstrip("/`"): row[3] for row in rows if len(row) == 6}
    assert sorted(named) == sorted(ROOMS)
    for room in ("data", "drive", "show"):
        told = set(re.findall(r"flows/(\w+)/", named[room]))
        assert told == ROOMS[room] - {room}, f"flows/{room}/ may import {ROOMS[room]}, its row says {told}"


def test_the_agent_needs_no_more_than_its_image_carries() -> None:
    import sys

    for path in sorted((ROOT / "checkpoint").rglob("*.py")):
        for name in imports(path):
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or top in {"checkpoint", "trainer", "__future__"} | AGENT_LIBRARIES
            assert known, f"{path.name} imports {name}"


# what is written once: what else would do it again, and where it stands
ONCE_IMPORTED = {"msgpack": "trainer/wire/packed.py"}
ONCE_CALLED = {
    "os.replace": "trainer/wire/files.py",
    "os.rename": "trainer/wire/files.py",
    "os.link": "trainer/wire/files.py",
    "PlanHeader.from_buffer_copy": "trainer/wire/plan.py",
}
KEYS, STORE_KEY = "checkpoint/keys.py", re.compile(r"(runs|data|index|manifests|chunks|folds|live)/")
# a launch's folder is called as its claim; what other programs made is moved to its name, folders too
APART = {"trainer/launch.py", "k8s/images/build.py", "k8s/images/store.py"}


def said_again(own: str, tree: ast.AST) -> Iterator[str]:
    """What a file does that belongs into another one."""
    for name in imported_names(ROOT / own, tree):
        if own != ONCE_IMPORTED.get(name.partition(".")[0], own):
            yield f"imports {name}"
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = f".{ast.unparse(node.func)}"
            for call, place in ONCE_CALLED.items():
                if own != place and called.endswith(f".{call}"):
                    yield f"line {node.lineno}: calls {call}, which belongs into {place}"
        elif isinstance(node, ast.Constant) and id(node) not in docs and STORE_KEY.match(str(node.value)):
            yield f"line {node.lineno}: makes a key of the store, {node.value!r}; {KEYS} makes them all"


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_written_once_is_not_written_again(path: Path) -> None:
    own = str(path.relative_to(ROOT))
    if own not in (*APART, KEYS):
        assert not list(said_again(own, ast.parse(path.read_text(encoding="utf-8"))))


def test_a_second_writer_is_found() -> None:
    text = (
        'import msgpack\nos.replace(a, b)\nwire.PlanHeader.from_buffer_copy(d)\nk = f"runs/{run}/spec"\n"""runs/x"""\n'
    )
    assert len(list(said_again("flows/x.py", ast.parse(text)))) == 4


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE)


def engine_files() -> list[Path]:
    return sorted(p for p in ENGINE.rglob("*") if p.suffix in (".c", ".h"))


@pytest.mark.parametrize("path", engine_files(), ids=lambda p: str(p.relative_to(ENGINE)))
def test_engine_includes_point_one_way(path: Path) -> None:
    room = path.relative_to(ENGINE).parts[0]
    for name in includes(path):
        target = name.split("/")[0] if "/" in name else room
        if "/" in name and not (ENGINE / name).exists():
            target = room  # relative to its own folder
        assert target in ENGINE_ALLOWED[room], f"{path.relative_to(ENGINE)} includes {name}"


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


def test_the_test_can_fail(tmp_path: Path) -> None:
    """A reversed arrow is seen: the readers above find what a file imports and includes."""
    module = ROOT / "trainer" / "__init__.py"
    assert module.exists()
    sample = tmp_path / "a.h"
    sample.write_text('#include "run/executor.h"\n')
    assert includes(sample) == ["run/executor.h"]
    names = set(imports(ROOT / "flows" / "drive" / "loop.py"))
    assert "checkpoint.log.RunLog" in names
    assert "flows.drive.decide.decide" in names
