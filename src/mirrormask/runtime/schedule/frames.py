"""A convolution over frames as convolutions over maps: which frames each one of the result reads, by which taps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mirrormask.runtime.graph.ir import Weight
from mirrormask.runtime.schedule.nonzeros import nonzeros

__all__ = ["Read", "reads", "weight_of"]

#: (tap, frame) of each tap that meets a frame, counted from the first one that is read.
Read = tuple[tuple[int, int], ...]


def reads(frames: Sequence[int], taps: int) -> list[tuple[int, Read]]:
    """Of each frame of the result, the first frame that it reads, and what it reads.

    Example:
        >>> reads((-1, 0, 0, 1), 2)
        [(0, ((1, 0),)), (0, ((0, 0), (1, 1)))]
    """
    found = []
    for begin in range(0, len(frames), taps):
        row = [(tap, frame) for tap, frame in enumerate(frames[begin : begin + taps]) if frame >= 0]
        first = min((frame for _, frame in row), default=0)
        found.append((first, tuple((tap, frame - first) for tap, frame in row)))
    return found


def weight_of(weight: Weight, groups: int, read: Read) -> tuple[Weight, int, int]:
    """``[outputs, frames * inputs, height, width]`` of a weight that has a depth, its groups, and how many frames.

    One of several frames has one group: the inputs of a group do not lie one after the other then.
    """
    outputs, inputs, taps, *kernel = weight.shape
    plane = math.prod(kernel)
    width = 1 + max((frame for _, frame in read), default=0)
    kept = groups if width == 1 else 1
    row = (inputs if width == 1 else width * groups * inputs) * plane
    place = np.full(taps, -1)
    for one, frame in read:
        place[one] = frame
    positions, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for found, some in nonzeros(weight):
        output, rest = np.divmod(found, inputs * taps * plane)
        channel, rest = np.divmod(rest, taps * plane)
        tap, at = np.divmod(rest, plane)
        if width > 1:
            channel = channel + (output // (outputs // groups) + place[tap] * groups) * inputs
        there = place[tap] >= 0
        to = (output * row + channel * plane + at)[there]
        order = np.argsort(to, kind="stable")
        positions.append(to[order])
        values.append(some[there][order])
    shape = (outputs, row // plane, *kernel)
    where, what = np.concatenate(positions), np.concatenate(values)
    if 2 * len(where) >= outputs * row:
        flat = np.zeros(outputs * row, np.float32)
        flat[where] = what
        return Weight(shape, None, flat), kept, width
    gaps = np.diff(where, prepend=0)
    narrow = gaps.max(initial=0) < 1 << 16
    return Weight(shape, gaps.astype(np.uint16) if narrow else gaps.astype(np.uint32), what), kept, width
