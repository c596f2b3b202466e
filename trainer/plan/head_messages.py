"""What passes between who owns the head's matrix and who computes with it, and between the parts of a head.

The owner of the matrix (``places.Layout``) may not be the position that has the head, nor the only one that does
(``job.HeadUse``): its rows go to the others once a step, and their gradients come back. Parts exchange a microbatch's
input, sums and shares (``head_rows.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer import wire
from trainer.plan.arena import PositionMemory
from trainer.plan.edges import OwnChannels
from trainer.plan.expand import OTHER_SHARES
from trainer.plan.head import SUMS
from trainer.plan.job import Job
from trainer.plan.places import Stage
from trainer.plan.records import BoundAction, Ref


@dataclass(frozen=True)
class HeadMessages:
    """Of one position."""

    job: Job
    mem: PositionMemory
    own: OwnChannels

    def weights(self) -> list[BoundAction]:
        """The head's rows of the compute weights to those that do not own them."""
        if self.mem.tied is None:
            return []
        owner = self.job.layout.owner(self.job.tensors[self.mem.tied])
        if self.mem.position == owner:
            whole, others = self.mem.compute(self.mem.tied), [u for u in self.job.head_uses if u.position != owner]
            return [self.own.send(u.position, wire.CH_TIED_WEIGHT, self.mem.rows_of(whole, u)) for u in others]
        return [] if self.mem.use is None else [self.own.receive(owner, wire.CH_TIED_WEIGHT, self.mem.head_weight)]

    def gradient(self) -> list[BoundAction]:
        """And their gradients back."""
        if self.mem.tied is None:
            return []
        owner = self.job.layout.owner(self.job.tensors[self.mem.tied])
        if self.mem.position == owner:
            return [self.own.receive(p, wire.CH_TIED_GRAD, ref) for p, ref in self.mem.tied_received.items()]
        if self.mem.use is None:
            return []
        share = self.mem.head_gradient
        assert share is not None
        share = share if self.job.parts is not None else self.mem.own(share, self.mem.tied)
        return [self.own.send(owner, wire.CH_TIED_GRAD, share)]

    def shares(self, n: int) -> list[tuple[Ref, Ref]]:
        """Where shares of the head's gradient are added, and what is: of parts their rows, in every replica."""
        whole, pairs = self.mem.gradients[n], []
        for use in self.job.head_uses:
            here = use.position == self.mem.position
            share = self.mem.head_gradient if here else self.mem.tied_received[use.position]
            assert share is not None
            if self.job.parts is not None:
                pairs.append((self.mem.rows_of(whole, use), share))
            else:
                own = self.mem.own(share, n) if here else share
                pairs.append((self.mem.own(whole, n), own))
        return pairs

    def messages(self, here: Stage, op: str) -> tuple[BoundAction, ...]:
        """The messages of a head in parts, in the order in which all positions pass them."""
        parts, mine = self.job.parts, self.mem.part
        assert parts is not None
        assert mine is not None
        stage, last, rows = self.mem.stages[here], parts.last, 12 * self.job.spec.train.rows
        others = [(part, position) for part, position in enumerate(parts.positions) if part != mine]
        if op == "SPREAD":
            ref = self.mem.bind(here, stage.received if mine else stage.sent)
            if mine:
                return (self.own.receive(parts.positions[0], wire.CH_FORWARD, ref, "F", here, last),)
            return tuple(self.own.send(position, wire.CH_FORWARD, ref, "F", here) for _, position in others)
        if op == "JOIN":
            if mine:
                ref = self.mem.bind(here, stage.gradient_sent, True)
                return (self.own.send(parts.positions[0], wire.CH_BACKWARD, ref, "B", here),)
            taken = next(ref for name, ref in self.mem.buffers[here].places.items() if name.startswith(OTHER_SHARES))
            size = taken.bytes // len(others)
            return tuple(
                self.own.receive(
                    position,
                    wire.CH_BACKWARD,
                    replace(taken, offset=taken.offset + n * size, bytes=size),
                    "B",
                    here,
                    parts.stage(part),
                )
                for n, (part, position) in enumerate(others)
            )
        sums = self.mem.buffers[here].places[SUMS]

        def of(part: int) -> Ref:
            return replace(sums, offset=sums.offset + part * rows, bytes=rows)

        # of two parts the lower gives first, and pairs pass in order: each position's share of one order
        actions: list[BoundAction] = []
        for part, position in others:
            give = self.own.send(position, wire.CH_FORWARD, of(mine), "F", here)
            take = self.own.receive(position, wire.CH_FORWARD, of(part), "F", here, parts.stage(part))
            actions += [give, take] if mine < part else [take, give]
        return tuple(actions)
