"""What the exporters are given, looked at before anything is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.checks import few

__all__ = ["expected_outputs", "inputs_of", "tolerance_of"]


def inputs_of(call: str, model: Any, path: Any, example: Any) -> tuple[Tensor, ...]:
    """The positional inputs of an export that was called as ``call(model, path, example)``.

    Raises:
        TypeError: an argument is not of its kind, as where two have changed places.

    Example:
        >>> len(inputs_of("onnx", nn.Linear(2, 1), "model.onnx", torch.ones(1, 2)))
        1
    """
    order = f"{call}(model, path, example)"
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is a {type(model).__name__}, not an nn.Module; call {order}")
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is a {type(path).__name__}, not a path; call {order}")
    inputs = example if isinstance(example, tuple) else (example,)
    odd = [type(value).__name__ for value in inputs if not isinstance(value, Tensor)]
    if odd or not inputs:
        got = f"holds a {odd[0]}" if odd and isinstance(example, tuple) else f"is a {type(example).__name__}"
        raise TypeError(
            f"example {got}; call {order} with a tensor, or a tuple of tensors that are its inputs in order"
        )
    return inputs


def expected_outputs(model: nn.Module, inputs: tuple[Tensor, ...], state: Mapping[str, Tensor]) -> Any:
    """What the model gives for its inputs.

    Raises:
        ValueError: it does not take them, or a tensor of it is not finite.
    """
    bad = [name for name, t in state.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise ValueError(f"{few(bad)} {'is' if len(bad) == 1 else 'are'} not finite; load or train the weights first")
    try:
        return model(*inputs)
    except Exception as error:
        sizes = ", ".join(str(list(x.shape)) for x in inputs)
        raise ValueError(
            f"the model does not take the example, {sizes}: {type(error).__name__}: {str(error)[:500]}"
        ) from error


def tolerance_of(tolerance: float | None, expected: Any) -> float:
    """The tolerance that was given; else 1e-5, or four units in the last place of the outputs' type if that is more.

    Example:
        >>> tolerance_of(None, torch.ones(1)), tolerance_of(None, torch.ones(1, dtype=torch.float16))
        (1e-05, 0.00390625)
    """
    if tolerance is not None:
        return tolerance
    flat, _ = torch.utils._pytree.tree_flatten(expected)
    kinds = {x.dtype for x in flat if isinstance(x, Tensor) and x.is_floating_point()}
    return max([1e-5, *(4 * torch.finfo(kind).eps for kind in kinds)])
