"""What a session's stages handed back, as people and other programs read it: ``test.json``, ``bench.json`` (rows as in
out/bench.json, with the limit of each), ``rooflines.json``, ``summary.txt``.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from tests.gpu.session import LOG, STATE, Outcome, Session, mirrored
from tests.gpu.workloads import Workload, workload
from trainer.wire.files import write_file

FILES = ("test.json", "bench.json", "rooflines.json", "summary.txt", STATE, LOG)
Row = dict[str, Any]

# limits of the project on one H100 or H200
PEER_LIMIT = {"torch": 1.2, "jax": 1.3}
SPEED = {"gpt2-124m": 580e3, "gpt2-1.5b": 60e3}  # tokens a second, bf16, on an H100
MFU, PEAK_BF16 = {"llama-1b": 0.55}, 989e12
OUTSIDE, START_S, MEMORY, FP8, SNAPSHOT_MS, MEMORY_BOUND = 0.02, 3.0, 0.9, 1.25, 10.0, 0.85


def row(
    name: str, value: float, unit: str, peer: str, peer_value: float, limit: float, *, least: bool = True, **more: Any
) -> Row:
    """A figure; ``limit``: what its ratio to the peer must reach, or with ``least=False`` must not pass."""
    ratio = value / peer_value if peer_value else None
    met = None if ratio is None else bool(ratio >= limit if least else ratio <= limit)
    found = {"name": name, "value": value, "unit": unit, "peer": peer, "peer_value": peer_value, "ratio": ratio}
    return found | {"limit": limit, "wanted": "at least" if least else "at most", "met": met} | more


def best(variants: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """The fastest of a peer's variants."""
    ran = {name: said for name, said in variants.items() if "tokens_per_s" in said}
    return max(ran.items(), key=lambda item: item[1]["tokens_per_s"]) if ran else None


def rows_of(session: Session, tiny: bool) -> Iterator[Row]:
    """The figures of all stages that are done."""
    emulated = {"emulated": True} if tiny else {}
    for name, done in session.done.items():
        told = done.told.get("figures", {})
        what, _, model = name.partition("-")
        if what == "train" and "ours" in told:
            yield from (r | emulated for r in _alone(workload(model, tiny), told["ours"]))
        elif what in PEER_LIMIT and told.get(what):
            yield from (r | emulated for r in _beside(workload(model, tiny), what, told))
        elif what == "fp8" and {"ours", "bf16", "again"} <= set(told):
            w = workload(model, tiny)
            peer = (told["bf16"]["tokens_per_s"] + told["again"]["tokens_per_s"]) / 2
            yield row(w.row("fp8"), told["ours"]["tokens_per_s"], "tok/s", "bf16", peer, FP8) | emulated
        elif what == "roofline" and "kernels" in told:
            yield from (r | emulated for r in _kernels(model, told))
        elif what == "timeline" and "outside" in told:
            yield row(f"outside/{model}", told["outside"], "of a step", "step", 1.0, OUTSIDE, least=False) | emulated
        elif what == "snapshot" and "blocks_ms" in told:
            size = told["bytes"] / 1e9
            yield (
                row(f"snapshot/{size:.0f}gb", told["blocks_ms"], "ms", "target", SNAPSHOT_MS, 1.0, least=False)
                | emulated
            )


def _alone(w: Workload, ours: dict[str, Any]) -> Iterator[Row]:
    if w.name in SPEED:
        yield row(w.row("bf16"), ours["tokens_per_s"], "tok/s", "target", SPEED[w.name], 1.0, spread=ours["spread"])
    if w.name in MFU:
        rate = ours["tokens_per_s"] * flops_a_token(w)
        yield row(
            f"mfu/{w.name}/bf16/t{w.sequence}", rate / 1e12, "TFLOP/s", "spec peak", PEAK_BF16 / 1e12, MFU[w.name]
        )
    yield row(f"start/{w.name}", ours["start_s"], "s", "target", START_S, 1.0, least=False)
    # a run's first start also times the candidates of each product
    yield row(f"start/{w.name}/first", ours["first_start_s"], "s", "target", START_S, 1.0, least=False)
    if ours["memory_mib"]:
        yield row(f"memory/{w.name}/plan", ours["memory_mib"], "MiB", "plan", ours["planned_mib"], 1.1, least=False)


def _beside(w: Workload, name: str, told: dict[str, Any]) -> Iterator[Row]:
    found = best(told[name])
    if found is None:
        return
    variant, peer = found
    again = told.get("again", told["ours"])  # the stage may have been ended before it
    ours = (told["ours"]["tokens_per_s"] + again["tokens_per_s"]) / 2
    drift = abs(told["ours"]["tokens_per_s"] - again["tokens_per_s"]) / ours
    more = {"variant": variant, "attention": peer.get("attention"), "version": peer.get("version"), "drift": drift}
    yield row(w.row("bf16"), ours, "tok/s", name, peer["tokens_per_s"], PEER_LIMIT[name], **more)
    yield row(f"start/{w.name}", told["ours"]["start_s"], "s", name, peer["start_s"], 1.0, least=False)
    if told["ours"]["memory_mib"] and peer.get("memory_mib"):
        yield row(f"memory/{w.name}", told["ours"]["memory_mib"], "MiB", name, peer["memory_mib"], MEMORY, least=False)


