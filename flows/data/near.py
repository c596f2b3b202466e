"""Near duplicates: MinHash signatures (by datasketch) of a text's five-word phrases, and where to look for equals.

A signature's values fall into bands; two texts that are as near as is asked share a band in 99 of 100 cases, and what
shares one is compared by its signatures. What a piece keeps (``near/<piece>.<part>``), little endian: for each band a
u64 of every document, then the signatures, ``VALUES`` u32 a document; a document that is out has zeros.
"""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flows.data.sources.base import optional_module

VALUES = 128
PHRASE = 5
_RECALL = 0.99
_BATCH = 4096
_PRIME = 0x9E3779B97F4A7C15
_WORD = re.compile(r"\w+")

Signature = npt.NDArray[np.uint32]


@functools.lru_cache
def bands(near: float) -> tuple[int, int]:
    """How many bands of how many values: the widest that two texts of that nearness share with probability 0.99.

    >>> bands(0.8)
    (21, 6)
    """
    for rows in range(VALUES, 0, -1):
        count = VALUES // rows
        if 1 - (1 - near**rows) ** count >= _RECALL:
            return count, rows
    return VALUES, 1


def phrases(text: str) -> npt.NDArray[np.uint32]:
    """A hash of each five words in a row of a text (of all of them, where it has fewer); empty where it has none."""
    words = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(text.lower())]
    if not words:
        return np.empty(0, np.uint32)
    hashes = np.asarray(words, np.uint64)
    width = min(PHRASE, len(words))
    count = len(words) - width + 1
    mixed = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for at in range(width):
            mixed = (mixed ^ hashes[at : at + count]) * np.uint64(_PRIME)
            mixed ^= mixed >> np.uint64(29)
    return np.unique((mixed >> np.uint64(32)).astype(np.uint32))


def signature(text: str) -> Signature | None:
    """Of a text; None where it has no word."""
    found = phrases(text)
    if not found.size:
        return None
    made = optional_module("datasketch", "datasketch", "data.dedupe.near").MinHash(
        VALUES, 1, hashfunc=int, scheme="affine32"
    )
    for first in range(0, found.size, _BATCH):
        made.update_batch(found[first : first + _BATCH].tolist())
    return np.asarray(made.hashvalues, np.uint32)


def likeness(one: Signature, others: Signature) -> npt.NDArray[np.float64]:
    """The share of values that are equal: an estimate of the phrases that two texts have in common."""
    return np.asarray((one == others).mean(axis=-1), np.float64)


def near_bytes(signatures: Sequence[Signature | None], near: float) -> bytes:
    """What a part keeps of its documents."""
    count, rows = bands(near)
    table = np.zeros((len(signatures), VALUES), np.uint32)
    there = np.zeros(len(signatures), bool)
    for number, made in enumerate(signatures):
        if made is not None:
            table[number], there[number] = made, True
    keys = np.zeros((count, len(signatures)), np.uint64)
    with np.errstate(over="ignore"):
        for band in range(count):
            mixed = np.full(len(signatures), band + 1, np.uint64)
            for column in range(band * rows, (band + 1) * rows):
                mixed = (mixed ^ table[:, column].astype(np.uint64)) * np.uint64(_PRIME)
                mixed ^= mixed >> np.uint64(29)
            keys[band] = np.where(there, np.maximum(mixed, 1), 0)
    return keys.astype("<u8").tobytes() + table.astype("<u4").tobytes()


def key_span(band: int, documents: int) -> tuple[int, int]:
    """First byte and length of a band's keys in such bytes."""
    return band * documents * 8, documents * 8


def signature_span(near: float, documents: int) -> tuple[int, int]:
    """First byte and length of all signatures."""
    return bands(near)[0] * documents * 8, documents * VALUES * 4
