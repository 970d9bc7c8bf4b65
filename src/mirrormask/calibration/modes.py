"""A model that is only looked at: what the looking would change is put back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from mirrormask.buffers import kept_buffers

__all__ = ["evaluating"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and not compiled; modes and buffers are afterwards as they were, always.

    Code that ``torch.compile`` made before hooks were set would not call them.

    Example:
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modes = {module: module.training for module in model.modules()}
    restore_buffers = kept_buffers(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    # The fast path of nn.TransformerEncoderLayer computes with its layers' weights and calls no layer.
    torch.backends.mha.set_fastpath_enabled(False)
    # Nothing is compiled where dynamo, which takes seconds to import, is not there.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        torch.clear_autocast_cache()
        torch.backends.mha.set_fastpath_enabled(fast)
        restore_buffers()
        for module, mode in modes.items():
            module.training = mode