def _kernels(model: str, told: dict[str, Any]) -> Iterator[Row]:
    """By op: all its calls of a step together; what bounds most of its time names the peer."""
    by_op: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for kernel in told["kernels"]:
        by_op[kernel["kernel"]].append(kernel)
    probe = told["probes"]
    for op, calls in sorted(by_op.items()):
        time_us = {b: sum(k["us"] * k["count"] for k in calls if k["bound"] == b) for b in ("bytes", "products")}
        bound = max(time_us, key=lambda b: time_us[b])
        part = [k for k in calls if k["bound"] == bound]
        rate = "gb_per_s" if bound == "bytes" else "tflop_per_s"
        value = sum(k[rate] * k["us"] * k["count"] for k in part) / max(time_us[bound], 1e-9)
        unit, peer, key, scale = (
            ("GB/s", "copy probe", "copy on device", 1e9)
            if bound == "bytes"
            else ("TFLOP/s", "product probe", "product bf16", 1e12)
        )
        # the limit is for memory-bound kernels; of products it is a figure
        limit = MEMORY_BOUND if bound == "bytes" else 0.0
        yield row(
            f"kernel/{op}", value, unit, peer, probe[key] / scale, limit, model=model, step_us=sum(time_us.values())
        )


def flops_a_token(w: Workload) -> float:
    """As MFU counts them."""
    from tests.gpu.workloads import spec_of
    from trainer.plan import flops_per_token

    return float(flops_per_token(spec_of(w, "bf16", 1).model, w.sequence))


def tests_of(session: Session) -> list[dict[str, Any]]:
    """Every test with its stage."""
    return [{"stage": name} | test for name, done in session.done.items() for test in done.told.get("tests", [])]


def summary(session: Session, rows: list[Row]) -> str:
    """What came out, the worst first."""
    lines = ["session: " + ", ".join(f"{k} {v}" for k, v in session.key.items()), ""]
    counted = Counter(done.outcome for done in session.done.values())
    left = session.left()
    lines.append(
        ", ".join(f"{counted[outcome]} {outcome}" for outcome in get_args(Outcome) if counted[outcome])
        + (f", {len(left)} to do" if left else "")
    )
    for stage in session.stages:
        done = session.done.get(stage.name)
        tests = Counter(test["outcome"] for test in done.told.get("tests", [])) if done else Counter()
        told = f"; {', '.join(f'{n} tests {o}' for o, n in tests.items())}" if tests else ""
        state = f"{done.outcome:<8} {done.seconds:6.1f} s" if done else f"{'to do':<8} {'':>8}"
        why = f"  {done.why.splitlines()[0][:200]}" if done and done.why else ""
        lines.append(f"  {stage.name:<22} {state}{told}{why}")
    failed = [test for test in tests_of(session) if test["outcome"] == "failed"]
    if failed:
        lines += ["", f"tests that failed: {len(failed)}"]
        lines += [f"  {t['stage']}: {t['name']}: {(t['why'].splitlines() or [''])[0][:160]}" for t in failed[:40]]
    if rows:
        lines += ["", "figures (missed limits first)"]
        for r in sorted(rows, key=lambda r: (r["met"] is not False, r["name"], r["peer"])):
            mark = {True: "met", False: "MISSED", None: "-"}[r["met"]] if r["limit"] else "-"
            ratio = f"{r['ratio']:.2f} x" if r["ratio"] is not None else "-"
            wanted = f"{r['wanted']} {r['limit']:g}" if r["limit"] else ""
            lines.append(
                f"  {mark:<7} {r['name']:<34} {r['value']:>12.4g} {r['unit']:<9} {r['peer']:<13} "
                f"{r['peer_value']:>12.4g}  {ratio:>8}  {wanted}"
            )
    notes = [f"  {name}: {note}" for name, done in session.done.items() for note in done.told.get("notes", [])]
    if notes:
        lines += ["", "notes", *notes]
    return "\n".join(lines) + "\n"


def publish(session: Session, out: Path | None, tiny: bool) -> None:
    """Writes all of it, and copies where files are fetched from."""
    rows = list(rows_of(session, tiny))
    roofs = {
        name.partition("-")[2]: done.told["figures"]
        for name, done in session.done.items()
        if name.startswith("roofline") and "figures" in done.told
    }
    for name, value in (("test.json", tests_of(session)), ("bench.json", rows), ("rooflines.json", roofs)):
        write_file(session.folder / name, (json.dumps(value, indent=1) + "\n").encode(), 0o644)
    write_file(session.folder / "summary.txt", summary(session, rows).encode(), 0o644)
    mirrored(session.folder, out, FILES)
