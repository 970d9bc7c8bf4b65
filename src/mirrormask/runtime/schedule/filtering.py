"""A convolution's weight for :mod:`kernels.winograd`: which rows its filters read, transformed and in panels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.ir import Weight
from mirrormask.runtime.kernels import dense
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.kernels.winograd import MOST_POINTS, MOST_ROWS, Band, TransformSpec, matrices
from mirrormask.runtime.schedule.nonzeros import row_parts
from mirrormask.runtime.schedule.taps import Taps

__all__ = ["bands_of", "filtered_layout", "pack", "tile_rows", "transform_spec"]


def bands_of(taps: Taps) -> tuple[Band, ...]:
    """The rows that each phase's filter reads; empty unless they follow each other, and are several in some phase."""
    phase, position = taps.places[0]
    bands = {}
    for a in np.unique(phase):
        rows = position[phase == a]  # ascending, as kernel rows are
        if (np.diff(rows) != 1).any():
            return ()
        bands[int(a)] = Band(int(rows[0]), len(rows))
    longest = max(band.taps for band in bands.values())
    return tuple(bands[a] for a, _ in taps.phases) if longest > 1 else ()


def tile_rows(taps: Taps) -> int:
    """The output rows of a tile that take the fewest products; 0 where rows cannot be filtered."""
    bands = bands_of(taps)
    height = taps.out[1]
    longest = max((band.taps for band in bands), default=MOST_POINTS)
    possible = range(2, min(height, MOST_ROWS, MOST_POINTS - longest + 1) + 1)

    def products(rows: int) -> int:
        return math.ceil(height / rows) * sum(rows + band.taps - 1 for band in bands)

    return min(possible, key=products, default=0)


def transform_spec(taps: Taps, x: Layout, target: Target, rows: int) -> TransformSpec:
    """The transform of an input that lies as ``x`` says, for tiles of ``rows`` output rows."""
    return TransformSpec(
        target,
        rows,
        taps.out[1],
        bands_of(taps),
        x.pitch,
        x.plane,
        x.vectors,
        _row(x, 1).plane,
        taps.source[0],
    )


def filtered_layout(taps: Taps, x: Layout, target: Target, rows: int) -> Layout:
    """Where the transformed rows lie: each as a map of one row, those of a tile together."""
    spec = transform_spec(taps, x, target, rows)
    return _row(x, spec.tiles * spec.slots)


def _row(x: Layout, count: int) -> Layout:
    return Layout(count, 1, x.width, x.lanes, x.stride, 1, 0)


def pack(taps: Taps, weight: Weight, spec: TransformSpec, channels: int) -> dict[str, Any]:
    """The kernel's constants, for ``channels`` output channels at a time.

    ``weights``: ``G g``, computed in 64 bits, as :func:`dense.pack` has it, the terms of one point after those of
    another; ``offsets`` of each term's transformed row and column in a tile; ``starts`` of each point's terms, and the
    end.
    """
    outputs, inputs, *kernel = weight.shape
    (row_phase, _), (column_phase, column) = taps.places
    phases = [(np.flatnonzero(row_phase == a), np.flatnonzero(column_phase == b)) for a, b in taps.phases]
    offsets: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(spec.points)]
    for number, (_, columns) in enumerate(phases):
        for point in spec.at(number):
            first, step = spec.place(point, number)
            slots = first + step * np.arange(inputs)
            offsets[point].append(slots[:, None] * spec.out_plane + column[columns] - taps.left)
    places = [np.concatenate(values, axis=1).reshape(-1) for values in offsets]
    starts = np.cumsum([0, *map(len, places)])

    def filtered(whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``G g`` of some outputs, a row each: of each point, channel by channel, the phases of one together."""
        filters: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(spec.points)]
        for number, (rows, columns) in enumerate(phases):
            g = matrices(spec.rows, len(rows))[1]
            transformed = np.einsum("nr,oirk->noik", g, whole[:, :, rows][:, :, :, columns])
            for point, values in zip(spec.at(number), transformed, strict=True):
                filters[point].append(values)
        return np.concatenate([np.concatenate(values, axis=2).reshape(len(whole), -1) for values in filters], axis=1)

    panels = np.zeros((-(-outputs // channels), int(starts[-1]), channels), np.float32)
    for low, rows in row_parts(weight, channels):
        whole = rows.reshape(-1, inputs, *kernel).astype(np.float64)
        dense.pack(filtered(whole), channels, panels[low // channels : -(-(low + len(rows)) // channels)])
    return {
        "weights": panels,
        "offsets": np.concatenate(places).astype(np.int32),
        "starts": starts.astype(np.int32),
    }
