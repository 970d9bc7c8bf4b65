"""A sparse weight as the stream that the sparse kernel reads: sorted, blocked, and every index checked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Weight
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.schedule.nonzeros import nonzeros
from mirrormask.runtime.schedule.taps import Taps

__all__ = ["Stream", "offsets_of", "pack", "share_out"]

Ints = npt.NDArray[np.int64]

#: Elements to each nonzero up to which looking through all of them orders the nonzeros faster than sorting.
MOST_LOOKED_AT = 200
#: Nonzeros of a layer that are gone through once and kept in between, 28 bytes each; of a larger one, twice.
MOST_KEPT = 1 << 18


@dataclass(frozen=True)
class Stream:
    """The constants of one sparse layer.

    Attributes:
        weights, offsets: one of each for every nonzero, in the order of use.
        starts: where each (block, place in ``order``, column group) begins, and the end.
        order: the output channel at each (block, place).
        bounds: the places of each thread.
        base: added to the input buffer's index; negative where the kernel reaches above or left of the map.
        columns: the kernel columns of the groups; ``(0,)`` when offsets hold the column.
        blocks, block_planes: how the input planes are cut.
    """

    weights: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    starts: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    bounds: tuple[int, ...]
    base: int
    columns: tuple[int, ...]
    blocks: int
    block_planes: int

    @property
    def short(self) -> bool:
        """Whether offsets are 16 bits wide."""
        return self.offsets.dtype == np.uint16

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(int(array.nbytes) for array in (self.weights, self.offsets, self.starts, self.order))


def _read(taps: Taps, ic: Ints, kh: Ints, kw: Ints) -> tuple[Ints, Ints, Ints]:
    """The input plane, row and column that a tap reads, rows and columns relative to the output's."""
    (row_phase, row), (column_phase, column) = taps.places
    number = np.zeros(taps.stride, np.int64)
    for i, phase in enumerate(taps.phases):
        number[phase] = i
    return ic * len(taps.phases) + number[row_phase[kh], column_phase[kw]], row[kh], column[kw]


