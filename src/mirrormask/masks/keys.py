"""Scores as they are read: some at a time, in a dtype in which all compare, and as integers in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = ["CHUNK", "all_chunks", "by_numpy", "chunks", "common", "equal_places", "from_key", "to_keys"]

#: Elements read at a time on a CPU: a few temporaries of so many stay in its caches, and calls cost little beside work.
CHUNK = 2**18


def common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A dtype of 32 or 64 bits in which each of these compares exactly."""
    found = set(dtypes)
    if torch.float64 in found:
        return torch.float64
    return torch.float32 if not found or any(dtype.is_floating_point for dtype in found) else torch.int64


def all_chunks(tensors: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements of several tensors, one after the other."""
    for tensor in tensors:
        yield from chunks(tensor, dtype)


def chunks(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements in row-major order, some at a time: no tensor is copied whole, contiguous or not."""
    tensor = tensor.detach()
    size = CHUNK if tensor.device.type == "cpu" else 8 * CHUNK  # a call on a GPU costs more beside its work
    if tensor.is_contiguous() or tensor.numel() <= size:
        for chunk in torch.split(tensor.reshape(-1), size):
            yield chunk.to(dtype)
        return
    rows = size * len(tensor) // tensor.numel()
    for part in torch.split(tensor, rows) if rows else tensor:
        yield from chunks(part, dtype)


def by_numpy(tensor: Tensor) -> bool:
    """Whether numpy reads this: on a CPU it compares, counts, finds and sorts several times as fast as torch."""
    return tensor.device.type == "cpu"


def equal_places(values: Tensor, bound: float) -> Tensor:
    """The places of the values that are ``bound``."""
    if by_numpy(values):
        return torch.from_numpy(np.flatnonzero(values.numpy() == bound))
    return (values == bound).nonzero().view(-1)


def to_keys(values: Tensor) -> Tensor:
    """Integers in the order of ``values``: of a float its magnitude's bits with its sign, so that -0.0 equals 0.0."""
    if not values.is_floating_point():
        return values
    integer = _integer(values.dtype)
    bits = values.view(integer)
    sign = bits >> (8 * values.itemsize - 1)
    return (bits & torch.iinfo(integer).max).bitwise_xor_(sign).sub_(sign)


def from_key(key: int, dtype: torch.dtype) -> float:
    """The number whose key this is."""
    if not dtype.is_floating_point:
        return key
    bits = key if key >= 0 else torch.iinfo(_integer(dtype)).min - key
    return torch.tensor(bits, dtype=_integer(dtype)).view(dtype).item()


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype.itemsize == 4 else torch.int64
