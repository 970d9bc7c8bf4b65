"""Where the elements of an activation lie in memory: planar, padded, and made of whole vectors.

A plane holds one channel. With one segment, row ``r`` of the map is a run of ``stride`` floats (whole vectors of the
instruction set) whose lanes beyond ``width`` are zero. Narrow maps (7x7, 4x4) would waste most of a vector so, hence
rows ``r``, ``r + groups``, ``r + 2 groups``, ... share one vector, as segments of ``stride`` lanes:

    lanes 16, 7x7 map, stride 8, segments 2, groups 4:   vector v = [row v | row v + 4]

``halo`` row vectors lie above and below each plane, so that a kernel's row ``r - 1`` is always the vector before: zero
outside the map, and with segments a copy of the neighbouring row, which whoever stores a row writes as well. Every
zero is written once, when the buffer is made; kernels keep it so, which is why only equal layouts share a buffer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

__all__ = ["MOST_PANEL", "Layout", "flat_layout", "map_layout"]

#: Vectors side by side in a tile of a long row: enough to hide latency, few enough for many planes in the L1 cache.
GOOD_TILES = (8, 6, 4)
#: The dense vector kernel writes whole panels, of 8 vectors of at most 32 numbers.
MOST_PANEL = 256


@dataclass(frozen=True)
class Layout:
    """How ``channels`` maps of ``height`` x ``width`` lie in memory.

    Attributes:
        lanes: floats per vector; 0 marks a flat, contiguous run of ``channels`` floats.
        stride: lanes per row, at least ``width``; a multiple of ``lanes`` when ``segments`` is 1.
        segments: rows that share a vector.
        halo: row vectors above and below each plane.
    """

    channels: int
    height: int
    width: int
    lanes: int
    stride: int
    segments: int
    halo: int

    @property
    def flat(self) -> bool:
        """Whether this is a contiguous run of floats rather than a set of planes."""
        return self.lanes == 0

    @property
    def groups(self) -> int:
        """Row vectors (with one segment: rows) of a plane, halo left out."""
        return -(-self.height // self.segments)

    @property
    def pitch(self) -> int:
        """Floats from one row vector to the next."""
        return self.stride * self.segments

    @property
    def vectors(self) -> int:
        """Vectors per row vector."""
        return max(1, self.pitch // self.lanes)

    @property
    def origin(self) -> int:
        """Floats from the start of a plane to its first row."""
        return self.halo * self.pitch

    @property
    def plane(self) -> int:
        """Floats from one channel to the next.

        Planes are padded such that equal tiles of neighbouring channels fall into different sets of the L1 cache: those
        larger than one of its ways (4 KiB) into neighbouring ones, smaller ones by an odd number of cache lines where
        they would keep to every fourth. Plain tensors (one lane) are not.
        """
        if self.flat:
            return 1
        size = (self.groups + 2 * self.halo) * self.pitch
        if size > 1024 and self.lanes > 1:
            tile = (8 * self.lanes + 2 * self.halo * self.pitch) % 1024
            size += (tile - size) % 1024 // self.lanes * self.lanes
        elif self.lanes > 1 and size % (4 * self.line) == 0:
            size += self.line
        return size

    @property
    def line(self) -> int:
        """Numbers in a cache line: vectors of 32 lanes are of 16-bit numbers."""
        return max(16, self.lanes)

    @property
    def size(self) -> int:
        """Floats of the whole buffer, with a margin for loads and stores that run past the last row or element."""
        if self.flat:
            return -(-self.channels // MOST_PANEL) * MOST_PANEL + 64
        return self.channels * self.plane + self.pitch + 64

    def address(self, channel: int, row: int, column: int) -> int:
        """The index of one element, in floats from the start of the buffer."""
        if self.flat:
            return channel
        segment, group = divmod(row, self.groups)
        return channel * self.plane + self.origin + group * self.pitch + segment * self.stride + column


def flat_layout(features: int) -> Layout:
    """A contiguous vector of ``features`` floats."""
    return Layout(features, 1, 1, 0, 1, 1, 0)


def map_layout(channels: int, height: int, width: int, lanes: int, *, halo: int, gap: int = 0) -> Layout:
    """The layout of ``channels`` maps for vectors of ``lanes`` floats.

    Args:
        halo: row vectors that kernels read above and below the map.
        gap: zero lanes that must follow each row. 0 allows rows that share a vector; a positive gap, which kernels
            with unaligned loads need, gives each row vectors of its own.
    """
    narrow = 1 << (width - 1).bit_length()
    segments = max(1, lanes // narrow)
    # A halo copy comes from the neighbouring segment only, hence the halo may not be deeper than a segment.
    if gap == 0 and segments > 1 and halo <= -(-height // segments):
        stride = narrow
        return Layout(channels, height, width, lanes, stride, segments, halo)
    stride = -(-(width + gap) // lanes) * lanes
    vectors = stride // lanes
    if vectors > 15:
        # Long rows are cut into tiles of equal width: as few vectors more as give them a good one.
        stride = next(n for n in itertools.count(vectors) if any(n % tile == 0 for tile in GOOD_TILES)) * lanes
    return Layout(channels, height, width, lanes, stride, 1, halo)
