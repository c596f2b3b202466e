"""What a search found, for people (text), for programs (JSON), and one plan as a file.

A plan's file is a description: layout, what each position takes, placement. Nothing in it is said once a replica, so it
grows with the positions alone, whatever the cluster.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from trainer.amounts import count_text, gigabytes, seconds_text
from trainer.planner.cluster import ClusterSpec
from trainer.planner.estimate import KINDS, TENSOR_EXPOSED, Estimate
from trainer.planner.layouts import MARK
from trainer.planner.search import WASTE, Advice, why_lost
from trainer.planner.times import DeviceTimes
from trainer.spec import RunSpec

WIDTH = 118
"""Of running text."""
PLAN_VERSION = 1


# --- for programs -------------------------------------------------------------------------------------------


def to_json(found: Advice, spec: RunSpec, cluster: ClusterSpec) -> dict[str, Any]:
    """Everything, by the names that programs rely on."""
    return {
        "cluster": {"nodes": cluster.nodes, "devices": cluster.devices, "device": cluster.sheet.name},
        "parameters": next(iter(found.costs.values())).parameters,
        "runnable": plan_json(found.runnable[0], spec) if found.runnable else None,
        "modelled": plan_json(found.modelled[0], spec) if found.modelled else None,
        "rejected": rejected_json(found),
        "looked_at": found.looked_at,
        "seconds": round(found.seconds, 3),
    }


def plan_json(plan: Estimate, spec: RunSpec) -> dict[str, Any]:
    """One plan."""
    told = _outline(plan)
    told["plan_file_bytes"] = len(plan_file(plan, spec))
    refusal = plan.layout.refusal()
    return {**told, "note": refusal} if refusal else told


def _outline(plan: Estimate) -> dict[str, Any]:
    return {
        "layout": plan.layout.to_json(),
        "devices": plan.layout.devices,
        "batch_tokens": plan.tokens,
        "step_time_s": plan.step_s,
        "tokens_per_s": plan.tokens_s,
        "mfu": plan.mfu,
        "bubble": plan.bubble,
        "goodput": plan.goodput,
        "checkpoint_every_s": plan.checkpoint_s if plan.checkpoint_s != float("inf") else None,
        "seconds": dict(plan.parts),
        "memory_bytes": [dict(kinds) for kinds in plan.memory],
        "traffic_bytes": {link: int(size) for link, size in plan.traffic.items()},
        "placement": plan.placed.to_json(),
        "simulated": plan.played,
    }


def rejected_json(found: Advice) -> list[dict[str, Any]]:
    """Why the others lost: those that were left out, by reason, and the best of each schedule that is slower."""
    rows: list[dict[str, Any]] = [
        {
            "reason": reason.text,
            "count": reason.count,
            "layout": reason.nearest.to_json() if reason.nearest is not None else None,
            "detail": reason.detail,
        }
        for reason in found.rejected
    ]
    for lost, best in found.families:
        rows.append({"reason": why_lost(lost, best), "count": 1, "layout": lost.layout.to_json(), "detail": ""})
    return rows


def plan_file(plan: Estimate, spec: RunSpec) -> bytes:
    """The plan's description: JSON with sorted keys, equal bytes for equal plans."""
    value = {
        "version": PLAN_VERSION,
        "name": spec.name,
        "model": spec.model.model_dump(mode="json"),
        "sequence": spec.train.sequence,
        "precision": "fp8" if plan.layout.fp8 else spec.train.precision,
        "note": plan.layout.refusal(),
        **_outline(plan),
        "memory_bytes": _runs(plan.memory),
    }
    return (json.dumps(value, sort_keys=True, separators=(",", ":")) + "\n").encode()


def _runs(memory: Sequence[Mapping[str, int]]) -> list[dict[str, Any]]:
    """Positions with the same memory, once."""
    found: list[dict[str, Any]] = []
    for position, kinds in enumerate(memory):
        if found and found[-1]["bytes"] == dict(kinds):
            found[-1]["last"] = position
        else:
            found.append({"first": position, "last": position, "bytes": dict(kinds)})
    return found


# --- for people ---------------------------------------------------------------------------------------------


