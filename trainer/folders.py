"""Folders of the user, as the XDG base directory specification has them. Standard library alone: tests and builds that
run before anything is installed use it too.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """What may be made again. Raises RuntimeError where the user has no home folder."""
    return _folder("XDG_CACHE_HOME", ".cache")


def data_folder() -> Path:
    """What is kept. Raises RuntimeError where the user has no home folder."""
    return _folder("XDG_DATA_HOME", ".local/share")


def _folder(variable: str, below_home: str) -> Path:
    """A relative value does not count, says the specification: it would be another folder from each folder."""
    said = os.environ.get(variable, "")
    return (Path(said) if os.path.isabs(said) else Path.home() / below_home) / "hotstage"
