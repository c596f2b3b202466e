"""A run, from spec to the objects that identify it: plain functions, no Prefect, no processes.

``load_run`` makes a ``Prepared`` run (dataset, resolved spec, plan) of what the store holds, for resume, fork, report
and generate; ``begin.py`` makes one of a spec. ``fold_view`` reads a folded log as the driver's ``LogView``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from checkpoint.amendments import NONE, Amendments
from checkpoint.codec import pack, unpack
from checkpoint.errors import Damaged, NotFound
from checkpoint.keys import INDEX, index_key, is_run, plan_key, run_key, spec_key
from checkpoint.log import AttemptInfo, Intervention, RunLog, RunState
from checkpoint.probe import ensure_probed
from checkpoint.read import refuse_newer
from checkpoint.store import Store
from checkpoint.store.base import is_hint
from flows.data import load_dataset
from flows.drive.decide import opened, superseded
from flows.drive.persons import who
from flows.drive.views import AttemptView, LogView, OrderView, Policy, RunLayout, Saves, StartAttempt
from trainer.dataset import DatasetRef
from trainer.errors import PlanError, SpecError
from trainer.plan import Plan, compile_plan
from trainer.plan.memory import host_kinds
from trainer.plan.records import PositionPlan
from trainer.spec import (
    GUARD,
    HOW_OF_WHAT,
    RunSpec,
    how_map,
    other_name,
    parse_spec,
    run_id,
    set_key,
    what_bytes,
    what_digest,
    with_how,
)
from trainer.spec_layouts import how_ranks, layout_words, other_hows, same_layout
from trainer.wire import PLAN_PLAIN
from trainer.wire.plan import parse, version_of
from trainer.wire.unreadable import Unreadable

log = logging.getLogger(__name__)

SPEC_CAP = 1 << 20
INDEX_CAP = 1 << 16
PLAN_HEAD = 16
WHAT_KEYS = ("name", "model", "data", "train")


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be driven: its name, its resolved spec, its data, and the plan of its present layout."""

    run: str
    spec: RunSpec
    dataset: DatasetRef
    what: bytes
    plan: Plan
    schedule: str = ""
    """The schedule that it is a firing of; its entry in the store's list of runs names it."""

    @property
    def nodes(self) -> int:
        return self.spec.launch.nodes

    @property
    def ranks(self) -> int:
        return self.spec.parallel.ranks

    def policy(
        self,
        launch: str,
        layouts: Sequence[RunLayout] = (),
        *,
        detaches: bool = False,
        amendments: Amendments = NONE,
    ) -> Policy:
        """The spec's recovery half as the driver takes it. ``layouts``: as `layouts_of` gives them; ``detaches``: of
        the launcher; ``amendments``: the log's.
        """
        spec, how = self.spec, how_map(self.spec)
        nodes, on_cuda = self.plan.on_nodes(self.nodes), spec.parallel.on_cuda(spec.launch.kernel_path)
        return Policy(
            steps=amendments.total(spec.train.steps),
            launch=launch,
            nodes=self.nodes,
            ranks=self.ranks,
            stall_s=spec.launch.stall_s,
            commit_s=spec.checkpoint.commit_s,
            max_same_step=spec.recovery.max_same_step,
            backoff_s=spec.recovery.backoff_s,
            backoff_max_s=spec.recovery.backoff_max_s,
            capacity_s=spec.recovery.capacity_s,
            skips_diverged=spec.recovery.on_divergence == "skip",
            on_explosion=spec.recovery.on_explosion,
            max_skips=spec.recovery.max_skips,
            layouts=tuple(layouts),
            layout=next((i for i, layout in enumerate(layouts) if same_layout(layout.how, how)), 0),
            detaches=detaches,
            device_hours=spec.limits.device_hours,
            node_bytes=max(sum(_without_slots(p, on_cuda) for p in node) for node in nodes),
        )


def _without_slots(position: PositionPlan, on_cuda: bool) -> int:
    """Bytes of the engine's container; its slots are the agent's."""
    kinds = host_kinds(position, on_cuda)
    return sum(kinds.values()) - kinds["slots"]


def ready_store(store: Store) -> None:
    """Probe a store before its first write. Raises StoreRefused with the reason where it cannot order writers."""
    ensure_probed(store)


