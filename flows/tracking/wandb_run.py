"""Weights & Biases, by its own library: one run of the same id for a run, whoever drives it and how often it resumes.

A line that an order left behind stays in its own W&B run: what follows is another one of the same group, which names
its parent and the step, and so is a fork. The axis is ``step``, the run's own; W&B's counts rows: evaluations come
later than their checkpoint, and its steps may not go back. Key, address and mode come from its environment alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

from flows.tracking.writers import About, Written

STEP = "step"


class WandbWriter:
    """``project``: of the user's default entity, or ``ENTITY/PROJECT``."""

    name = "W&B"

    def __init__(self, project: str) -> None:
        self.entity, _, self.project = project.rpartition("/")
        self._run: Any = None

    def begin(self, about: About, held: Written | None) -> Written:
        import wandb

        self.end("")
        os.environ.setdefault("WANDB_SILENT", "true")
        settings = wandb.Settings(
            console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True, silent=True
        )
        if held is None or held.branch != about.branch:
            held = Written(about.begins, about.branch, about.begins)
        config = {**about.config, "hotstage/run": about.run, "hotstage/store": about.store}
        parent = about.parent
        if about.branch:
            parent = (about.run, about.begins)
        if parent is not None:
            config |= {"hotstage/parent": parent[0], "hotstage/parent_step": parent[1]}
        self._run = wandb.init(
            project=self.project,
            entity=self.entity or None,
            dir=os.environ.get("WANDB_DIR") or tempfile.gettempdir(),
            id=run_id_of(about),
            name=about.run if not about.branch else f"{about.run} from step {about.begins}",
            group=about.run,
            resume="allow",
            reinit="create_new",
            config=config,
            allow_val_change=True,
            settings=settings,
            notes=f"a fork of {parent[0]} at step {parent[1]}" if parent else None,
        )
        self._run.define_metric(STEP, hidden=True, summary="max")
        for names in ("train/*", "speed/*", "validation/*", "eval/*", "sample"):
            self._run.define_metric(names, step_metric=STEP)
        known = self._run.summary.get(STEP) if self._run.resumed else None  # the server's, where there is one
        if isinstance(known, dict):
            known = known.get("max")
        held.step = max(held.step, int(known)) if isinstance(known, int | float) else held.step
        return held

    def numbers(self, step: int, time: float, values: Mapping[str, float], *, late: bool = False) -> None:
        self._run.log({**values, STEP: step})

    def text(self, step: int, time: float, name: str, text: str) -> None:
        self._run.log({name: text, STEP: step})

    def flush(self, held: Written) -> None:
        """Its own process sends as it likes."""

    def end(self, outcome: str) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=1 if outcome == "gave_up" else 0)


def run_id_of(about: About) -> str:
    """The same for a run and its line, so that whoever drives it goes on with it."""
    return f"{about.run}-{about.branch}" if about.branch else about.run
