"""All or nothing: after an error a model is what it was."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from mirrormask.buffers import kept_buffers

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[Callable[[Tensor], None]]:
    """What is yielded keeps a parameter's value, to be called before it changes; an error brings all of them back.

    Values go to a temporary file (in ``tempfile.gettempdir()``) and not into memory, which a large model may fill.
    Buffers are kept in memory and brought back as well.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> before = layer.weight.clone()
        >>> try:
        ...     with all_or_nothing(layer) as keep:
        ...         keep(layer.weight)
        ...         _ = layer.weight.data.zero_()
        ...         raise KeyError
        ... except KeyError:
        ...     torch.equal(layer.weight, before)
        True
    """
    kept: list[tuple[Tensor, int]] = []
    restore_buffers = kept_buffers(model)
    with tempfile.TemporaryFile() as file:

        def keep(tensor: Tensor) -> None:
            place = file.seek(0, 2)
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
            kept.append((tensor, place))

        try:
            yield keep
        except BaseException:
            with torch.no_grad():
                for tensor, place in kept:
                    file.seek(place)
                    data = np.fromfile(file, np.uint8, tensor.numel() * tensor.itemsize)
                    tensor.copy_(torch.from_numpy(data).view(tensor.dtype).view(tensor.shape))
            restore_buffers()
            raise
