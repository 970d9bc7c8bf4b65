"""Coded: gaps and the high byte of each value under a Huffman code, the rest of the values as they are.

    bytes ~ (H(gaps) + H(high bytes)) / 8 + nonzeros * (itemsize - 1)

One stored array holds three pieces. The first are the codes of :mod:`~mirrormask.storage.encodings.gaps`; the second
is the top byte of each value once its bits are rotated left by one: of a float32 that is the exponent, which takes few
values where mantissas take all. Both are raw deflate streams (RFC 1951) of Huffman codes alone, as zlib's strategy
``Z_HUFFMAN_ONLY`` writes them; they come within 1% of the entropy. The third holds the other bytes of the rotated
values, value by value.

A Huffman code takes at least one bit, so a stored byte accounts for at most 8 gaps, and a gap for at most 255 elements.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from mirrormask.storage.dtypes import Bits
from mirrormask.storage.encodings.base import CHUNK, ESCAPE, Source
from mirrormask.storage.parts import Part

__all__ = ["LEAST_GAIN", "Coded"]

#: What it must save beside any other encoding, so that files of small tensors stay simple.
LEAST_GAIN = 256
#: Codes decoded at a time, and bytes of a stream that are fed: temporaries stay small beside the streams themselves.
_STEP = CHUNK // 16


@dataclass(frozen=True)
class Coded:
    """Huffman-coded gaps and high bytes.

    Args:
        count: how many values there are.
        codes: how many gap codes.
        gaps: bytes of the first stream.
        high: bytes of the second.
    """

    count: int
    codes: int
    gaps: int
    high: int

    name: ClassVar[str] = "coded"
    parts: ClassVar[tuple[str, ...]] = ("coded",)

    @classmethod
    def of(cls, source: Source) -> Coded:
        """For this tensor; it is coded once, as its size is known only then."""
        if not source.coded:
            rows = _rotated(source.values).view(np.uint8).reshape(-1, source.itemsize)
            source.coded = (_deflated(source.gaps), _deflated(rows[:, -1]), rows[:, :-1].tobytes())
        gaps, high, _ = source.coded
        return cls(source.nonzeros, int(source.gaps.size), len(gaps), len(high))

    @classmethod
    def size(cls, source: Source) -> int:
        """Bytes it takes."""
        return cls.of(source)._nbytes(source.itemsize)

    @staticmethod
    def about(source: Source) -> int:
        """What it will take, within some percent, by the entropies of the two streams."""
        high = _rotated(source.values).view(np.uint8)[source.itemsize - 1 :: source.itemsize]
        return int(_entropy(source.gaps) + _entropy(high)) + source.nonzeros * (source.itemsize - 1)

    def index(self) -> dict[str, int | str]:
        """The lengths of the two streams, decoded and stored."""
        return {"count": self.count, "codes": self.codes, "gaps": self.gaps, "high": self.high}

    def encode(self, source: Source) -> dict[str, Bits]:
        """The three pieces, one behind the other."""
        return {"coded": np.frombuffer(b"".join(source.coded), np.uint8)}

    def check_room(self, shape: tuple[int, ...], left: Mapping[str, int]) -> str | None:
        """No more codes than the stored bits can hold, and codes enough to account for every element."""
        count = prod(shape)
        if not 0 <= self.count <= min(self.codes, count) or self.gaps < 0 or self.high < 0:
            return f"{self.count:,} values and {self.codes:,} gaps for {count:,} elements"
        if self.codes > 8 * self.gaps or self.count > 8 * self.high:
            sizes = f"{self.gaps:,} and {self.high:,} bytes"
            return f"{sizes} cannot hold {self.codes:,} gaps and {self.count:,} values"
        if left["coded"] < self.gaps + self.high:
            return f"{left['coded']:,} bytes, of which the streams are {self.gaps + self.high:,}"
        if count > ESCAPE * self.codes + ESCAPE - 1:
            return f"{self.codes:,} gaps cannot cover the {count:,} elements of shape {list(shape)}"
        return None

    def decode(self, parts: Mapping[str, Part], out: Bits, shape: tuple[int, ...]) -> str | None:
        """Sum the gaps, put the values together and scatter, a chunk at a time."""
        part, width = parts["coded"], out.itemsize
        if part.left != self._nbytes(width):
            return f"{part.left:,} bytes instead of {self._nbytes(width):,}"
        gaps, high = _Inflated(part.take(self.gaps)), _Inflated(part.take(self.high))
        position, done = -1, 0
        for start in range(0, self.codes, _STEP):
            codes = gaps.take(min(_STEP, self.codes - start))
            if codes is None:
                return "the gaps are no such stream, or too few"
            placed = codes != ESCAPE
            where = np.cumsum(codes + placed.astype(np.int64)) + position
            position = int(where[-1])
            if position >= out.size:
                return f"a gap leads to element {position:,} of {out.size:,}"
            where = where[placed]
            done += where.size
            if done > self.count:
                return f"gaps for more than the {self.count:,} values"
            top = high.take(where.size)
            if top is None:
                return "the high bytes are no such stream, or too few"
            rows = np.empty((where.size, width), np.uint8)
            rows[:, -1] = top
            rows[:, :-1] = part.take(where.size * (width - 1)).reshape(where.size, width - 1)
            out[where] = _rotated(rows.reshape(-1).view(out.dtype), back=True)
        if done != self.count or not gaps.ended or not high.ended:
            return f"{done:,} of {self.count:,} values, or more in a stream than is stated"
        rest = out.size - 1 - position
        return None if rest < ESCAPE else f"the gaps end {rest:,} elements before the tensor does"

    def _nbytes(self, itemsize: int) -> int:
        return self.gaps + self.high + self.count * (itemsize - 1)


class _Inflated:
    """The bytes of a raw deflate stream, some at a time.

    It is fed in pieces: what a call leaves unread is copied, which must not be all of the rest.
    """

    def __init__(self, data: Bits) -> None:
        self._data, self._stream, self._unread = data.data, zlib.decompressobj(-15), b""

    def take(self, count: int) -> Bits | None:
        """The next ``count`` bytes; ``None`` where the stream is damaged or ends before."""
        found = b""
        while len(found) < count:
            fed = self._feed()
            more = self._inflate(fed, count - len(found))
            if more is None or (not more and (not fed or self._stream.eof)):
                return None
            found += more
        return np.frombuffer(found, np.uint8)

    @property
    def ended(self) -> bool:
        """Whether the stream ends here, and with it the data."""
        while not self._stream.eof:
            fed = self._feed()
            if not fed or self._inflate(fed, 1) != b"":
                return False
        return not self._stream.unused_data and not self._unread and not self._data

    def _feed(self) -> bytes:
        if not self._unread:
            self._unread, self._data = bytes(self._data[:_STEP]), self._data[_STEP:]
        return self._unread

    def _inflate(self, fed: bytes, count: int) -> bytes | None:
        try:
            found = self._stream.decompress(fed, count)
        except zlib.error:
            return None
        self._unread = self._stream.unconsumed_tail
        return found


def _rotated(values: Bits, *, back: bool = False) -> Bits:
    """The bits of each value moved one place up, the sign to the lowest place; or ``back``."""
    one, rest = values.dtype.type(1), values.dtype.type(8 * values.itemsize - 1)
    up, down = (rest, one) if back else (one, rest)
    rotated: Bits = (values << up) | (values >> down)
    return rotated


def _deflated(data: Bits) -> bytes:
    """Huffman codes alone: no search for repetitions, of which there are none to speak of."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return stream.compress(np.ascontiguousarray(data).data) + stream.flush()


def _entropy(data: Bits) -> float:
    """Bytes that the best code of single bytes takes."""
    counts = np.bincount(data, minlength=256)
    counts = counts[counts > 0]
    return float((counts * np.log2(data.size / counts)).sum() / 8)
