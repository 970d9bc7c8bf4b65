"""What is asked for: the model, and the example of a call; and what the model itself makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mirrormask.resharding import check_whole
from mirrormask.runtime.graph.export import Arguments, signature_of

__all__ = ["check_model", "example_arguments", "expected_of", "first_line"]


def first_line(error: Exception) -> str:
    """What an exception says first."""
    return str(error).partition("\n")[0][:300]


def example_arguments(model: nn.Module, example: Any, kwargs: Mapping[str, Any] | None) -> Arguments:
    """The example's arguments.

    Raises:
        TypeError: the model does not take such.
        ValueError: a tensor is not on the CPU, or requires grad.
    """
    named = dict(kwargs or {})
    args: tuple[Any, ...] = example if isinstance(example, tuple) else (example,)
    if isinstance(example, Mapping):
        args, named = (), {**example, **named}
    try:
        arguments = Arguments.of(signature_of(model), args, named)
    except TypeError as error:
        raise TypeError(f"{type(model).__name__}.forward does not take the example: {error}") from None
    for x in arguments.tensors:
        if x.device.type != "cpu":
            raise ValueError(f"example_input is on {x.device}, and the runtime is for the CPU; pass x.cpu()")
        if x.requires_grad:
            raise ValueError("example_input requires grad, and a compiled model computes none; pass x.detach()")
    plain = (bool, int, float, str, type(None))
    if not arguments.tensors and all(isinstance(leaf, plain) for leaf in arguments.leaves):
        raise TypeError(f"example_input holds no tensor: {example!r}")
    return arguments


def expected_of(model: nn.Module, arguments: Arguments) -> Any:
    """What the model gives for the example.

    Raises:
        ValueError: it cannot run it.
    """
    try:
        return model(*arguments.args, **arguments.kwargs)
    except Exception as error:
        shapes = [tuple(x.shape) for x in arguments.tensors]
        raise ValueError(
            f"{type(model).__name__} cannot run the example, of shapes {shapes}: {type(error).__name__}: "
            f"{first_line(error)}; pass an example that model(*example) takes"
        ) from error


def check_model(model: Any) -> None:
    """Look whether the runtime can take the model at all.

    Raises:
        TypeError: it is no module.
        ValueError: it is sharded, in training mode, not in float32, or not on the CPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    check_whole(model, "compile")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the model'!r} is in training mode; call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name!r} has no shape yet; call the model once first")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name!r} is on {tensor.device}, and the runtime is for the CPU; call model.cpu()")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name!r} is {tensor.dtype}, not torch.float32; call model.float()")
