"""Model families as data: named tensors and kernel calls. A family is one module here that defines ``FAMILY``.

Adding a file adds a family (docs/add-a-model.md); nothing is registered anywhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING

from trainer.errors import SpecError

if TYPE_CHECKING:
    from trainer.models.base import Family


BESIDE = frozenset({"base", "hf_config"})
"""Modules here that are no family."""


def names() -> tuple[str, ...]:
    """Families that a spec may name, in alphabetical order."""
    found = {module.name for module in pkgutil.iter_modules(__path__)}
    return tuple(sorted(found - BESIDE))


def family(name: str) -> Family:
    """The family of that name; SpecError where there is none."""
    there = name not in BESIDE and f"{__name__}.{name}" in sys.modules  # else the folder is read, for each spec again
    if not there and name not in names():
        raise SpecError(f"model.family {name!r} is unknown; take one of {', '.join(names())}")
    from trainer.models.base import Family

    found = importlib.import_module(f"{__name__}.{name}").FAMILY
    if not isinstance(found, Family):
        raise TypeError(f"trainer/models/{name}.py must define FAMILY, an instance of Family")
    return found
