"""The files of a corpus pattern, and why a pattern has none.

``*`` and ``?`` stand for characters of one name, ``[ab]`` for one of those between the brackets, ``**`` for any
folders, ``~`` at the beginning for the home folder; names that begin with a dot only match a pattern that does. As
``glob``, but nothing is left out in silence: a folder that cannot be listed is an error, and a link that leads back to
a folder above is not followed for ever.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import logging
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from trainer.errors import DatasetError
from trainer.spec_fields import shown

log = logging.getLogger(__name__)

_Identity = tuple[int, int]


def files_of(source: str) -> list[str]:
    """The regular files that ``text:PATTERN`` or ``jsonl:PATTERN`` matches, in the order of their names.

    DatasetError where there is none, with what the pattern probably should be; where a match is neither a file nor a
    folder, or a link to nothing; where a folder cannot be listed.
    """
    pattern = os.path.expanduser(source.partition(":")[2])
    if "\0" in pattern:
        raise DatasetError(f"data.source {source!r} holds a NUL byte, which no name can; take it out")
    found: list[str] = []
    folders = 0
    for path in sorted(set(_matches(pattern))):
        if os.path.isfile(path):
            found.append(path)
        elif os.path.isdir(path):
            folders += 1
        elif os.path.islink(path) and not os.path.exists(path):
            raise DatasetError(
                f"{path} is a link to nothing ({os.readlink(path)}); mend or remove it, or narrow data.source "
                f"{source!r}"
            )
        elif os.path.lexists(path):
            raise DatasetError(f"{path} is no regular file (a pipe, a socket, a device); narrow data.source {source!r}")
    if not found:
        kind = source.partition(":")[0]
        raise DatasetError(f"data.source {source!r} matches no file: {_why_none(kind, pattern, folders)}")
    if folders and pattern.rpartition("/")[2].strip("*"):
        log.warning(
            "data.source %s: %d folder(s) match too, and what is in them is not read; %s/* reads that",
            shown(source),
            folders,
            shown(f"{source}/**").strip("'"),
        )
    return found


def below(folder: str, without: Collection[str]) -> Iterator[str]:
    """The regular files below a folder, in the order of their names; hidden ones, links to folders and folders of these
    names are left out."""
    for name, is_folder in _names(folder):
        path = os.path.join(folder, name)
        if name.startswith("."):
            continue
        if is_folder:
            if name not in without and not os.path.islink(path):
                yield from below(path, without)
        elif os.path.isfile(path):
            yield path


def _matches(pattern: str, hidden: bool = False, flags: int = 0) -> Iterator[str]:
    parts = [part for part in pattern.split("/") if part]
    parts = [part for n, part in enumerate(parts) if part != "**" or parts[n - 1 : n] != ["**"]]
    if parts:
        base = "/" if pattern.startswith("/") else ""
        yield from _expand(base, parts, frozenset(_identity(base or ".")), hidden, flags)


def _expand(base: str, parts: list[str], above: frozenset[_Identity], hidden: bool, flags: int) -> Iterator[str]:
    """What ``parts`` match below ``base``. ``above``: the folders on the way that ``**`` has gone through; ``flags`` of
    patterns' expressions."""
    head, rest = parts[0], parts[1:]
    if head == "**":
        if rest:
            yield from _expand(base, rest, above, hidden, flags)
        for name, is_folder in _names(base):
            if name.startswith(".") and not hidden:
                continue
            path = os.path.join(base, name)
            if not rest:
                yield path
            here = _identity(path) if is_folder else []
            if here and above.isdisjoint(here):  # a link to a folder above would go round for ever
                yield from _expand(path, parts, above.union(here), hidden, flags)
    elif not glob.has_magic(head):
        path = os.path.join(base, head)
        if not rest:
            if os.path.lexists(path):
                yield path
        elif os.path.isdir(path):
            yield from _expand(path, rest, above.union(_identity(path)), hidden, flags)
    else:
        fits = re.compile(fnmatch.translate(head), flags).match
        for name, is_folder in _names(base):
            if fits(name) is None or (name.startswith(".") and not head.startswith(".") and not hidden):
                continue
            path = os.path.join(base, name)
            if not rest:
                yield path
            elif is_folder:
                yield from _expand(path, rest, above.union(_identity(path)), hidden, flags)


