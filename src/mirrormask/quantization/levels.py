"""Weights in 8 bits: a level from -127 to 127 for each, and one scale for each output of a layer.

    x ≈ s q,        s = max |x| / 127 over the weights of an output,        q = round(x / s)

The scale is rounded to a bfloat16's 8 significant bits. A product of it and a level is then exact in float32, and the
largest weight of an output still has level 127 (the scale is off by at most 1/512). So weights that were rounded once
are rounded to themselves, and a file of levels and scales gives back the very weights that it was made of.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from mirrormask.matrices import Candidate, candidates, output_axis

__all__ = ["LEVELS", "levels", "output_axes", "per_output", "rounded", "scales"]

#: The largest level; -128 stays unused, so that the levels are symmetric.
LEVELS = 127


def scales(x: Tensor, axis: int) -> Tensor:
    """The scale of each output: ``max |x| / 127`` over the other dimensions, as the nearest bfloat16.

    Args:
        x: weights, finite in float32, of a floating type.
        axis: the dimension that counts outputs.

    Returns:
        bfloat16, one for each index of ``axis``, at least the least normal number, and at most what keeps the largest
        level within the type of ``x``.

    Example:
        >>> scales(torch.tensor([[127.0, -3.0], [0.5, -2.54]]), 0).tolist()
        [1.0, 0.02001953125]
    """
    others = [dim for dim in range(x.dim()) if dim != axis]
    peak = x.detach().abs().amax(others).double() if x.numel() else x.new_zeros(x.shape[axis]).double()
    scale = (peak / LEVELS).clamp_min(torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
    return scale.clamp_max(_largest(x.dtype))


@functools.lru_cache
def _largest(dtype: torch.dtype) -> float:
    """The largest bfloat16 whose product with the largest level ``dtype`` holds, and float32, which it is made in."""
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / LEVELS
    nearest = torch.tensor(most, dtype=torch.float64).bfloat16()
    below = (nearest.view(torch.int16) - 1).view(torch.bfloat16)
    return float(nearest if float(nearest) <= most else below)


def levels(x: Tensor, scale: Tensor, axis: int) -> Tensor:
    """The nearest level of each weight, int8; what is zero stays zero.

    Example:
        >>> levels(torch.tensor([[1.0, -0.26, 0.0]]), torch.tensor([0.5]), 0).tolist()
        [[2, -1, 0]]
    """
    return (
        (x.detach().double() / per_output(scale.double(), x.dim(), axis))
        .round_()
        .clamp_(-LEVELS, LEVELS)
        .to(torch.int8)
    )


def rounded(level: Tensor, scale: Tensor, axis: int) -> Tensor:
    """``s q``, exact in float32."""
    return level.float() * per_output(scale.float(), level.dim(), axis)


def per_output(scale: Tensor, dims: int, axis: int) -> Tensor:
    """One number for each output, in the shape that multiplies a weight of so many dimensions."""
    return scale.view([-1 if dim == axis else 1 for dim in range(dims)])


def output_axes(model: nn.Module) -> dict[str, int]:
    """Every name of a weight that 8 bits are meant for -> its output dimension: layers' matrices and embeddings."""
    return {
        name: output_axis(candidate.owners[0])
        for candidate in candidates(model)
        if _is_meant(candidate)
        for name in candidate.names
    }


def _is_meant(candidate: Candidate) -> bool:
    tensor = candidate.parameter
    floating = tensor.dtype.is_floating_point and tensor.dim() >= 2 and math.prod(tensor.shape) > 0
    return floating and tensor.element_size() > 1 and (candidate.is_matrix or candidate.is_embedding)
