"""How large a file is, tensor by tensor, and what other encodings would give."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirrormask.checks import one_line
from mirrormask.storage.dtypes import BYTES
from mirrormask.storage.encodings import all_sizes
from mirrormask.storage.narrow import Values
from mirrormask.storage.plan import Form, make_plan, source_of
from mirrormask.storage.reader import Entry, read_contents, stored_tensors
from mirrormask.storage.tensors import Storable

__all__ = ["FileSizes", "TensorSizes", "file_sizes", "predict_size"]


@dataclass(frozen=True)
class TensorSizes:
    """One stored tensor: what it is, how it is encoded, its bytes, and its bytes under each encoding.

    Attributes:
        dtype: the stored element type.
        nonzeros: elements whose bits are not all zero.
        becomes: the element type that is loaded.
        others: encoding -> bytes; ``None`` for ``"blocked"`` where the tensor has no N:M pattern.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nonzeros: int
    encoding: str
    nbytes: int
    others: dict[str, int | None]
    becomes: str

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The fraction of elements that are left out."""
        return 1.0 - self.nonzeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class FileSizes:
    """The bytes of a file; ``int()`` gives the total, ``str()`` a table.

    Attributes:
        tensors: the stored tensors; tied ones count once.
        overhead: bytes of the header: names, shapes, checksums and metadata.
    """

    tensors: tuple[TensorSizes, ...]
    overhead: int

    @property
    def total(self) -> int:
        """The size of the file."""
        return self.overhead + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def dense(self) -> int:
        """Bytes of the tensors that are loaded, without any header."""
        return sum(tensor.numel * BYTES[tensor.becomes] for tensor in self.tensors)

    def __int__(self) -> int:
        return self.total

    def __str__(self) -> str:
        rows = [("tensor", "shape", "type", "zeros", "encoding", "bytes", *("as " + name for name in _COLUMNS))]
        rows += [
            (
                one_line(tensor.name),
                "x".join(map(str, tensor.shape)) or "scalar",
                tensor.dtype if tensor.dtype == tensor.becomes else f"{tensor.dtype} for {tensor.becomes}",
                f"{100 * tensor.sparsity:.2f}%",
                tensor.encoding,
                f"{tensor.nbytes:,}",
                *(f"{tensor.others[name]:,}" if tensor.others[name] is not None else "-" for name in _COLUMNS),
            )
            for tensor in self.tensors
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [_line(row, widths) for row in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: the file, the dense file, and how they compare."""
        times = f", {self.dense / self.total:.2f} times smaller" if self.total else ""
        return f"{self.total:,} bytes, of which header {self.overhead:,}; dense {self.dense:,}{times}"


_COLUMNS = ("dense", "bitmask", "gaps", "blocked", "coded")
#: Name, shape, type and encoding are texts and stand at the left; numbers stand at the right.
_TEXTS = (0, 1, 2, 4)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = enumerate(zip(row, widths, strict=True))
    return "  ".join(cell.ljust(width) if column in _TEXTS else cell.rjust(width) for column, (cell, width) in cells)


def predict_size(
    model: Storable,
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    values: Values = None,
    signed_zeros: bool = False,
) -> FileSizes:
    """The size of the file that :func:`mirrormask.save` would write with the same arguments, to the byte.

    Args:
        model: a module or a state dict.
        metadata: as for :func:`mirrormask.save`; it is part of the file.
        dtype, values, signed_zeros: as for :func:`mirrormask.save`.

    Returns:
        A :class:`FileSizes`: ``int()`` for the total, ``str()`` for a table with a row a tensor.

    Example:
        >>> int(predict_size({"w": torch.zeros(1000, 1000)})) < 8000
        True
    """
    plan = make_plan(model, metadata, dtype, Form(values, signed_zeros), sizes_only=True)
    tensors = tuple(
        TensorSizes(
            planned.name,
            planned.dtype,
            planned.shape,
            planned.nonzeros,
            planned.encoding.name,
            planned.nbytes,
            planned.others,
            planned.becomes or planned.dtype,
        )
        for planned in plan.tensors
    )
    return FileSizes(tensors, len(plan.header))


def file_sizes(path: str | os.PathLike[str]) -> FileSizes:
    """The sizes of an existing file, plain or compressed.

    Raises:
        FormatError: the file is damaged.
    """
    contents = read_contents(path)
    tensors = tuple(_sizes(entry, tensor) for entry, tensor in stored_tensors(path))
    return FileSizes(tensors, contents.nbytes - sum(tensor.nbytes for tensor in tensors))


def _sizes(entry: Entry, stored: Tensor) -> TensorSizes:
    source = source_of(stored, Form(signed_zeros=True))
    return TensorSizes(
        entry.name,
        entry.dtype,
        entry.shape,
        source.nonzeros,
        entry.encoding.name,
        entry.nbytes,
        all_sizes(source),
        entry.becomes or entry.dtype,
    )
