"""The health of a run's training, from its steps' lines: what differs from the run's own recent past, in numbers.

Pure: `Health.see(line)` gives findings, each told once while it lasts. Lines are hints that may be missing: nothing
here ends a gang, or changes a bit, unless the spec's policy asks for that (`recovery.on_explosion`, D11),
and then for an explosion of the loss alone. What a run does at first is the measure of nothing: `LEAST` steps are.

  explosion    the loss was above the usual for so many steps in a row (`IN_A_ROW`)
  spike        it was once
  gradient     the gradient's norm was many times the usual
  slow         tokens a second were below `SLOW` of the usual for so many steps, of `RATED_US` at least; over where they
               are above `FAST` again
  straggler    a stage computes longer than the plan says, beside the others; over when it does not
  repeated     the data are read a second time from their beginning
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

WINDOW, LEAST = 128, 32
"""Steps that are remembered; and of those that must be known before anything is found."""
IN_A_ROW = 8
WARM_UP = 4
"""First steps of an attempt, whose times say nothing."""
SIGMAS, LOSS_SHARE = 10.0, 0.1
"""A loss is out of line where it is so many times the usual deviation, and this part of the usual loss, above it."""
NORM_TIMES = 10.0
SLOW, FAST = 0.7, 0.85
RATED_US = 500_000
"""Shorter steps are rated together, until they are so long: a few milliseconds say more of the system's scheduler."""
STRAGGLES, KEEPS_UP = 1.5, 1.25
LEAST_BUSY_US = 20_000
"""Computing that is shorter in a step says more of the system's scheduler than of a stage."""
TELL_AGAIN = 100
"""Steps before a spike or an outlier of the gradient's norm is told again."""


@dataclass(frozen=True)
class Symptom:
    """``kind``: as above; ``step``: the first of it; ``value``, ``usual``: the number, and what it is compared with;
    ``over``: it is over.
    """

    kind: str
    epoch: int
    step: int
    last: int
    value: float
    usual: float
    text: str
    over: bool = False

    def facts(self) -> dict[str, Any]:
        """As an event has them: the kind under ``finding``."""
        return {"finding" if key == "kind" else key: value for key, value in asdict(self).items()}


