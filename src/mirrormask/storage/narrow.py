"""Weights rounded for the file: levels of 8 bits with a scale an output, or half precision; vectors are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mirrormask.checks import check_known
from mirrormask.quantization.levels import levels, output_axes, scales
from mirrormask.storage.tensors import Storable, converted

__all__ = ["Narrow", "Values", "narrow"]

Values = Literal["int8", "float16"] | None
KNOWN = ("int8", "float16")


@dataclass(frozen=True)
class Narrow:
    """What a file holds of a tensor.

    Attributes:
        tensor: as stored.
        becomes: the type that is loaded, where it is another.
        axis: the dimension that ``scales`` go with.
        scales: what levels are multiplied with, bfloat16, one for each index of ``axis``.
    """

    tensor: Tensor
    becomes: torch.dtype | None = None
    axis: int | None = None
    scales: Tensor | None = None


def narrow(model: Storable, state: Mapping[str, Tensor], values: Values) -> dict[str, Narrow]:
    """Each tensor in the form asked for.

    Of a module those weights are rounded that are matrices of layers or embeddings; of a state dict, which does not
    tell what is what, all floating tensors of two or more dimensions whose numbers are finite.

    Raises:
        ValueError: ``values`` is unknown, or a module's weight is not finite.
    """
    if values is None:
        return {name: Narrow(tensor) for name, tensor in state.items()}
    check_known("values", values, KNOWN)
    if isinstance(model, nn.Module):
        axes = output_axes(model)
        for name, tensor in state.items():
            if name in axes and not _finite(tensor, values):
                raise ValueError(f"{name!r} holds numbers that are not finite; values={values!r} cannot hold those")
    else:
        axes = {name: 0 for name, tensor in state.items() if _is_matrix(tensor) and _finite(tensor, values)}
    return {name: _narrow(name, tensor, values, axes.get(name)) for name, tensor in state.items()}


def _narrow(name: str, tensor: Tensor, values: Values, axis: int | None) -> Narrow:
    if axis is None or not tensor.is_floating_point():
        return Narrow(tensor)
    if values == "float16":
        small = converted(name, tensor, torch.float16)
        return Narrow(small) if small is tensor else Narrow(small, tensor.dtype)
    scale = scales(tensor, axis)
    return Narrow(levels(tensor, scale, axis), tensor.dtype, axis, scale)


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1 and tensor.dim() >= 2 and tensor.numel() > 0


def _finite(tensor: Tensor, values: Values) -> bool:
    """Whether all numbers are; levels are multiplied in float32, and have to be there."""
    made_in = tensor.float() if values == "int8" else tensor
    return bool(made_in.isfinite().all())
