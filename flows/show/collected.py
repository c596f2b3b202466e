"""A pass of the collector, as lines for a person and as a map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from checkpoint.collect.collector import Collected, Swept
from flows.drive.collecting import NotCollected


def collected_lines(done: Collected | NotCollected) -> list[str]:
    """A pass, for a person."""
    if isinstance(done, NotCollected):
        return [f"{done.run}: not collected: {done.error}"]
    would = "would be " if done.dry_run else ""
    keeps = (
        f"keeps {len(done.kept)} checkpoint(s)" if done.rules else "keeps every checkpoint (checkpoint.keep is not set)"
    )
    lines = [f"{done.run}: {keeps}"]
    if done.rules:
        lines += [f"  {count:>6}  {why}" for why, count in sorted(Counter(done.kept.values()).items())]
    if done.refused:
        lines.append(f"  NOTHING IS GIVEN UP: {done.refused}")
    if done.given_up:
        steps = _some([f"{info.step}" for info in done.given_up])
        lines.append(f"  {would}given up: step {steps}; the objects go {done.grace_s:g} s later")
    if done.abandoned:
        steps = _some([str(step) for step, _ in done.abandoned])
        lines.append(f"  {would}given up: step {steps}, of which only a part was ever stored")
    for swept, what in ((done.deleted, f"{would}deleted"), (done.waiting, "waiting")):
        lines += _swept(swept, what)
    if done.versions:
        lines.append("  the bucket keeps old versions of that: they take room until a lifecycle rule ends them")
    if done.unknowns:
        lines.append(f"  left alone, names that hotstage does not know: {_some(done.unknown, done.unknowns)}")
    if done.more:
        lines.append("  there is more than one pass deletes: run it again")
    return lines


def _swept(swept: Sequence[Swept], what: str) -> list[str]:
    lines = []
    for why in dict.fromkeys(s.why for s in swept):
        some = [s for s in swept if s.why == why]
        objects, size = sum(s.objects for s in some), sum(s.bytes for s in some)
        named = f" of step {_some([str(s.step) for s in some])}" if some[0].step >= 0 else f" of {len(some)} attempt(s)"
        wait = max(s.wait_s for s in some)
        left = f", the last in {wait:.0f} s" if 0 < wait < float("inf") else ""
        lines.append(f"  {what}: {objects} objects, {size / 1e6:.1f} MB{named} ({why}{left})")
    return lines


def _some(texts: Sequence[str], count: int | None = None) -> str:
    """The first few."""
    count = len(texts) if count is None else count
    return ", ".join(texts[:8]) + (f" and {count - 8} more" if count > 8 else "")


def collected_map(done: Collected) -> dict[str, Any]:
    """A pass, for a program."""

    def swept(some: Sequence[Swept]) -> list[dict[str, Any]]:
        return [
            {
                "step": s.step if s.step >= 0 else None,
                "epoch": s.epoch,
                "objects": s.objects,
                "bytes": s.bytes,
                "why": s.why,
                "wait_s": s.wait_s if s.wait_s < float("inf") else None,
            }
            for s in some
        ]

    return {
        "run": done.run,
        "dry_run": done.dry_run,
        "kept": [{"record": n, "step": done.steps.get(n), "why": why} for n, why in sorted(done.kept.items())],
        "given_up": [{"record": info.n, "step": info.step, "epoch": info.epoch} for info in done.given_up],
        "abandoned": [{"step": step, "epoch": epoch} for step, epoch in done.abandoned],
        "deleted": swept(done.deleted),
        "waiting": swept(done.waiting),
        "unknown": done.unknown,
        "unknowns": done.unknowns,
        "refused": done.refused,
        "more": done.more,
        "versions": done.versions,
        "objects": done.objects,
        "bytes": done.bytes,
    }
