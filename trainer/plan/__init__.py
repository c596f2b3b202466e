"""The plan compiler: RunSpec to Plan, in passes of pure functions.

    places      which stage is at which position, which rank fills it, which position owns a tensor
    expand      a family's calls into forward and backward programs of a stage
    layout      layers to stages, by cost (flops: what a kernel call costs)
    schedules   computations of every position, in order (rows: actions as columns)
    schedule_file  the same, as PyTorch's CSV
    messages    sends and receives put in
    check       order and place of all of these (rules, channels: order, deadlock)
    lower       operands bound, action lists (job: what positions share; arena: where all lies; slots: microbatches)
    memory      static placement, the account of bytes, the budget
    simulate    seconds of a step; draw: pictures of it; devices: both, and memory, on accelerators
    binary      the flat file that the engine reads

Example::

    plan = compile_plan(spec.resolve(dataset), dataset, what_digest(spec, dataset))
    path.write_bytes(plan.to_bytes())
"""

from trainer.plan.compile import compile_plan, flops_per_token
from trainer.plan.compiled import Plan

__all__ = ["Plan", "compile_plan", "flops_per_token"]
