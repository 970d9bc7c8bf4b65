"""Parts: the stored arrays that together make one tensor, checksummed while they stream past."""

from __future__ import annotations

import hashlib
from typing import IO

import numpy as np

from mirrormask.storage.container import Extent, read_into
from mirrormask.storage.dtypes import BITS, BYTES, Bits
from mirrormask.storage.errors import FormatError

__all__ = ["DIGITS", "Part", "checksum"]

#: Hexadecimal digits kept of a part's SHA-256: 128 bits, so that damage goes unseen once in 10^38 files.
DIGITS = 32
DAMAGED = "its bytes do not match their checksum; the file is damaged"
_CHUNK = 1 << 20


def checksum(data: Bits) -> str:
    """The first 128 bits of the SHA-256 of an array's bytes, in hexadecimal."""
    return hashlib.sha256(data.view(np.uint8).data).hexdigest()[:DIGITS]


class Part:
    """One stored array, read once from its beginning to its end.

    Args:
        file: the open file.
        extent: where the part is and what its elements are.
        tensor: the tensor that it belongs to, for messages.
        digest: the checksum that the file states, or ``None`` for a plain safetensors file.
    """

    def __init__(self, file: IO[bytes], extent: Extent, tensor: str, digest: str | None) -> None:
        self._file = file
        self._position = extent.start
        self._stop = extent.stop
        self._itemsize = BYTES[extent.dtype]
        self._tensor = tensor
        self._digest = digest
        self._hash = hashlib.sha256()

    @property
    def left(self) -> int:
        """How many elements have not been read yet."""
        return (self._stop - self._position) // self._itemsize

    def take(self, count: int) -> Bits:
        """The next ``count`` elements, as bits; asking for more than there are is the file's fault."""
        if count > self.left:
            raise FormatError(f"{count - self.left:,} stored elements are missing", tensor=self._tensor)
        out = np.empty(count, BITS[self._itemsize])
        self.fill(out)
        return out

    def fill(self, out: Bits) -> None:
        """Read the next elements into ``out``, which must not ask for more than :attr:`left`."""
        view = out.view(np.uint8).data
        for start in range(0, len(view), _CHUNK):  # hashed while the chunk is still in the cache
            chunk = view[start : start + _CHUNK]
            try:
                read_into(self._file, self._position, chunk)
            except FormatError as error:
                raise FormatError(error.fault, tensor=self._tensor) from None
            self._position += len(chunk)
            if self._digest is not None:
                self._hash.update(chunk)

    def finish(self) -> None:
        """Check that everything was read and that the checksum is right."""
        if self.left:
            raise FormatError(f"{self.left:,} stored elements are left over", tensor=self._tensor)
        if self._digest is not None and self._hash.hexdigest()[:DIGITS] != self._digest:
            raise FormatError(DAMAGED, tensor=self._tensor)
