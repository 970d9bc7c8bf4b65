"""How far results are from those of eager PyTorch, and how far those are from the truth."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mirrormask.runtime.graph.export import Arguments

__all__ = ["acceptable", "difference"]

#: What differs by less, relative to the largest output, is rounding; so is what is not this many times farther from
#: a computation in 64 bits than eager PyTorch is.
ROUNDING, TIMES = 1e-5, 4.0
#: How much more in half precision.
HALF = 2e-2


def difference(result: Any, expected: Any) -> float:
    """The largest difference over the largest expected element, over all output tensors.

    Infinity if they do not fit each other.
    """
    got, want = tensors(result), tensors(expected)
    if len(got) != len(want):
        return float("inf")
    return max((_of_tensors(a, b) for a, b in zip(got, want, strict=True)), default=0.0)


def _of_tensors(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape or got.is_floating_point() != want.is_floating_point():
        return float("inf")
    if not want.is_floating_point() or not want.numel():
        return 0.0 if torch.equal(got, want) else float("inf")
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return float("inf")
    got, want = got[finite], want[finite]
    if not want.numel():
        return 0.0
    scale, worst = float(want.abs().max()), float((got - want).abs().max())
    return worst / scale if scale else worst


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a result."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def acceptable(error: float, half: bool, model: nn.Module, arguments: Arguments, expected: Any, result: Any) -> bool:
    """Whether a difference of ``error`` between ``result`` and eager's ``expected`` is rounding.

    Where it is large, eager itself is judged: the result may be :data:`TIMES` as far from 64-bit
    arithmetic as eager is.
    """
    if half:
        return error <= HALF
    if error <= ROUNDING:
        return True
    if not error < 1e-1:
        return False
    try:
        exact = _in_64_bits(model, arguments)
    except Exception:  # a stranger's model in another type
        return error <= 1e-4
    return difference(result, exact) <= max(ROUNDING, TIMES * difference(expected, exact))


def _in_64_bits(model: nn.Module, arguments: Arguments) -> Any:
    double = copy.deepcopy(model).double()
    given = arguments.copied().with_tensors(lambda x: x.double() if x.is_floating_point() else x)
    return double(*given.args, **given.kwargs)
