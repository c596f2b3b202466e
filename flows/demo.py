"""The main job in front of your eyes, by the very flow that production uses: prepare, plan, train on two stages, kill
one, recover, prove the bits, export, sample, report. Everything is written under ``out/demo``.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from checkpoint.export_to import Folder
from checkpoint.log import RunLog
from checkpoint.store import Store
from flows.data import interpreter_note
from flows.drive.begin import prepare_run
from flows.drive.events import Event, NoSink, Outcome, Sink
from flows.drive.fork import fork_run
from flows.drive.live import StatusReader
from flows.drive.run import Prepared
from flows.drive.train import cancel, make_driver, store_at
from flows.hosting import Hosted, Prefect
from flows.page import Page
from flows.prefect_api import Client, PrefectSettingsError, configured, why_not
from flows.prefect_server import PrefectServer
from flows.show.export import checkpoint_at, export_hf
from flows.show.facts import report_facts
from flows.show.lines import Lines
from flows.show.peak import measured_peak
from flows.show.report import render
from flows.show.talk import generate
from trainer.errors import LaunchError, OutputError
from trainer.plan import flops_per_token
from trainer.spec import RunSpec

PROMPT = "class Queue:\n    def __init__(self"


@dataclass
class Killer:
    """Kills the last rank with SIGKILL once: halfway, between two snapshots, once a checkpoint is durable. Whichever
    of the two is told last.
    """

    store: Store
    run: str
    at_step: int
    say: Callable[[str], None]
    killed_rank: int | None = None
    _durable: bool = False
    _halfway: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, event: Event) -> None:
        self._durable |= event.kind == "checkpoint"
        self._halfway |= event.kind == "step" and int(event.facts["step"]) >= self.at_step
        if not (self._durable and self._halfway):
            return
        with self._lock:
            if self.killed_rank is None:
                self._kill()

    def _kill(self) -> None:
        newest = RunLog(self.store, self.run).fold().newest_attempt
        if newest is None:
            return
        for node in StatusReader(self.store, self.run, newest.launch).poll(newest.nodes, {}):
            for rank in reversed(node.ranks):
                if rank.pid and not rank.ended and node.epoch == newest.epoch:
                    self.say("")
                    self.say(
                        f">>> kill -9 {rank.pid}: rank {rank.rank} of {newest.ranks} dies in the middle of its work"
                    )
                    os.kill(rank.pid, signal.SIGKILL)
                    self.killed_rank = rank.rank
                    return


@dataclass(frozen=True)
class DemoResult:
    """What ``out/demo/result.json`` holds."""

    run: str
    attempts: int
    lost_steps: int
    recovery_s: float | None
    first_loss: float
    last_loss: float
    digest: str
    digest_one_stage: str
    seconds: float


class Voice(Protocol):
    """Who the demo speaks to; ``sink`` begins to show a run, ``quiet`` ends that."""

    def say(self, text: str) -> None: ...

    def sink(self, prepared: Prepared, every_s: float = 1.0) -> Sink: ...

    def quiet(self) -> None: ...


def demo(spec: RunSpec, out: Path, voice: Voice, *, use_prefect: bool = True) -> DemoResult:
    """Run the demo; raises where any of its parts does not do what it must."""
    began = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(out, error) from error
    store = store_at(str(out / "store"))
    with ThreadPoolExecutor(1, "prefect") as beside:  # its thread stays to the end: so does a server that it started
        prefect = beside.submit(_prefect, out, voice.say) if use_prefect else None
        page = _page(spec, out, store, voice.say, prefect) if prefect is not None else None
        try:
            with Hosted(store, out, page, voice.say) as hosted:
                return _demo(spec, out, voice, began, store, hosted, prefect)
        finally:
            voice.quiet()
            if prefect is not None and prefect.exception() is None:
                prefect.result().close()


def _prefect(out: Path, say: Callable[[str], None]) -> Prefect:
    """A Prefect server of the demo's own, unless Prefect's settings name one. Takes a second: Prefect is imported."""
    try:
        found = configured()
    except PrefectSettingsError as error:
        raise LaunchError(f"{error}, or use --no-prefect") from error
    if found is not None:
        why = why_not(found)
        if why:
            raise LaunchError(f"{why}; mend that, unset it, or use --no-prefect")
        return Prefect(say=say)
    server = PrefectServer((out / "prefect").absolute())
    server.start()
    return Prefect(server, say=say)


def _page(spec: RunSpec, out: Path, store: Store, say: Callable[[str], None], prefect: Future[Prefect]) -> Page:
    """The run's page, which begins before it is known where: what it is told until then is kept for it."""

    def connect() -> Client | None:
        known = prefect.done() and prefect.exception() is None
        return prefect.result().connect() if known else None

    page = Page(connect, store, name=spec.name, parameters={"store": store.url}, warn=say)
    page.report = str((out / "report.html").absolute())
    page.shown = lambda url: say(f"Prefect's page of this run: {url}" + prefect.result().while_it_runs)
    return page


