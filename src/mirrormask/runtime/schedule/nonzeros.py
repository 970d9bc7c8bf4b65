"""A weight's rows or nonzeros a part at a time: whole, with their positions, they take several times its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Weight
from mirrormask.runtime.kernels import dense

__all__ = ["PART", "nonzeros", "panels", "row_counts", "row_parts", "some_rows"]

#: Numbers of a part: packing holds a dozen arrays of 64 bits for each.
PART = 1 << 16

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


def _size(weight: Weight) -> int:
    """Elements of a row: of one output."""
    return math.prod(weight.shape[1:])


def nonzeros(weight: Weight) -> Iterator[tuple[Ints, npt.NDArray[Any]]]:
    """The flat positions of nonzeros and their values, in order; no row is in two parts."""
    size = max(1, _size(weight))
    if weight.gaps is None:
        for low, high in _spans(weight.shape[0], size):
            rows = _whole_rows(weight, low, high).reshape(-1)
            found = np.flatnonzero(rows)
            yield found + low * size, rows[found]
        return
    at, before, take = 0, 0, PART
    while at < len(weight.gaps):
        position = before + np.cumsum(weight.gaps[at : at + take], dtype=np.int64)
        if at + take < len(weight.gaps):
            position = position[: np.searchsorted(position, position[-1] // size * size)]
        if len(position) == 0:  # a row of more nonzeros than that
            take *= 2
            continue
        yield position, weight.values[at : at + len(position)]
        at, before = at + len(position), int(position[-1])


def row_counts(weight: Weight) -> Ints:
    """The nonzeros of each row."""
    size, counts = max(1, _size(weight)), np.zeros(weight.shape[0], np.int64)
    for position, _ in nonzeros(weight):
        counts += np.bincount(position // size, minlength=len(counts))
    return counts


def row_parts(weight: Weight, whole: int = 1, most: int = 1 << 62) -> Iterator[tuple[int, Floats]]:
    """The rows as dense matrices of about :data:`PART` numbers, each with the number of its first row.

    Args:
        whole: every matrix but the last is a multiple of so many rows.
        most: about so many matrices at most, which may make them larger.
    """
    size = _size(weight)
    starts = np.concatenate([[0], np.cumsum(row_counts(weight))]) if weight.gaps is not None else np.zeros(0, np.int64)
    before = 0
    for low, high in _spans(weight.shape[0], size, whole, most):
        if weight.gaps is None:
            yield low, _whole_rows(weight, low, high)
            continue
        rows = np.zeros((high - low) * size, np.float32)
        span = slice(int(starts[low]), int(starts[high]))
        position = before + np.cumsum(weight.gaps[span], dtype=np.int64)
        rows[position - low * size] = weight.values[span]
        before = int(position[-1]) if len(position) else before
        yield low, rows.reshape(-1, size)


def some_rows(weight: Weight, number: int) -> tuple[Ints, Weight]:
    """So many rows, evenly spaced: their numbers, and the weight of them alone."""
    size = _size(weight)
    chosen = np.arange(number) * weight.shape[0] // number
    rows = np.zeros((number, size), np.float32)
    for position, values in nonzeros(weight):
        row = position // size
        place = np.minimum(np.searchsorted(chosen, row), number - 1)
        found = chosen[place] == row
        rows[place[found], position[found] % size] = values[found]
    return chosen, Weight.of(rows.reshape(number, *weight.shape[1:]))


def panels(weight: Weight, height: int, into: npt.NDArray[Any]) -> None:
    """Fill an array of zeros with the weight's rows, cut into panels as :func:`dense.pack` does."""
    packed = into.reshape(-1, _size(weight), height)
    for low, rows in row_parts(weight, height):
        dense.pack(rows, height, packed[low // height : -(-(low + len(rows)) // height)])


def _whole_rows(weight: Weight, low: int, high: int) -> Floats:
    """The rows in [``low``, ``high``) of a weight that is kept whole."""
    size, panel = _size(weight), weight.panel
    if not panel:
        return weight.values.reshape(-1, size)[low:high]
    first, last = low // panel, -(-high // panel)
    rows = weight.values.reshape(-1, size, panel)[first:last].transpose(0, 2, 1).reshape(-1, size)
    return np.ascontiguousarray(rows[low - first * panel : high - first * panel], np.float32)


def _spans(rows: int, size: int, whole: int = 1, most: int = 1 << 62) -> Iterator[tuple[int, int]]:
    """Spans of ``rows`` rows of ``size`` elements, see :func:`row_parts`."""
    step = max(1, PART // max(1, size) // whole, -(-rows // whole // most)) * whole
    for low in range(0, rows, step):
        yield low, min(rows, low + step)
