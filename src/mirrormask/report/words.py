"""Numbers in words: percentages, sizes and times as the page's sentences write them, without breaks before units."""

from __future__ import annotations

import math

__all__ = ["count", "duration", "percent", "points", "size", "sparsity"]

#: A space at which no line is broken.
SPACE = "\u00a0"


def percent(share: float, digits: int = 1) -> str:
    """A share in percent.

    Example:
        >>> percent(0.8766), percent(0.8766, 2)
        ('87.7%', '87.66%')
    """
    return f"{100 * share:.{digits}f}%"


def sparsity(value: float) -> str:
    """A sparsity without needless zeros.

    Example:
        >>> sparsity(0.995), sparsity(0.9)
        ('99.5%', '90%')
    """
    return f"{100 * value:.6g}%"


def points(difference: float, half_width: float | None = None) -> str:
    """The size of a difference of accuracies in points, with half of its interval; two digits for less than a tenth.

    Example:
        >>> points(0.0163), points(-0.0004), points(0.01)
        ('1.6\xa0points', '0.04\xa0points', '1.0\xa0points')
        >>> points(0.011, 0.004)
        '1.1\xa0±\xa00.4\xa0points'
    """
    size = abs(100 * difference)
    digits = 1 if min(size, math.inf if half_width is None else 100 * half_width) >= 0.095 else 2
    interval = "" if half_width is None else f"{SPACE}±{SPACE}{100 * half_width:.{digits}f}"
    return f"{size:.{digits}f}{interval}{SPACE}points"


def size(n: float) -> str:
    """Bytes with a decimal prefix.

    Example:
        >>> size(10962), size(1.07e6), size(960)
        ('11.0\xa0kB', '1.07\xa0MB', '960\xa0B')
    """
    if n >= 1e6:
        return f"{n / 1e6:.2f}{SPACE}MB"
    return f"{n / 1e3:.1f}{SPACE}kB" if n >= 1e3 else f"{n:.0f}{SPACE}B"


def duration(seconds: float) -> str:
    """A time with the unit that suits it.

    Example:
        >>> duration(3.5e-05), duration(0.0041), duration(17.6)
        ('35\xa0µs', '4.1\xa0ms', '17.6\xa0s')
    """
    for unit, factor in (("µs", 1e6), ("ms", 1e3)):
        value = seconds * factor
        if value < 999.5:
            return f"{value:.2g}{SPACE}{unit}" if value < 99.5 else f"{value:.0f}{SPACE}{unit}"
    return f"{seconds:.1f}{SPACE}s"


def count(n: int, one: str, many: str = "") -> str:
    """A number with its noun.

    Example:
        >>> count(1, "run"), count(1200, "run"), count(2, "entry", "entries")
        ('1 run', '1,200 runs', '2 entries')
    """
    return f"{n:,} {one if n == 1 else many or one + 's'}"
