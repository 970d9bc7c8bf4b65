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
        room = torch.empty(0, dtype=self.dtype, device=self.device)
        for chunk in chunks(self.x, dtype):
            bits = chunk[every - 1 :: every].view(self.dtype)
            if len(room) < len(bits):  # memory that is taken anew for every chunk costs as much as the work in it
                room = torch.empty_like(bits, memory_format=torch.contiguous_format)
            found = room[: len(bits)]
            _without_sign(bits, found)
            if mask is not None:
                own = mask[start : start + len(chunk)][every - 1 :: every]
                _last(own - 1 if self.wanted else -own, found)
            start += len(chunk)
            yield found


def _without_sign(bits: Tensor, out: Tensor) -> None:
    others = torch.iinfo(bits.dtype).max
    if by_numpy(bits):
        np.bitwise_and(bits.numpy(), others, out=out.numpy())
    else:
        torch.bitwise_and(bits, others, out=out)


def _last(others: Tensor, out: Tensor) -> None:
    """All bits of what is not wanted."""
    if by_numpy(out):
        np.bitwise_or(out.numpy(), others.numpy(), out=out.numpy())
    else:
        out.bitwise_or_(others)
