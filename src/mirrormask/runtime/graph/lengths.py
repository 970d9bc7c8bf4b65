"""``len(x)`` of a tensor as a size that stays open.

Python's ``len`` gives a number, whatever its argument says: ``token.expand(len(x), -1, -1)`` fixes the batch of a
vision transformer, where ``x.shape[0]`` would leave it open. While a model is traced, its own code finds another
``len``, which is the same for all but tensors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["open_lengths"]

#: Packages whose code means what it says.
OTHERS = ("torch", "mirrormask")


def _length(x: Any) -> Any:
    """``len``, but the first size of a tensor as it is known."""
    return x.shape[0] if isinstance(x, Tensor) and x.dim() else len(x)


@contextlib.contextmanager
def open_lengths(model: nn.Module) -> Iterator[None]:
    """Let the files that the model's classes are written in read ``len`` as :func:`_length` for a while.

    A file that has its own ``len`` keeps it. Who calls the model meanwhile finds no difference.
    """
    found: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        scope = getattr(inspect.unwrap(type(module).forward), "__globals__", {})
        if scope and str(scope.get("__name__")).partition(".")[0] not in OTHERS and "len" not in scope:
            found[id(scope)] = scope
    for scope in found.values():
        scope["len"] = _length
    try:
        yield
    finally:
        for scope in found.values():
            scope.pop("len", None)
