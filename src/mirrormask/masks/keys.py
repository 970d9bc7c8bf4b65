"""Scores as they are read: some at a time, in a dtype in which all compare, and as integers in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "CHUNK", "Made", "Scores", "all_chunks", "by_numpy", "chunks", "common", "equal_places", "from_key", "integer_of",
    "over_layers", "to_keys",
]  # fmt: skip

T = TypeVar("T")

#: Elements read at a time on a CPU: a few temporaries of so many stay in its caches, and calls cost little beside work.
CHUNK = 2**18


class Made(Protocol):
    """Scores that are made as they are read, and stand where a tensor of them would."""

    @property
    def shape(self) -> torch.Size:
        """Of the tensor that they would be."""

    @property
    def dtype(self) -> torch.dtype:
        """In which they are made."""

    @property
    def device(self) -> torch.device:
        """Where they are made."""

    def numel(self) -> int:
        """How many there are."""

    def chunks(self, every: int = 1) -> Iterator[Tensor]:
        """All of them in row-major order, some at a time; of each chunk one in ``every``."""


Scores = Tensor | Made


def common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A dtype of 32 or 64 bits in which each of these compares exactly."""
    found = set(dtypes)
    if torch.float64 in found:
        return torch.float64
    if not found or any(dtype.is_floating_point for dtype in found):
        return torch.float32
    return torch.int32 if found <= {torch.uint8, torch.int8, torch.int16, torch.int32} else torch.int64


def all_chunks(scores: Iterable[Scores], dtype: torch.dtype, every: int = 1) -> Iterator[Tensor]:
    """As :func:`chunks`, of several tensors one after the other."""
    for score in scores:
        yield from chunks(score, dtype, every)


def chunks(scores: Scores, dtype: torch.dtype, every: int = 1) -> Iterator[Tensor]:
    """The elements in row-major order, some at a time: no tensor is copied whole, contiguous or not.

    Args:
        scores: what to read.
        dtype: what each chunk becomes.
        every: of each chunk, take one element in so many, the last of each: a sample.
    """
    if not isinstance(scores, Tensor):
        for chunk in scores.chunks(every):
            yield chunk.to(dtype)
        return
    for chunk in _pieces(scores.detach()):
        yield chunk[every - 1 :: every].to(dtype)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    size = CHUNK if tensor.device.type == "cpu" else 8 * CHUNK  # a call on a GPU costs more beside its work
    if tensor.is_contiguous() or tensor.numel() <= size:
        yield from torch.split(tensor.reshape(-1), size)
        return
    rows = size * len(tensor) // tensor.numel()
    for part in torch.split(tensor, rows) if rows else tensor:
        yield from _pieces(part)


def over_layers(function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
    """``map`` as a list, with layers shared out to as many threads as torch may use: numpy itself uses one."""
    threads = torch.get_num_threads()
    if threads == 1:
        return list(map(function, *arguments))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, *arguments))


def by_numpy(tensor: Scores) -> bool:
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
    integer = integer_of(values.dtype)
    bits = values.view(integer)
    sign = bits >> (8 * values.itemsize - 1)
    return (bits & torch.iinfo(integer).max).bitwise_xor_(sign).sub_(sign)


def from_key(key: int, dtype: torch.dtype) -> float:
    """The number whose key this is."""
    if not dtype.is_floating_point:
        return key
    bits = key if key >= 0 else torch.iinfo(integer_of(dtype)).min - key
    return torch.tensor(bits, dtype=integer_of(dtype)).view(dtype).item()


def integer_of(dtype: torch.dtype) -> torch.dtype:
    """The integers of as many bits, 32 or 64."""
    return torch.int32 if dtype.itemsize == 4 else torch.int64
