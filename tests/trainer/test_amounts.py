"""Numbers as people read them: the examples are the cases."""

from __future__ import annotations

import doctest

from trainer import amounts


def test_examples_in_the_docstrings_run() -> None:
    failed, ran = doctest.testmod(amounts)
    assert (failed, ran) == (0, 5)