def text(found: Advice, spec: RunSpec, cluster: ClusterSpec, top: int, named: str = "SPEC") -> str:
    """The whole answer. ``named``: the spec and what it was given, as a shell takes them."""
    sheet = cluster.sheet
    costs = next(iter(found.costs.values()))
    lines = [
        f"{spec.name}: {count_text(costs.parameters)} parameters, {spec.train.precision}, sequences of "
        f"{spec.train.sequence:,} tokens",
        f"on {cluster.nodes:,} node{'s' * (cluster.nodes > 1)} of {cluster.devices_per_node} {sheet.name}"
        + (f", {cluster.rack_nodes} nodes a rack" if cluster.rack_nodes > 1 else "")
        + f": {cluster.devices:,} devices of {gigabytes(sheet.memory_bytes)}; "
        f"{found.looked_at:,} layouts looked at in {found.seconds:.0f} s",
        "",
    ]
    lines += _side_by_side([found.runnable[:1], found.modelled[:1]], sheet.memory_bytes)
    if not found.runnable and found.tightest is not None:
        one = found.tightest
        lines += [
            "",
            f"Nothing that this engine runs fits; the nearest needs {gigabytes(one.most_bytes)} of "
            f"{gigabytes(sheet.memory_bytes)} a device: {one.layout.words()}:",
            *_memory(one),
        ]
    for kind, heads in (("this engine runs", found.runnable), ("with axes that are " + MARK, found.modelled)):
        if heads:
            lines += ["", f"The best that {kind}:" if heads is found.runnable else f"The best {kind}:"]
            lines += _ranking(heads, top)
    best = found.runnable[0] if found.runnable else found.modelled[0] if found.modelled else None
    if len(found.scaling) > 1:
        lines += ["", "What more devices buy, of what this engine runs:"]
        lines += _scaling(found.scaling[-8:])
    if best is not None:
        lines += ["", f"Memory of each position's device ({best.layout.words()}):", *_memory(best)]
        lines += ["", "Placement:", *_placement(best)]
    lines += ["", "Why the others lost:", *_own_layout(found, sheet.memory_bytes), *_lost(found)]
    lines += ["", *wrap(_assumed(cluster, spec), WIDTH)]
    if found.runnable:
        lines += ["", f"To run it: hotstage train {named} {command(found.runnable[0])}"]
        a, train = found.runnable[0].layout, spec.train
        if (a.sequences, a.microbatch, a.groups) != (train.batch, train.microbatch, train.groups):
            lines.append("  (a run of its own: train.* above differs from the spec's, and so do the bits; --keep-bits)")
    return "\n".join(lines)


def _side_by_side(plans: Sequence[Sequence[Estimate]], memory: int) -> list[str]:
    heads = ["this engine runs", MARK]
    rows: list[tuple[str, list[str]]] = [("", heads)]

    def row(name: str, of: Any) -> None:
        rows.append((name, [of(plan[0]) if plan else "none" for plan in plans]))

    row("layout", lambda e: e.layout.grid())
    row("schedule", lambda e: f"{e.layout.schedule}, {e.layout.filling()}")
    row("recomputation", lambda e: e.layout.recompute)
    row("devices", lambda e: f"{e.layout.devices:,} ({e.placed.cluster.devices - e.layout.devices:,} idle)")
    row("tokens a batch", lambda e: count_text(e.tokens))
    row("a step", lambda e: seconds_text(e.step_s))
    row("tokens/s that count", lambda e: count_text(e.tokens_s))
    row("MFU", lambda e: f"{e.mfu:.1%}")
    row("bubble", lambda e: f"{e.bubble:.1%}")
    row("goodput under failures", lambda e: f"{e.goodput:.1%}, a checkpoint every {seconds_text(e.checkpoint_s)}")
    row("fullest device", lambda e: f"{gigabytes(e.most_bytes)} of {gigabytes(memory)}")
    row(
        "sent by a device a step", lambda e: ", ".join(f"{k} {gigabytes(v)}" for k, v in e.traffic.items()) or "nothing"
    )
    row("a step goes into", _spent)
    wide = max(len(name) for name, _ in rows)
    cells = [max(len(values[n]) for name, values in rows[:-1]) for n in range(2)]
    # the last is longer than a column
    lines = [f"{name:<{wide}}  {values[0]:<{cells[0]}}  {values[1]}".rstrip() for name, values in rows[:-1]]
    for head, value in zip(heads, rows[-1][1], strict=True):
        if value != "none":
            which = "the modelled step goes into" if head == MARK else "a step here goes into"
            lines += ["", *wrap(f"{which}: {value}", WIDTH, subsequent_indent="    ")]
    return lines


