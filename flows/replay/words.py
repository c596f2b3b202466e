"""A replay's result as a person reads it."""

from __future__ import annotations

from collections.abc import Iterator

from flows.replay.compare import Verdict, whom
from flows.replay.replay import Replayed


def replay_lines(report: Replayed) -> Iterator[str]:
    """A report as a person reads it."""
    r = report
    yield f"{r.run}, steps {r.first + 1} to {r.last}, computed again here: {r.layout}"
    missing = f" ({r.missing} steps have none)" if r.missing else ""
    found = r.difference
    if found is None:
        parts = [f"{r.compared} losses and gradient norms that were recorded{missing}"] if r.compared else []
        parts += [f"the state digest after step {r.last}"] if r.digest else []
        yield f"the same, bit for bit: {' and '.join(parts)}"
        return
    if found.values is not None:
        told = f"{found.values[0]!r} was recorded ({found.recorded}), {found.values[1]!r} is computed ({found.again})"
    else:
        told = f"{found.recorded} was recorded, {found.again} is computed"
    yield f"DIFFERS at step {found.step}, the {found.what}: {told}"
    before = found.same_before
    yield (
        "no step before it was compared"
        if not before
        else f"the {before} steps compared before it are the same"
        if before > 1
        else "the one step compared before it is the same"
    )
    yield _SAYS[r.verdict]
    if r.suspects is not None and r.attempt is not None:
        yield whom(r.suspects, r.attempt)


_SAYS = {
    Verdict.RUN: "computed a second time here it is the same as the first time: the run's machines computed that step "
    "wrongly, or this one always does; a replay on a third machine decides",
    Verdict.HERE: "computed a second time here it is what the run recorded: this machine computed wrongly the first "
    "time; test it (hotstage doctor), and trust no result of it until then",
    Verdict.UNCLEAR: "computed a second time here it is yet another: this machine computes wrongly; test it (hotstage "
    "doctor), and replay on another one",
}
