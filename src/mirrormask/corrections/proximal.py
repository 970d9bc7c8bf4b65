"""Explicit L1 by proximal steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.corrections.base import Correction
from mirrormask.progress import Clock

__all__ = ["Proximal"]


@dataclass(frozen=True)
class Proximal(Correction):
    """``θ ← sign(θ) max(|θ| - lr alpha, 0)``: the proximal step of ``alpha ‖θ‖₁``.

    Args:
        alpha: the strength, in [0, inf).
        until: the fraction of training after which it rests, in (0, 1].

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> theta = [torch.tensor([1.0, -0.25, 0.125])]
        >>> Proximal(alpha=1.0).apply(theta, [], lr=0.25)
        >>> [value + 0.0 for value in theta[0].tolist()]
        [0.75, 0.0, 0.0]

    Source: Parikh and Boyd 2014, Proximal Algorithms, section 6.5.2 (soft thresholding).
    """

    alpha: float = 1e-4
    until: float = 1.0

    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, low=0.0)
        check_number("until", self.until, low=0.0, high=1.0, open_low=True, hint="a fraction of training")

    def active(self, clock: Clock) -> bool:
        """Up to ``until``."""
        return clock.step < clock.at(self.until)

    def apply(self, theta: list[Tensor], prepared: list[Tensor], lr: float) -> None:
        """Soft thresholding by ``lr alpha``."""
        sizes = torch._foreach_abs(theta)
        torch._foreach_sub_(sizes, lr * self.alpha)
        torch._foreach_clamp_min_(sizes, 0.0)
        torch._foreach_mul_(sizes, torch._foreach_sign(theta))
        torch._foreach_copy_(theta, sizes)
