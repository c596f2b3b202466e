"""Folders of the user, as the XDG base directory specification has them. Standard library alone: tests and builds that
run before anything is installed use it too.
"""

from __future__ import annotations

import os
import pwd
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
    return (Path(said) if os.path.isabs(said) else _home() / below_home) / "hotstage"


def _home() -> Path:
    """``HOME``; the user's in the system's table where it is unset, empty or relative."""
    said = os.environ.get("HOME", "")
    try:
        return Path(said if os.path.isabs(said) else pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError as error:
        raise RuntimeError(f"the user {os.getuid()} has no home folder: set HOME") from error
