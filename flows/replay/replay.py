"""``hotstage replay``: steps of a run computed again from one of its checkpoints, and compared with what it recorded.

Nothing of the run changes but a pin of the checkpoint, for as long as it is read: it may train on meanwhile. What is
compared: every loss and gradient norm that its metrics hold, bit for bit, and the state digest where a checkpoint of
the last step was recorded. Any layout will do; another family of kernels, or another version of what bits mean, gives
other bits by right and is refused.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoint import codec
from checkpoint.agent.devices import from_map
from checkpoint.collect.pins import pinned
from checkpoint.errors import Damaged, NotFound
from checkpoint.keys import address_key
from checkpoint.log import AttemptInfo, CheckpointInfo, RunLog, RunState
from checkpoint.read import refuse_newer
from checkpoint.store import Store
from flows.drive.replays import EXIT_DIFFERS
from flows.drive.room import lacking_memory
from flows.drive.run import Prepared, load_spec_of
from flows.drive.views import Restore, some_steps
from flows.replay.again import Computed, compute, scratch
from flows.replay.compare import Difference, Suspects, Verdict, first_difference, verdict
from flows.replay.recorded import StepLine, computed_by, newest_step, read_recorded
from flows.replay.suspects import Evidence, suspects_of
from trainer.errors import PlanError, SpecError
from trainer.plan import compile_plan
from trainer.spec import how_map, set_key, what_digest
from trainer.spec_layouts import layout_words
from trainer.wire import CUDA_PATHS

MAX_PLAN_BYTES = 1 << 30
_ADDRESS_BYTES = 1 << 20
_SETS = ("parallel", "launch")


@dataclass(frozen=True)
class Origin:
    """Where the steps begin: the run's checkpoint (of a fork maybe its parent's), or nothing: from its first weights.

    ``run``: whose checkpoint it is.
    """

    step: int
    run: str
    info: CheckpointInfo | None

    @property
    def restore(self) -> Restore:
        parent = None if self.info is None else (self.run, self.info.n)
        return Restore(None, self.step, None, parent)


@dataclass(frozen=True)
class Replayed:
    """What came out. ``compared`` and ``missing``: steps that the run's metrics have, and that they lack.

    ``digest``: the state digest that was recorded after the last step; None where none was, and so none compared.
    """

    run: str
    first: int
    last: int
    layout: str
    compared: int
    missing: int
    digest: str | None
    verdict: Verdict
    difference: Difference | None = None
    suspects: Suspects | None = None
    attempt: int | None = None
    """The number of the attempt that computed what differs."""

    @property
    def exit_code(self) -> int:
        return 0 if self.verdict is Verdict.SAME else EXIT_DIFFERS


def replay_run(
    store: Store,
    run: str,
    first: int | None,
    last: int | None,
    *,
    out: Path,
    sets: Sequence[str] = (),
    stop: threading.Event | None = None,
    engine: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Replayed:
    """Compute the steps after ``first`` up to ``last`` again, and compare. ``sets``: of ``parallel`` and ``launch``.

    ``first`` None: the newest checkpoint before ``last``; ``last`` None: the newest one.

    Raises SpecError where that cannot be asked, and what computing raises (``again.compute``).
    """
    stop = stop or threading.Event()
    state = RunLog(store, run).fold().of_this_version()
    first, last = _range(run, state, first, last)
    point, attempts = _begin(store, run, state, first), state.attempts
    # of the line that leads here, also where its objects are gone: its digest is in the log
    saved = next((c for c in state.lineage() if c.step == last), None)
    _check_computed(run, last, newest_step(store, run, attempts), saved)  # before all of them are asked for
    recorded = read_recorded(store, run, attempts, first + 1, last)
    if saved is None and not recorded:
        raise SpecError(
            f"nothing of steps {first + 1} to {last} of {run} is recorded: its metrics have no line of them and there "
            f"is no checkpoint of step {last}; take a step with a checkpoint as --to (hotstage ckpt ls {run})"
        )
    prepared = _prepare(store, run, _attempt_of(attempts, first + 1), sets)
    _check_numerics(prepared, attempts, first, last)
    # what an order amended lies behind where it began: so what was trained last by holds for all steps up to there
    amended = _attempt_of(attempts, last).amendments
    if last > (total := amended.total(prepared.spec.train.steps)):
        raise SpecError(f"{run} has {total} steps; --to {last} is beyond them")
    _check_memory(prepared)
    report = Replayed(
        run=run,
        first=first,
        last=last,
        layout=layout_words(how_map(prepared.spec)),
        compared=len(recorded),
        missing=last - first - len(recorded),
        digest=saved.state_digest if saved is not None else None,
        verdict=Verdict.SAME,
    )
    with _pinned(store, point), scratch(out) as folder:

        def computed(prepared: Prepared, upto: int, name: str) -> Computed:
            return compute(
                store,
                prepared,
                point.restore,
                upto,
                folder / name,
                amendments=amended,
                stop=stop,
                engine=engine,
                stepped=_Progress(tell, first, upto),
            )

        one = computed(prepared, last, "1")
        found = first_difference(recorded, one.lines, last, report.digest, one.info.state_digest)
        if found is None:
            return report
        tell(f"step {found.step}: the {found.what} differs; it is computed a second time")
        by = _attempt_of(attempts, found.step)
        two = computed(_own_layout(store, run, by, prepared), found.step, "2")  # whose messages can be compared too
        said = _judged(found, recorded, report.digest if found.step == last else None, one, two)
        evidence = Evidence(found, recorded.get(found.step), two.lines.get(found.step), saved, one.manifest)
        suspects = suspects_of(store, run, by, evidence) if said is Verdict.RUN else None
        number = [a.epoch for a in attempts].index(by.epoch) + 1
        return replace(report, verdict=said, difference=found, suspects=suspects, attempt=number)


def _attempt_of(attempts: Sequence[AttemptInfo], step: int) -> AttemptInfo:
    """That computed a step which is known to be computed."""
    found = computed_by(attempts, step)
    assert found is not None
    return found


def _judged(
    found: Difference, recorded: Mapping[int, StepLine], digest: str | None, one: Computed, two: Computed
) -> Verdict:
    """What it means that ``one`` differs from what was recorded, now that ``two`` has computed up to there as well.

    ``digest``: recorded of the state at that step, where ``one`` ended there too and one was.
    """
    upto = found.step
    again = first_difference(_upto(recorded, upto), two.lines, upto, digest, two.info.state_digest)
    mine = one.info.state_digest if one.info.step == upto else None
    between = first_difference(_upto(one.lines, upto), two.lines, upto, mine, two.info.state_digest)
    return verdict(found, again, between)


def _pinned(store: Store, point: Origin) -> AbstractContextManager[object]:
    """Over the time that the point is read."""
    return contextlib.nullcontext() if point.info is None else pinned(store, point.run, point.info, "replay")


class _Progress:
    """Tells now and then how far it has come."""

    def __init__(self, tell: Callable[[str], None], first: int, last: int) -> None:
        self._tell, self._first, self._last, self._told = tell, first, last, -1

    def __call__(self, step: int) -> None:
        tenth = 10 * (step - self._first) // max(1, self._last - self._first)
        if step > self._first and tenth > self._told:
            self._told = tenth
            self._tell(f"step {step} of {self._last}")


def _upto(lines: Mapping[int, StepLine], step: int) -> dict[int, StepLine]:
    return {at: line for at, line in lines.items() if at <= step}


# --- what is asked ------------------------------------------------------------------------------------------


def _range(run: str, state: RunState, first: int | None, last: int | None) -> tuple[int, int]:
    """Both, where one is left out from the checkpoints that there are."""
    steps = sorted({c.step for c in state.restore_candidates()})
    if last is None:
        if not steps:
            raise SpecError(f"{run} has no checkpoint yet: give the last step to compute, --to")
        last = steps[-1]
    if first is None:
        first = max((step for step in steps if step < last), default=0)
    if last <= first:
        raise SpecError(f"--to {last} is not after --from {first}: the steps after {first} up to --to are computed")
    return first, last


def _begin(store: Store, run: str, state: RunState, step: int) -> Origin:
    """The point that the steps after ``step`` begin from."""
    info, parent = state.at_step(step), state.parent
    if info is not None:
        refuse_newer(store, run, info)
        return Origin(step, run, info)
    if parent is not None and parent["step"] == step:
        source = str(parent["run"])
        found = RunLog(store, source).fold(quick=True).of_this_version().checkpoint(int(parent["checkpoint"]))
        if found is not None:
            return Origin(step, source, found)
    if parent is None and step == 0:
        return Origin(0, run, None)
    steps = sorted({c.step for c in state.restore_candidates()} | ({0} if parent is None else set()))
    raise SpecError(
        f"{run} has no usable checkpoint at step {step} to begin from; --from takes one of "
        f"{some_steps(steps) or 'none'}"
    )


def _check_computed(run: str, last: int, reached: int, saved: CheckpointInfo | None) -> None:
    if saved is None and last > reached:
        raise SpecError(f"{run} is known to have computed steps up to {reached} so far; take --to {reached} or less")


def _check_numerics(prepared: Prepared, attempts: Sequence[AttemptInfo], first: int, last: int) -> None:
    """The bits of another version are other ones by right (of a newer one the log is not even read)."""
    ours, by = prepared.plan.config.numerics_version, [a for a in attempts if a.step < last]
    used = {a.n: a for step in (first + 1, last) if (a := computed_by(by, step)) is not None}
    for number, attempt in enumerate(attempts, 1):
        between = min(used) <= attempt.n <= max(used)
        if between and attempt.numerics != ours:
            raise SpecError(
                f"attempt {number} of {prepared.run} computed with numerics version {attempt.numerics}, "
                f"this program has version {ours}: the same step has other bits by right. Replay with the hotstage "
                "that computed it, or take steps that an attempt of this version computed (hotstage runs show)"
            )


def _prepare(store: Store, run: str, attempt: AttemptInfo, sets: Sequence[str]) -> Prepared:
    """The run in a layout of this machine: the attempt's on one node, with ``sets`` over it."""
    bad = [text for text in sets if set_key(text)[0] not in _SETS]
    if bad:
        raise SpecError(
            f"--set {bad[0]}: a replay computes what the run computed; only parallel.… and launch.… may be another"
        )
    was, how = attempt.how, dict[str, Any]()
    asked = was.get("launch", {})
    kind, path = _ran_on(store, run, attempt)
    how["parallel"] = {**was.get("parallel", {}), "threads": 0, "device": kind}
    recompute = how["parallel"].get("recompute")
    if isinstance(recompute, Mapping) and not isinstance(recompute.get("layers"), int):
        how["parallel"]["recompute"] = {**recompute, "layers": None}  # a list is for so many stages as there were
    how["launch"] = {k: asked[k] for k in ("kernel_path", "stall_s", "connect_s") if k in asked}
    how["checkpoint"] = {"every": 0, "slots": 2}
    spec, dataset = load_spec_of(store, run, how, sets)
    resolved = spec.resolve(dataset)
    theirs, ours = kernel_family(kind, path), kernel_family(resolved.parallel.device, resolved.launch.kernel_path)
    if theirs != ours:
        raise SpecError(
            f"{run} ran on kernels of the family {theirs}; those of the family {ours} have other bits by right: leave "
            "launch.kernel_path and parallel.device as they were"
        )
    what = what_digest(resolved, dataset)
    return Prepared(run, resolved, dataset, what, compile_plan(resolved, dataset, what))


