"""Which documents of a corpus stay: by length, by language tag, by a predicate of the user's.

Pure but for the import of the predicate. What is left out is counted by reason.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flows.data.sources import Document
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec

REASONS = ("", "too short", "too long", "without a language tag", "of another language", "refused by the predicate")
"""Why a document is out, by its code; 0: it stays."""


@dataclass(frozen=True)
class Filter:
    """The spec's filter, ready: see ``filter_of``."""

    least: int
    most: int | None
    languages: Sequence[str]
    tag: str
    predicate: Callable[[Document], object] | None
    path: str
    source: bytes
    """Digest of what the predicate's module is."""

    def __call__(self, document: Document, letters: int) -> int:
        """0 where the document stays, else the code of the reason."""
        if letters < self.least:
            return 1
        if self.most is not None and letters > self.most:
            return 2
        if self.languages:
            tag = document.fields.get(self.tag)
            if not isinstance(tag, str) or not tag.strip():
                return 3
            if not any(_of(tag, wanted) for wanted in self.languages):
                return 4
        return 0 if self.predicate is None or self._asked(self.predicate, document) else 5

    def _asked(self, predicate: Callable[[Document], object], document: Document) -> bool:
        try:
            answer = predicate(document)
        except (Exception, SystemExit) as error:  # what leaves by itself would leave without a word
            line = error.__traceback__.tb_next if error.__traceback__ is not None else None
            at = "" if line is None else f" (line {line.tb_lineno} of it)"
            raise DatasetError(
                f"data.filter.predicate {self.path!r} raised {type(error).__name__} for {document.name}: "
                f"{str(error)[:300]}{at}; mend it, or have it answer False for such documents"
            ) from error
        if not isinstance(answer, bool) and type(answer).__name__ != "bool_":
            raise DatasetError(
                f"data.filter.predicate {self.path!r} answered {type(answer).__name__} for {document.name}; it must "
                "answer True (the document stays) or False"
            )
        return bool(answer)


def _of(tag: str, wanted: str) -> bool:
    """Whether a language tag is of a range, as RFC 4647 filters: ``en`` takes ``en-GB`` and ``EN_us``, not ``eng``."""
    tag, wanted = tag.strip().lower().replace("_", "-"), wanted.lower().replace("_", "-")
    return tag == wanted or tag.startswith(wanted + "-")


def filter_of(spec: DataSpec) -> Filter:
    """The spec's filter. SpecError (exit 78) where its predicate cannot be had."""
    made = spec.filter
    if made is None:
        return Filter(0, None, (), "", None, "", b"")
    predicate, source = (None, b"") if made.predicate is None else _predicate(made.predicate)
    return Filter(
        made.min_length, made.max_length, made.language, made.language_field, predicate, made.predicate or "", source
    )


def _predicate(path: str) -> tuple[Callable[[Document], object], bytes]:
    what, (module, _, name) = f"data.filter.predicate {path!r}", path.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # where the spec's patterns are looked for too
        sys.path.append(here)
    try:
        found: object = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            raise SpecError(
                f"{what}: there is no module {error.name!r} in {here} or among the installed ones; write it as "
                "package.module:function, and start where the module lies"
            ) from error
        raise SpecError(f"{what}: importing {module!r} failed: {error}; install what it needs") from error
    except (Exception, SystemExit) as error:
        raise SpecError(f"{what}: importing {module!r} raised {type(error).__name__}: {str(error)[:300]}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            have = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            raise SpecError(f"{what}: {module} has no {name!r}; it has {', '.join(have[:8]) or 'nothing to call'}")
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"{what} is {type(found).__name__}, nothing to call; name a function of a document")
    return found, _digest(found, sys.modules[module])


def _digest(function: object, module: object) -> bytes:
    """Of what the predicate is made of, as far as can be seen: its module's source."""
    try:
        return hashlib.sha256(inspect.getsource(module).encode("utf-8", "surrogatepass")).digest()  # type: ignore[arg-type]
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return hashlib.sha256(repr(function).encode() if code is None else code.co_code).digest()
