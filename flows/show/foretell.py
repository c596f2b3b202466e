"""What a plan says about a spec before anything runs: memory, schedule, time. Pure, but for its yardsticks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from checkpoint.errors import CheckpointError
from flows.drive.train import store_at
from flows.show.peak import measured_bandwidth, measured_peak
from trainer.amounts import count_text, seconds_text
from trainer.cores import usable_cpus
from trainer.dataset import DatasetRef
from trainer.errors import DatasetError
from trainer.plan import Plan, compile_plan
from trainer.plan.devices import DeviceSheet, assumptions, cost_of, fits, on_device, on_host, smaller_chunks
from trainer.plan.draw import memory_text
from trainer.plan.memory import more_threads_bytes
from trainer.plan.simulate import CostModel, Simulation, from_plan
from trainer.plan.simulate import simulate as play
from trainer.plan.steady import steady
from trainer.spec import RunSpec, what_digest


def stand_in(spec: RunSpec, tokens_known: int | None = None) -> DatasetRef:
    """A dataset's outline where none is prepared: the spec's vocabulary and enough tokens for one pass.

    ``tokens_known``: entries of the tokenizer that is given, where it is here."""
    vocab = tokens_known or spec.model.vocab or spec.data.vocab_size
    digest = hashlib.sha256(b"stand-in").hexdigest()
    tokens = max(spec.train.sequence + 1, spec.train.tokens + 1)
    end = None if spec.data.end_token == "" else 0
    return DatasetRef(digest, vocab, 2 if vocab <= 1 << 16 else 4, (tokens,), digest, end)


def compile_for(spec: RunSpec, store_url: str | None) -> tuple[Plan, RunSpec, str]:
    """The plan, the resolved spec, and a note where the data was only outlined."""
    dataset, note = stand_in(spec), ""
    if spec.data.source.startswith("dataset:"):
        from flows.data import load_dataset

        try:
            dataset = load_dataset(store_at(store_url), spec.data.source.removeprefix("dataset:"))
        except (DatasetError, CheckpointError):
            note = " (its dataset is not here: vocabulary taken from data.vocab_size)"
    elif spec.data.tokenizer is not None:
        if os.path.exists(os.path.expanduser(spec.data.tokenizer)):
            from flows.data.tokenizer import given_tokenizer

            given = given_tokenizer(spec.data)
            dataset = stand_in(spec, given.vocab if given is not None else None)
        elif not spec.model.vocab:
            note = " (its tokenizer is not here: vocabulary taken from data.vocab_size)"
    resolved = spec.resolve(dataset)
    return compile_plan(resolved, dataset, what_digest(resolved, dataset)), resolved, note


def yardstick(ranks: int) -> CostModel:
    """This machine's measured speed, shared by so many ranks."""
    return CostModel(flops_per_s=0.8 * measured_peak() / ranks, memory_bytes_per_s=measured_bandwidth() / ranks)


def simulate(plan: Plan) -> Simulation:
    """The plan's step, timed with this machine's measured speed shared by its ranks; so is the peak that MFU is of."""
    ranks = len(plan.ranks)
    return _played(plan, yardstick(ranks), measured_peak() / ranks)


def simulate_on(plan: Plan, spec: RunSpec, sheet: DeviceSheet) -> Simulation:
    """The plan's step on such devices, a rank on each, by roofline; MFU is of the peak of the sheet."""
    return _played(plan, cost_of(sheet, spec), sheet.peak[spec.train.precision])


def _played(plan: Plan, cost: CostModel, peak: float) -> Simulation:
    """A step by itself; of one that begins before the one before is checked, the times are those of many in a row.

    ``peak``: a rank's."""
    alone = play(from_plan(plan, cost), cost, peak_flops=peak)
    if not ahead(plan):
        return alone
    many = steady(plan, cost)
    mfu = alone.mfu * alone.step_seconds / many.step_seconds
    return replace(alone, step_seconds=many.step_seconds, bubble=many.bubble, mfu=mfu)


def ahead(plan: Plan) -> bool:
    """Whether its steps are optimistic."""
    return any(position.step_checks for position in plan.positions)


