"""``hotstage ckpt diff``: two checkpoints side by side, as plain values and as lines for people.

A difference is one of bits: 0.0 and -0.0 differ (by no ulp). The largest difference and the ulps are of pairs of finite
numbers; others are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.chunks import shape_text
from checkpoint.diff import Pair, differing, pairs
from checkpoint.digest import KINDS
from checkpoint.manifest import Manifest
from checkpoint.read import StateReader
from checkpoint.store import Store
from flows.drive.run import find_run
from flows.show.export import checkpoint_at
from trainer.errors import SpecError


@dataclass(frozen=True)
class KindDiff:
    """One kind (param, exp_avg, exp_avg_sq) of a tensor that differs.

    ``elements``: how many differ; ``first``: the first of them, by its indices; ``values``: it, on both sides;
    ``max_abs`` and ``max_ulp``: over pairs of finite numbers; ``not_finite``: differing pairs that are none.
    """

    kind: str
    elements: int
    first: tuple[int, ...]
    values: tuple[float, float]
    max_abs: float
    max_ulp: int
    not_finite: int


@dataclass
class _Tally:
    """Of a tensor and kind, while it is read."""

    elements: int = 0
    first: int = -1
    values: tuple[float, float] = (0.0, 0.0)
    max_abs: float = 0.0
    max_ulp: int = 0
    not_finite: int = 0

    def add(self, at: int, a: bytes | bytearray, b: bytes | bytearray) -> None:
        """Elements from number ``at`` on, of both sides."""
        mine, theirs = (np.frombuffer(data, dtype="<u4") for data in (a, b))
        found = np.flatnonzero(mine != theirs)
        if not len(found):
            return
        mine, theirs = mine[found], theirs[found]
        with np.errstate(invalid="ignore"):  # NaNs that signal
            x, y = (bits.view("<f4").astype(np.float64) for bits in (mine, theirs))
        if self.first < 0:
            self.first, self.values = at + int(found[0]), (float(x[0]), float(y[0]))
        self.elements += len(found)
        finite = np.isfinite(x) & np.isfinite(y)
        self.not_finite += len(found) - int(finite.sum())
        if finite.any():
            self.max_abs = max(self.max_abs, float(np.abs(x - y, where=finite, out=np.zeros_like(x)).max()))
            self.max_ulp = max(self.max_ulp, int(np.abs(ordered(mine) - ordered(theirs))[finite].max()))

    def of(self, kind: int, shape: tuple[int, ...]) -> KindDiff:
        indices = tuple(int(i) for i in np.unravel_index(self.first, shape))
        return KindDiff(KINDS[kind], self.elements, indices, self.values, self.max_abs, self.max_ulp, self.not_finite)


def ordered(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """The bits of float32 as numbers whose distance is the ulps between them; both zeros are 0."""
    wide = bits.astype(np.int64)
    return np.where(wide < 1 << 31, wide, (1 << 31) - wide)


def diff(store_a: Store, a: Manifest, store_b: Store, b: Manifest) -> Iterator[tuple[Pair, tuple[KindDiff, ...]]]:
    """Every tensor of either side, and the kinds of it that differ. Raises Damaged, StoreError."""
    one, two = StateReader(store_a, a), StateReader(store_b, b)
    for pair in pairs(a, b):
        yield pair, tuple(_kinds(one, two, pair)) if pair.comparable else ()


def _kinds(a: StateReader, b: StateReader, pair: Pair) -> Iterator[KindDiff]:
    for kind in range(min(side.manifest.tensor(pair.name).kinds for side in (a, b))):
        tally = _Tally()
        for first, mine, theirs in differing(a, b, pair.name, kind):
            tally.add(first, mine, theirs)
        if tally.elements:
            yield tally.of(kind, pair.shape)


def parse_point(text: str) -> tuple[str, int | None]:
    """A run and a step as a person names them; the step None where it is left out: the newest.

    >>> parse_point("demo-0a1b2c@40"), parse_point("demo")
    (('demo-0a1b2c', 40), ('demo', None))
    """
    run, at, step = text.partition("@")
    if at and not (step.isascii() and step.isdigit() and len(step) <= 15):
        raise SpecError(f"{text!r}: what follows the @ must be a step, such as {run or 'RUN'}@100")
    return run, int(step) if at else None


def compare(store: Store, a: str, b: str) -> dict[str, Any]:
    """Both checkpoints and each tensor that differs, in JSON's values. SpecError, Damaged, StoreError."""
    sides, manifests = [], []
    for text in (a, b):
        name, step = parse_point(text)
        run = find_run(store, name)
        info, manifest = checkpoint_at(store, run, step)
        manifests.append(manifest)
        sides.append({"run": run, "step": info.step, "epoch": info.epoch, "state_digest": info.state_digest})
    found = list(diff(store, manifests[0], store, manifests[1]))
    differ = [(pair, kinds) for pair, kinds in found if kinds or not pair.comparable]
    same = {name: getattr(manifests[0], name) == getattr(manifests[1], name) for name in ("step", "samples", "what")}
    tensors = [{**asdict(pair), "kinds": [asdict(kind) for kind in kinds]} for pair, kinds in differ]
    return {
        "equal": sides[0]["state_digest"] == sides[1]["state_digest"],
        "a": sides[0],
        "b": sides[1],
        "same_step": same["step"],
        "same_samples": same["samples"],
        "same_what": same["what"],
        "tensors": len(found),
        "differ": tensors,
    }


def diff_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """What ``compare`` gives, for people."""
    for side in ("a", "b"):
        at = told[side]
        yield f"{side}: {at['run']} step {at['step']}, state digest {at['state_digest']}"
    for tensor in told["differ"]:
        yield from _tensor(tensor)
    if told["equal"]:
        yield f"equal: all {told['tensors']} tensors with their moments, the step and the data position"
        return
    if told["differ"]:
        yield f"{len(told['differ'])} of {told['tensors']} tensors differ"
    else:
        yield f"all {told['tensors']} tensors are equal, with their moments"
    for key, words in (
        ("same_step", "the steps differ"),
        ("same_samples", "the data positions differ"),
        ("same_what", "the two are of runs that train different things (model, data or train)"),
    ):
        if not told[key]:
            yield words


def _tensor(tensor: Mapping[str, Any]) -> Iterator[str]:
    if tensor["only"]:
        yield f"  {tensor['name']}  {shape_text(tensor['shape'])}: in {tensor['only']} alone"
    elif tensor["shapes"]:
        yield f"  {tensor['name']}: {' in a, '.join(shape_text(s) for s in tensor['shapes'])} in b"
    for kind in tensor["kinds"]:
        odd = f", {kind['not_finite']:,} of them not finite" if kind["not_finite"] else ""
        x, y = kind["values"]
        yield (
            f"  {tensor['name']}  {shape_text(tensor['shape'])}  {kind['kind']}: {kind['elements']:,} of "
            f"{math.prod(tensor['shape']):,} differ{odd}, at most {kind['max_abs']:.3g} ({kind['max_ulp']:,} ulp); "
            f"first {kind['first']}: {x} and {y}"
        )
