"""Buffers: some models count, cache or replace them as they run; whoever only looks at a model puts them back."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mirrormask.overlaps import is_expanded

__all__ = ["kept_buffers"]


def kept_buffers(model: nn.Module) -> Callable[..., None]:
    """A function that makes the buffers of ``model`` what they are now: their values, which tensors they are, and how
    many of them there are.

    It takes ``but``, modules whose own buffers are left as they are by then.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> restore = kept_buffers(model)
        >>> model.running_mean = torch.ones(2)
        >>> restore()
        >>> model.running_mean.tolist()
        [0.0, 0.0]
    """
    held = {module: dict(module._buffers) for module in model.modules()}
    # What is expanded cannot be written in place, and what has no values yet has none to lose.
    every = [
        b for own in held.values() for b in own.values() if b is not None and not is_lazy(b) and not is_expanded(b)
    ]
    values = {id(buffer): buffer.clone() for buffer in every}

    @torch.no_grad()
    def restore(*, but: Collection[nn.Module] = ()) -> None:
        for module, own in held.items():
            if module in but:
                continue
            for name in [name for name in module._buffers if name not in own]:
                del module._buffers[name]
            for name, buffer in own.items():
                if buffer is not None and id(buffer) in values:
                    _write(buffer, values[id(buffer)])
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer

    return restore


def _write(buffer: Tensor, value: Tensor) -> None:
    with torch.inference_mode(buffer.is_inference() or torch.is_inference_mode_enabled()):
        if buffer.shape == value.shape:
            buffer.copy_(value)
        else:  # resized in place
            buffer.set_(value)  # type: ignore[call-overload]
