"""What a file holds, read from its header, and its stored arrays as bits: no torch here, and nothing is trusted."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from mirrormask.storage.container import Container, Extent, check_shape, parse_json, read_exactly
from mirrormask.storage.dtypes import BITS, BYTES, Bits
from mirrormask.storage.encodings import Dense, Encoding, from_index
from mirrormask.storage.errors import FormatError
from mirrormask.storage.parts import DAMAGED, DIGITS, Part

__all__ = [
    "COMPILED",
    "FORMAT_VERSIONS",
    "PREFIX",
    "SCALES",
    "Contents",
    "Entry",
    "contents_of",
    "opened",
    "stored_bits",
    "stored_name",
    "stored_part",
]

#: The first has the encodings dense, bitmask, gaps and blocked; the second also coded, and tensors that become wider
#: when they are loaded. A file says the least that it needs.
FORMAT_VERSIONS = ("1", "2")
#: The part of a tensor of levels that holds their scales.
SCALES = "scales"
#: What the library's own metadata keys begin with.
PREFIX = "mirrormask."
#: The metadata that makes a file of weights one that runs, see :func:`mirrormask.runtime.load`.
COMPILED = PREFIX + "model"
#: What levels may become.
WIDE = ("F64", "F32", "F16", "BF16")


def stored_name(tensor: str, part: str, separator: str) -> str:
    """The name of a stored array: the tensor's own if it is dense, else with the part's name behind it."""
    return f"{tensor}{separator}{part}" if part else tensor


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, as its index describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: Encoding
    #: part -> where it is
    stored: dict[str, Extent]
    #: part -> the checksum that the file states; empty for a plain safetensors file
    digests: dict[str, str]
    #: the element type that is loaded, where it is another than the stored one
    becomes: str = ""
    #: the dimension that the scales of stored levels go with, where there are any
    axis: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that its stored arrays take."""
        return sum(extent.nbytes for extent in self.stored.values())


