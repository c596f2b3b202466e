"""What can go wrong in the trainer's Python half, and what the caller should do about it.

    TrainerError            base; ``exit_code`` is the process exit code of ``trainer.wire.EXITS``
    ├── SpecError     78    the spec asks for something that cannot be: change the spec (``problems``: one line each)
    ├── PlanError     78    no plan can be made, or a plan file does not hold: change spec or cluster, or compile again
    ├── DatasetError  65    the training data is missing, damaged or does not fit: mend the data
    ├── OutputError   78    a file or folder that the user named cannot be written: choose another
    └── LaunchError   75    processes could not be started or were lost: look at the machine, then try again
        ├── LaunchUnknown 75    the place where nodes run does not answer: unknown, never failure; try again
        └── LaunchRefused 78    that place says no (rights, names, an object of somebody else): mend it first

Every text names the value, the limit and the mend.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class TrainerError(Exception):
    """Base of everything that ``trainer`` raises on purpose."""

    exit_code: int = 70


class SpecError(TrainerError):
    """A RunSpec was refused. ``problems`` holds one line for each thing that must change."""

    exit_code = 78

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class PlanError(TrainerError):
    """A plan was refused: it cannot be made, does not fit the budget, or its file does not hold."""

    exit_code = 78


class DatasetError(TrainerError):
    """Training data is missing, cut short, or holds what the spec does not allow. One line, whatever names hold."""

    exit_code = 65

    def __init__(self, text: str) -> None:
        super().__init__(text.replace("\n", "\\n").replace("\r", "\\r"))


class OutputError(TrainerError):
    """A file or folder that the user named for a result cannot be written."""

    exit_code = 78

    def __init__(self, path: Path, error: OSError) -> None:
        why = "a file lies where a folder must be" if isinstance(error, FileExistsError) else error.strerror
        super().__init__(f"{path} cannot be written: {why}; choose another place")


class LaunchError(TrainerError):
    """Processes of a run could not be started, or what was started cannot be found."""

    exit_code = 75


class LaunchUnknown(LaunchError):
    """The place where nodes run does not answer now: what runs there is unknown, never failed."""


class LaunchRefused(LaunchError):
    """The place where nodes run says no: the same call will be refused again until somebody mends it."""

    exit_code = 78
