"""Training from Python: ``run = flows.train(spec)``, ``run.wait()``, ``run.result()``; and what flow and command call.

Example::

    import flows
    run = flows.train("examples/demo.toml", store="file:///data/hotstage")
    run.wait()
    print(run.result().state_digest)

The run does not depend on this process: kill it, and ``hotstage runs resume`` (or the same call again) goes on.
"""

from __future__ import annotations

import atexit
import logging
import os
import shlex
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint.errors import StoreRefused
from checkpoint.log import RunLog, ended_body
from checkpoint.store import Store, address, endpoint_of, open_store
from flows.drive.amend import Wish
from flows.drive.begin import prepare_run
from flows.drive.claims import StoreClaims
from flows.drive.driving import Driving
from flows.drive.evaluations import Evaluating
from flows.drive.events import Outcome, Sink, Sinks
from flows.drive.loop import Driver
from flows.drive.orders import Asked, place_order
from flows.drive.replays import Replays
from flows.drive.run import Prepared, ask_run, readable
from flows.proxies import reach_directly
from flows.tracking.tracker import Trackers
from trainer.folders import data_folder
from trainer.launch import Launch, Launcher, Watching
from trainer.local_launch import LocalLauncher
from trainer.spec import RunSpec, how_map, load_spec, parse_spec

log = logging.getLogger(__name__)

OUT = Path("out")


def default_store() -> str:
    """``HOTSTAGE_STORE``, else a folder of the user's data folder."""
    known = os.environ.get("HOTSTAGE_STORE")
    if known:
        return known
    try:
        return str(data_folder())
    except RuntimeError as error:
        raise StoreRefused(
            "this user has no home folder for the default store: give one with --store or HOTSTAGE_STORE"
        ) from error


def store_at(url: str | None) -> Store:
    """The store at a URL or a plain folder (``checkpoint/store/address.py``); the default one for None."""
    return open_store(store_url(url))


def store_url(text: str | None) -> str:
    """The URL of a store as a person wrote it; of the default one for None."""
    url = address(default_store() if text is None else text)
    reach_directly(partial(endpoint_of, url), os.environ)
    return url


def launcher_for(spec: RunSpec, out: Path, store: Store, run: str) -> Launcher:
    """The launcher that a spec's ``launch.target`` asks for; a run's local launches are claimed in its store."""
    if spec.launch.target == "local":
        return LocalLauncher(out, claims=StoreClaims(store, run))
    from k8s.api import Api
    from k8s.launcher import KubernetesLauncher
    from k8s.render import check_fabric

    check_fabric(spec)
    return KubernetesLauncher(Api.load(), spec.launch.namespace)


def launch_for(store_url: str, out: Path, prepared: Prepared, launch_id: str, avoid: tuple[str, ...]) -> Launch:
    """All that a launcher must know of a run, to start its nodes under that name."""
    return Launch(
        run=prepared.run,
        launch_id=launch_id,
        nodes=prepared.nodes,
        store_url=store_url,
        work_root=out,
        how=how_map(prepared.spec),
        spec=prepared.spec,
        plan=prepared.plan,
        avoid=avoid,
    )


def make_driver(
    prepared: Prepared,
    store: Store,
    *,
    sink: Sink | None = None,
    out: Path = OUT,
    stop: threading.Event | None = None,
) -> Driver:
    """A driver for a prepared run, with the launcher that its spec asks for."""
    launcher, trackers = launcher_for(prepared.spec, out, store, prepared.run), Trackers(store, prepared.run)
    return Driver(
        prepared,
        store,
        launcher,
        partial(launch_for, store.url, out),
        replays=Replays(store, prepared.run, out, elsewhere=launcher.detaches),
        evaluating=Evaluating(store, prepared.run, elsewhere=launcher.detaches),
        sink=Sinks((sink, trackers)) if sink is not None else trackers,
        trackers=trackers,
        stop=stop or threading.Event(),
        driving=Driving(store, prepared.run, out),
    )


