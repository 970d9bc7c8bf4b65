"""A copy of a model with weights of 8 bits, for ``mm.compile(..., weights="int8")``."""

from __future__ import annotations

from torch import nn

from mirrormask.quantization.levels import levels, output_axes, rounded, scales
from mirrormask.runtime.graph.export import private_copy

__all__ = ["with_levels"]


def with_levels(model: nn.Module) -> nn.Module:
    """The model with its matrices and embeddings rounded as :func:`mirrormask.quantize` does; all else is shared.

    Raises:
        ValueError: there is nothing to round, a weight is not finite, or the model cannot be copied.
    """
    copy = private_copy(model)
    axes = output_axes(copy)
    if copy is model:
        raise ValueError("weights='int8' rounds a copy, and the model cannot be copied; call mm.quantize(model)")
    if not axes:
        raise ValueError("weights='int8' rounds matrices and embeddings, and the model has none; leave it out")
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    for name, axis in axes.items():
        weight = parameters[name]
        if id(weight) in done:  # under another name
            continue
        done.add(id(weight))
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name!r} holds numbers that are not finite, which levels cannot be; leave weights= out")
        scale = scales(weight, axis)
        weight.data = rounded(levels(weight, scale, axis), scale, axis)
    return copy
