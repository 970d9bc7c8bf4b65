"""The safetensors container: eight bytes of header length, a JSON header, the tensors' bytes.

The layout is read and written here rather than by the safetensors package for two reasons: a header written here has
one order and so can carry its own checksum, and tensors are streamed, so that neither way holds the file in memory.
Any safetensors reader opens the result; ``tests/storage`` checks each file with that package.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from mirrormask.storage.dtypes import BYTES
from mirrormask.storage.errors import FormatError

__all__ = ["DIGEST_KEY", "Container", "Extent", "build_header", "open_container"]

#: safetensors refuses longer headers, so none are written and none are read.
MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 64
#: The metadata key whose 64 hexadecimal digits are the SHA-256 of the header with these digits set to zero.
DIGEST_KEY = "mirrormask.header_sha256"
_BLANK = "0" * 64
KEYS = {"dtype", "shape", "data_offsets"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Extent:
    """One tensor of the container: its element type, its shape and where its bytes are, from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many bytes it occupies."""
        return self.stop - self.start


def build_header(tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The length and the header of a file that holds ``(name, dtype, shape)`` one after the other.

    Args:
        tensors: in the order of the file; whoever asks sorts wide elements first, so that all stay aligned.
        metadata: texts by name; :data:`DIGEST_KEY` is put before them.
    """
    header: dict[str, Any] = {"__metadata__": {DIGEST_KEY: _BLANK, **metadata}}
    offset = 0
    for name, dtype, shape in tensors:
        stop = offset + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the names and shapes take {len(text):,} bytes; safetensors allows {MAX_HEADER:,}; split it")
    text = text.replace(_BLANK.encode(), hashlib.sha256(text).hexdigest().encode(), 1)
    return len(text).to_bytes(8, "little") + text


@dataclass
class Container:
    """An open file whose header has been checked: names, extents and metadata."""

    file: IO[bytes]
    tensors: dict[str, Extent]
    metadata: dict[str, str]
    nbytes: int


def open_container(file: IO[bytes], nbytes: int) -> Container:
    """Read and check the header of an open file of ``nbytes`` bytes.

    Raises:
        FormatError: the file is cut short, its header is damaged, or its tensors overlap, leave holes, or do not
            fill the file.
    """
    if nbytes < 8:
        raise FormatError(f"{nbytes} bytes; a safetensors file has at least 8")
    length = int.from_bytes(read_exactly(file, 0, 8), "little")
    if length > min(nbytes - 8, MAX_HEADER):
        raise FormatError(f"the header claims {length:,} bytes; the file has {nbytes - 8:,}, limit {MAX_HEADER:,}")
    raw = bytes(read_exactly(file, 8, length))
    header = parse_json(raw, "the header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ is not a table of strings")
    # Several keys have this prefix, so that no one flipped bit can pass the file off as a plain one.
    if any(key.startswith("mirrormask.") for key in metadata):
        _check_digest(raw, metadata)
    tensors = {name: _extent(name, entry, 8 + length) for name, entry in header.items()}
    _check_layout(tensors, 8 + length, nbytes)
    return Container(file, tensors, metadata, nbytes)


def read_exactly(file: IO[bytes], start: int, count: int) -> bytearray:
    """``count`` bytes from ``start``; whoever calls has compared ``count`` with the size of the file."""
    buffer = bytearray(count)
    read_into(file, start, memoryview(buffer))
    return buffer


def read_into(file: IO[bytes], start: int, view: memoryview) -> None:
    """Fill ``view`` from ``start``; a file that another process cuts meanwhile is an error, not a crash."""
    file.seek(start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + _CHUNK])  # type: ignore[attr-defined]
        if not count:
            raise FormatError(f"the file ends after {start + done:,} of {start + len(view):,} bytes")
        done += count


def parse_json(raw: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object without repeated keys, fractions, NaN or numbers beyond 64 bits; anything else is a FormatError."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_refuse, parse_constant=_refuse
        )
        if "\\u" in text:  # half a character can be written so, and no other reader takes it
            json.dumps(value, ensure_ascii=False).encode()
    except FormatError as error:
        raise FormatError(f"{what}: {error.fault}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} is a JSON {type(value).__name__}, not an object")
    return value


def check_shape(value: object, itemsize: int, tensor: str) -> tuple[int, ...]:
    """``value`` as a shape whose bytes a 64-bit offset can count, else a FormatError."""
    plain = isinstance(value, list) and len(value) <= MAX_DIMENSIONS
    for n in value if plain else ():  # type: ignore[attr-defined]
        plain = plain and type(n) is int and n >= 0
    if not plain:
        raise FormatError(f"shape {str(value)[:100]} is not a list of at most {MAX_DIMENSIONS} sizes", tensor=tensor)
    shape: tuple[int, ...] = tuple(value)  # type: ignore[arg-type]
    if math.prod([size or 1 for size in shape]) * itemsize >= 2**63:
        raise FormatError(f"shape {list(shape)} has more bytes than memory can address", tensor=tensor)
    return shape


def _extent(name: str, entry: object, base: int) -> Extent:
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise FormatError("its header entry is not {dtype, shape, data_offsets}", tensor=name)
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise FormatError(f"unknown element type {str(dtype)[:50]!r}; known: {', '.join(BYTES)}", tensor=name)
    shape = check_shape(entry["shape"], BYTES[dtype], name)
    offsets = entry["data_offsets"]
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int for n in offsets)):
        raise FormatError("data_offsets is not two integers", tensor=name)
    start, stop = offsets
    if start < 0 or stop - start != math.prod(shape) * BYTES[dtype]:
        raise FormatError(f"offsets {start}..{stop} do not fit shape {list(shape)} of {dtype}", tensor=name)
    return Extent(dtype, shape, base + start, base + stop)


def _check_layout(tensors: Mapping[str, Extent], base: int, size: int) -> None:
    position = base
    for name, extent in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if extent.start != position:
            fault = f"its bytes start at {extent.start:,}, but those before it end at {position:,}"
            raise FormatError(fault, tensor=name)
        position = extent.stop
        if position > size:
            raise FormatError(f"its bytes end at {position:,}, but the file has {size:,}", tensor=name)
    if position != size:
        raise FormatError(f"the tensors end at byte {position:,}, but the file has {size:,}")


def _check_digest(raw: bytes, metadata: Mapping[str, str]) -> None:
    stated = metadata.get(DIGEST_KEY, "")
    plain = raw.replace(stated.encode(), _BLANK.encode(), 1) if len(stated) == 64 else raw
    if hashlib.sha256(plain).hexdigest() != stated:
        raise FormatError(f"the header does not match its checksum ({DIGEST_KEY}); the file is damaged")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise FormatError("a key occurs twice")
    return table


def _integer(digits: str) -> int:
    if len(digits) > 20:  # int() takes quadratic time, and nothing here counts that far
        raise FormatError(f"a number of {len(digits)} digits")
    return int(digits)


def _refuse(text: str) -> NoReturn:
    raise FormatError(f"the number {text[:40]}")
