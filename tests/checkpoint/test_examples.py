"""The examples in the docstrings of this package, and of the readers below it, run."""

from __future__ import annotations

import doctest
import importlib

import pytest

CHECKPOINT = ("codec", "dataset", "digest", "chunks", "export", "store")
WIRE = ("packed", "unreadable")


@pytest.mark.parametrize("name", [*(f"checkpoint.{n}" for n in CHECKPOINT), *(f"trainer.wire.{n}" for n in WIRE)])
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0
