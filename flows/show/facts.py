"""What a store knows of a run, gathered for people: summaries, details, and the report's facts. Reads only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from checkpoint.curve import AttemptRow, Curve
from checkpoint.errors import CheckpointError, NotFound
from checkpoint.keys import traces_prefix
from checkpoint.log import AttemptInfo, CheckpointInfo, RunLog, RunState
from checkpoint.read import load_manifest
from checkpoint.store import Store
from flows.drive.hours import recoveries, worked
from flows.drive.line import ordered_back
from flows.drive.live import load_curve, on_line, read_curve
from flows.drive.orders import describe
from flows.drive.persons import founder
from flows.drive.replays import Kept
from flows.drive.run import find_run, is_gone, load_what, opened_again, read_run, ruling_how
from flows.drive.scores import line_evaluations, score_table
from flows.drive.telling import PARKED
from flows.drive.train import store_at
from flows.show.loss_chart import AttemptFact
from flows.show.mixture import read_so_far
from flows.show.report import ReportFacts
from trainer.errors import PlanError, TrainerError
from trainer.models import family
from trainer.models.base import tensor_table
from trainer.plan.calibrate import fitted
from trainer.plan.compiled import Plan
from trainer.plan.draw import timeline_svg
from trainer.plan.places import Rank
from trainer.plan.simulate import from_plan, simulate
from trainer.plan.timeline import Timeline, from_chrome
from trainer.spec import ModelSpec, OptimizerSpec, RunSpec, how_map
from trainer.spec_layouts import layout_words, same_layout

TRACE_CAP = 64 << 20
_NO_TIME = ("vocab", "steps", "seed", "optimizer", "schedule", "max_batch_tokens")
"""Keys of a model and its training that change no time, or that a spec without its data does not know."""
GONE = "gone"
TRACED = 8
AT_ONCE = 16
EVALUATIONS_SHOWN = 10
TAILS = 8
"""Attempts whose last lines are looked for beyond the index: an agent that was lost with its machine left it behind."""


def state_word(state: RunState) -> str:
    """Where a run stands, as far as the log alone says; nobody knows where a record of it cannot be read."""
    if state.unreadable and not state.newer:
        return "unreadable"
    if state.ended and not opened_again(state):
        return PARKED if state.ended.outcome == "preempted" else state.ended.outcome.replace("_", " ")
    return "open" if state.attempts else "planned"


def skipped_samples(state: RunState, info: CheckpointInfo) -> int:
    """Of the samples up to a checkpoint's data position those that orders passed over."""
    attempt = state.attempt(info.epoch)
    batch = attempt.amendments.batch(info.step) if attempt else info.step
    return info.data_position // batch * (batch - info.step) if batch else 0