def _own_layout(store: Store, run: str, attempt: AttemptInfo, prepared: Prepared) -> Prepared:
    """The run in the layout that the attempt had, where this machine has room for that; else as it is prepared."""
    try:
        own = _prepare(store, run, attempt, ())
    except (SpecError, PlanError):
        return prepared
    return prepared if lacking_memory(own) else own


def _check_memory(prepared: Prepared) -> None:
    if lack := lacking_memory(prepared):
        raise SpecError(
            f"the plan needs {lack}: take another machine, or a layout that keeps less (--set "
            "parallel.recompute=layer, fewer replicas)"
        )


def kernel_family(kind: str, kernel_path: str) -> str:
    """Kernels of one family have the same bits: all paths of the CPU but ``ref`` do, a CUDA path is one by itself.

    >>> kernel_family("cpu", "avx2"), kernel_family("cpu", "ref"), kernel_family("cuda", "auto")
    ('cpu', 'ref', 'cuda-exact')
    """
    if kind == "cuda" or kernel_path in CUDA_PATHS:
        return kernel_path if kernel_path in CUDA_PATHS else "cuda-exact"
    return "ref" if kernel_path == "ref" else "cpu"


def _ran_on(store: Store, run: str, attempt: AttemptInfo) -> tuple[str, str]:
    """The kind of device that the attempt ran on, as its first node said it, and the family that was asked for."""
    device = str(attempt.how.get("parallel", {}).get("device", "auto"))
    path = str(attempt.how.get("launch", {}).get("kernel_path", "auto"))
    try:
        raw = store.get(address_key(run, attempt.epoch, 0), max_bytes=_ADDRESS_BYTES)
        said = codec.unpack_hint(raw, "a node's address", max_bytes=_ADDRESS_BYTES)
        kind = from_map(said, attempt.ranks // attempt.nodes).kind
    except (NotFound, Damaged, ValueError, KeyError, TypeError, AttributeError):
        kind = "cuda" if path in CUDA_PATHS or device == "cuda" else "cpu"
    return kind, path
