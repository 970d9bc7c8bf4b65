"""What an optimizer does is found out on a stand-in: its state after a step, and whether parts step as the whole."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mirrormask.optimizer.base_groups import Group

__all__ = ["bare_step", "first_state", "splits"]


def splits(optimizer: Optimizer) -> bool:
    """Whether two steps on a random matrix are two steps on its quarters."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = torch.randn((3, 8, 6), generator=generator)
    whole = _tried(optimizer, [start], [[grad] for grad in grads])
    quarters = [_quarters(tensor) for tensor in (start, *grads)]
    parts = _tried(optimizer, quarters[0], quarters[1:])
    if whole is None or parts is None:
        return False
    return all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(_quarters(whole[0]), parts, strict=True))


def first_state(optimizer: Optimizer, held: Tensor, group: Group) -> dict[str, Any]:
    """The state of a tensor after a first step on zeros; empty if it will not step on zeros, or on it alone."""
    stand_in = torch.zeros_like(held).requires_grad_()
    stand_in.grad = torch.zeros_like(held)
    trial = _stand_in(optimizer, {**group, "params": [stand_in]})
    # A fake tensor of a GPU may be of one that is not there.
    on_gpu = held.is_cuda and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    try:
        # A base may draw random numbers: looking must not change what the next dropout draws.
        with torch.random.fork_rng(devices=[held.device] if on_gpu else []):
            bare_step(type(optimizer))(trial)
    except Exception:  # of whatever kind a base raises
        return {}
    return dict(trial.state[stand_in])


def _tried(optimizer: Optimizer, starts: Sequence[Tensor], steps: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    """What becomes of tensors in steps with these gradients; None where it will not take them."""
    held = [start.clone().requires_grad_() for start in starts]
    trial = _stand_in(optimizer, {**optimizer.param_groups[0], "params": held})
    try:
        with torch.random.fork_rng(devices=[]):
            for grads in steps:
                for tensor, grad in zip(held, grads, strict=True):
                    tensor.grad = grad.clone()
                bare_step(type(optimizer))(trial)
    except Exception:
        return None
    return [tensor.detach() for tensor in held]


def _stand_in(optimizer: Optimizer, group: Group) -> Optimizer:
    """Another optimizer like it, of one group, without state and without hooks."""
    trial: Optimizer = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial._optimizer_step_pre_hooks, trial._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    trial.state = defaultdict(dict)
    trial.param_groups = [group]
    mode = getattr(trial, "train", None)
    if callable(mode):  # schedule-free ones step in this mode only, and are saved and loaded in the other too
        mode()
    return trial


def bare_step(kind: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """``kind.step`` without the hooks of torch's wrapper, which have run in the SparseOptimizer's step already."""
    step: Any = kind.step
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def _quarters(matrix: Tensor) -> list[Tensor]:
    return [part for half in matrix.chunk(2) for part in half.chunk(2, dim=1)]
