"""Hyperbolic aware minimisation: a mirror step in the geometry of m ⊙ w, without the factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.corrections.base import Correction

__all__ = ["Hyperbolic"]


@dataclass(frozen=True)
class Hyperbolic(Correction):
    """``θ ← θ exp(-lr (a sign(θ) ∇f + b))`` after the base optimizer's step, with ∇f from before it.

    To first order ``θ ← θ - lr (a |θ| ∇f + b θ)``: beside the base optimizer, which moves every weight alike, large
    weights move faster, as under ``m ⊙ w``, while weights near zero do not slow down.

    Args:
        a: the strength of the geometry (the paper's α), in [0, inf).
        b: the strength of the pull to zero (the paper's β), in [0, inf).
        clip: the most that ``lr a |∇f|`` may be, in (0, inf): no step changes a weight by more than ``exp(clip)``,
            which keeps large ``a`` stable where a gradient is large; ``None`` for no bound.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> step, theta = Hyperbolic(a=2.0, b=0.0, clip=None), [torch.tensor([1.0, -1.0])]
        >>> step.apply(theta, step.prepare([torch.tensor([0.5, 0.5])], lr=1.0), lr=1.0)
        >>> [round(value, 4) for value in theta[0].tolist()]         # exp(-1) and -exp(1)
        [0.3679, -2.7183]

    Source: Jacobs, Gadhikar, Rubio-Madrigal and Burkholz 2025, arXiv 2506.02630, Algorithm 1.

    Differs from the paper: a = 20 instead of 200, and ``lr a |∇f|`` is bounded by 0.1. The published code bounds the
    whole exponent by 5 (``a=200, clip=5.0`` is that, but for b's part of it) and the norm of a weight by 1000, and
    clips gradients only after it has used them. It steps every weight of two dimensions and more, here those that may
    become sparse are stepped.
    """

    a: float = 20.0
    b: float = 1e-3
    clip: float | None = 0.1

    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("a", self.a, low=0.0)
        check_number("b", self.b, low=0.0)
        if self.clip is not None:
            check_number("clip", self.clip, low=0.0, open_low=True)

    def prepare(self, grads: list[Tensor], lr: float) -> list[Tensor]:
        """``-lr a ∇f``, clipped."""
        exponents = list(torch._foreach_mul(grads, -lr * self.a))
        if self.clip is not None:
            torch._foreach_clamp_max_(exponents, self.clip)
            torch._foreach_clamp_min_(exponents, -self.clip)
        return exponents

    def apply(self, theta: list[Tensor], prepared: list[Tensor], lr: float) -> None:
        """``θ ← θ exp(sign(θ) prepared - lr b)``."""
        torch._foreach_mul_(prepared, torch._foreach_sign(theta))
        if self.b:
            torch._foreach_add_(prepared, -lr * self.b)
        torch._foreach_exp_(prepared)
        torch._foreach_mul_(theta, prepared)