@dataclass
class Run:
    """A run that is being driven by a thread of this process.

    ``wait(timeout)`` returns True once it has ended; ``result()`` waits and gives the Outcome, or raises what stopped
    the driver; ``stop()`` has the gang save its state and leave; ``cancel()`` ends the run for good.
    """

    prepared: Prepared
    store: Store
    driver: Driver
    host: Callable[[Driver], Outcome] = Driver.run
    """Runs the driver, with what else belongs to it."""
    _done: threading.Event = field(default_factory=threading.Event)
    _outcome: Outcome | None = None
    _error: BaseException | None = None

    @property
    def name(self) -> str:
        """The run's name, ``<spec name>-<6 hex digits>``."""
        return self.prepared.run

    def start(self) -> Run:
        """Begin to drive; returns itself."""
        threading.Thread(target=self._work, name=f"drive-{self.name}", daemon=True).start()
        return self

    def _work(self) -> None:
        try:
            self._outcome = self.host(self.driver)
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()
            if isinstance(self.driver.launcher, Watching):
                self.driver.launcher.close()

    @property
    def error(self) -> BaseException | None:
        """What stopped the driver before the run's end; None where nothing has."""
        return self._error

    def wait(self, timeout: float | None = None) -> bool:
        return self._done.wait(timeout)

    def result(self) -> Outcome:
        self._done.wait()
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    def stop(self) -> None:
        self.driver.stop.set()

    def left(self) -> None:
        """This process ends: say what becomes of a run that has not."""
        if not self._done.is_set():
            log.warning(
                "this program ends, and run %s has not: nobody drives it from here on. Call wait() or result() of what "
                "flows.train gave, to stay until its end; `hotstage runs resume %s --store %s` goes on",
                self.name,
                self.name,
                shlex.quote(self.store.url),
            )

    def cancel(self, reason: str = "cancelled by the user") -> None:
        cancel(self.store, self.name, reason)


def cancel(store: Store, run: str, reason: str = "cancelled by the user") -> bool:
    """Write the run's end; its nodes leave by themselves. False where it had ended before. Damaged where its log is
    missing: with an end alone it would be taken for one that has nothing.
    """
    from checkpoint.errors import Conflict

    log = RunLog(store, run, writer="user")
    state = log.fold()
    if not state.n:
        readable(store, run)
    while not state.ended:
        try:
            log.append("ended", ended_body(state, "cancelled", reason), state)
            return True
        except Conflict as conflict:
            state = conflict.state
    return False


def train(
    spec: RunSpec | Mapping[str, Any] | str | Path,
    *,
    store: str | Path | Store | None = None,
    sets: str | Sequence[str] = (),
    sink: Sink | None = None,
    out: str | Path = OUT,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """Start (or attach to) the run of a spec and drive it in a thread. A spec may be a file's name, or what such a file
    holds; ``sets`` are overrides as those of ``--set``.

    Raises SpecError, PlanError, DatasetError or StoreRefused before anything is launched.
    """
    the_store = _opened(store)
    run_spec = _spec_of(spec, _several(sets))
    prepared = place_order(the_store, prepare_run(run_spec, the_store, out=Path(out), say=say), Asked("flows.train"))
    return _started(prepared, the_store, sink, out)


def _started(prepared: Prepared, store: Store, sink: Sink | None, out: str | Path) -> Run:
    """Driven; a program that ends before the run is told so."""
    run = Run(prepared, store, make_driver(prepared, store, sink=sink, out=Path(out))).start()
    atexit.register(run.left)
    return run


def _opened(store: str | Path | Store | None) -> Store:
    if store is None or isinstance(store, str):
        return store_at(store)
    return store_at(str(store)) if isinstance(store, Path) else store


def _several(sets: str | Sequence[str]) -> Sequence[str]:
    """One override may stand alone."""
    return [sets] if isinstance(sets, str) else sets


def _spec_of(spec: RunSpec | Mapping[str, Any] | str | Path, sets: Sequence[str]) -> RunSpec:
    if isinstance(spec, RunSpec):
        return parse_spec(spec.model_dump(exclude_unset=True), sets) if sets else spec
    return parse_spec(spec, sets) if isinstance(spec, Mapping) else load_spec(spec, sets)


def resume(
    run: str,
    *,
    store: str | Path | Store | None = None,
    sets: str | Sequence[str] = (),
    wish: Wish | None = None,
    sink: Sink | None = None,
    out: str | Path = OUT,
) -> Run:
    """Drive a run of the store again, with another How where ``sets`` says so, other numbers where ``wish`` does."""
    the_store = _opened(store)
    prepared = place_order(
        the_store, ask_run(the_store, run, _several(sets)), Asked("flows.resume", again=True, wish=wish or Wish())
    )
    return _started(prepared, the_store, sink, out)