@dataclass
class Health:
    """Of one run, as its lines come. ``pass_steps``: steps of one pass over the data (0: unknown); ``shares``: how much
    of the work each stage has by the plan, any unit (empty: unknown), in the order of the lines' ``busy``;
    ``clip``: the limit of the gradient's norm (0: none).
    """

    pass_steps: int = 0
    shares: Sequence[float] = ()
    clip: float = 0.0
    _epoch: int = 0
    _first: int = 0
    _past: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))  # step, loss, norm
    _rates: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _newest: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=IN_A_ROW))  # step, tokens a second
    _short: list[tuple[int, float, float]] = field(default_factory=list)  # step, its time, tokens: rated together
    _busy: deque[tuple[float, ...]] = field(default_factory=lambda: deque(maxlen=LEAST))
    _high: list[int] = field(default_factory=list)  # steps in a row whose loss was out of line
    _lasting: set[str] = field(default_factory=set)
    _told: dict[str, int] = field(default_factory=dict)  # kind -> step
    _explosion: Symptom | None = None

    @property
    def epoch(self) -> int:
        """Of the newest line; 0: there was none."""
        return self._epoch

    @property
    def explosion(self) -> Symptom | None:
        """One of the loss that lasts."""
        return self._explosion

    def see(self, line: Mapping[str, Any]) -> list[Symptom]:
        """What a step's line (``hints.step_line``) adds. Lines of an attempt that is over are left out."""
        epoch, step = int(line["epoch"]), int(line["step"])
        if epoch < self._epoch:
            return []
        if epoch > self._epoch:
            self._begin(epoch, step)
        found: list[Symptom] = []
        measured = line.get("counted") != 0  # of a step of which no token counts, loss and norm say nothing
        if measured:
            found += [*self._loss(step, float(line["loss"])), *self._norm(step, float(line["grad_norm"]))]
        if measured and not self._high:
            self._past.append((step, float(line["loss"]), float(line["grad_norm"])))
        if step >= self._first + WARM_UP:
            found += self._rate(step, float(line.get("tokens_per_s") or 0.0), float(line.get("step_us") or RATED_US))
            found += self._straggler(step, line.get("busy"))
        return found + self._repeated(step)

    def _begin(self, epoch: int, step: int) -> None:
        """An attempt: what an older one did from this step on is not the run's; times are its own."""
        self._epoch, self._first, self._high, self._explosion = epoch, step, [], None
        self._past = deque((p for p in self._past if p[0] < step), maxlen=WINDOW)
        for times in (self._rates, self._newest, self._short, self._busy):
            times.clear()
        self._lasting.clear()
        self._told = {kind: at for kind, at in self._told.items() if at < step}

    def _loss(self, step: int, loss: float) -> list[Symptom]:
        if len(self._past) < LEAST:
            return []
        losses = [past[1] for past in self._past]
        usual = median(losses)
        spread = 1.4826 * median(abs(x - usual) for x in losses)
        if loss - usual <= max(SIGMAS * spread, LOSS_SHARE * abs(usual)):
            self._high, self._explosion = [], None
            return []
        self._high.append(step)
        first, at = self._high[0], f"loss {loss:.4f} at step {step}, where {usual:.4f} is usual"
        if len(self._high) >= IN_A_ROW and self._explosion is None:
            text = f"the loss explodes: {at}; above the usual since step {first}"
            self._explosion = Symptom("explosion", self._epoch, first, step, loss, usual, text)
            return [self._explosion]
        if len(self._high) == 1 and self._again("spike", step):
            return [Symptom("spike", self._epoch, step, step, loss, usual, f"the loss leaps: {at}")]
        return []

    def _norm(self, step: int, norm: float) -> list[Symptom]:
        if len(self._past) < LEAST:
            return []
        usual = median(past[2] for past in self._past)
        if norm <= NORM_TIMES * usual or usual <= 0.0 or not self._again("gradient", step):
            return []
        mend = "nothing clips it (train.optimizer.clip is 0)"
        if self.clip > 0.0:
            mend = f"it was clipped to {self.clip:g}" if norm > self.clip else f"train.optimizer.clip is {self.clip:g}"
        text = f"the gradient's norm is {norm:.3g} at step {step}, where {usual:.3g} is usual; {mend}"
        return [Symptom("gradient", self._epoch, step, step, norm, usual, text)]

    def _again(self, kind: str, step: int) -> bool:
        if step - self._told.get(kind, -TELL_AGAIN) < TELL_AGAIN:
            return False
        self._told[kind] = step
        return True

    def _rate(self, step: int, rate: float, time_us: float) -> list[Symptom]:
        if rate <= 0.0:
            return []
        self._short.append((step, time_us, rate * time_us))
        first, took = self._short[0][0], sum(us for _, us, _ in self._short)
        if took < RATED_US:
            return []
        rate = sum(tokens for _, _, tokens in self._short) / took
        self._short.clear()
        self._newest.append((first, rate))
        now, slow = median(r for _, r in self._newest), "slow" in self._lasting
        usual = median(self._rates) if self._rates else now
        if not slow and rate >= SLOW * usual:
            self._rates.append(rate)
        if len(self._newest) < IN_A_ROW or len(self._rates) < LEAST:
            return []
        if not slow and max(r for _, r in self._newest) < SLOW * usual:
            self._lasting.add("slow")
            first = self._newest[0][0]
            text = f"{now:,.0f} tokens a second since step {first}, where {usual:,.0f} are usual"
            return [Symptom("slow", self._epoch, first, step, now, usual, text)]
        if slow and now >= FAST * usual:
            self._lasting.discard("slow")
            text = f"{now:,.0f} tokens a second again"
            return [Symptom("slow", self._epoch, step, step, now, usual, text, over=True)]
        return []

    def _straggler(self, step: int, busy: Any) -> list[Symptom]:
        """Each stage's time over its share of the plan, beside the median of the others'."""
        if not _times(busy, len(self.shares)) or median(busy) < LEAST_BUSY_US:
            return []
        self._busy.append(tuple(float(b) / share for b, share in zip(busy, self.shares, strict=True)))
        if len(self._busy) < LEAST:
            return []
        typical = [median(column) for column in zip(*self._busy, strict=True)]
        found = []
        for stage, mine in enumerate(typical):
            others, kind = median(t for s, t in enumerate(typical) if s != stage), f"straggler {stage}"
            if others <= 0.0:
                continue
            times, first = mine / others, step - LEAST + 1
            if times > STRAGGLES and kind not in self._lasting:
                self._lasting.add(kind)
                text = f"rank {stage} computes {times:.1f} times as long as the plan says, beside the others"
                found.append(Symptom("straggler", self._epoch, first, step, times, 1.0, f"{text}, since step {first}"))
            elif times < KEEPS_UP and kind in self._lasting:
                self._lasting.discard(kind)
                text = f"rank {stage} keeps up again"
                found.append(Symptom("straggler", self._epoch, step, step, times, 1.0, text, over=True))
        return found

    def _repeated(self, step: int) -> list[Symptom]:
        first = self.pass_steps + 1
        if not 1 < first <= step or "repeated" in self._told:
            return []
        self._told["repeated"] = first
        text = f"from step {first} on the data are read again from their beginning ({self.pass_steps:,} steps a pass)"
        return [Symptom("repeated", self._epoch, first, step, step / self.pass_steps, 1.0, text)]


def _times(busy: Any, count: int) -> bool:
    """Whether these are the times of so many stages, at least two; of a hint."""
    return (
        count > 1
        and isinstance(busy, list)
        and len(busy) == count
        and all(isinstance(b, int | float) and not isinstance(b, bool) and 0 < b < math.inf for b in busy)
    )