class Board(Protocol):
    """Where the parts of a job are shown as they begin and end; what a block gives to the function is its last word."""

    def task(self, key: str, name: str) -> AbstractContextManager[Callable[[str], None]]: ...


class NoBoard:
    """Shows nothing."""

    @contextlib.contextmanager
    def task(self, key: str, name: str) -> Iterator[Callable[[str], None]]:
        yield lambda _: None


def create_run(prepared: Prepared, store: Store, begins: Callable[[], None] | None = None) -> None:
    """The objects by which a run is known, created where they are not there: its What, its plan, its place in the list.
    ``begins``: writes the record by which the log of a fork begins. A run is listed after that: whoever resumed one
    whose fork was killed in between would train it from its start.

    Raises SpecError where another run has this name, Damaged where its What cannot be read or its log is missing,
    PlanError where its plan is there and damaged, OtherVersion.
    """
    run, spec = prepared.run, prepared.spec
    readable(store, run)
    if not store.create(spec_key(run), what_bytes(spec, prepared.dataset)):
        load_what(store, run)  # refuses a damaged one as that
        raise SpecError(f"run {run} is there already, and trains something else; choose another name (--set name=…)")
    publish_plan(store, run, prepared.plan)
    if begins is not None:
        begins()
    entry = {"v": 1, "run": run, "name": spec.name, "owner": who(), "packing": spec.data.packing}
    store.create(index_key(run), pack(entry | ({"schedule": prepared.schedule} if prepared.schedule else {})))


def as_begun(
    spec: RunSpec, dataset: DatasetRef, store: Store, suffix: str = "", say: Callable[[str], None] = log.info
) -> RunSpec:
    """The resolved spec; where an older version began a run of the same spec, as that run has it, so that it is found
    again by its name.

    Of a key that the spec leaves open: ``data.packing``, which was "across" then. A version that knows the new default
    says in the list of runs which it took, and the older ones did not: what a person chose since is no such run.
    """
    resolved = spec.resolve(dataset)
    if spec.data.packing is not None or resolved.data.packing == "across":
        return resolved
    old = spec.model_copy(update={"data": spec.data.model_copy(update={"packing": "across"})}).resolve(dataset)
    run = run_name(old, dataset, suffix)
    try:
        if store.get(spec_key(run), max_bytes=SPEC_CAP) != what_bytes(old, dataset):
            return resolved
    except NotFound:
        return resolved
    if "packing" in index_entry(store, run):
        return resolved
    say(
        f'run {run} was begun by an older version, whose default was data.packing = "across": it goes on so; '
        'packing = "within" in the spec makes a new run'
    )
    return old


def index_entry(store: Store, run: str) -> Mapping[str, Any]:
    """What the list of runs says of a run; nothing where it is missing or empty, as the first versions left it."""
    try:
        known = unpack(store.get(index_key(run), max_bytes=INDEX_CAP), f"entry of {run}", max_bytes=INDEX_CAP)
    except (NotFound, Damaged):
        return {}
    return known if isinstance(known, dict) else {}


def run_name(spec: RunSpec, dataset: DatasetRef, suffix: str = "") -> str:
    """The run's name; ``suffix`` joins it."""
    return run_id(spec, dataset) + (f"-{suffix}" if suffix else "")


def under(prepared: Prepared, store: Store, how: Mapping[str, Any]) -> Prepared:
    """The same run with another How; its plan is in the store. SpecError or PlanError where this version cannot."""
    other = compiled(prepared, spec_under(prepared.spec, how))
    publish_plan(store, prepared.run, other.plan)
    return other


def compiled(prepared: Prepared, spec: RunSpec) -> Prepared:
    """The same run by a spec of the same What. PlanError where no plan can be made."""
    return replace(prepared, spec=spec, plan=compile_plan(spec, prepared.dataset, prepared.what))


def spec_under(spec: RunSpec, how: Mapping[str, Any]) -> RunSpec:
    """The spec with another How, checked as any spec is."""
    what = spec.model_dump(mode="json", include={"name", "model", "data", "train"})
    return parse_spec(with_how(what, how), origin="its order")


