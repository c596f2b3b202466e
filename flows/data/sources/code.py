"""CorpusSource code: the standard library of the running interpreter, and folders that hold some.

``code:FOLDER`` takes the files below it whose name says that they are source code. Its documents have a ``language``,
so that ``data.filter`` can choose.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from flows.data.sources.base import Borne, Document, Entry, whole_pairs
from flows.data.sources.files import BOM, entry_of, opened_file
from flows.data.sources.paths import below
from trainer.errors import DatasetError

# of the standard library: tests, what installers bring, and tables that a generator wrote
_SKIP_PARTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "encodings"}
_SKIP_FILES = {
    "topics.py",
    "_pydecimal.py",
    "_sysconfigdata",
    "pyodide",
    "stringprep.py",
    "entities.py",
    "keyword.py",
    "token.py",
}
_BROUGHT = {"node_modules", "__pycache__", "site-packages", "dist-packages"}
"""Folders of what others wrote, below a project's own."""
MOST_BYTES = 1 << 20
"""Of a file of code: a larger one was generated."""
LANGUAGES = {
    "ada": "adb ads",
    "assembly": "asm s",
    "bash": "bash sh zsh",
    "c": "c h",
    "c#": "cs",
    "c++": "cc cpp cxx hh hpp hxx",
    "clojure": "clj cljc cljs",
    "cmake": "cmake",
    "css": "css less scss",
    "cuda": "cu cuh",
    "dart": "dart",
    "elixir": "ex exs",
    "erlang": "erl hrl",
    "fortran": "f f90 f95 for",
    "go": "go",
    "groovy": "gradle groovy",
    "haskell": "hs",
    "html": "htm html",
    "java": "java",
    "javascript": "cjs js jsx mjs",
    "json": "json",
    "julia": "jl",
    "kotlin": "kt kts",
    "lisp": "el lisp scm",
    "lua": "lua",
    "makefile": "mk",
    "markdown": "md rst",
    "matlab": "m",
    "nix": "nix",
    "ocaml": "ml mli",
    "perl": "pl pm",
    "php": "php",
    "protobuf": "proto",
    "python": "py pyi pyx",
    "r": "r",
    "ruby": "rb",
    "rust": "rs",
    "scala": "scala",
    "sql": "sql",
    "swift": "swift",
    "terraform": "hcl tf",
    "toml": "toml",
    "typescript": "ts tsx",
    "verilog": "sv v vh",
    "vhdl": "vhd vhdl",
    "xml": "xml",
    "yaml": "yaml yml",
    "zig": "zig",
}
_OF = {ending: language for language, endings in LANGUAGES.items() for ending in endings.split()}
_NAMES = {"makefile": "makefile", "dockerfile": "dockerfile", "cmakelists.txt": "cmake", "rakefile": "ruby"}


def language_of(name: str) -> str | None:
    """Of a file by its name; None where it is no source code.

    >>> language_of("a/main.C"), language_of("Makefile"), language_of("a.png")
    ('c', 'makefile', None)
    """
    last = name.rpartition("/")[2].lower()
    return _NAMES.get(last) or _OF.get(last.rpartition(".")[2] if "." in last else "")


class CodeSource:
    """``code:FOLDER``."""

    def __init__(self, source: str) -> None:
        self._source = source

    def look(self) -> list[Entry]:
        root = os.path.expanduser(self._source.partition(":")[2])
        if not os.path.isdir(root):
            why = "is a file; text:GLOB reads files" if os.path.exists(root) else "does not exist"
            raise DatasetError(f"data.source {self._source!r}: {root} {why}; name a folder that holds source code")
        found = [entry_of(name) for name in below(root, _BROUGHT) if language_of(name) is not None]
        found = [entry for entry in found if entry.size <= MOST_BYTES]
        if not found:
            raise DatasetError(
                f"data.source {self._source!r} matches no file: below {root} there is none whose name says that it is "
                f"source code of at most {MOST_BYTES >> 20} MiB (hidden folders and {', '.join(sorted(_BROUGHT))} are "
                "left out)"
            )
        return found

    def divides(self, entry: Entry) -> bool:
        return False

    def read(self, entry: Entry, first: int, last: int, borne: Borne) -> Iterator[Document]:
        with opened_file(entry) as file:
            data = file.read(0, entry.size)
        text = _text(data)
        if text is None or "\0" in text:
            borne.skipped.add(lambda: entry.name)
        else:
            yield Document(entry.name, text, {"language": language_of(entry.name)})


class StdlibSource:
    """``python-stdlib``: real text that every machine has."""

    def look(self) -> list[Entry]:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if _SKIP_PARTS.intersection(relative.parts) or any(path.name.startswith(s) for s in _SKIP_FILES):
                continue
            found.append(entry_of(str(path)))
        return found

    def divides(self, entry: Entry) -> bool:
        return False

    def read(self, entry: Entry, first: int, last: int, borne: Borne) -> Iterator[Document]:
        with opened_file(entry) as file:
            text = _text(file.read(0, entry.size), mark=True)  # a handful of files declare another encoding
        if text is not None and text.strip():
            root = Path(sysconfig.get_paths()["stdlib"])
            name = Path(entry.name).relative_to(root).as_posix()
            yield Document(name, whole_pairs(text, lambda: name, borne), {"language": "python"})


def _text(data: bytes, mark: bool = False) -> str | None:
    """Text of UTF-8, line ends ``\n``; None where it is none. ``mark``: a byte order mark stays."""
    try:
        text = (data if mark else data.removeprefix(BOM)).decode()
    except UnicodeDecodeError:
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
