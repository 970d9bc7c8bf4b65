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


def _taps_of(taps: Taps, weight: Weight, groups: int) -> Iterator[tuple[Ints, Ints, Ints, Ints, npt.NDArray[Any]]]:
    """(output channel, input plane, row, column, value) of each nonzero, some output channels at a time."""
    shape = weight.shape if len(weight.shape) == 4 else (*weight.shape, 1, 1)
    for position, values in nonzeros(weight):
        oc, ic, kh, kw = np.unravel_index(position, shape)
        ic = ic + oc // (shape[0] // groups) * shape[1]
        yield oc, *_read(taps, ic, kh, kw), values


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

    Twice over the nonzeros, some rows at a time: to count them, and to put them where the counts say.
    """
    outputs, blocks = weight.shape[0], max(1, -(-x.channels // block_planes))
    places = np.unique(taps.places[1][1]) if aligned else np.zeros(1, np.int64)

    def parts() -> Iterator[tuple[Ints, Ints, Ints, Ints, npt.NDArray[Any]]]:
        """(output channel, block, column group, offset, value) of some nonzeros."""
        for oc, plane, row, column, values in _taps_of(taps, weight, groups):
            block = plane // block_planes
            offset = (plane - block * block_planes) * x.plane + (row - taps.top) * x.pitch
            if aligned:
                yield oc, block, np.searchsorted(places, column), offset // x.lanes, values
            else:
                yield oc, block, np.zeros_like(column), offset + column - taps.left, values

    counts, highest = np.zeros((blocks, outputs, len(places)), np.int64), 0
    for oc, block, group, offset, _ in parts():
        low, high = int(oc[0]), int(oc[-1]) + 1
        key = (block * (high - low) + oc - low) * len(places) + group
        found = np.bincount(key, minlength=blocks * (high - low) * len(places))
        counts[:, low:high] += found.reshape(blocks, high - low, len(places))
        highest = max(highest, int(offset.max()))
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
    renumbered = np.cumsum(used) - 1
    for oc, block, group, offset, values in parts():
        key = (block * outputs + place[block, oc]) * size + renumbered[group]
        sequence = _sorted(((oc - oc[0]) * blocks + block) * size + renumbered[group], offset)
        if sequence is not None:
            key, offset, values = key[sequence], offset[sequence], values[sequence]
        # Equal keys follow each other, and all of a key are in this part.
        first = np.flatnonzero(np.diff(key, prepend=-1))
        rank = np.arange(len(key)) - np.repeat(first, np.diff(first, append=len(key)))
        to = starts[key] + rank
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


def _sorted(key: Ints, offset: Ints) -> Ints | None:
    """The sequence by key and then offset; None where they are in it, as those of a linear layer are."""
    whole = key * (int(offset.max()) + 1) + offset
    return None if (whole[1:] >= whole[:-1]).all() else np.argsort(whole, kind="stable")


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
