"""The element types a file can hold: safetensors' names, their widths, and the unsigned type that holds their bits.

Every encoding works on *bits*: a flat unsigned NumPy array as wide as the element. That is what makes it exact for
NaN payloads and for ``-0.0`` (which is not the zero that is left out), and the same for float64 and float8. What these
are in torch, :mod:`mirrormask.storage.torch_types` knows.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "BYTES", "Bits"]

if sys.byteorder != "little":  # values are stored little-endian, and nothing here swaps them
    raise ImportError("mirrormask.storage reads and writes little-endian files and needs a little-endian processor")

Bits = NDArray[Any]

#: safetensors' name -> bytes an element.
BYTES: dict[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "C64": 8,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
#: bytes an element -> the unsigned type that holds its bits.
BITS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