def _spent(plan: Estimate) -> str:
    names = {**WASTE, "compute": "computation"}
    parts = sorted(plan.parts.items(), key=lambda item: -item[1])
    return ", ".join(f"{names[n]} {s / plan.step_s:.0%}" for n, s in parts if s >= 0.005 * plan.step_s)


COLUMNS = ("positions", "chunks", "replicas", "tensor", "context", "schedule", "M", "of", "again")


def _cells(plan: Estimate) -> list[str]:
    """A layout in columns: M microbatches a replica, of so many sequences; what is computed again."""
    a = plan.layout
    schedule = a.schedule + ", FP8" * a.fp8 + ", sharded" * (a.sharded > 1)
    numbers = (a.positions, a.chunks, a.replicas, a.tensor, a.context)
    return [*map(str, numbers), schedule, str(a.microbatches), str(a.microbatch), a.recompute]


def _ranking(plans: Sequence[Estimate], top: int) -> list[str]:
    rows = [[*COLUMNS, "devices", "a step", "tokens/s", "MFU", "memory"]]
    reasons = []
    for plan in plans[:top]:
        rows.append([
            *_cells(plan), f"{plan.layout.devices:,}", seconds_text(plan.step_s), count_text(plan.tokens_s),
            f"{plan.mfu:.1%}", gigabytes(plan.most_bytes),
        ])  # fmt: skip
        faster = plan is not plans[0] and plan.tokens_s >= plans[0].tokens_s
        why = f"{plan.tokens_s / plans[0].tokens_s - 1:.1%} faster, on more devices" if faster else ""
        reasons.append(why or ("" if plan is plans[0] else why_lost(plan, plans[0])))
    lines = _table(rows)
    for number, why in enumerate(reasons, 1):
        lines[number] += f"  {number}" if why else ""
    return [*lines, *(f"    {number}: {why}" for number, why in enumerate(reasons, 1) if why)]


def _scaling(plans: Sequence[Estimate]) -> list[str]:
    rows = [["devices", "tokens/s", "MFU", "bubble", "goodput", *COLUMNS[:3], *COLUMNS[5:]]]
    for plan in plans:
        cells = _cells(plan)
        rows.append([
            f"{plan.layout.devices:,}", count_text(plan.tokens_s), f"{plan.mfu:.1%}", f"{plan.bubble:.1%}",
            f"{plan.goodput:.1%}", *cells[:3], *cells[5:],
        ])  # fmt: skip
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _memory(plan: Estimate) -> list[str]:
    unit, name = (1e9, "GB") if plan.most_bytes >= 1e9 else (1e6, "MB")
    rows = [["position", *KINDS, "in all", name]]
    runs = _runs([{kind: round(size / 1e7) for kind, size in kinds.items()} for kinds in plan.memory])
    shown = runs if len(runs) <= 9 else [*runs[:4], *runs[-4:]]
    for number, run in enumerate(shown):
        if len(runs) > 9 and number == 4:
            rows.append(["…", *[""] * (len(KINDS) + 2)])
        first, last = run["first"], run["last"]
        kinds = plan.memory[first]
        where = f"{first}" if first == last else f"{first}-{last}"
        sizes = [kinds[kind] for kind in KINDS]
        rows.append([where, *(f"{size / unit:,.2f}" for size in (*sizes, sum(sizes))), ""])
    return _table(rows)


