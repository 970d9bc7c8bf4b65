"""Magnitudes as scores, made as they are read: they take no memory beside the weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirrormask.masks.keys import by_numpy, chunks, common, integer_of

__all__ = ["Magnitudes"]


@dataclass(frozen=True)
class Magnitudes:
    """``|x|`` in order: as an integer, the bits of a float without its sign, so that NaN is above infinity.

    Those of one tensor compare with each other, and with those of tensors of as many bits.

    Args:
        x: any shape and layout, a floating dtype.
        mask: a bool tensor of its shape, which says which elements are wanted; None for all.
        wanted: what an element's mask has to be. The others come last: they are -1.

    Example:
        >>> from mirrormask.masks import largest
        >>> alive = torch.tensor([True, True, False, True])
        >>> largest(Magnitudes(torch.tensor([0.5, -2.0, 9.0, 1.0]), alive), 2).int().tolist()
        [0, 1, 0, 1]
    """

    x: Tensor
    mask: Tensor | None = None
    wanted: bool = True

    @property
    def shape(self) -> torch.Size:
        """That of x."""
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        """Integers of 32 bits, of 64 where x is of float64."""
        return integer_of(common([self.x.dtype]))

    @property
    def device(self) -> torch.device:
        """That of x."""
        return self.x.device

    def numel(self) -> int:
        """How many elements x has."""
        return self.x.numel()

    def chunks(self, every: int = 1) -> Iterator[Tensor]:
        """The integers, some at a time; of each chunk one in ``every``. Each chunk may be written over by the next."""
        dtype, start = common([self.x.dtype]), 0
        mask = None if self.mask is None else self.mask.reshape(-1).view(torch.int8)
        for chunk in chunks(self.x, dtype):
            drawn = chunk[every - 1 :: every]
            others = None
            if mask is not None:
                own = mask[start : start + len(chunk)][every - 1 :: every]
                others = own - 1 if self.wanted else -own  # all bits of what is not wanted
            start += len(chunk)
            yield _bits(drawn, others)


def _bits(values: Tensor, others: Tensor | None) -> Tensor:
    bits = values.view(integer_of(values.dtype))
    if not by_numpy(values):
        found = bits & torch.iinfo(bits.dtype).max
        return found if others is None else found.bitwise_or_(others)
    array = np.bitwise_and(bits.numpy(), torch.iinfo(bits.dtype).max)
    if others is not None:
        np.bitwise_or(array, others.numpy(), out=array)
    return torch.from_numpy(array)
