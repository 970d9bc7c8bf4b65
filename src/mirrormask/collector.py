"""Python's collector of cycles, which would look at 10^5 objects again and again for nothing."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

__all__ = ["uncollected", "while_uncollected"]

P = ParamSpec("P")
R = TypeVar("R")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Let the collector rest while many objects are made that all stay, or that hold no cycles.

    It goes over all objects whenever some share of them is new, and finds none to free: of a model of 10^5 tensors a
    third of the time of ``mm.load``. What it would have freed it frees afterwards. Not for code of the user's.

    Example:
        >>> with uncollected():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    if not gc.isenabled():  # whoever has turned it off is who turns it on
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def while_uncollected(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs so; contextlib's own decorator would be a frame of nobody's, which warnings would name.

    Example:
        >>> while_uncollected(gc.isenabled)()
        False
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with uncollected():
            return function(*args, **kwargs)

    return wrapped
