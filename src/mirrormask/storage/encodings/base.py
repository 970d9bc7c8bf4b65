"""What an encoding is: a way to write the bits of one tensor as a few arrays, and to read them back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import numpy as np

from mirrormask.storage.dtypes import Bits
from mirrormask.storage.parts import Part

__all__ = ["CHUNK", "ESCAPE", "Encoding", "Source", "gap_codes"]

#: Elements handled at a time: the temporaries stay in the cache, and far below a tenth of a large tensor.
CHUNK = 1 << 17
#: The gap code that skips this many zeros and places no value.
ESCAPE = 255


class Source:
    """The bits of one tensor, and what the encodings want to know about them, each computed at most once.

    Args:
        bits: flat, row-major, unsigned.
        shape: the tensor's shape.
    """

    def __init__(self, bits: Bits, shape: tuple[int, ...]) -> None:
        self.bits = bits
        self.shape = shape
        self.itemsize = bits.itemsize
        self.coded: tuple[bytes, ...] = ()
        """The pieces of the coded form, once it was made."""

    @cached_property
    def mask(self) -> Bits:
        """True where the element's bits are not all zero."""
        mask: Bits = self.bits != 0
        return mask

    @cached_property
    def nonzeros(self) -> int:
        """How many elements are not the zero that is left out; ``-0.0`` counts as one of them."""
        return int(np.count_nonzero(self.mask))

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return int(self.bits.nbytes)

    @cached_property
    def values(self) -> Bits:
        """The nonzero elements, in order.

        Through positions rather than ``bits[mask]``, which mispredicts a branch at every change of the mask and takes
        five times as long at half zeros.
        """
        values = np.empty(self.nonzeros, self.bits.dtype)
        done = 0
        for start in range(0, self.bits.size, CHUNK):
            where = np.flatnonzero(self.mask[start : start + CHUNK])
            values[done : done + where.size] = self.bits[start : start + CHUNK][where]
            done += where.size
        return values

    @cached_property
    def gaps(self) -> Bits:
        """The gaps between the nonzero elements, coded in bytes."""
        return gap_codes(self.mask)

    @cached_property
    def negative_zeros(self) -> int:
        """How many elements have the sign bit and nothing else."""
        sign = self.bits.dtype.type(1 << (8 * self.itemsize - 1))
        return int(np.count_nonzero(self.bits == sign))


def gap_codes(mask: Bits) -> Bits:
    """The number of zeros before each nonzero, as codes below 255 after an escape for every 255 of them, vectorised.

    Example:
        >>> mask = np.zeros(600, bool)
        >>> mask[[0, 3, 300]] = True
        >>> gap_codes(mask).tolist()
        [0, 2, 255, 41, 255]
    """
    codes = []
    last = -1
    for start in range(0, mask.size, CHUNK):
        where = np.flatnonzero(mask[start : start + CHUNK])
        if not where.size:
            continue
        gaps = np.diff(where, prepend=last - start)
        gaps -= 1
        last = int(where[-1]) + start
        if gaps.max() < ESCAPE:
            codes.append(gaps.astype(np.uint8))
            continue
        escapes, rest = np.divmod(gaps, ESCAPE)
        piece = np.full(rest.size + int(escapes.sum()), ESCAPE, np.uint8)
        piece[np.arange(rest.size) + np.cumsum(escapes)] = rest
        codes.append(piece)
    codes.append(np.full((mask.size - 1 - last) // ESCAPE, ESCAPE, np.uint8))
    return np.concatenate(codes)


class Encoding(Protocol):
    """One way to store a tensor. An instance carries the parameters of one tensor, if the encoding has any."""

    @property
    def name(self) -> str:
        """What the index of the file calls it."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the stored arrays; ``""`` is the tensor itself, ``"values"`` has its element type."""
        ...

    def index(self) -> dict[str, int | str]:
        """The parameters, for the file's index."""
        ...

    def encode(self, source: Source) -> dict[str, Bits]:
        """The stored arrays; ``"values"`` (or ``""``) as wide as the element, all others uint8."""
        ...

    def check_room(self, shape: tuple[int, ...], left: Mapping[str, int]) -> str | None:
        """What is wrong with the stored arrays' lengths for this shape, before anything is allocated."""
        ...

    def decode(self, parts: Mapping[str, Part], out: Bits, shape: tuple[int, ...]) -> str | None:
        """Write the elements into ``out``, which is zero; returns what is wrong with the stored arrays, if anything."""
        ...
