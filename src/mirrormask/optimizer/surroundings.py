"""What a user has set for their own code, a default device or inference mode, is not for the optimizer's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["apart"]

P = ParamSpec("P")
R = TypeVar("R")


def apart(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without gradients, outside inference mode, with the CPU as default device.

    ``torch.set_default_device("cuda")`` would make counts and histograms there that are for the CPU, and what a step
    makes in inference mode nobody may write into later.

    Example:
        >>> with torch.inference_mode(), torch.device("meta"):
        ...     apart(torch.zeros)(1).device.type, apart(torch.is_inference_mode_enabled)()
        ('cpu', False)
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        elsewhere, infers = torch.get_default_device().type != "cpu", torch.is_inference_mode_enabled()
        with contextlib.ExitStack() as stack:
            if elsewhere:
                stack.enter_context(torch.device("cpu"))
            if infers:
                stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())  # last: leaving inference mode would turn gradients on
            return function(*args, **kwargs)

    return wrapped