def _names(folder: str) -> list[tuple[str, bool]]:
    """Entries of a folder with whether each is one; none where there is no such folder."""
    try:
        with os.scandir(folder or ".") as entries:
            return sorted((entry.name, _is_folder(entry)) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DatasetError(
            f"folder {folder or '.'} of the corpus cannot be listed: {error.strerror}; its files would be left out in "
            "silence: give this user the right to read it, or narrow data.source"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str) -> list[_Identity]:
    try:
        status = os.stat(path)
    except OSError:
        return []
    return [(status.st_dev, status.st_ino)]


def _why_none(kind: str, pattern: str, folders: int) -> str:
    """What is probably meant by a pattern without a file, as the end of a message."""
    plain = pattern.rstrip("/") or pattern
    if pattern.startswith("file://"):
        return f"it is an address; write the path alone: {kind}:{pattern.removeprefix('file://')}"
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", pattern):
        return "it is an address; files of this machine and s3://bucket/… are read: fetch what is there first"
    if re.match(r"[A-Za-z]:\\", pattern) or ("\\" in pattern and "/" not in pattern):
        return "\\ is a character of a name here; folders are parted by /, such as " + _slashed(kind, pattern)
    if any(ord(letter) < 32 for letter in pattern):
        return (
            "it holds a control character, as a backslash in double quotes makes one in TOML; put the text in single "
            "quotes, and part folders by /"
        )
    if os.path.isdir(plain):
        return f"it is a folder; {kind}:{glob.escape(plain)}/**/* takes every file below it"
    if folders:
        deeper = plain if plain.endswith("/**") else f"{plain}/**"
        return f"it matches {folders} folder(s) and nothing else; {kind}:{deeper}/* takes the files below them"
    literal, missing = _literal(pattern)
    if literal != pattern and any(os.path.isfile(path) for path in _matches(literal)):
        return (
            "*, ? and [ ] stand for other characters in a pattern; for the name as it is written, put each of them in "
            f"brackets: {kind}:{literal}"
        )
    behind_dots = sum(os.path.isfile(path) for path in _matches(pattern, hidden=True))
    if behind_dots:
        return (
            f"{behind_dots} file(s) match whose name, or whose folder's, begins with a dot; those are taken only where "
            "the pattern has the dot: .*"
        )
    other_case = sum(os.path.isfile(path) for path in _matches(pattern, flags=re.IGNORECASE))
    if other_case:
        return f"{other_case} file(s) match but for small and capital letters; write those as the names have them"
    hints = []
    if "$" in pattern:
        hints.append("variables of the shell are not replaced here; write what it stands for, or ~ for the home folder")
    if pattern[0] in "\"'":
        hints.append(f"quotes are part of a name; write {kind}:{pattern.strip(pattern[0])}")
    parts = [part.strip().removeprefix(f"{kind}:") for part in pattern.split(",")]
    if len(parts) > 1 and any(os.path.lexists(part) or any(_matches(part)) for part in parts if part):
        hints.append("a comma is part of a name; several patterns are one with * or [ ], or parts of data.mix")
    if missing is not None:
        hints.append(missing)
    if "{" in pattern and "}" in pattern:
        hints.append("braces are taken literally; write one pattern with * or [ ] instead")
    if "[" in pattern:
        hints.append("[ ] stands for one of the characters between; a bracket in a name is written [[]")
    hints.append(f"check the pattern (it is taken from {_here()})")
    return "; ".join(hints)


def _slashed(kind: str, pattern: str) -> str:
    """A pattern of Windows with slashes, its drive left out."""
    return f"{kind}:{re.sub(r'^[A-Za-z]:', '', pattern)}".replace("\\", "/")


def _literal(pattern: str) -> tuple[str, str | None]:
    """The pattern with those parts escaped that exist as they are written, and a word on the first that is missing."""
    root = "/" if pattern.startswith("/") else ""
    at, out, lost = root, [], False
    missing: str | None = None
    for part in (p for p in pattern.split("/") if p):
        path = os.path.join(at, part)
        if not lost and os.path.lexists(path):
            out.append(glob.escape(part))
            at = path
            continue
        out.append(part)
        if lost or glob.has_magic(part):
            lost = True
            continue
        lost = True
        if at and not os.access(at, os.X_OK):
            missing = f"this user may not enter {at}"
            continue
        names = [name for name, _ in _names(at)]
        near = [n for n in names if n.lower() == part.lower()] or difflib.get_close_matches(part, names, n=1)
        missing = f"there is no {path}" + (f", but {os.path.join(at, near[0])}" if near else "")
    return root + "/".join(out), missing


def _here() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "a folder that is gone"
