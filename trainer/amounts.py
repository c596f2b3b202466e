"""Numbers as people read them, in a page, a table or a line: times, bytes, counts."""

from __future__ import annotations


def seconds_text(value: float) -> str:
    """A time in the unit that reads best.

    >>> [seconds_text(x) for x in (0.0000125, 0.0042, 0.9999, 1.5, 1_234.0, 90_000.0, float("inf"))]
    ['12.5 us', '4.2 ms', '0.9999 s', '1.5 s', '1234 s', '25 h', 'never']
    """
    if value == float("inf"):
        return "never"
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        if value * factor < 999.5:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.4g} s" if value < 3600 else f"{value / 3600:,.4g} h"


def took(seconds: float) -> str:
    """How long something of a run lasted.

    >>> [took(x) for x in (0.0, 0.618, 12.34, 59.96, 754.0, 3_599.9, 11_531.0, 260_000.0)]
    ['0 s', '0.62 s', '12.3 s', '1 min 0 s', '12 min 34 s', '1 h 0 min', '3 h 12 min', '3 d 0 h']
    """
    if seconds < 59.95:
        return f"{seconds:.2f} s" if 0 < seconds < 9.995 else f"{seconds:.1f} s" if seconds else "0 s"
    whole = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size:,} {unit} {whole % size // part} {below}"
    raise AssertionError("unreachable")


def clock(seconds: float) -> str:
    """A time that counts up or down before a person's eyes, always as wide.

    >>> [clock(x) for x in (0, 75.9, 3_723)]
    ['0:00', '1:15', '1:02:03']
    """
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def bytes_text(count: int) -> str:
    """Bytes in the unit that reads best.

    >>> [bytes_text(x) for x in (0, 900, 2048, 3 << 20, 5 << 30)]
    ['0', '900 B', '2.0 KiB', '3.0 MiB', '5.0 GiB']
    """
    if count == 0:
        return "0"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def count_text(value: float) -> str:
    """A count with its thousands, or in the unit that reads best.

    >>> [count_text(x) for x in (512, 16384, 2_530_000, 4.1e11, 1.008e12)]
    ['512', '16,384', '2.53 M', '410 B', '1.01 T']
    """
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:,.0f}"


def gigabytes(value: float) -> str:
    """Bytes as GB of 10^9, the unit of device sheets."""
    return f"{value / 1e9:,.1f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"
