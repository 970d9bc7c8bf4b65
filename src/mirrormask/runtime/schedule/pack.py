"""A sparse weight as the stream that the sparse kernel reads: sorted, blocked, and every index checked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Weight
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.schedule.taps import Taps

__all__ = ["Stream", "offsets_of", "pack", "share_out"]

Ints = npt.NDArray[np.int64]


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


def taps_of(taps: Taps, weight: Weight, groups: int) -> tuple[Ints, Ints, Ints, Ints, npt.NDArray[np.float32]]:
    """(output channel, input plane, row, column, value) of each nonzero, rows and columns relative to the output's."""
    shape = weight.shape if len(weight.shape) == 4 else (*weight.shape, 1, 1)
    dense = weight.dense().reshape(shape)
    oc, ic, kh, kw = np.nonzero(dense)
    values = dense[oc, ic, kh, kw]
    ic = ic + oc // (shape[0] // groups) * shape[1]
    (row_phase, row), (column_phase, column) = taps.places
    number = np.zeros(taps.stride, np.int64)
    for i, phase in enumerate(taps.phases):
        number[phase] = i
    plane = ic * len(taps.phases) + number[row_phase[kh], column_phase[kw]]
    return oc, plane, row[kh], column[kw], values


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
    """Pack ``weight`` for inputs that lie as ``x`` says, in blocks of ``block_planes`` planes."""
    outputs = weight.shape[0]
    oc, plane, row, column, values = taps_of(taps, weight, groups)
    blocks = max(1, -(-x.channels // block_planes))
    block = plane // block_planes
    offset = (plane - block * block_planes) * x.plane + (row - taps.top) * x.pitch
    base = x.origin + taps.top * x.pitch
    if aligned:
        found = np.unique(column)
        columns = tuple(int(c) for c in found) or (0,)
        group = np.searchsorted(found, column)
        offset = offset // x.lanes
    else:
        columns, group = (0,), np.zeros_like(column)
        offset = offset + column - taps.left
        base += taps.left
    size = len(columns)
    counts = np.bincount((block * outputs + oc) * size + group, minlength=blocks * outputs * size)
    counts = counts.reshape(blocks, outputs, size)
    part, bounds = share_out(counts.sum((0, 2)), threads)
    order = np.stack([_similar_neighbours(c, part) for c in counts])
    place = np.empty((blocks, outputs), np.int64)
    np.put_along_axis(place, order, np.broadcast_to(np.arange(outputs), order.shape), 1)
    key = (block * outputs + place[block, oc]) * size + group
    sequence = np.lexsort((offset, key))
    starts = np.concatenate([[0], np.cumsum(np.bincount(key, minlength=blocks * outputs * size))])
    ordered = offset[sequence]
    narrow = offset.max(initial=0) < 1 << 16
    return Stream(
        np.ascontiguousarray(values[sequence], np.float32),
        ordered.astype(np.uint16) if narrow else ordered.astype(np.uint32),
        starts.astype(np.int32),
        order.reshape(-1).astype(np.int32),
        bounds,
        base,
        columns,
        blocks,
        block_planes,
    )


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
    channels = taps.source[0]
    ones = Weight.of(np.ones((1, channels, *taps.kernel), np.float32))
    _, plane, row, column, _ = taps_of(taps, ones, 1)
    offset = plane * x.plane + (row - taps.top) * x.pitch + column - taps.left
    return offset.astype(np.int32), x.origin + taps.top * x.pitch + taps.left
