"""Kubernetes quantities: ``500m``, ``16Gi``, ``2`` as numbers."""

from __future__ import annotations

import re

QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?\Z")
_UNITS = {"": 1.0, "m": 1e-3}
_UNITS |= {unit: 1000.0 ** (n + 1) for n, unit in enumerate("kMGTPE")}
_UNITS |= {f"{unit}i": 1024.0 ** (n + 1) for n, unit in enumerate("KMGTPE")}


def amount(quantity: str) -> float:
    """The number that a quantity stands for. Raises ValueError for what is none.

    >>> amount("500m"), amount("2Ki"), amount("3")
    (0.5, 2048.0, 3.0)
    """
    match = QUANTITY.match(str(quantity))
    if match is None:
        raise ValueError(f"{quantity!r} is no quantity; write for example 4, 500m, 16Gi")
    return float(match[1]) * _UNITS[match[2] or ""]
