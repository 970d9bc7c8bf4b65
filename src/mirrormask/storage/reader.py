"""Reading a model back, bit for bit, from a file that is not trusted."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import torch
from torch import Tensor, nn

from mirrormask.quantization.levels import rounded
from mirrormask.storage.container import Container, Extent, check_shape, open_container, parse_json
from mirrormask.storage.dtypes import BITS, BYTES, TYPES
from mirrormask.storage.encodings import Dense, Encoding, from_index
from mirrormask.storage.errors import FormatError
from mirrormask.storage.parts import DIGITS, Part
from mirrormask.storage.plan import FORMAT_VERSIONS, PREFIX, SCALES, stored_name

__all__ = ["Contents", "Entry", "load", "read_contents", "read_state", "stored_tensors"]

Model = TypeVar("Model", bound=nn.Module)
#: What levels may become.
WIDE = ("F64", "F32", "F16", "BF16")


@overload
def load(path: str | os.PathLike[str], model: None = None) -> dict[str, Tensor]: ...
@overload
def load(path: str | os.PathLike[str], model: Model) -> Model: ...
def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> dict[str, Tensor] | nn.Module:
    """Read a file of :func:`mirrormask.save`, or any safetensors file, with its zeros back in place.

    Nothing in the file is trusted: lengths are compared with the file before anything is allocated, every position
    with the tensor, and every stored array with its checksum. Memory: the dense tensors and at most a tenth more.

    Args:
        path: the file. A plain safetensors file (no checksums) is read too.
        model: ``None`` for a state dict on the CPU; or a module whose state dict has the same names and shapes, which
            is filled in place, on its own device and in its own dtypes, after the whole file has been checked.

    Returns:
        The state dict, in the order in which it was saved, tied weights tied; or ``model``.

    Raises:
        FormatError: the file is damaged; names the tensor and the fault. The model is untouched.
        ValueError: the file is sound but its names or shapes are not the model's. The model is untouched.
        OSError: there is no such file, or it cannot be read.

    Example:
        >>> import tempfile
        >>> from mirrormask.storage.writer import save
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> save({"w": torch.eye(200)}, path)
        >>> bool((load(path)["w"] == torch.eye(200)).all())
        True
    """
    with _open(path) as (file, nbytes):
        state = read_state(file, nbytes)
    if model is None:
        return state
    _check_fits(model, state, path)
    model.load_state_dict(state)
    return model


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


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Describe a file without reading its tensors.

    Raises:
        FormatError: the header is damaged.

    Example:
        >>> import tempfile
        >>> from mirrormask.storage.writer import save
        >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
        >>> save({"w": torch.eye(200)}, path, metadata={"method": "pilot"})
        >>> contents = read_contents(path)
        >>> contents.metadata["method"], contents.entries["w"].encoding.name
        ('pilot', 'coded')
    """
    with _open(path) as (file, nbytes):
        return _contents(open_container(file, nbytes))


def read_state(file: IO[bytes], nbytes: int) -> dict[str, Tensor]:
    """The state dict in an open binary file of ``nbytes`` bytes; what :func:`load` does once the file is open."""
    contents = _contents(open_container(file, nbytes))
    state: dict[str, Tensor] = {}
    for name, entry in contents.entries.items():
        if isinstance(entry, Entry):
            state[name] = _loaded(file, entry, _decode(file, entry))
    return {name: state[entry if isinstance(entry, str) else name] for name, entry in contents.entries.items()}


def stored_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[Entry, Tensor]]:
    """Each entry of a file with its tensor as it is stored: levels, where it is stored by levels.

    Raises:
        FormatError: the file is damaged.
    """
    with _open(path) as (file, nbytes):
        for entry in _contents(open_container(file, nbytes)).entries.values():
            if isinstance(entry, Entry):
                yield entry, _decode(file, entry)


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], int]]:
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


def _contents(container: Container) -> Contents:
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


def _decode(file: IO[bytes], entry: Entry) -> Tensor:
    """One tensor. Its size was compared with its stored arrays, so the file pays for what is allocated here."""
    nbytes = math.prod(entry.shape) * BYTES[entry.dtype]
    try:
        flat = torch.empty(nbytes, dtype=torch.uint8)
        if not isinstance(entry.encoding, Dense):
            flat.zero_()
    except (RuntimeError, MemoryError):
        raise FormatError(f"its {nbytes:,} bytes do not fit into memory", tensor=entry.name) from None
    parts = {part: _part(file, entry, part) for part in entry.encoding.parts}
    fault = entry.encoding.decode(parts, flat.numpy().view(BITS[BYTES[entry.dtype]]), entry.shape)
    if fault is None and entry.dtype == "BOOL" and nbytes and int(flat.max()) > 1:
        fault = "a bool that is neither 0 nor 1"
    for part in parts.values():
        if fault is None:
            part.finish()
    if fault is not None:
        raise FormatError(fault, tensor=entry.name)
    return flat.view(TYPES[entry.dtype]).reshape(entry.shape)


def _part(file: IO[bytes], entry: Entry, part: str) -> Part:
    return Part(file, entry.stored[part], entry.name, entry.digests.get(part))


def _loaded(file: IO[bytes], entry: Entry, stored: Tensor) -> Tensor:
    """What the model gets of a stored tensor."""
    if not entry.becomes:
        return stored
    try:
        if entry.axis is None:
            return stored.to(TYPES[entry.becomes])
        part = _part(file, entry, SCALES)
        scale = torch.from_numpy(part.take(part.left)).view(torch.bfloat16)
        part.finish()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise FormatError("a scale that is not a positive number", tensor=entry.name)
        return rounded(stored, scale, entry.axis).to(TYPES[entry.becomes])
    except (RuntimeError, MemoryError):
        raise FormatError(f"its {stored.numel():,} elements do not fit into memory", tensor=entry.name) from None


def _check_fits(model: nn.Module, state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """``load_state_dict`` copies before it complains; this complains before anything is copied."""
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [
        f"{name!r} is {list(state[name].shape)} in the file and {list(wanted[name].shape)} in the model"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if missing or extra or shapes:
        faults = [f"the file lacks {missing[:3]}"] if missing else []
        faults += [f"the model lacks {extra[:3]}"] if extra else []
        faults += shapes[:3]
        raise ValueError(f"{path} does not fit {type(model).__name__}: {'; '.join(faults)}; load it without a model")