def layouts_of(prepared: Prepared, state: RunState) -> tuple[RunLayout, ...]:
    """The layout that was asked for last, then those that the spec allows where there is no room for it, best first."""
    asked, how = state.asked_how, how_map(prepared.spec)
    if asked is not None and asked != how:
        with contextlib.suppress(SpecError):  # of another version: what this one drives is all that it knows
            how = how_map(spec_under(prepared.spec, asked))
    hows: list[Mapping[str, Any]] = [how, *other_hows(how)]
    return tuple(RunLayout(int(h["launch"]["nodes"]), how_ranks(h), h) for h in hows)


def check_layouts(prepared: Prepared) -> None:
    """PlanError where one of the layouts that the spec allows makes no plan."""
    for number, how in enumerate(other_hows(how_map(prepared.spec))):
        try:
            compiled(prepared, spec_under(prepared.spec, how))
        except PlanError as error:
            name = other_name(prepared.spec.recovery, number)
            raise PlanError(f"{name} ({layout_words(how)}): {error}") from error


def publish_plan(store: Store, run: str, plan: Plan) -> None:
    """Create the plan object that the agents fetch. Raises PlanError where a damaged one has its name."""
    key = plan_key(run, plan.digest)
    if store.create(key, plan.to_bytes()):
        return
    try:
        parse(store.get(key, max_bytes=len(plan.to_bytes()) + 1))
        why = "it is another one than its name says"
    except (Damaged, Unreadable) as error:
        why = str(error)
    raise PlanError(
        f"plan {key} in {store.describe()} is damaged, or of another version: {why}; remove that object and start "
        "again (the plan is compiled anew)"
    )


def still_read(store: Store, prepared: Prepared, attempt: AttemptInfo) -> bool:
    """Whether nodes of this version run that attempt's plan; one of an older version is compiled anew, for the same
    bits, and so is one of other numerics, for other ones.
    """
    if attempt.numerics != prepared.plan.config.numerics_version:
        return False
    plan = attempt.plan
    try:
        version = version_of(store.get(plan_key(prepared.run, plan), first=0, length=PLAN_HEAD))
    except (NotFound, Damaged):
        return True  # they say what is wrong with it
    return not 0 < version < PLAN_PLAIN


def run_names(store: Store) -> Iterator[str]:
    """Every run of the store, by name. What else lies there (a copy that a tool made beside a name) is none."""
    names = (info.key.removeprefix(INDEX) for info in store.list(INDEX))
    return filter(is_run, names)


