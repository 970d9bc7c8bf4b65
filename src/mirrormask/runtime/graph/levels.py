"""Weights that are levels of 8 bits, or halves: found in the numbers, so that a rounded model is known as one.

    w = s q,        s = max |w| / 127 over an output's weights,        q an integer in [-127, 127]

:func:`mirrormask.quantize` rounds so that an output's largest weight has level 127, and a batch norm that is folded
into a layer multiplies the scale alone. So the scale can be read from the largest weight, whatever became of it since.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Weight

__all__ = ["are_halves", "levels_of", "stored_as"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

#: The largest level, and how far a weight may be from ``s q``, relatively: a few roundings in 32 bits.
MOST, CLOSE = 127, 4e-7
#: Weights that are looked at to tell a rounded matrix from another.
FIRST = 1 << 12


def levels_of(
    parts: Iterable[tuple[Ints, npt.NDArray[Any]]], outputs: int
) -> tuple[list[npt.NDArray[np.int8]], Floats] | None:
    """The levels of each part and the scale of each output; None where a weight is no level.

    Args:
        parts: (output, value) of the nonzeros, in order of the outputs; no output is in two parts.

    Example:
        >>> found, scales = levels_of([(np.array([0, 0, 2]), np.array([12.7, -0.3, 254.0]))], 3)
        >>> found[0].tolist(), [round(scale, 6) for scale in scales.tolist()]
        ([127, -3, 127], [0.1, 0.0, 2.0])
    """
    scales, found = np.zeros(outputs, np.float32), []
    for row, values in parts:
        if not len(row):
            continue
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        exact = np.asarray(values, np.float64)
        scale = np.maximum.reduceat(np.abs(exact), starts) / MOST
        each = np.repeat(scale, np.diff(starts, append=len(row)))
        level = np.rint(exact / each)
        if not (np.abs(level * each - exact) <= CLOSE * np.abs(exact)).all():
            return None
        scales[row[starts]] = scale
        found.append(level.astype(np.int8))
    return found, scales


def are_halves(values: npt.NDArray[Any]) -> bool:
    """Whether all numbers are those of half precision."""
    with np.errstate(over="ignore"):
        return bool((values.astype(np.float16) == values).all())


def stored_as(weight: Weight) -> str:
    """What a matrix's first weights can be stored as: ``"int8"``, ``"fp16"`` or ``"fp32"``.

    For telling a rounded model's plans from those of another.
    """
    if weight.gaps is None or len(weight.shape) != 2 or not len(weight.values):
        return "fp32"
    row = np.cumsum(weight.gaps[:FIRST], dtype=np.int64) // weight.shape[1]
    whole = row < row[-1] if len(weight.gaps) > FIRST else np.ones(len(row), bool)
    first = weight.values[:FIRST][whole]
    if len(first) and levels_of([(row[whole], first)], weight.shape[0]) is not None:
        return "int8"
    return "fp16" if len(first) and are_halves(first) else "fp32"
