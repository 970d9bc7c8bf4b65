"""A copy of a model with narrower weights, for ``mm.compile(..., weights="int8" | "fp16")``."""

from __future__ import annotations

from torch import Tensor, nn

from mirrormask.quantization.levels import levels, output_axes, rounded, scales
from mirrormask.runtime.graph.export import private_copy

__all__ = ["with_weights"]


def with_weights(model: nn.Module, kind: str) -> nn.Module:
    """The model with its matrices and embeddings rounded; all else is shared.

    Args:
        kind: ``"int8"``: as :func:`mirrormask.quantize` does; ``"fp16"``: to half precision.

    Raises:
        ValueError: there is nothing to round, a weight is not finite, or too large, or the model cannot be copied.
    """
    copy, asked = private_copy(model), f"weights={kind!r}"
    axes = output_axes(copy)
    if copy is model:
        raise ValueError(f"{asked} rounds a copy, and the model cannot be copied; call mm.quantize(model)")
    if not axes:
        raise ValueError(f"{asked} rounds matrices and embeddings, and the model has none; leave it out")
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    for name, axis in axes.items():
        weight = parameters[name]
        if id(weight) in done:  # under another name
            continue
        done.add(id(weight))
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name!r} holds numbers that are not finite, which cannot be rounded; leave {asked} out")
        made = _levels(weight, axis) if kind == "int8" else weight.detach().half().float()
        if not bool(made.isfinite().all()):
            raise ValueError(f"{name!r} holds numbers beyond half precision's 65,504; take weights='int8', or none")
        weight.data = made
    return copy


def _levels(weight: Tensor, axis: int) -> Tensor:
    scale = scales(weight, axis)
    return rounded(levels(weight, scale, axis), scale, axis)
