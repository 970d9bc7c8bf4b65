"""The kernels, tiles and blocks that are worth measuring for a layer over maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.ir import Weight
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.schedule import filtering
from mirrormask.runtime.schedule.problem import Choice
from mirrormask.runtime.schedule.taps import Taps

__all__ = ["MapLayer", "map_candidates"]

#: Sparsities from which on the sparse kernels are candidates beside ``winograd``, and up to which the dense ones are.
LEAST_SPARSE, MOST_DENSE = 0.2, 0.7
#: What a block of input planes may take of a 32 KiB L1 cache.
L1_BYTES = 24 * 1024


@dataclass(frozen=True)
class MapLayer:
    """What decides which choices there are for a layer over maps.

    Attributes:
        out: the layout of the result.
        unshared: one without shared vectors, for kernels that cannot fill those.
    """

    taps: Taps
    weight: Weight
    groups: int
    out: Layout
    unshared: Layout
    target: Target


def row_choices(rows: int, vectors: int, most: int) -> list[int]:
    """Row counts of a tile that waste little on the last, overlapping tile: the largest first, three at most."""
    found = [r for r in range(1, rows + 1) if r * vectors <= most and -(-rows // r) * r <= 1.15 * rows]
    useful = [r for r in found if r * vectors >= 4] or found[-1:]
    largest = sorted(useful, reverse=True)
    # One near 8 vectors (enough to hide latency, small enough for many planes), the largest, and one between.
    near = min(largest, key=lambda r: abs(r * vectors - 8), default=1)
    return sorted({near, *largest[:1], *largest[len(largest) // 2 : len(largest) // 2 + 1]}, reverse=True)


def map_candidates(layer: MapLayer) -> Iterator[Choice]:
    """The choices worth measuring for a layer over maps, best guess first."""
    taps, out, target = layer.taps, layer.out, layer.target
    weight = layer.weight
    columns = taps.places[1][1]
    shifted = bool(columns.min() < 0 or columns.max() > 0)
    # Shifted, the sums wait while a side is summed; of 16 registers that leaves too few, and some wait in memory.
    most = max(8, (target.registers - 4) // 2) if shifted else target.registers - 4
    x = taps.aligned_layout(target.lanes)
    dense = weight.sparsity < MOST_DENSE and layer.groups == 1
    filtered = list(_winograd(layer, layer.unshared)) if dense and not target.half else []
    if filtered and weight.sparsity < LEAST_SPARSE:
        pass  # sparse kernels take longer
    elif taps.fits_aligned(x, out, most if shifted else 99):
        yield from _sparse("aligned", layer, x, out, most, whole_rows=shifted)
    else:
        layout = taps.direct_layout(target.lanes)
        yield from _sparse("direct", layer, layout, layer.unshared, target.registers - 4)
    yield from filtered
    if dense:
        yield from _dense(layer, layer.unshared, 2 if filtered else 5)


def _sparse(
    kernel: str, layer: MapLayer, x: Layout, out: Layout, most: int, whole_rows: bool = False
) -> Iterator[Choice]:
    reach = int(np.ptp(layer.taps.places[0][1]))
    # With many nonzeros per block its size matters less, and packing each candidate takes long.
    dense = layer.weight.sparsity < MOST_DENSE
    shares = (1.2, 6.0) if dense else (0.6, 1.2, 2.5, 6.0, 1e9)
    most_planes = _most_planes(layer, x) if layer.target.half else x.channels
    for rows, vectors in _tiles(out, most, whole_rows):
        width = x.pitch if vectors == out.vectors else vectors * x.lanes
        plane = (rows + reach) * width * layer.target.dtype.itemsize
        blocks = {max(1, min(x.channels, most_planes, round(share * L1_BYTES / plane))) for share in shares}
        for block in sorted(blocks):
            yield Choice(kernel, rows, vectors, -(-x.channels // -(-x.channels // block)))


def _most_planes(layer: MapLayer, x: Layout) -> int:
    """Input planes per block in half precision: as many as make sums of 16 terms, since long sums lose digits."""
    weight = layer.weight
    groups = len(np.unique(layer.taps.places[1][1]))
    terms = weight.nonzeros / weight.shape[0] / groups
    return max(1, int(x.channels * 16 / max(16.0, terms)))


def _tiles(out: Layout, most: int, whole_rows: bool) -> list[tuple[int, int]]:
    if out.segments > 1:
        return (
            [(out.groups, 1)]
            if out.groups <= most or whole_rows
            else [(r, 1) for r in row_choices(out.groups, 1, most)]
        )
    if out.vectors <= most and (out.groups > 1 or whole_rows):
        return [(r, out.vectors) for r in row_choices(out.groups, out.vectors, most)]
    fitting = [v for v in range(1, most + 1) if out.vectors % v == 0]
    # Narrow tiles of long rows, which tokens are: more planes of them stay in the L1 cache.
    return [(1, v) for v in fitting if v >= 2 or v == fitting[-1]][:-4:-1]


def _dense(layer: MapLayer, out: Layout, number: int) -> Iterator[Choice]:
    """So many sets of accumulators, the largest ones."""
    registers = layer.target.registers
    found = []
    for channels in (6, 5, 4, 3, 2, 1):
        copies = 2 if layer.target.half else 1  # of the accumulators: of a chunk, and of all
        most = (registers - 1) // (copies * channels + 1)
        for vectors in (v for v in range(1, most + 1) if out.vectors % v == 0):
            for rows in row_choices(out.groups, vectors, most) if vectors == out.vectors else [1]:
                found.append((channels * rows * vectors, Choice("dense", rows, vectors, channels)))
    found.sort(key=lambda pair: -pair[0])
    yield from (choice for _, choice in found[:number])


def _winograd(layer: MapLayer, out: Layout) -> Iterator[Choice]:
    """The two largest sets of accumulators, if rows can be filtered."""
    rows = filtering.tile_rows(layer.taps)
    registers = layer.target.registers
    sets = [
        (channels, vectors)
        for channels in (6, 5, 4, 3, 2, 1)
        for vectors in range(1, (registers - 1) // (channels + 1) + 1)
        if out.vectors % vectors == 0
    ]
    sets.sort(key=lambda pair: -pair[0] * pair[1])
    yield from (Choice("winograd", rows, vectors, channels) for channels, vectors in sets[:2] if rows)
