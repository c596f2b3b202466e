"""Schedules of PyTorch's own pipelining against ours, live: what its ``_dump_csv`` writes is read here, what is written
here its ``_load_csv`` takes.

An environment of its own, because torch is large and nothing else here needs it (the tests use the files that
``--write`` made, tests/golden/schedules):

    python3 -m venv /tmp/compare
    /tmp/compare/bin/pip install torch numpy pydantic msgpack
    /tmp/compare/bin/python -m tests.reference.compare_pipelining [--write FOLDER]

from the root of the repository; ``make nightly`` does so where HOTSTAGE_TORCH names such a python. No tensor runs and
no process group is made: torch's schedules work out all ranks' orders from one rank's stages. Prints a line a case,
and exits with 1 where one fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.pipelining import schedules as theirs
from torch.distributed.pipelining import stage

from trainer.plan.messages import insert_messages
from trainer.plan.places import Pipeline
from trainer.plan.rows import Row
from trainer.plan.schedule_file import from_csv, to_csv
from trainer.plan.schedules import ZERO_BUBBLE, gpipe, interleaved, one_f_one_b, pipeline_for, rows_for
from trainer.spec_how import THERE_AND_BACK

FORMS = ("compute_only", "compute_comms")
SIZES = [(1, 2), (2, 2), (2, 4), (2, 5), (2, 6), (3, 3), (3, 4), (3, 7), (4, 4), (4, 8), (4, 12), (8, 16)]


class Stage(stage._PipelineStageBase):  # type: ignore[misc]
    """What a schedule asks of a stage while it works out its order."""

    def __init__(self, index: int, ranks: int, stages: int) -> None:
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, stages, ranks, 0
        self.submod = None
        self.has_backward = True


Stage.__abstractmethods__ = frozenset()  # what would make and pass tensors


def stages_of(ranks: int, chunks: int, v: bool = False) -> list[Any]:
    """Rank 0's."""
    mine = [0, 2 * ranks - 1] if v else [chunk * ranks for chunk in range(chunks)]
    return [Stage(index, ranks, ranks * chunks) for index in mine]


def runtime(ranks: int, chunks: int, microbatches: int) -> Any:
    """A schedule that takes its order from elsewhere."""
    return theirs._PipelineScheduleRuntime(stages_of(ranks, chunks), microbatches, loss_fn=sum)


def alone(kind: Any, ranks: int, microbatches: int) -> Any:
    """GPipe or 1F1B, which have no text form of their own: their order in a schedule that has one."""
    (first,) = stages_of(ranks, 1)
    out = runtime(ranks, 1, microbatches)
    out.pipeline_order = kind(first, microbatches, loss_fn=sum).pipeline_order
    return out


def cases() -> Iterator[tuple[str, Any, int, int, int]]:
    """Name, schedule, ranks, stages a rank, microbatches: what torch allows of SIZES."""
    for ranks, microbatches in SIZES:
        for kind, text in ((theirs.ScheduleGPipe, "gpipe"), (theirs.Schedule1F1B, "1f1b")):
            yield text, alone(kind, ranks, microbatches), ranks, 1, microbatches
        for kind, text, few in (
            (theirs.ScheduleInterleaved1F1B, "interleaved1f1b", (1, 2, 3)),
            (theirs.ScheduleInterleavedZeroBubble, "interleavedzerobubble", (2, 3)),
            (theirs.ScheduleZBVZeroBubble, "zbv", (2,)),
        ):
            for chunks in few:
                v = text == "zbv"
                try:
                    made = kind(stages_of(ranks, chunks, v), microbatches, loss_fn=sum)
                except ValueError as error:
                    print(f"  torch refuses {text} {ranks}x{chunks}x{microbatches}: {str(error)[:90]}")
                    continue
                yield text, made, ranks, chunks, microbatches


def ours(ranks: int, microbatches: int) -> Iterator[tuple[str, list[Row], Pipeline]]:
    """Our schedules of a size."""
    yield "gpipe", gpipe(ranks, microbatches), Pipeline.in_turn(ranks)
    yield "1f1b", one_f_one_b(ranks, microbatches), Pipeline.in_turn(ranks)
    for chunks in (2, 3):
        if not microbatches % max(1, microbatches // ranks):
            yield "interleaved-1f1b", interleaved(ranks, chunks, microbatches), Pipeline.in_turn(chunks * ranks, ranks)
    for name in ZERO_BUBBLE:
        pipeline = pipeline_for(name, ranks * (2 if name in THERE_AND_BACK else 1), ranks)
        yield name, rows_for(name, pipeline, microbatches), pipeline


def words(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    """Both sides' computations as text; a backward in two parts, as torch leaves it."""
    return [[str(a) for a in row if a is not None and str(getattr(a, "op", None) or a.computation_type.value) in "FBIW"]
            for row in rows]  # fmt: skip


def main() -> int:
    target = Path(sys.argv[2]) if sys.argv[1:2] == ["--write"] else None
    bad = 0
    print(f"torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "it.csv"
        for text, made, ranks, chunks, microbatches in cases():
            for form in FORMS:
                if form == "compute_comms" and text in ("gpipe", "1f1b"):
                    try:
                        made._prepare_schedule_with_comms(made.pipeline_order)
                    except Exception as error:  # torch checks its own order here
                        print(f"  torch does not lower its own {text} {ranks}x{microbatches}: {str(error)[:100]!r}")
                        continue
                made._dump_csv(str(path), form)
                label = f"{text}-{ranks}x{chunks}x{microbatches}{'.comms' if form == 'compute_comms' else ''}"
                try:
                    rows, pipeline = from_csv(path.read_text(), label, ranks * chunks, microbatches)
                    insert_messages(rows, pipeline.stages)
                    print(f"  {label}: read")
                except Exception as error:
                    bad += 1
                    print(f"  {label}: FAILS: {error}")
                if target is not None:
                    (target / f"{label}.csv").write_bytes(path.read_bytes())
        for ranks, microbatches in SIZES:
            for text, rows, pipeline in ours(ranks, microbatches):
                path.write_text(to_csv(rows))
                chunks = pipeline.stages // ranks
                taken = runtime(ranks, chunks, microbatches)
                try:
                    taken._load_csv(str(path), "compute_only")
                    found = [taken.pipeline_order[rank] for rank in range(ranks)]
                    assert words(found) == words(rows), "another order"
                    assert taken.stage_index_to_group_rank == dict(enumerate(pipeline.of_stage)), "other ranks"
                    print(f"  ours, {text} {ranks}x{chunks}x{microbatches}: taken")
                except Exception as error:
                    bad += 1
                    print(f"  ours, {text} {ranks}x{chunks}x{microbatches}: FAILS: {error!r}"[:300])
    print(f"{bad} failures")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
