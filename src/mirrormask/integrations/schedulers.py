"""Learning-rate schedulers that were built on the base optimizer before anybody could wrap it."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch.optim import Optimizer

__all__ = ["drive", "release"]


def release(base: Any) -> None:
    """Take from an optimizer the mark of a scheduler, which ``mm.sparsify`` refuses; :func:`drive` comes next."""
    vars(base).pop("step", None)


def drive(scheduler: Any, base: Any, sparse: Optimizer) -> None:
    """Let a scheduler that was built on ``base`` drive ``sparse`` from now on, the schedulers within it too.

    Right before the first step only: ``sparse`` has copied the groups of ``base``, with the rates (``initial_lr``, the
    first rate of a warm-up) that the scheduler has written there.

    Args:
        scheduler: of torch, transformers or timm, or any that holds its optimizer as an attribute.
        base: the optimizer that it was built on.
        sparse: what :func:`mirrormask.sparsify` made of ``base``.

    Raises:
        ValueError: it does not hold ``base``, so that it would go on to set the rates of something else.
    """
    if _put(scheduler, base, sparse, set()) == 0:
        raise ValueError(
            f"the {type(scheduler).__name__} does not drive the optimizer that is trained ({type(base).__name__}); "
            "build the scheduler on that optimizer"
        )
    _note_steps(sparse)


def _put(owner: Any, base: Any, sparse: Optimizer, seen: set[int]) -> int:
    """How many attributes held ``base``, in ``owner`` and in the schedulers that it holds."""
    if id(owner) in seen:
        return 0
    seen.add(id(owner))
    count = 0
    for name, value in list(getattr(owner, "__dict__", {}).items()):
        if value is base:
            setattr(owner, name, sparse)
            count += 1
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            # A scheduler, by what it does: torch's SequentialLR, timm's wrappers and own classes share no base class.
            if callable(getattr(part, "step", None)) and hasattr(part, "optimizer"):
                count += _put(part, base, sparse, seen)
    return count


def _note_steps(sparse: Optimizer) -> None:
    """Mark steps as torch's schedulers do at construction; without it they warn that the order of steps is wrong."""
    if hasattr(sparse.step, "_wrapped_by_lr_sched"):
        return
    method, owner = type(sparse).step, weakref.ref(sparse)

    @functools.wraps(method)
    def step(*args: Any, **kwargs: Any) -> Any:
        own: Any = owner()
        own._opt_called = True
        return method(own, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    sparse.step = step  # type: ignore[method-assign]