def headline(plan: Plan, spec: RunSpec) -> str:
    """What is planned, in a line."""
    stages, replicas, microbatches = spec.parallel.stages, spec.parallel.replicas, spec.train.microbatches
    layout = f"{stages} stage{'s' * (stages > 1)}" + f" x {replicas} replicas" * (replicas > 1)
    shared = f", head shared by {plan.heads} ranks" * (plan.heads > 1)
    size = f"{spec.train.microbatch} x {spec.train.sequence} tokens"
    work = f"{microbatches} microbatch{'es' * (microbatches > 1)} of {size}"
    each = f" ({microbatches // replicas} a replica)" * (replicas > 1)
    return (
        f"plan {plan.digest[:12]}: {count_text(plan.parameters)} parameters, {layout}, {work}{each}, "
        f"{spec.parallel.schedule}, {spec.train.precision}{shared}"
    )


def foretold_line(plan: Plan, spec: RunSpec, simulation: Simulation, where: str) -> str:
    """The step's time, what comes of it, and what its ranks idle."""
    many = " (the one that is drawn stands alone; in a run the next begins before it is checked)" * ahead(plan)
    return (
        f"a step: {seconds_text(simulation.step_seconds)} foretold on {where}{many}, "
        f"{spec.train.tokens / simulation.step_seconds:,.0f} tokens/s, "
        f"bubble {_bubbles(simulation.bubble, spec.parallel.replicas)}, MFU {simulation.mfu:.0%}"
    )


def _bubbles(bubble: Sequence[float], replicas: int) -> str:
    """The bubble of each rank, once where replicas idle alike; from least to most where ranks are many.

    >>> _bubbles([0.25, 0.5, 0.25, 0.5], 2)
    '25%, 50% by rank of each replica'
    >>> _bubbles([0.01 * rank for rank in range(9)], 1)
    '0% to 8% by rank'
    """
    words = [f"{part:.0%}" for part in bubble]
    ranks = len(words) // replicas
    whose = "by rank"
    if replicas > 1 and words == words[:ranks] * replicas:
        words, whose = words[:ranks], "by rank of each replica"
    if len(words) > 8:
        return f"{min(bubble):.0%} to {max(bubble):.0%} {whose}"
    return f"{', '.join(words)} {whose}"


def facts_on(plan: Plan, spec: RunSpec, simulation: Simulation, sheet: DeviceSheet) -> dict[str, Any]:
    """`facts` of a plan on devices: their memory, and what the estimate assumes. PlanError where it does not fit."""
    told = {
        "device": sheet.name,
        "memory": [on_device(position, spec) for position in plan.positions],
        "host_memory": [on_host(plan, position) for position in plan.positions],
        "memory_text": fits(plan, spec, sheet),
        "assumptions": assumptions(sheet, spec),
        "classifier_chunk": smaller_chunks(plan, spec, sheet),
    }
    return {**facts(plan, spec, simulation), **told}


def facts(plan: Plan, spec: RunSpec, simulation: Simulation) -> dict[str, Any]:
    """The plan's facts for people and programs."""
    # the plan leaves parallel.threads = 0 to the machine, and this is the machine where it runs here
    more = more_threads_bytes(spec, usable_cpus()) if spec.launch.target == "local" else 0
    memory = [{**p.bytes_by_kind, "other": p.bytes_by_kind["other"] + more} for p in plan.positions]
    return {
        "plan": plan.digest,
        "parameters": plan.parameters,
        "stages": spec.parallel.stages,
        "replicas": spec.parallel.replicas,
        "vocab_stages": plan.heads,
        "reduction_groups": spec.train.groups,
        "microbatches": spec.train.microbatches,
        "tokens_per_step": spec.train.tokens,
        "memory": memory,
        "memory_text": memory_text(memory, replicas=spec.parallel.replicas),
        "optimizer": "optimistic" if ahead(plan) else "checked",
        "step_seconds": simulation.step_seconds,
        "bubble": list(simulation.bubble),
        "mfu": simulation.mfu,
        "schedule": [[str(action) for action in row] for row in plan.schedule],
    }
