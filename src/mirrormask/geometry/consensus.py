"""The weight and a sparse copy of it that it must come to agree with: ADMM."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.geometry.base import Geometry, Latents
from mirrormask.progress import Clock

__all__ = ["Consensus"]


@dataclass(frozen=True)
class Consensus(Geometry):
    """``x = w``, drawn to a sparse target z: ``min f(x) + I(z is sparse)`` subject to ``x = z``, by ADMM.

    The gradient of the augmented Lagrangian, with the scaled dual u, is what the base optimizer steps w with::

        ∂w = ∂x + λ_t (w - z + u)                                             at every step
        z ← what lives of w + u, 0 elsewhere;   u ← u + w - z                 every ``every`` of training

    Which weights of z live the optimizer decides, over all tensors together: those with the largest ``(w + u)² v``,
    where v is the second moment that Adam keeps of their gradients, an estimate of the Fisher information; by
    ``|w + u|`` under a base that keeps none. λ rises as ``½ strength (1 - cos(π t / until))``, by steps, one with each
    new target; then u becomes ``u λ_before / λ_after``, since ``λ u`` is the multiplier. From ``until`` on, λ is 0.

    Args:
        strength: λ at the end, in the units of a gradient over a weight, in [0, inf).
        every: the fraction of training between two targets, in (0, 1].
        until: the fraction of training after which w is an ordinary weight, in (0, 1].

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> geometry = Consensus(strength=2.0).at(Clock(85, 100))
        >>> latents = {"w": [torch.tensor([1.0])], "target": [torch.tensor([0.0])], "dual": [torch.tensor([0.5])]}
        >>> round(geometry.strength_now, 3), geometry.pullback([torch.tensor([0.25])], [], latents)["w"][0].item() > 3
        (1.985, True)

    Source: Lee, Jang, Lee, Alistarh and Lee 2025, arXiv 2510.01650 (ELSA), and its authors' code.

    Differs from the paper: the dual is scaled anew when λ changes, in the code with the next target; λ and the interval
    are fractions of training.
    """

    strength: float = 0.01
    every: float = 1 / 128
    until: float = 0.9
    #: λ at the moment of :meth:`at`.
    strength_now: float = field(default=0.0, init=False, repr=False, compare=False)

    latents: ClassVar[tuple[str, ...]] = ("w",)
    constants: ClassVar[tuple[str, ...]] = ("target", "dual")
    weight_decayed: ClassVar[tuple[str, ...]] = ("w",)
    masked: ClassVar[tuple[str, ...]] = ("w",)
    keeps_zeros: ClassVar[bool] = False
    aims: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0.0)
        check_number("every", self.every, low=0.0, high=1.0, open_low=True, hint="a fraction of training")
        check_number("until", self.until, low=0.0, high=1.0, open_low=True, hint="a fraction of training")

    def at(self, clock: Clock) -> Consensus:
        """With the λ of the step that begins at ``clock``."""
        now = dataclasses.replace(self)
        object.__setattr__(now, "strength_now", self._strength(clock, clock.step))
        return now if self.held is Geometry.held else now.over(self.held)

    def _strength(self, clock: Clock, step: int) -> float:
        end, gap = max(clock.at(self.until), 1), max(clock.at(self.every), 1)
        if not 0 <= step < end:
            return 0.0
        return 0.5 * self.strength * (1 - math.cos(math.pi * (step // gap * gap) / end))

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """``w = z = x`` and ``u = 0``, in float32 at least."""
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x.clone()
        return {"w": x, "target": x.clone(), "dual": torch.zeros_like(x)}

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """``∂x + λ (w - z + u)``."""
        found = [grad.to(w.dtype, copy=True) for grad, w in zip(grads, latents["w"], strict=True)]
        if self.strength_now and found:
            gaps = list(torch._foreach_sub(latents["w"], latents["target"]))
            torch._foreach_add_(gaps, latents["dual"])
            torch._foreach_add_(found, gaps, alpha=self.strength_now)
        return {"w": found}

    def push(self, x: list[Tensor], latents: Latents) -> None:
        """``x = w``."""
        if x:
            torch._foreach_copy_(x, latents["w"])

    def shrink(self, latents: Latents, keep: float) -> None:
        """``w ← keep w``; neither target nor dual."""
        if latents["w"]:
            torch._foreach_mul_(latents["w"], keep)

    def adopt(self, x: Tensor, latents: Mapping[str, Tensor], changed: Tensor) -> None:
        """``w = x``."""
        w = latents["w"]
        w.copy_(torch.where(changed, x.to(w.dtype), w))

    def revive(self, latents: Mapping[str, Tensor], alive: Tensor, new: Tensor, values: Tensor | None = None) -> None:
        """``w = v``, or 0."""
        if values is not None:
            latents["w"].copy_(torch.where(new, values.to(latents["w"].dtype), latents["w"]))

    def refresh_due(self, clock: Clock) -> bool:
        """At every new target, up to ``until``."""
        return clock.step % max(clock.at(self.every), 1) == 0 and clock.step < clock.at(self.until)

    def wish(self, latents: Mapping[str, Tensor], moment: Tensor | None) -> Tensor:
        """``|w + u| sqrt(v)``, or ``|w + u|``."""
        size = (latents["w"] + latents["dual"]).abs_()
        return size if moment is None else size.mul_(moment.sqrt())

    def aim(self, latents: Mapping[str, Tensor], living: Tensor, clock: Clock) -> None:
        """A new target, the dual's step, and its scale under the λ of the steps to come."""
        w, target, dual = latents["w"], latents["target"], latents["dual"]
        dual.add_(w)
        target.copy_(torch.where(living, dual, dual.new_zeros(())))
        dual.sub_(target)
        before, after = self._strength(clock, clock.step - 1), self._strength(clock, clock.step)
        if after:
            dual.mul_(before / after)
