"""Prefect flows and the ``hotstage`` command: they sequence plain functions of trainer, checkpoint and k8s.

``flows.train(spec)`` starts a run from Python; see ``flows.api``. Nothing here is imported before it is used, so that
the command starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.api import Run, resume, train
    from flows.loop import Outcome

__all__ = ["Outcome", "Run", "resume", "train"]


def __getattr__(name: str) -> Any:
    if name == "Outcome":
        from flows.loop import Outcome

        return Outcome
    if name in __all__:
        from flows import api

        return getattr(api, name)
    raise AttributeError(f"module 'flows' has no attribute {name!r}")
