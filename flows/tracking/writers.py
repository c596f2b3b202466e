"""What a tracker's own library is asked for, and which ones a spec names."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.errors import SpecError
from trainer.spec_watch import TrackSpec

NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""By key of ``[track]`` the module; each comes with ``hotstage[track]``."""


@dataclass(frozen=True)
class About:
    """The run, as a tracker is told of it. ``branch``: the attempt that an order sent back last, 0 without one, and
    ``begins``, the step after which it goes on; ``born``: where the run itself began; ``parent``: run and step of which
    it is a fork.
    """

    run: str
    store: str
    branch: int = 0
    begins: int = 0
    born: int = 0
    parent: tuple[str, int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Written:
    """What a tracker has of the run already: steps after ``begins`` up to ``step``; ``done``: of an evaluated
    checkpoint (``step-epoch``) the numbers that were written.
    """

    step: int = 0
    branch: int = 0
    begins: int = 0
    done: dict[str, list[str]] = field(default_factory=dict)

    def to_map(self) -> dict[str, Any]:
        done = dict(list(self.done.items())[-MOST_DONE:])
        return {"v": 1, "step": self.step, "branch": self.branch, "begins": self.begins, "done": done}

    @classmethod
    def of_map(cls, value: Any) -> Written | None:
        """None for what does not hold."""
        try:
            if value["v"] != 1:
                return None
            done = {str(key): [str(name) for name in names] for key, names in dict(value["done"]).items()}
            return cls(int(value["step"]), int(value["branch"]), int(value["begins"]), done)
        except (KeyError, TypeError, ValueError):
            return None


MOST_DONE = 256


class Writer(Protocol):
    """One tracker, behind its own library. Every method is called by one thread, and may raise whatever that does.

    Order: ``begin``; then steps, numbers and texts; ``flush`` now and then; ``end``. After a failure: ``begin`` again.
    """

    name: str

    def begin(self, about: About, held: Written | None) -> Written:
        """Open it. ``held``: what the run's store says that it has, where anything is known. What it has, by then."""

    def numbers(self, step: int, time: float, values: Mapping[str, float], *, late: bool = False) -> None:
        """Of a step; ``late``: of one that lies behind those that were written last."""

    def text(self, step: int, time: float, name: str, text: str) -> None: ...

    def flush(self, held: Written) -> None: ...

    def end(self, outcome: str) -> None:
        """The driver's part is over; ``outcome`` of the run, empty where it goes on elsewhere."""


def missing(track: TrackSpec) -> str:
    """Why the spec's trackers cannot be had here; empty where they can."""
    for key, module in NEEDS.items():
        if getattr(track, key) and importlib.util.find_spec(module) is None:
            return f"track.{key} needs {module}: pip install 'hotstage[track]', or leave track.{key} unset"
    return ""


def check_trackers(track: TrackSpec) -> None:
    """SpecError where a tracker's library is not installed: before a run begins that would go untracked."""
    why = missing(track)
    if why:
        raise SpecError(why)
