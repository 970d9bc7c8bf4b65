"""Which part of a plan's arena each buffer takes, and which buffers must be cleared because others were there.

Kernels rely on zeros around each map, also before the first row of the first one, and write only the maps themselves.
Memory that holds one layout throughout keeps its zeros from one run to the next; where layouts take turns, they are
written again each time. Every buffer ends with a margin that holds nothing: the zeros before the next one fit there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.kernels.layout import Layout

__all__ = ["MARGIN", "Memory", "Taken", "aligned_array"]

#: Zeros before a buffer, for loads left of its first row; and what every buffer's size has to spare at its end.
MARGIN = 64
#: Buffers start at multiples of so many numbers.
STEP = 16


@dataclass(frozen=True)
class Taken:
    """A buffer: its place and layout, the number of ops before it, and whether its writer leaves rows unwritten."""

    place: int
    layout: Layout
    step: int
    partly: bool

    @property
    def end(self) -> int:
        """Past the last number."""
        return self.place + _rounded(self.layout)

    def disturbs(self, other: Taken) -> bool:
        """Whether it leaves other numbers where ``other`` needs zeros."""
        same = (self.place, self.layout) == (other.place, other.layout)
        return not same and self.place < other.end and other.place - MARGIN < self.end - MARGIN


class Memory:
    """Hands out places in the arena, the smallest that fit; equal layouts get each other's, where no zeros are lost."""

    def __init__(self) -> None:
        self.size = MARGIN
        self._free: list[tuple[int, int]] = []
        self._taken: list[Taken] = []

    def take(self, layout: Layout, step: int = 0, *, partly: bool = True) -> int:
        """A place for ``layout``, in numbers from the start of the arena.

        Args:
            step: how many ops there are so far; the next ones write.
            partly: whether what writes the buffer may leave parts of its rows as they were.
        """
        need = _rounded(layout)
        place = self._place(layout, need)
        for i, (low, high) in enumerate(self._free):
            if low <= place < high:
                rest = [(low, place), (place + need, high)]
                self._free[i : i + 1] = [(a, b) for a, b in rest if a < b]
                break
        self.size = max(self.size, place + need)
        self._taken.append(Taken(place, layout, step, partly))
        return place

    def _place(self, layout: Layout, need: int) -> int:
        before = {t.place for t in self._taken if t.layout == layout}
        for place in sorted(before):
            if any(low <= place and place + need <= high for low, high in self._free):
                return place
        fits = [(high - low, low) for low, high in self._free if high - low >= need]
        if fits:
            return min(fits)[1]
        if self._free and self._free[-1][1] == self.size:
            return self._free[-1][0]  # the last gap, and as much beyond it as is missing
        return self.size

    def give(self, layout: Layout, place: int) -> None:
        """Let others use the place."""
        spans = sorted([*self._free, (place, place + _rounded(layout))])
        merged = spans[:1]
        for low, high in spans[1:]:
            if low == merged[-1][1]:
                merged[-1] = (merged[-1][0], high)
            else:
                merged.append((low, high))
        self._free = merged

    def disturbed(self) -> list[Taken]:
        """The buffers whose memory another layout used since they last were there, in this run or in the one before."""
        found = []
        for i, taken in enumerate(self._taken):
            if taken.layout.flat:
                continue
            # Backwards to where this very layout was last, around the start of the run.
            for other in (*self._taken[:i][::-1], *self._taken[:i:-1]):
                if other.disturbs(taken):
                    found.append(taken)
                    break
                if (other.place, other.layout) == (taken.place, taken.layout):
                    break
        return found


def _rounded(layout: Layout) -> int:
    return -(-layout.size // STEP) * STEP


def aligned_array(size: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """A zeroed array that starts on a cache line."""
    item = np.dtype(dtype).itemsize
    raw = np.zeros(size * item + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * item].view(dtype)