def share_out(counts: Ints, threads: int) -> tuple[Ints, tuple[int, ...]]:
    """Deal channels to threads so that each has nearly equal work: the thread of each channel, and the bounds.

    Channels are dealt from the heaviest down, back and forth.
    """
    ranks = np.empty(len(counts), np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    lap, seat = np.divmod(ranks, threads)
    part = np.where(lap % 2 == 0, seat, threads - 1 - seat)
    return part, tuple(np.concatenate([[0], np.cumsum(np.bincount(part, minlength=threads))]).tolist())


def pack(
    taps: Taps, weight: Weight, groups: int, x: Layout, *, aligned: bool, block_planes: int, threads: int
) -> Stream:
    """Pack ``weight`` for inputs that lie as ``x`` says, in blocks of ``block_planes`` planes.

    The nonzeros are gone through twice, some rows at a time: to count them, and to put them where the counts say.
    """
    outputs, blocks = weight.shape[0], max(1, -(-x.channels // block_planes))
    places = np.unique(taps.places[1][1]) if aligned else np.zeros(1, np.int64)
    # Of each element of a row, in each group of channels: the block and column group, and the offset.
    cells, reads = _cells(taps, weight, groups, x, places if aligned else None, block_planes)
    row, height, each = cells.shape[1], outputs // groups, len(places) * blocks
    by_place = np.argsort(cells * (int(reads.max(initial=0)) + 1) + reads, axis=1, kind="stable")
    ranks = np.empty_like(by_place)
    np.put_along_axis(ranks, by_place, np.broadcast_to(np.arange(row), by_place.shape), 1)
    cells, reads = (np.take_along_axis(table, by_place, 1).reshape(-1) for table in (cells, reads))
    ranks = ranks.reshape(-1)

    def parts() -> Iterator[tuple[Ints, Ints, Ints, npt.NDArray[Any]]]:
        """(output channel, cell, offset, value) of some nonzeros: for each channel in the order of use."""
        for position, values in nonzeros(weight):
            if not len(position):
                continue
            oc = position // row
            first = (oc // height - oc) * row  # from a position to one in the tables
            place = oc * row + ranks[position + first]
            place, values = _in_order(place, values, int(oc[0]) * row, (int(oc[-1]) + 1) * row)
            yield oc, cells[place + first], reads[place + first], values

    kept = list(parts()) if len(weight.values) <= MOST_KEPT else None
    counts, highest = np.zeros((outputs, blocks, len(places)), np.int64), 0
    for oc, cell, offset, _ in kept or parts():
        low, high = int(oc[0]), int(oc[-1]) + 1
        found = np.bincount((oc - low) * each + cell, minlength=(high - low) * each)
        counts[low:high] += found.reshape(high - low, blocks, len(places))
        highest = max(highest, int(offset.max()))
    counts = counts.transpose(1, 0, 2)
    used = counts.any((0, 1)) if counts.any() else np.arange(len(places)) == 0
    columns = tuple(int(c) for c in places[used]) if counts.any() else (0,)
    counts, size = counts[:, :, used], len(columns)
    part, bounds = share_out(counts.sum((0, 2)), threads)
    order = np.stack([_similar_neighbours(c, part) for c in counts])
    place = np.empty((blocks, outputs), np.int64)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(outputs), order.shape), 1)
    ordered = np.take_along_axis(counts, order[:, :, None], 1)
    starts = np.concatenate([[0], np.cumsum(ordered.reshape(-1))])
    weights = np.empty(int(starts[-1]), np.float32)
    offsets: Any = np.empty(len(weights), np.uint16 if highest < 1 << 16 else np.uint32)
    # Where the nonzeros of each output channel, block and column group begin.
    each_begins = np.zeros((outputs, blocks, len(places)), np.int64)
    first_of = (np.arange(blocks)[:, None] * outputs + place) * size
    each_begins[:, :, used] = starts[first_of.T[:, :, None] + np.arange(size)]
    begins = each_begins.reshape(-1)
    for oc, cell, offset, values in kept or parts():
        key = oc * each + cell
        # Equal keys follow each other, and all of a key are in this part.
        first = np.flatnonzero(np.diff(key, prepend=-1))
        long = np.diff(first, append=len(key))
        to = np.arange(len(key)) + np.repeat(begins[key[first]] - first, long)
        weights[to], offsets[to] = values, offset
    return Stream(
        weights,
        offsets,
        starts.astype(np.int32),
        order.reshape(-1).astype(np.int32),
        bounds,
        x.origin + taps.top * x.pitch + (0 if aligned else taps.left),
        columns,
        blocks,
        block_planes,
    )


def _cells(
    taps: Taps, weight: Weight, groups: int, x: Layout, places: Ints | None, block_planes: int
) -> tuple[Ints, Ints]:
    """For each group of channels and element of a row: the block and the column group as one number, and the offset.

    Args:
        places: the columns of the column groups; without, the offset holds the column.
    """
    _, inputs, *kernel = weight.shape if len(weight.shape) == 4 else (*weight.shape, 1, 1)
    ic, kh, kw = (n.reshape(-1) for n in np.indices((inputs, *kernel)))
    plane, row, column = _read(taps, ic + np.arange(groups)[:, None] * inputs, kh, kw)
    block = plane // block_planes
    offset = (plane - block * block_planes) * x.plane + (row - taps.top) * x.pitch
    if places is None:
        return block, offset + column - taps.left
    return block * len(places) + np.searchsorted(places, column), offset // x.lanes


def _in_order(place: Ints, values: npt.NDArray[Any], low: int, high: int) -> tuple[Ints, npt.NDArray[Any]]:
    """Different places in [``low``, ``high``) and what goes with them, by place."""
    if (place[1:] > place[:-1]).all():  # as those of a linear layer are
        return place, values
    if high - low > MOST_LOOKED_AT * len(place):
        sequence = np.argsort(place)
        return place[sequence], values[sequence]
    # Looking for marks is many times faster than sorting, unless there are few.
    there, at = np.zeros(high - low, bool), np.empty(high - low, values.dtype)
    there[place - low], at[place - low] = True, values
    found = np.flatnonzero(there)
    return found + low, at[found]


def _similar_neighbours(counts: Ints, part: Ints) -> Ints:
    """Order channels so that neighbours have equal or nearly equal counts in every group.

    The loops over nonzeros are short, and the processor predicts their ends from the ones before. Back and forth in
    the later keys, so that the counts do not jump where an earlier key steps.
    """
    keys = [counts[:, 0]]
    for i in range(1, counts.shape[1]):
        turns = counts[:, :i].sum(1) % 2
        keys.append(np.where(turns == 1, -counts[:, i], counts[:, i]))
    return np.lexsort((*keys[::-1], part))


def offsets_of(taps: Taps, x: Layout) -> tuple[npt.NDArray[np.int32], int]:
    """The offset of every tap of a dense layer, ordered as its weight's ``[input, row, column]``, and the base."""
    ic, kh, kw = (n.reshape(-1) for n in np.indices((taps.source[0], *taps.kernel)))
    plane, row, column = _read(taps, ic, kh, kw)
    offset = plane * x.plane + (row - taps.top) * x.pitch + column - taps.left
    return offset.astype(np.int32), x.origin + taps.top * x.pitch + taps.left