def find_run(store: Store, name: str) -> str:
    """The full name of a run, from it, from the name in its spec, or from a beginning, where only one run has that.
    Raises SpecError otherwise.
    """
    if not name.strip():  # of one run alone every name is a beginning
        raise SpecError("the name of the run is empty: write it; is a variable of the shell unset?")
    names = list(run_names(store))
    if name in names:
        return name
    of_spec = [n for n in names if n.rpartition("-")[0] == name]
    fitting = of_spec if len(of_spec) == 1 else [n for n in names if n.startswith(name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SpecError(f"{name!r} is the beginning of {', '.join(fitting[:5])}; write more of the name")
    known = f"; it has {', '.join(names[:8])}" if names else "; it has no runs"
    folder = f"; a run of the model in that folder: hotstage import {shlex.quote(name)}" if os.path.isdir(name) else ""
    raise SpecError(f"there is no run {name!r} in {store.describe()}{known} (see --store and HOTSTAGE_STORE){folder}")


def readable(store: Store, run: str) -> RunState:
    """The run's log, before anything is written for it. OtherVersion where a newer hotstage has gone on with it, or
    wrote what it would go on from. Damaged where there is state without a log (a copy of a store that is not whole):
    the run would be trained anew, under the names of what is there.
    """
    state = RunLog(store, run).fold(quick=True).of_this_version()
    there = None if state.n else next(iter(store.list(run_key(run, "chunks") + "/")), None)
    if there is not None and not RunLog(store, run).fold(quick=True).n:  # nobody began it in between
        raise Damaged(
            f"run {run} has state in {store.describe()} (such as {there.key}) and no log: a copy of a store that is "
            f"not whole? Copy runs/{run}/log/ too, or remove runs/{run}/ to begin anew"
        )
    for newest in state.restore_candidates()[:1]:
        refuse_newer(store, run, newest)
    return state


def is_gone(store: Store, run: str, state: RunState) -> bool:
    """Whether nothing of it is there but its name in the index, and hints: somebody has removed its folder."""
    if state.n or state.unreadable is not None:
        return False
    return all(is_hint(info.key) for info in store.list(run_key(run) + "/"))


def load_what(store: Store, run: str) -> dict[str, Any]:
    """The What of a run as it was written at its birth."""
    try:
        what = unpack(store.get(spec_key(run), max_bytes=SPEC_CAP), f"spec of {run}", max_bytes=SPEC_CAP)
    except NotFound:
        raise SpecError(
            f"run {run} has no spec in {store.describe()}: where runs/{run}/ was removed, remove {index_key(run)} too"
        ) from None
    if not isinstance(what, dict):
        raise Damaged(f"the spec of run {run} is not a map")
    return what


def spec_tree(what: Mapping[str, Any], name: str, how: Mapping[str, Any]) -> dict[str, Any]:
    """A spec's plain values again, from a What and a How."""
    data = {k: v for k, v in what["data"].items() if k != "digest"}
    source = {"source": f"dataset:{what['data']['digest']}", **data}
    return with_how({"name": name, "model": what["model"], "data": source, "train": what["train"]}, how)


def load_spec_of(
    store: Store, run: str, how: Mapping[str, Any], sets: Sequence[str] = ()
) -> tuple[RunSpec, DatasetRef]:
    """A run's RunSpec again: its What from the store, its How from an attempt, with overrides of the How only."""
    what = load_what(store, run)
    for text in sets:
        key = set_key(text)
        if key[0] not in WHAT_KEYS or key in (*HOW_OF_WHAT, GUARD):
            continue
        orders = {"steps": "to end it at another step, --steps N", "lr": "to lower its rate, --lr-scale FACTOR"}
        order = orders.get(key[-1])
        raise SpecError(
            f"--set {text} changes what is trained, and a run's What is fixed; start another run from a checkpoint: "
            f"hotstage runs fork {run} --step N --set {shlex.quote(text)}" + (f"; or, {order}" if order else "")
        )
    tree = spec_tree(what, run.rsplit("-", 1)[0][:40] if "-" in run else run, how)
    return parse_spec(tree, sets, origin=run), load_dataset(store, what["data"]["digest"])


def load_run(store: Store, run: str) -> Prepared:
    """As `read_run`, to be driven: its plan is published."""
    prepared = _loaded(store, run, ruling_how(_begun(store, run)), ())
    publish_plan(store, run, prepared.plan)
    return prepared


def read_run(store: Store, run: str) -> Prepared:
    """A run as the store knows it, with the How that rules now. Writes nothing: for whoever only looks."""
    return _loaded(store, run, ruling_how(readable(store, run)), ())


def ask_run(store: Store, run: str, sets: Sequence[str]) -> Prepared:
    """A run with the How that was last asked for and ``sets`` over it: what ``orders.place_order`` makes an order."""
    prepared = _loaded(store, run, _begun(store, run).asked_how, sets)
    publish_plan(store, run, prepared.plan)
    check_layouts(prepared)
    return prepared


def _begun(store: Store, run: str) -> RunState:
    """As `readable`. SpecError where the run begins from weights that are not stored whole yet: it would begin from
    random ones."""
    state = readable(store, run)
    whole = state.parent is not None or state.at_step() is not None
    if not whole and load_what(store, run)["model"].get("init"):
        raise SpecError(
            f"run {run} begins from weights that were not stored to their end (model.init): `hotstage train` with its "
            "spec goes on with that"
        )
    return state


def _loaded(store: Store, run: str, how: Mapping[str, Any] | None, sets: Sequence[str]) -> Prepared:
    spec, dataset = load_spec_of(store, run, how or {}, sets)
    resolved = spec.resolve(dataset)
    what = what_digest(resolved, dataset)
    return Prepared(run, resolved, dataset, what, compile_plan(resolved, dataset, what))


# --- the log, read ------------------------------------------------------------------------------------------


def ruling_how(state: RunState) -> Mapping[str, Any] | None:
    """The How that every driver follows: the newest attempt's, or that of an order which it does not follow yet."""
    newest = state.newest_attempt
    return state.asked_how if newest is None or asks_layout(state) else newest.how


def opened_again(state: RunState) -> bool:
    """Whether a run that had ended is to go on by a person's order."""
    orders = tuple(order_view(o) for o in state.orders)
    return state.ended is not None and opened(LogView(ended=state.ended.outcome, ended_n=state.ended.n, orders=orders))


def is_superseded(state: RunState) -> bool:
    """``flows.drive.decide.superseded`` of the newest attempt and the order that stands."""
    newest, orders = state.newest_attempt, state.orders
    if newest is None or not orders:
        return False
    later = tuple(order_view(order) for order in orders if order.n > newest.order)
    return superseded(LogView(attempts=(attempt_view(newest),), orders=later))


def asks_layout(state: RunState) -> bool:
    """Whether a person's order waits to be followed: it is for the layout that was asked for, whatever the run had to
    make of that. An order of the driver's own is for the layout that there is.
    """
    newest = state.attempts[-1].order if state.attempts else 0
    return is_superseded(state) and any(order.n > newest and not order.body.get("own") for order in state.orders)


def order_view(order: Intervention) -> OrderView:
    """An order as the driver's plain data."""
    body = order.body
    by = f"{body['by']} ({body['via']})"
    again, anew, own = (bool(body.get(key)) for key in ("again", "anew", "own"))
    return OrderView(order.n, body["how"], by, again, anew, order.start, own)


def attempt_view(a: AttemptInfo) -> AttemptView:
    """An attempt as the driver's plain data."""
    return AttemptView(
        epoch=a.epoch,
        launch=a.launch,
        nodes=a.nodes,
        ranks=a.ranks,
        plan=a.plan,
        restore_step=a.step,
        restore_checkpoint=a.checkpoint,
        restore_slots=(a.slots["step"], a.slots["epoch"]) if a.slots else None,
        slot_epochs=tuple(a.body.get("slot_epochs", ())),
        cause=a.body.get("cause"),
        order=a.order,
        how=a.how,
        pardon=tuple(str(p) for p in a.body.get("pardon") or ()),
    )


def fold_view(state: RunState) -> LogView:
    """A folded log as the driver's plain data."""
    parent, points, best = state.parent, state.checkpoints, state.restore_candidates()
    return LogView(
        attempts=tuple(attempt_view(a) for a in state.attempts),
        checkpoints=Saves(points.n, points.step, points.epoch),
        candidates=Saves(best.column("n"), best.column("step"), best.column("epoch")),
        ended=state.ended.outcome if state.ended else None,
        parent=(str(parent["run"]), int(parent["checkpoint"]), int(parent["step"])) if parent else None,
        ended_n=state.ended.n if state.ended else 0,
        damaged=tuple(sorted(state.damaged)),
        orders=tuple(order_view(o) for o in state.orders),
        amendments=state.amendments,
    )


def fallback_body(state: RunState, begin: StartAttempt) -> Mapping[str, Any] | None:
    """What the next attempt's record says of a layout that nobody asked for: what is so now, or was so before."""
    if begin.fallback is not None:
        return begin.fallback.to_map()
    newest = state.newest_attempt
    if newest is None or not newest.fell_back or begin.layout is not None or asks_layout(state):
        return None
    kept: Mapping[str, Any] = newest.body.get("fallback") or {"kind": "capacity", "why": newest.reason}
    return kept


def attempt_body(
    prepared: Prepared,
    launch: str,
    restore: Mapping[str, Any],
    *,
    same: AttemptInfo | None = None,
    order: int = 0,
    amendments: Amendments = NONE,
    **more: Any,
) -> dict[str, Any]:
    """The body of an ``attempt`` record. ``same``: that whose plan it keeps, where that is not this version's;
    ``order``: the one that it follows.
    """
    if order:
        more["order"] = order
    if amendments:
        more["amendments"] = amendments.to_map()
    return {
        "launch": launch,
        "nodes": prepared.nodes,
        "ranks": prepared.ranks,
        "how": how_map(prepared.spec),
        "plan": same.plan if same else prepared.plan.digest,
        "numerics": same.numerics if same else prepared.plan.config.numerics_version,
        "what": prepared.what.hex(),
        "restore": dict(restore),
        **more,
    }
