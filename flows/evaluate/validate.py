"""The loss of a checkpoint on data that is not trained on: forward only, by the engine, window by window.

Which windows: ``count`` of those that the dataset has, spread evenly over it, the same ones each time. The engine gives
the losses of a window's tokens, equal bits for any number of threads; they are added up exactly (``math.fsum``), so the
result does not depend on an order either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from checkpoint import keys
from checkpoint.errors import NotFound
from checkpoint.store import Store
from flows.data import prepare, validation_of
from flows.drive.evaluations import NO_DATA, own_data
from flows.drive.run import Prepared
from flows.drive.their_tokenizer import run_tokenizer, with_tokenizer
from flows.show.export import Inference
from trainer.dataset import HEADER_BYTES, DatasetRef, counts_of, without_mask
from trainer.errors import DatasetError, SpecError
from trainer.spec import DataSpec

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Validated:
    """``loss``: the mean over ``tokens`` tokens in ``windows`` windows of the dataset of this digest: those that count,
    where it has a mask.
    """

    loss: float
    windows: int
    tokens: int
    data: str


def validation_data(store: Store, prepared: Prepared, say: Callable[[str], None]) -> DatasetRef:
    """What the run is validated on: ``validation.source`` by the run's own tokenizer, else the validation part of its
    data. SpecError where there is neither.
    """
    wanted, dataset = prepared.spec.validation, prepared.dataset
    source = wanted.source
    if not source:
        found = validation_of(store, dataset)
        if found is None:
            raise SpecError(NO_DATA)
        return found
    if source.startswith("dataset:"):
        other = prepare(DataSpec(source=source), store, say=say)
        if other.tokenizer_digest != dataset.tokenizer_digest:
            raise SpecError(
                f"validation.source {source[:40]} was made by another tokenizer than the run's data: its tokens mean "
                "other texts; give the text itself (text:… or jsonl:…)"
            )
        return other
    with with_tokenizer(own_data(wanted), run_tokenizer(store, prepared.run)) as data:
        return prepare(data, store, say=say)


def validate(
    store: Store, prepared: Prepared, step: int, data: DatasetRef, *, threads: int = 0, stop: Callable[[], bool]
) -> Validated:
    """The mean loss of the checkpoint of this step. Stopped where ``stop`` says so."""
    sequence = prepared.spec.train.sequence
    losses: list[float] = []
    windows = 0
    with Inference(store, prepared.run, step, losses=True, threads=threads) as engine:
        for tokens, targets in windows_of(store, data, sequence, prepared.spec.validation.windows):
            if stop():
                raise InterruptedError
            losses += engine.losses(tokens, targets)[targets >= 0].tolist()
            windows += 1
    if not losses:
        raise DatasetError(
            f"no token counts in {windows} windows of {sequence} tokens of validation data {data.digest[:12]}: prompts "
            "fill them; take more (validation.windows), or validate on data with longer answers"
        )
    return Validated(math.fsum(losses) / len(losses), windows, len(losses), data.digest)


def windows_of(store: Store, data: DatasetRef, sequence: int, count: int) -> Iterator[tuple[Tokens, Tokens]]:
    """Windows of ``sequence`` tokens, each with their targets (-1: does not count), as many as there are, at most
    ``count``. DatasetError where there is none.
    """
    have = data.samples(sequence)
    if have < 1:
        raise DatasetError(
            f"validation data {data.digest[:12]} has {data.tokens} tokens, and no window of {sequence + 1} "
            "(train.sequence and one) fits into a shard of it; validate on more text"
        )
    count = min(count, have)
    firsts = np.cumsum([0, *(max(0, tokens - 1) // sequence for tokens in data.shards)])
    for number in range(count):
        sample = number * have // count
        shard = int(np.searchsorted(firsts, sample, side="right")) - 1
        at = HEADER_BYTES + (sample - int(firsts[shard])) * sequence * data.token_bytes
        key = keys.dataset_key(data.digest, keys.shard_name(shard))
        size = (sequence + 1) * data.token_bytes
        try:
            raw = store.get(key, first=at, length=size)
        except NotFound:
            raise DatasetError(f"{key} is not in {store.describe()}; `hotstage data prepare` makes it again") from None
        if len(raw) != size:
            raise DatasetError(f"{key} ends within a window: it is damaged; `hotstage data prepare SPEC --again`")
        stored = np.frombuffer(raw, dtype=f"<u{data.token_bytes}")
        window = (without_mask(stored) if data.masked else stored).astype(np.int32)
        yield window[:-1], np.where(counts_of(stored[1:]), window[1:], np.int32(-1)) if data.masked else window[1:]