def _demo(
    spec: RunSpec, out: Path, voice: Voice, began: float, store: Store, hosted: Hosted, prefect: Future[Prefect] | None
) -> DemoResult:
    say = voice.say
    say("1. data")
    prepared = prepare_run(spec, store, say=say, board=hosted.board)
    again = ""
    if RunLog(store, prepared.run).fold().n:  # an earlier demo's: its data are used again, its run is not
        again = time.strftime("%Y%m%dt%H%M%S", time.gmtime())
        prepared = prepare_run(spec, store, suffix=again)
    say("")
    say("2. the plan, before the first step")
    _show_plan(prepared, say)
    if prefect is not None:
        prefect.result()  # raises where one is named that cannot be used; its page nobody waits for
    say("")
    say(f"3. training on {prepared.spec.parallel.stages} stages, a rank each; one rank will be killed halfway")
    outcome = _train(prepared, store, hosted, voice)
    say("")
    say("4. the proof: the last part again, from a checkpoint, on one stage, undisturbed")
    proof = _prove(prepared, store, out, again)
    _compare(prepared, outcome, proof, say)
    say("")
    say("5. export, sample, report")
    return _report(prepared, outcome, proof, store, out, began, say)


def _show_plan(prepared: Prepared, say: Callable[[str], None]) -> None:
    from flows.show import foretell
    from trainer.amounts import seconds_text
    from trainer.plan.draw import timeline_text

    simulation = foretell.simulate(prepared.plan)
    told = foretell.facts(prepared.plan, prepared.spec, simulation)
    say(str(told["memory_text"]))
    say("")
    say(timeline_text(simulation.timeline))
    say(f"a step: {seconds_text(simulation.step_seconds)} foretold")


def _train(prepared: Prepared, store: Store, hosted: Hosted, voice: Voice) -> Outcome:
    """The run to its end, with a stage killed on the way."""
    steps = prepared.spec.train.steps
    killer = Killer(store, prepared.run, steps // 2 + prepared.spec.checkpoint.every // 2, voice.say)
    sinks: list[Sink] = [voice.sink(prepared, every_s=2.0), killer]
    if hosted.page is not None:
        sinks.append(Lines(hosted.page.line, steps, every_s=10.0))
    try:
        outcome = hosted.drive(prepared, *sinks)
    except BaseException:  # Ctrl-C above all: a demo that is left does not go on in the dark
        cancel(store, prepared.run, "the demo was left")
        raise
    finally:
        voice.quiet()
    if outcome.outcome != "succeeded":
        raise LaunchError(f"the run ended as {outcome.outcome}: {outcome.reason}")
    if killer.killed_rank is None or outcome.attempts < 2:
        raise LaunchError("the run ended before a rank could be killed; give it more steps (train.steps)")
    return outcome


def _prove(prepared: Prepared, store: Store, out: Path, again: str) -> Outcome:
    """A fork with the same What from a checkpoint before the kill, on one stage."""
    state = RunLog(store, prepared.run).fold()
    first_attempt = state.attempts[0].epoch
    # of the run's own line: one whose upload ended late may have been left behind by the attempt after it
    early = [c for c in state.restore_candidates() if c.epoch == first_attempt]
    if not early:
        raise LaunchError("no checkpoint of the first attempt is durable; lower checkpoint.every")
    name = f"{prepared.spec.name[:16]}-proof" + (f"-{again}" if again else "")
    sets = [f"name={name}", "parallel.stages=1", "launch.nodes=1", "launch.trace=false"]
    proof = fork_run(store, prepared.run, max(c.step for c in early), sets)
    try:
        outcome = make_driver(proof, store, sink=NoSink(), out=out).run()
    except BaseException:
        cancel(store, proof.run, "the demo was left")
        raise
    checkpoint_at(store, proof.run, prepared.spec.train.steps)
    return outcome


def _compare(prepared: Prepared, outcome: Outcome, proof: Outcome, say: Callable[[str], None]) -> None:
    say(f"   {prepared.spec.parallel.stages} stages, a rank killed and recovered:")
    say(f"     {outcome.state_digest}")
    say("   one stage, undisturbed:")
    say(f"     {proof.state_digest}")
    if outcome.state_digest != proof.state_digest or not outcome.state_digest or not proof.state_digest:
        raise LaunchError("the digests differ: this is a bug of hotstage")
    say("   equal: every weight, every moment, the step and the data position, bit for bit")


def _report(
    prepared: Prepared,
    outcome: Outcome,
    proof: Outcome,
    store: Store,
    out: Path,
    began: float,
    say: Callable[[str], None],
) -> DemoResult:
    """Weights, a sample, ``report.html`` and ``result.json``."""
    weights = Path(export_hf(store, prepared.run, None, Folder(out / "model")))
    sample = generate(store, prepared.run, PROMPT, tokens=160, temperature=0.7)
    say(f"   {weights} opens in transformers")
    say("   a sample:")
    for line in sample.splitlines():
        say(f"   | {line}")
    spec, seconds = prepared.spec, time.monotonic() - began
    facts = report_facts(
        store,
        prepared.run,
        flops_per_token=flops_per_token(spec.model, spec.train.sequence),
        peak_flops=measured_peak(),
        digest_one_stage=proof.state_digest,
        sample=sample,
        seconds=seconds,
        data_note=f"trained on {interpreter_note()}" if spec.data.source == "python-stdlib" else spec.data.source,
    )
    (out / "report.html").write_text(render(facts), encoding="utf-8")
    losses = list(facts.curve.values())
    assert outcome.state_digest is not None
    assert proof.state_digest is not None
    result = DemoResult(
        run=prepared.run,
        attempts=outcome.attempts,
        lost_steps=outcome.lost_steps,
        recovery_s=outcome.recovery_s,
        first_loss=losses[0],
        last_loss=losses[-1],
        digest=outcome.state_digest,
        digest_one_stage=proof.state_digest,
        seconds=seconds,
    )
    (out / "result.json").write_text(json.dumps(result.__dict__, indent=1) + "\n")
    say(f"   report: {out / 'report.html'}    result: {out / 'result.json'}    {seconds:.0f} s in all")
    return result
