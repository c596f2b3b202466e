"""Prefect flows and the ``hotstage`` command: they sequence plain functions of trainer, checkpoint and k8s.

``flows.train(spec)`` starts a run from Python; see ``flows.drive.train``. Nothing here is imported before it is used,
so that the command starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.drive.events import Outcome
    from flows.drive.train import Run, resume, train

__all__ = ["Outcome", "Run", "resume", "train"]


def __getattr__(name: str) -> Any:
    if name == "Outcome":
        from flows.drive.events import Outcome

        return Outcome
    if name in __all__:
        from flows.drive import train as api

        return getattr(api, name)
    raise AttributeError(f"module 'flows' has no attribute {name!r}")