def summaries(store: Store, runs: Sequence[str]) -> list[dict[str, Any]]:
    """Of each in its order, several asked for at a time: a run takes a handful of requests, one after the other."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(partial(summary, store), runs))


def summary(store: Store, run: str, state: RunState | None = None) -> dict[str, Any]:
    """One run in a row of `runs ls`, in a handful of requests. ``state``: its folded log, where it was read."""
    state = RunLog(store, run).fold(quick=True) if state is None else state
    newest, how = state.restore_candidates()[:1], ruling_how(state) or {}
    limits, launch, curve = how.get("limits") or {}, how.get("launch") or {}, load_curve(store, run)
    hours = worked(state.attempts, curve or Curve(), dict(ordered_back(state)))
    try:
        steps = state.amendments.total(int(load_what(store, run)["train"]["steps"]))
    except (CheckpointError, TrainerError):
        steps = 0
    return {
        "run": run,
        "state": GONE if is_gone(store, run, state) else state_word(state),
        "saved_step": newest[0].step if newest else 0,
        "steps": steps,
        "attempts": len(state.attempts),
        "began": state.attempts[0].time if state.attempts else None,
        "owner": limits.get("owner") or founder(store, run),
        "queue": launch.get("queue", ""),
        "priority": launch.get("priority_class", ""),
        "device_hours": round(hours.used, 4),
        "lost_hours": round(hours.lost, 4),
        "limit_hours": limits.get("device_hours") or None,
    }


def state_bytes(model: ModelSpec, optimizer: OptimizerSpec) -> int:
    """Of a checkpoint of this model: weights and moments, float32."""
    table = tensor_table(family(model.family), model)
    return sum(4 * optimizer.kinds(tensor) * tensor.elements for tensor in table)


def _of_parent(attempt: AttemptInfo) -> bool:
    """Whether it begins from another run's checkpoint, as a fork's first one does."""
    return bool(attempt.body["restore"].get("parent"))


def details(store: Store, run: str) -> dict[str, Any]:
    """One run as `runs show` shows it; OtherVersion where a newer hotstage has gone on with it."""
    state = RunLog(store, run).fold().of_this_version()
    what, kept = load_what(store, run), Kept.load(store, run)
    numbers = {a.epoch: number for number, a in enumerate(state.attempts, 1)}
    line = set(state.lineage().column("n"))
    size = state_bytes(
        ModelSpec.model_validate(what["model"]), OptimizerSpec.model_validate(what["train"]["optimizer"])
    )
    pins: dict[int, list[str]] = {}
    for pin, n in sorted(state.pins.items()):
        pins.setdefault(n, []).append(pin)
    return {
        **summary(store, run, state),
        "reason": state.ended.reason if state.ended and not opened_again(state) else "",
        "unreadable": state.unreadable,
        "dataset": what["data"]["digest"],
        "parent": {key: parent[key] for key in ("run", "step")} if (parent := state.parent) else None,
        "mixed": read_so_far(store, what, next((c.data_position for c in state.restore_candidates()), 0)),
        "orders": describe(state),
        "replays": {"steps": kept.steps, "differ": list(kept.differ)},
        "evaluations": score_table(line_evaluations(store, state), EVALUATIONS_SHOWN),
        "attempts_list": [
            {
                "attempt": number,
                "epoch": a.epoch,
                "step": a.step,
                "from": "memory" if a.slots else "checkpoint" if a.checkpoint or _of_parent(a) else "start",
                "reason": a.reason,
                "cause": (a.body.get("cause") or {}).get("text", ""),
                "launch": a.launch,
                "stages": a.how.get("parallel", {}).get("stages", a.ranks),
                "ranks": a.ranks,
                "layout": _layout(a),
                "fallback": (a.body.get("fallback") or {}).get("why", "") if a.fell_back else "",
                "plan": a.plan,
                "time": a.time,
            }
            for number, a in enumerate(state.attempts, 1)
        ],
        "checkpoints": [
            {
                "step": c.step,
                "attempt": numbers.get(c.epoch),
                "epoch": c.epoch,
                "state_digest": c.state_digest,
                "manifest": c.manifest,
                "bytes": size,
                "usable": state.usable(c),
                "damaged": state.damaged.get(c.n, ""),
                "left": c.n not in line,
                "given_up": c.n in state.buried,
                "pins": pins.get(c.n, []),
                "time": c.time,
            }
            for c in state.listed()
        ],
    }


def _layout(attempt: AttemptInfo) -> str:
    """For people; of a record without a How what its ranks and nodes tell."""
    return layout_words({"parallel": {"stages": attempt.ranks}, "launch": {"nodes": attempt.nodes}, **attempt.how})


def attempt_facts(state: RunState, rows: Mapping[int, AttemptRow]) -> list[AttemptFact]:
    """Attempts with the steps that each did, what was done twice (without what an order left), and how long until steps
    came again after a failure.

    ``rows``: of the index of metrics, by epoch.
    """
    out: list[AttemptFact] = []
    reached, back = 0, dict(ordered_back(state))
    recovered = recoveries(state.attempts, rows)
    for number, attempt in enumerate(state.attempts, 1):
        reached = back.get(attempt.epoch, reached)
        row = rows.get(attempt.epoch)
        out.append(
            AttemptFact(
                number=number,
                epoch=attempt.epoch,
                began_s=attempt.time - state.attempts[0].time,
                restore_step=attempt.step if attempt.checkpoint or attempt.slots else -1,
                cause=(attempt.body.get("cause") or {}).get("text", ""),
                first_step=row.first.step if row is not None else None,
                last_step=row.last.step if row is not None else None,
                lost_steps=max(0, reached - attempt.step) if out else 0,
                recovery_s=recovered.get(attempt.epoch),
                layout=_layout(attempt),
                reason=attempt.reason,
            )
        )
        if row is not None:
            reached = max(reached, row.last.step)
    return out


def read_traces(store: Store, run: str, epochs: list[int]) -> Timeline | None:
    """The newest measured timeline, where ranks of one of the last attempts left traces."""
    for epoch in reversed(epochs[-TRACED:]):
        traces: dict[Rank, str] = {}
        for info in store.list(traces_prefix(run, epoch)):
            try:
                traces[Rank(int(info.key.rsplit("/", 1)[1]))] = store.get(info.key, max_bytes=TRACE_CAP).decode()
            except (NotFound, ValueError):
                continue
        if traces:
            return from_chrome(traces)
    return None


def beside(plan: Plan, spec: RunSpec, run: str, store_url: str | None, steps: Sequence[Timeline]) -> list[Timeline]:
    """``steps``, then one that the run's ranks traced in the plan's layout, and the plan's simulated with the rates
    that its programs had. PlanError where the run trains something else, or left no
    trace of the layout."""
    from flows.show.foretell import yardstick

    store = store_at(store_url)
    run = find_run(store, run)
    theirs = read_run(store, run).spec
    for name, own, other in (("model", spec.model, theirs.model), ("train", spec.train, theirs.train)):
        differ = [k for k, v in own if k not in _NO_TIME and v != getattr(other, k)]
        if differ:
            first = f"{name}.{differ[0]}"
            raise PlanError(
                f"run {run} trains something else: {first} is {getattr(other, differ[0])} there and "
                f"{getattr(own, differ[0])} in this spec; give --run one of the runs of this spec"
            )
    traced = ""
    for attempt in reversed(RunLog(store, run).fold(quick=True).attempts[-TRACED:]):
        measured = read_traces(store, run, [attempt.epoch])
        if measured is not None and same_layout(how_map(spec), attempt.how):
            cost = fitted(plan, [measured], yardstick(len(plan.ranks)))
            again = simulate(from_plan(plan, cost), cost, title="simulated with the measured programs' rates").timeline
            return [*steps, measured, again]
        if measured is not None:
            traced = traced or f"{_layout(attempt)}, {attempt.how.get('parallel', {}).get('schedule', '1f1b')}"
    if not traced:
        raise PlanError(f"run {run} left no trace of a step; set launch.trace = true and let it train some steps")
    raise PlanError(
        f"run {run} left no trace of a step in this layout, {layout_words(how_map(spec))}, {spec.parallel.schedule}; "
        f"its newest is of {traced}: set parallel.… as it was there, or train some steps in this one"
    )


def report_facts(
    store: Store, run: str, *, flops_per_token: float = 0.0, peak_flops: float = 0.0, **more: Any
) -> ReportFacts:
    """The report's facts, all read from the store; ``more`` overrides (the demo adds its proof and its sample).

    MFU only where the peak of the machine that trained is known.
    """
    from flows.show import foretell

    state = RunLog(store, run).fold(quick=True)
    prepared = read_run(store, run)
    epochs = [a.epoch for a in state.attempts]
    numbers = {epoch: number for number, epoch in enumerate(epochs, 1)}
    index = read_curve(store, run, epochs, tails=TAILS)
    curve = on_line(index.curve(), ordered_back(state))
    scores = line_evaluations(store, state)
    simulation = foretell.simulate(prepared.plan)
    measured = read_traces(store, run, epochs)
    rates = [point.tokens_per_s for point in curve.values() if point.tokens_per_s]
    newest = state.restore_candidates()[:1]
    size = (
        load_manifest(store, run, newest[0]).total_bytes if newest else None
    )  # the same for every checkpoint of a run
    rate = sorted(rates)[len(rates) // 2] if rates else None
    known: dict[str, Any] = {
        "run": run,
        "store": store.url,
        "mfu": rate * flops_per_token / peak_flops if rate and peak_flops else None,
        "outcome": state_word(state),
        "reason": state.ended.reason if state.ended and state_word(state) not in ("open", "succeeded") else "",
        "steps": max(curve, default=0),
        "curve": {step: point.loss for step, point in curve.items()},
        "attempts": attempt_facts(state, index.rows),
        "checkpoints": [
            {"step": c.step, "attempt": numbers.get(c.epoch), "bytes": size, "state_digest": c.state_digest}
            for c in state.listed()
        ],
        "tokens_per_s": rate,
        "digest": newest[0].state_digest if newest else None,
        "parameters": prepared.plan.parameters,
        "stages": prepared.spec.parallel.stages,
        "memory_text": foretell.facts(prepared.plan, prepared.spec, simulation)["memory_text"],
        "timeline_svg": timeline_svg([simulation.timeline, *([measured] if measured else [])]),
        "measured": measured is not None,
        "evaluations": score_table(scores),
        "validation": {row.step: row.loss for row in scores if row.loss is not None},
        "sample": next((row.sample for row in reversed(scores) if row.sample), ""),
    }
    return ReportFacts(**{**known, **more})
