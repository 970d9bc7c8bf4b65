"""Which input plane, row and column each kernel tap of a convolution reads, with strides taken out by phases."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.kernels.layout import Layout, map_layout

__all__ = ["Taps"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Taps:
    """The taps of a convolution.

    Tap ``k`` of a dimension reads input position ``stride * o + k * dilation - padding`` for output ``o``, that is
    position ``o + q`` of phase ``a`` with ``k * dilation - padding = stride * q + a``, ``0 <= a < stride``.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    source: tuple[int, int, int]
    out: tuple[int, int, int]

    @classmethod
    def of(cls, node: Node, source: tuple[int, ...]) -> Taps:
        """The taps of a ``conv`` node, or of a ``linear`` one over tokens (a 1x1 convolution)."""
        return cls(node.kernel, node.stride, node.padding, node.dilation, _three(source), _three(node.shape))

    @cached_property
    def places(self) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        """(phase, position) of each kernel row, and of each kernel column."""
        both = []
        for k, s, p, d in zip(self.kernel, self.stride, self.padding, self.dilation, strict=True):
            place = np.arange(k, dtype=np.int64) * d - p
            both.append((place % s, place // s))
        return both[0], both[1]

    @cached_property
    def phases(self) -> tuple[tuple[int, int], ...]:
        """The (row, column) phases that some tap reads."""
        rows, columns = self.places
        return tuple(sorted({(int(a), int(b)) for a in rows[0] for b in columns[0]}))

    @property
    def top(self) -> int:
        """The first row read, relative to the output's; 0 or negative."""
        return min(0, int(self.places[0][1].min()))

    @property
    def left(self) -> int:
        """The first column read, relative to the output's; 0 or negative."""
        return min(0, int(self.places[1][1].min()))

    @property
    def right(self) -> int:
        """The last column read, relative to the output's; 0 or positive."""
        return max(0, int(self.places[1][1].max()))

    @property
    def phase_size(self) -> tuple[int, int]:
        """Rows and columns that a phase map must hold."""
        sizes = [-(-n // s) for n, s in zip(self.source[1:], self.stride, strict=True)]
        return max(sizes[0], self.out[1]), max(sizes[1], self.out[2])

    def halo(self, height: int) -> int:
        """Row vectors that must lie above and below a map of ``height`` rows."""
        below = self.out[1] - 1 + max(0, int(self.places[0][1].max())) - (height - 1)
        return max(0, -self.top, below)

    def aligned_layout(self, lanes: int) -> Layout:
        """The layout of the phase maps for aligned loads."""
        height, width = self.phase_size
        return map_layout(self.source[0] * len(self.phases), height, width, lanes, halo=self.halo(height))

    def direct_layout(self, lanes: int) -> Layout:
        """The layout of the phase maps for unaligned loads: rows with zero columns between them."""
        height, width = self.phase_size
        gap = max(-self.left, self.out[2] - 1 + self.right - (width - 1), 1)
        return map_layout(self.source[0] * len(self.phases), height, width, lanes, halo=self.halo(height), gap=gap)

    def fits_aligned(self, x: Layout, out: Layout, most_vectors: int) -> bool:
        """Whether the aligned kernel can read ``x`` and write ``out``."""
        same = (x.stride, x.segments) == (out.stride, out.segments)
        whole = x.segments == 1 or (x.groups == out.groups and x.height == out.height)
        room = x.halo >= self.halo(x.height) and out.width <= x.width
        reach = max(-self.left, self.right) < x.stride
        return x.lanes > 1 and same and whole and room and reach and out.vectors <= most_vectors

    def fits_direct(self, x: Layout, out: Layout) -> bool:
        """Whether the kernels with unaligned loads can read ``x`` and write ``out``."""
        gap = x.stride - x.width
        enough = gap >= -self.left and x.stride >= out.width + self.right
        wide = x.stride >= out.vectors * out.lanes or out.groups <= x.groups
        return x.segments == out.segments == 1 and enough and wide and x.halo >= self.halo(x.height)


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) == 3:
        return shape
    return (shape[0], 1, 1)
