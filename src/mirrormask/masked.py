"""What a mask leaves of a tensor: how much, and zeros where it leaves nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["count_true", "keep_only"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Elements at a time: they stay in a core's cache from one pass over them to the next.
_CHUNK = 2**17


def count_true(mask: Tensor) -> int:
    """How many elements of a bool tensor are True.

    Example:
        >>> count_true(torch.tensor([[True, False], [True, True]]))
        3
    """
    if mask.device.type == "cpu":  # an eighth of the time of torch's sum
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.count_nonzero())


def keep_only(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zero in place wherever ``mask`` is False, whatever is there, NaN and infinity too; returns ``tensor``.

    Args:
        tensor: any shape, layout and device.
        mask: a bool tensor of its shape, on its device.

    Example:
        >>> keep_only(torch.tensor([1.0, float("nan"), -2.0]), torch.tensor([True, False, False])).tolist()
        [1.0, 0.0, 0.0]
    """
    usual = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_complex()
    if not usual or tensor.device.type != "cpu" or tensor.is_inference():
        return tensor.masked_fill_(~mask, 0.0)
    # A third of the time of masked_fill_ or less: of what stays all bits are kept, of the others none.
    bits = tensor.detach().view(_INTEGERS[tensor.itemsize])
    if bits.is_contiguous() and mask.is_contiguous():
        for values, stays in zip(torch.split(bits.view(-1), _CHUNK), torch.split(mask.view(-1), _CHUNK), strict=True):
            _and(values, stays)
    else:
        _and(bits, mask)
    torch.autograd.graph.increment_version(tensor)  # numpy wrote: a backward pass that needs what was here is told
    return tensor


def _and(bits: Tensor, stays: Tensor) -> None:
    array = bits.numpy()
    np.bitwise_and(array, np.negative(stays.view(torch.int8).numpy()), out=array)
