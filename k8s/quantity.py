"""Kubernetes quantities: ``500m``, ``1.5Gi``, ``1e3``, ``2`` as exact numbers, and back. Pure.

The rules are those of the API server's own parser (apimachinery, ``resource.ParseQuantity``): what is finer than a
billionth is rounded up in size, and what a binary suffix carries beyond 2^63 - 1 counts as that. Two things are refused
that the server lets pass, because nobody means them: a quantity without any digit (``Ki``, ``-``), which it reads as 0,
and exponents above 100.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

_FORM = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>[0-9]*)(?:\.(?P<part>[0-9]*))?(?P<unit>[numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]{1,9}|)\Z"
)
_DECIMAL = {"": 0, "n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {f"{letter}i": 1 << 10 * (n + 1) for n, letter in enumerate("KMGTPE")}
_FINEST = Fraction(1, 10**9)
_MOST_BINARY = (1 << 63) - 1
_LONGEST, _MOST_EXPONENT = 100, 100


def amount(quantity: str) -> Fraction:
    """The number that a quantity stands for. Raises ValueError for what is none.

    >>> amount("500m"), amount("2Ki"), amount("1E3"), amount("1E")
    (Fraction(1, 2), Fraction(2048, 1), Fraction(1000, 1), Fraction(1000000000000000000, 1))
    """
    text = str(quantity)
    match = _FORM.match(text) if len(text) <= _LONGEST else None
    digits = match and f"{match['whole']}{match['part'] or ''}"
    if match is None or not digits:
        raise ValueError(f"{text[:_LONGEST]!r} is no quantity; write for example 4, 500m, 16Gi{_almost(text)}")
    value, unit = Fraction(int(digits), 10 ** len(match["part"] or "")), match["unit"]
    if unit in _BINARY:
        value = min(_rounded(value * _BINARY[unit]), Fraction(_MOST_BINARY))
    else:
        exponent = _DECIMAL[unit] if unit in _DECIMAL else int(unit[1:])
        if exponent > _MOST_EXPONENT:
            raise ValueError(f"{text!r} is no quantity: its exponent is above {_MOST_EXPONENT}; write for example 16Gi")
        # beyond these digits everything rounds to the same billionth
        value = _rounded(value * Fraction(10) ** max(exponent, -2 * _LONGEST))
    return -value if match["sign"] == "-" else value


def _almost(text: str) -> str:
    """What somebody means who writes a unit as elsewhere (16GB, 16gib, 16 G), as the end of a message."""
    found = re.match(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([kmgtp])(i?)b?\Z", text, re.IGNORECASE | re.ASCII)
    if found is None:
        return ""
    binary = f"{found[1]}{found[2].upper()}i"
    return f" (is {binary} meant?)" if found[3] else f" (is {binary} meant, or {binary[:-1].replace('K', 'k')}?)"


def _rounded(value: Fraction) -> Fraction:
    return Fraction(math.ceil(value / _FINEST)) * _FINEST


def spelled(value: Fraction, resource: str = "") -> str:
    """A number as a quantity, without loss: bytes (``resource`` is one of memory or storage) with binary suffixes.

    >>> spelled(Fraction(1, 2)), spelled(Fraction(1 << 30), "limits.memory"), spelled(Fraction(1000), "pods")
    ('500m', '1Gi', '1000')
    """
    if value.denominator == 1 and in_bytes(resource):
        for unit, size in reversed(_BINARY.items()):
            if value and value % size == 0:
                return f"{value // size}{unit}"
    for unit in ("", "m", "u", "n"):
        scaled = value / Fraction(10) ** _DECIMAL[unit]
        if scaled.denominator == 1:
            return f"{scaled}{unit}"
    return f"{float(value):g}"


def in_bytes(resource: str) -> bool:
    """Whether a resource is counted in bytes."""
    return resource.endswith(("memory", "storage")) or "hugepages-" in resource
