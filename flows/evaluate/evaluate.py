"""One checkpoint evaluated: validation loss, a sample, the user's commands; what was found goes into the store.

Called by ``hotstage evaluate``: by a person, or by a run's driver beside training (``flows/drive/evaluations.py``). The
checkpoint is pinned meanwhile. A validation that fails is raised once the commands are through; a command that fails is
a row that says so.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from checkpoint.codec import short
from checkpoint.collect.pins import pinned
from checkpoint.errors import StoreError
from checkpoint.evaluated import MAX_TEXT, Evaluation, Ran
from checkpoint.export_to import Folder
from checkpoint.keys import evaluated_key
from checkpoint.store import Store
from flows.drive.evaluations import VALIDATION
from flows.drive.live import load_evaluations
from flows.drive.run import Prepared, read_run
from flows.drive.telling import EXIT_STOPPED
from flows.evaluate.command import run_command
from flows.evaluate.validate import validate, validation_data
from flows.show.export import export_hf, usable_at
from flows.show.talk import generate
from trainer.errors import SpecError, TrainerError

log = logging.getLogger(__name__)

SEED = 0


class StoppedEvaluating(TrainerError):
    """Somebody asked to stop, or the time was over."""

    exit_code = EXIT_STOPPED


@dataclass
class Evaluator:
    """Of one run's checkpoint. ``stop``: set it to leave; ``say`` hears what is at work."""

    store: Store
    run: str
    step: int | None
    stop: threading.Event = field(default_factory=threading.Event)
    say: Callable[[str], None] = log.info
    threads: int = 0

    def evaluate(self, only: Sequence[str] = ()) -> Evaluation:
        """What the spec asks for (or of it ``only`` these: ``validation``, names of commands), now; kept in the store.

        SpecError where it asks for nothing, or for nothing of that name.
        """
        prepared = read_run(self.store, self.run)
        names = self._names(prepared, only)
        info = usable_at(self.store, self.run, self.step)
        row = Evaluation(info.step, info.epoch, time=time.time())
        failed: TrainerError | StoreError | None = None
        with pinned(self.store, self.run, info, "evaluate"):
            if VALIDATION in names:
                try:
                    row = self._validated(prepared, row)
                except (TrainerError, StoreError) as error:
                    if isinstance(error, StoppedEvaluating):
                        raise
                    failed = error
            commands = [e for e in prepared.spec.eval if e.name in names]
            if commands:
                row = replace(row, commands=self._commands(prepared, info.step, [e.name for e in commands]))
        row = replace(row, time=time.time())
        if failed is None or row.commands:
            self._keep(row)
        if failed is not None:
            raise failed
        return row

    def _names(self, prepared: Prepared, only: Sequence[str]) -> list[str]:
        spec = prepared.spec
        have = [VALIDATION, *(e.name for e in spec.eval)]
        for name in only:
            if name not in have:
                raise SpecError(f"run {self.run} has no evaluation {name!r}; it has {', '.join(have)}")
        names = list(only) or [*([VALIDATION] if spec.validation.every else []), *(e.name for e in spec.eval)]
        if not names:
            raise SpecError(
                f"run {self.run} asks for no evaluation: set validation.every or [[eval]] in its spec (it is How: "
                f"hotstage runs order {self.run} --set validation.every=1), or say --only validation"
            )
        return names

    def _validated(self, prepared: Prepared, row: Evaluation) -> Evaluation:
        spec, began = prepared.spec.validation, time.monotonic()

        def over() -> bool:
            return self.stop.is_set() or time.monotonic() - began > spec.timeout_s

        data = validation_data(self.store, prepared, self.say)
        self.say(
            f"step {row.step}: the loss on {min(spec.windows, data.samples(prepared.spec.train.sequence))} windows"
        )
        try:
            found = validate(self.store, prepared, row.step, data, threads=self.threads, stop=over)
        except InterruptedError:
            if self.stop.is_set():
                raise StoppedEvaluating("stopped on request; nothing of it is kept") from None
            raise SpecError(
                f"the validation had not ended after {spec.timeout_s:g} s (validation.timeout_s), and was left: take "
                f"fewer windows than {spec.windows}, or more time"
            ) from None
        row = replace(row, loss=found.loss, windows=found.windows, tokens=found.tokens, data=found.data)
        if not spec.sample:
            return row
        text = generate(self.store, self.run, spec.sample, tokens=spec.sample_tokens, seed=SEED, step=row.step)
        return replace(row, prompt=short(spec.sample, MAX_TEXT), sample=short(text, MAX_TEXT))

    def _commands(self, prepared: Prepared, step: int, names: Sequence[str]) -> dict[str, Ran]:
        ran: dict[str, Ran] = {}
        facts = {"step": str(step), "run": self.run}
        with tempfile.TemporaryDirectory(prefix="hotstage-export-") as folder:
            model = Path(folder) / "model"
            export_hf(self.store, self.run, step, Folder(model))
            for spec in prepared.spec.eval:
                if spec.name in names and not self.stop.is_set():
                    self.say(f"step {step}: {spec.name}: {' '.join(spec.command)[:200]}")
                    ran[spec.name] = run_command(spec, model, facts, self.stop)
        if self.stop.is_set():
            raise StoppedEvaluating("stopped on request; nothing of it is kept")
        return ran

    def _keep(self, row: Evaluation) -> None:
        """Joined with what is there by now."""
        try:
            known = load_evaluations(self.store, self.run)
            known.add(row)
            self.store.put(evaluated_key(self.run), known.to_bytes())
        except StoreError as error:  # whoever may only read evaluates for himself
            self.say(f"what was found is not kept in {self.store.describe()}: {error}")


def evaluation_lines(row: Evaluation) -> dict[str, str]:
    """It in words, a line by what it is of."""
    lines = {}
    if row.loss is not None:
        text = f"step {row.step}: validation loss {row.loss:.4f} ({row.windows} windows, {row.tokens:,} tokens)"
        lines[VALIDATION] = text
    for name, ran in row.commands.items():
        numbers = ", ".join(f"{key} {value:.6g}" for key, value in ran.numbers.items())
        said = f"failed: {ran.why}" if ran.why else numbers
        lines[name] = f"step {row.step}: {name}: {said} ({ran.seconds:.1f} s)"
    if row.sample:
        lines["sample"] = f"step {row.step}: sample: {' '.join(row.sample.split())}"
    return lines
