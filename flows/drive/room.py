"""Whether this machine has the memory that a run's ranks take here. The kernel would kill them, or whatever else is
large, where it has not."""

from __future__ import annotations

from flows.drive.run import Prepared
from trainer.amounts import bytes_text
from trainer.cores import free_bytes, swap_bytes
from trainer.plan.memory import host_kinds


def lacking_memory(prepared: Prepared) -> str:
    """Where what is free is less than all ranks need: both, in words that follow "the plan needs". Else empty. What the
    machine can swap out counts as free."""
    on_cuda = prepared.spec.parallel.on_cuda(prepared.spec.launch.kernel_path)
    positions = (p for node in prepared.plan.on_nodes(prepared.nodes) for p in node)
    needs = sum(sum(host_kinds(position, on_cuda).values()) for position in positions)
    free = free_bytes() + swap_bytes()
    if needs <= free:
        return ""
    return f"{bytes_text(needs)} of memory, and {bytes_text(free)} are free on this machine"