def nothing_fits(found: Advice, cluster: ClusterSpec) -> str:
    """Why no layout is left, with the table of the one that is nearest to fitting."""
    reasons = "\n".join(_lost(found))
    if found.tightest is None:
        return f"no layout of this model, batch and cluster is possible; change one of them\n{reasons}"
    one, have = found.tightest, cluster.sheet.memory_bytes
    return (
        f"no layout fits {cluster.devices:,} devices of {gigabytes(have)}; the nearest needs "
        f"{gigabytes(one.most_bytes)}: {one.layout.words()}. Take more nodes, devices with more memory, shorter "
        "sequences or a smaller model\n"
        + "\n".join(["memory of each position's device:", *_memory(one)])
        + f"\n{reasons}"
    )


def _placement(plan: Estimate) -> list[str]:
    placed = plan.placed.to_json()
    strides = ", ".join(f"{name} {stride}" for name, stride in placed["rank"].items())
    near = ", ".join(f"{name} over the {link}" for name, link in placed["neighbours"].items()) or "none"
    return [
        f"  ranks are numbered with strides: {strides}",
        f"  device = {placed['device']}; node = {placed['node']}; NIC = {placed['nic']}",
        f"  slowest link between neighbours: {near}; {placed['nodes']:,} node{'s' * (placed['nodes'] > 1)} used",
    ]


def _own_layout(found: Advice, memory: int) -> list[str]:
    """What the spec itself says, beside the best."""
    own, best = found.own, found.runnable[:1]
    if own is None or (best and own.layout == best[0].layout):
        return []
    if own.most_bytes > memory:
        why = f"does not fit: {gigabytes(own.most_bytes)} of {gigabytes(memory)}"
    else:
        why = why_lost(own, best[0]) if best else "fits"
    return [f"  as the spec says, {own.layout.words()}: {why}"]


def _lost(found: Advice) -> list[str]:
    lines = []
    for reason in found.rejected:
        nearest = f"; nearest: {reason.nearest.words()}" if reason.nearest is not None else ""
        lines.append(f"  {reason.count:,} layout{'s' * (reason.count > 1)}: {reason.text}{nearest}")
        if reason.detail:
            lines.append(f"      {reason.detail}")
    for lost, best in found.families[:12]:
        lines.append(f"  {lost.layout.words()}: {why_lost(lost, best)}")
    return lines or ["  nothing else was possible"]


def _assumed(cluster: ClusterSpec, spec: RunSpec) -> str:
    times = DeviceTimes.of(cluster.sheet, spec.train.precision)
    sheet = cluster.sheet
    kept = f", and of that {times.sustained:.0%}, fitted on published runs" if times.sustained != 1.0 else ""
    return (
        f"By roofline, nothing of it measured here: products at {times.rate('linear') / 1e12:,.4g} TFLOP/s of "
        f"{times.peak / 1e12:,.4g} (the best products' {sheet.product_share[spec.train.precision]:.0%}{kept}); "
        f"links at {cluster.link_share:.0%}; {TENSOR_EXPOSED:.0%} of "
        f"tensor messages hidden; {cluster.failures_node_s * 86_400:.2g} failures a node and day, "
        f"{seconds_text(cluster.restart_s)} to restart. docs/planner.md says where each comes from."
    )


def settings(plan: Estimate) -> dict[str, Any]:
    """A plan as keys of a spec."""
    a = plan.layout
    keys: dict[str, Any] = {
        "parallel.stages": a.stages,
        "parallel.chunks": a.chunks,
        "parallel.schedule": a.schedule,
        "parallel.replicas": a.replicas,
        "train.batch": a.sequences,
        "train.microbatch": a.microbatch,
        "train.reduction_groups": a.groups,
        "launch.nodes": plan.placed.nodes,
    }
    if a.recompute != "none":
        keys["parallel.recompute"] = a.recompute
    if a.blocks > 1:
        keys["parallel.vocab_stages"] = a.head
    # an optimistic step keeps the old state, and in fp32 copies, beside what is counted here
    if max(sum(k.values()) + 1.4 * k["optimizer"] for k in plan.memory) > plan.placed.cluster.sheet.memory_bytes:
        keys["parallel.optimizer"] = "checked"
    return keys


def command(plan: Estimate) -> str:
    """A plan as options of the command."""
    return " ".join(f"--set {key}={value}" for key, value in settings(plan).items())