@dataclass(frozen=True)
class Contents:
    """What a file holds, from its header alone.

    Attributes:
        entries: name -> its description, or the name of the tensor that it is tied to.
        metadata: all texts of the file, the library's own with the prefix ``"mirrormask."``.
        compressed: False for a plain safetensors file.
        nbytes: the size of the file.
    """

    entries: dict[str, Entry | str]
    metadata: dict[str, str]
    compressed: bool
    nbytes: int


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], int]]:
    """The open file and its size; faults found while it is open get its name."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe could wait for ever
            raise FormatError("not an ordinary file")
        with Path(path).open("rb", buffering=0) as file:
            yield file, os.fstat(file.fileno()).st_size
    except FormatError as error:
        error.path = str(path)
        raise


def contents_of(container: Container) -> Contents:
    """What a container holds, each entry of its index checked against its stored arrays.

    Raises:
        FormatError: the index is damaged, or says what is not so.
    """
    metadata = container.metadata
    if not any(key.startswith(PREFIX) for key in metadata):
        plain: dict[str, Entry | str] = {
            name: Entry(name, extent.dtype, extent.shape, Dense(), {"": extent}, {})
            for name, extent in container.tensors.items()
        }
        return Contents(plain, metadata, False, container.nbytes)
    version = metadata.get(PREFIX + "format_version")
    if version not in FORMAT_VERSIONS:
        known = " and ".join(map(repr, FORMAT_VERSIONS))
        raise FormatError(f"format version {str(version)[:40]!r}; this library reads {known}; update it")
    separator = metadata.get(PREFIX + "separator", "")
    index = parse_json(metadata.get(PREFIX + "index", ""), "the index")
    if len(separator) < 2:
        raise FormatError(f"the separator {separator!r} is too short")
    left = dict(container.tensors)
    entries = {name: _entry(name, entry, separator, left) for name, entry in index.items()}
    if left:
        raise FormatError("it is stored, but the index does not list it", tensor=next(iter(left)))
    for name, entry in entries.items():
        if isinstance(entry, str) and not isinstance(entries.get(entry), Entry):
            raise FormatError(f"it is tied to {entry[:200]!r}, which is not stored", tensor=name)
    return Contents(entries, metadata, True, container.nbytes)


def _entry(name: str, entry: Any, separator: str, left: dict[str, Extent]) -> Entry | str:
    """One entry of the index, checked against the stored arrays, which are taken out of ``left``."""
    if not isinstance(entry, dict):
        raise FormatError("its index entry is not an object", tensor=name)
    if entry.get("encoding") == "tied":
        first = entry.get("to")
        if not isinstance(first, str):
            raise FormatError("it is tied to something that is not a name", tensor=name)
        return first
    encoding = from_index(entry, name)
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise FormatError(f"unknown element type {str(dtype)[:50]!r}; known: {', '.join(BYTES)}", tensor=name)
    shape = check_shape(entry.get("shape"), BYTES[dtype], name)
    becomes, axis = _becomes(entry, dtype, shape, name)
    whole = _whole(entry, encoding, axis, left.get(stored_name(name, "", separator)), dtype, shape)
    if whole is not None:  # as most are; whatever is not right is found below
        del left[stored_name(name, "", separator)]
        return Entry(name, dtype, shape, encoding, {"": whole}, entry["sha256"], becomes, axis)
    parts = (*encoding.parts, *(() if axis is None else (SCALES,)))
    digests = entry.get("sha256")
    if not (isinstance(digests, dict) and set(digests) == set(parts) and all(map(_is_digest, digests.values()))):
        raise FormatError(f"its index entry needs a checksum for each of {list(parts)}", tensor=name)
    stored = {}
    for part in parts:
        key = stored_name(name, part, separator)
        if key not in left:
            raise FormatError(f"its stored array {key[:200]!r} is missing or used twice", tensor=name)
        stored[part] = left.pop(key)
        wanted = dtype if part in ("", "values") else "BF16" if part == SCALES else "U8"
        sizes = {"": shape, SCALES: (shape[axis or 0],) if axis is not None else ()}
        if stored[part].dtype != wanted or sizes.get(part, (math.prod(stored[part].shape),)) != stored[part].shape:
            raise FormatError(f"its stored array {key[:200]!r} is not {wanted} of the right shape", tensor=name)
    fault = encoding.check_room(shape, {part: math.prod(extent.shape) for part, extent in stored.items()})
    if fault:
        raise FormatError(fault, tensor=name)
    return Entry(name, dtype, shape, encoding, stored, digests, becomes, axis)


def _whole(
    entry: Mapping[str, Any],
    encoding: Encoding,
    axis: int | None,
    extent: Extent | None,
    dtype: str,
    shape: tuple[int, ...],
) -> Extent | None:
    """Where a dense tensor without scales is stored, if all that its entry says of that is right."""
    digests = entry.get("sha256")
    if type(encoding) is not Dense or axis is not None or extent is None or type(digests) is not dict:
        return None
    good = len(digests) == 1 and _is_digest(digests.get("")) and extent.dtype == dtype and extent.shape == shape
    return extent if good else None


def _becomes(entry: Mapping[str, Any], dtype: str, shape: tuple[int, ...], name: str) -> tuple[str, int | None]:
    """The element type that is loaded of an entry, ``""`` if it is the stored one, and the dimension of its scales."""
    becomes, axis = entry.get("becomes", ""), entry.get("axis")
    if becomes == "" and axis is None:
        return "", None
    wide = {"I8": WIDE, "F16": ("F32", "F64")}
    if becomes not in wide.get(dtype, ()) or (axis is not None) != (dtype == "I8"):
        fault = f"{dtype} cannot become {str(becomes)[:40]!r}; known: levels (I8 with an axis) and F16, of wider floats"
        raise FormatError(fault, tensor=name)
    if axis is not None and not (type(axis) is int and 0 <= axis < len(shape)):
        raise FormatError(f"scales along dimension {str(axis)[:40]} of shape {list(shape)}", tensor=name)
    check_shape(list(shape), BYTES[becomes], name)
    return becomes, axis


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == DIGITS


def stored_bits(file: IO[bytes], entry: Entry) -> Bits:
    """One tensor as it is stored: bytes, flat. Its size was compared with its stored arrays, so the file pays for it.

    Raises:
        FormatError: it is damaged.
    """
    nbytes = math.prod(entry.shape) * BYTES[entry.dtype]
    try:
        flat = np.empty(nbytes, np.uint8) if isinstance(entry.encoding, Dense) else np.zeros(nbytes, np.uint8)
    except (ValueError, MemoryError):
        raise FormatError(f"its {nbytes:,} bytes do not fit into memory", tensor=entry.name) from None
    parts = {part: stored_part(file, entry, part) for part in entry.encoding.parts}
    fault = entry.encoding.decode(parts, flat.view(BITS[BYTES[entry.dtype]]), entry.shape)
    if fault is None and entry.dtype == "BOOL" and nbytes and int(flat.max()) > 1:
        fault = "a bool that is neither 0 nor 1"
    for part in parts.values():
        if fault is None:
            part.finish()
    if fault is not None:
        raise FormatError(fault, tensor=entry.name)
    return flat


def small_array(file: IO[bytes], entry: Entry) -> bytearray:
    """The one stored array of a small dense tensor; what :func:`stored_bits` reads and checks, with fewer calls.

    Raises:
        FormatError: it is damaged.
    """
    extent = entry.stored[""]
    try:
        array = read_exactly(file, extent.start, extent.nbytes)
    except FormatError as error:
        raise FormatError(error.fault, tensor=entry.name) from None
    digest = entry.digests.get("")
    if digest is not None and hashlib.sha256(array).hexdigest()[:DIGITS] != digest:
        raise FormatError(DAMAGED, tensor=entry.name)
    return array


def stored_part(file: IO[bytes], entry: Entry, part: str) -> Part:
    """One stored array of a tensor."""
    return Part(file, entry.stored[part], entry.name, entry.digests.get(part))
