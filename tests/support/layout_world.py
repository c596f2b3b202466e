"""Checkpoints of one state by gangs of any layout, and what gangs of any other layout restore from them.

Real slots, uploaders, commits and restores, one node for each replica; nothing trains. Judges nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np

from checkpoint.agent.commit import commit
from checkpoint.agent.gang import layouts
from checkpoint.agent.slots import SlotTable
from checkpoint.agent.upload import Source, Uploader
from checkpoint.layout import PlanLayout, read_plan
from checkpoint.log import CheckpointInfo
from checkpoint.restore import restore_slots
from checkpoint.store import Store
from tests.support.agents import Run, put_dataset, state_bytes, wait_for
from trainer.dataset import DatasetRef
from trainer.plan import compile_plan
from trainer.plan.compiled import Plan
from trainer.spec import RunSpec, what_digest

STEP = 6
Way = tuple[int, int]
"""Stages and replicas."""


def plan_of(spec: RunSpec, dataset: DatasetRef, stages: int, replicas: int) -> Plan:
    parallel = spec.parallel.model_copy(update={"stages": stages, "replicas": replicas})
    changed = spec.model_copy(update={"parallel": parallel}).resolve(dataset)
    return compile_plan(changed, dataset, what_digest(changed, dataset))


def layout_of(spec: RunSpec, dataset: DatasetRef, stages: int, replicas: int) -> PlanLayout:
    return read_plan(plan_of(spec, dataset, stages, replicas).to_bytes())


class World:
    """A run and its checkpoints of the same state, one of each layout."""

    def __init__(self, store: Store, spec: RunSpec) -> None:
        self.spec, self.dataset = spec, put_dataset(store)
        self.run = Run(store, f"tiny-{what_digest(spec, self.dataset).hex()[:6]}")
        self.saved: dict[Way, CheckpointInfo] = {}
        self.layouts: dict[Way, PlanLayout] = {}

    @cached_property
    def elements(self) -> Mapping[str, int]:
        return {t.name: t.elements for t in self.layout(1, 1).tensors}

    def layout(self, stages: int, replicas: int) -> PlanLayout:
        if (stages, replicas) not in self.layouts:
            self.layouts[stages, replicas] = layout_of(self.spec, self.dataset, stages, replicas)
        return self.layouts[stages, replicas]

    def table(self, way: Way, node: int) -> SlotTable:
        """A slot for each rank of a node."""
        layout, ranks = self.layout(*way), range(node * way[0], (node + 1) * way[0])
        table = SlotTable(layouts(layout, ranks), layout.digest, layout.what_digest, 1)
        for rank in ranks:
            table.create(rank)
        return table

    def checkpoint(self, stages: int, replicas: int) -> CheckpointInfo:
        """Saved by a gang of this layout."""
        key = stages, replicas
        if key not in self.saved:
            layout = self.layout(stages, replicas)
            self.run.layouts[layout.digest.hex()] = layout
            epoch = self.run.attempt(self.spec, layout.digest.hex())
            for node in range(replicas):
                self._upload(key, epoch, node)
            state = commit(self.run.log, replicas, STEP, epoch, self.run.fold())
            assert state is not None
            self.saved[key] = state.checkpoints[-1]
        return self.saved[key]

    def _upload(self, way: Way, epoch: int, node: int) -> None:
        layout, table, stored = self.layout(*way), self.table(way, node), threading.Event()
        with ThreadPoolExecutor(2) as pool:
            for rank in table.layouts:
                with table.slots[rank][0].begin_fill() as view:
                    view[:] = state_bytes(layout, rank, STEP)
                table.slots[rank][0].finish_fill(STEP, epoch, pool)
            uploader = Uploader(
                self.run.store, self.run.name, node, way[1], "a0", pool=pool, post=lambda call: call(),
                on_part=lambda *_: stored.set(), on_idle=lambda: None, on_error=lambda _: None,
            )  # fmt: skip
            uploader.begin(Source(epoch, layout, table, 20.0))
            assert stored.wait(60)
            wait_for(lambda: uploader.idle, "the upload to end")
            uploader.close()
        assert table.close()

    def restore(self, source: Way, target: Way, table: SlotTable) -> None:
        """What a node of the gang ``target`` has in its slots after a start from the checkpoint of ``source``."""
        info, run = self.checkpoint(*source), self.run
        with ThreadPoolExecutor(2) as pool:
            slots = {rank: table.slots[rank][0] for rank in table.layouts}
            restore_slots(run.store, run.name, info, self.layout(*target), slots, epoch=99, pool=pool)

    def wrong(self, source: Way, target: Way) -> list[int]:
        """Ranks whose slots, restored, do not hold what they would have saved, bit for bit."""
        found = []
        for node in range(target[1]):
            table = self.table(target, node)
            self.restore(source, target, table)
            for rank in table.layouts:
                with table.slots[rank][0].data() as view:
                    wanted = state_bytes(self.layout(*target), rank, STEP)
                    # views compare element by element in a loop of their own
                    if not np.array_equal(np.frombuffer(view, np.uint8), np.frombuffer(wanted, np.uint8)):
                        found.append(rank)
            assert table.close()
        return found
