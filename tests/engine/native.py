"""The small C programs of the tests (``tests/engine/programs``), linked with the engine's library.

``HOTSTAGE_TEST_CC`` picks the compiler, ``HOTSTAGE_TEST_SANITIZE`` a sanitizer (``address,undefined`` or ``thread``).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from tests.engine import engine_build


@functools.cache
def build_program(name: str) -> Path:
    """The program's path; built where its sources changed since the last time."""
    compiler = os.environ.get("HOTSTAGE_TEST_CC", "cc")
    return engine_build.build_program(name, compiler, os.environ.get("HOTSTAGE_TEST_SANITIZE", ""))
