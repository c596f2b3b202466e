"""A sweep driven in this process: each point's run with a page of its own, the table on the sweep's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from checkpoint.store import Store
from flows.data import prepare
from flows.drive.begin import data_of, prepare_run
from flows.drive.events import NoSink, Outcome, Sink
from flows.drive.orders import Asked, place_order
from flows.drive.run import ready_store
from flows.drive.train import cancel
from flows.hosting import END_PATIENCE_S, Hosted
from flows.page import Page
from flows.prefect_api import Client
from flows.recurring.sweep import SweepRow, pointed_specs, run_points, sweep_table, sweep_words, table_lines
from trainer.local_launch import ready_to_launch
from trainer.spec import RunSpec


def drive_sweep(
    spec: RunSpec,
    points: Sequence[Sequence[str]],
    at_once: int,
    store: Store,
    out: Path,
    *,
    connect: Callable[[], Client | None] | None = None,
    suffix: str = "",
    say: Callable[[str], None] = lambda _: None,
    stop: threading.Event | None = None,
    no_more: threading.Event | None = None,
    drives: Callable[[str], AbstractContextManager[Sink]] = lambda _: contextlib.nullcontext(NoSink()),
    tell: Callable[[Sequence[SweepRow]], None] = lambda _: None,
    patience_s: float = END_PATIENCE_S,
) -> list[SweepRow]:
    """The sweep to its end. ``connect``: how a run's page reaches Prefect; None: without. ``tell`` hears the rows as
    they change; ``drives``, of a run's name, is the context in which that is driven, and gives who hears of it. After
    ``stop`` the runs save and leave, after ``no_more`` none begins. SpecError before anything begins where a point is
    refused.
    """
    specs = pointed_specs(spec, points)
    stop = stop or threading.Event()
    if any(one.launch.target == "local" for one in specs):
        ready_to_launch(out)
    ready_store(store)
    with data_of(specs[0], store) as data:
        prepare(data, store, say=say, sequence=specs[0].train.sequence)  # once, before several want the same

    def drive(one: RunSpec, named: Callable[[str], None]) -> Outcome:
        page = Page(connect, store, name=one.name, parameters={"store": store.url}, warn=say) if connect else None
        with Hosted(store, out, page, say, patience_s=patience_s, stop=stop) as hosted:
            prepared = prepare_run(one, store, suffix=suffix, say=lambda _: None, board=hosted.board)
            place_order(store, prepared, Asked("sweep"))
            named(prepared.run)
            say(f"run {prepared.run} begins")
            with drives(prepared.run) as sink:
                outcome = hosted.drive(prepared, sink)
            say(f"run {prepared.run}: {outcome.outcome.replace('_', ' ')}, step {outcome.step}")
            return outcome

    return run_points(specs, points, at_once, drive, store, stop=no_more or stop, tell=tell)


def hosted_sweep(
    spec: RunSpec,
    points: Sequence[Sequence[str]],
    at_once: int,
    store: Store,
    out: Path,
    *,
    flow_run: str,
    name: str,
    suffix: str,
    say: Callable[[str], None],
) -> list[SweepRow]:
    """The same for a flow run that Prefect started: its table is kept true there, a cancel of it cancels the runs."""
    no_more, now = threading.Event(), list[SweepRow]()

    def end_runs() -> None:
        no_more.set()
        for row in list(now):
            if row.state == "trains":
                cancel(store, row.run, f"the sweep was cancelled on Prefect's page ({name})")

    page = Page(lambda: Client.connect(None), store, name=name, flow_run=flow_run, warn=say, cancelled=end_runs).start()

    def told(text: str) -> None:
        say(text)
        page.line(text)

    def tell(rows: Sequence[SweepRow]) -> None:
        now[:] = rows
        page.table(f"{name}-sweep", sweep_table(rows), sweep_words(rows))
        if no_more.is_set():
            end_runs()

    try:
        rows = drive_sweep(
            spec, points, at_once, store, out, connect=lambda: Client.connect(None), suffix=suffix, say=told,
            no_more=no_more, tell=tell,
        )  # fmt: skip
        tell(rows)
        for line in (*table_lines(rows), sweep_words(rows)):
            told(line)
    finally:
        page.close(None, patience_s=END_PATIENCE_S)
    return rows
