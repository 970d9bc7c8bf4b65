"""A sigmoid mask whose temperature hardens it: continuous sparsification."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.geometry.base import Geometry, Latents
from mirrormask.masked import keep_only
from mirrormask.progress import Clock

__all__ = ["SigmoidMask"]

#: A logit at which the sigmoid is exactly 1 at every temperature of at least 1, whatever an optimizer adds to it.
SETTLED = 1e4


@dataclass(frozen=True)
class SigmoidMask(Geometry):
    """``x = w ⊙ σ(τ s)`` with one logit s a weight, τ rising from 1 to ``final`` and a penalty ``λ Σ σ(τ s)``.

    The pullback is ``∂w = ∂x ⊙ σ(τ s)`` and ``∂s = (∂x ⊙ w + λ) ⊙ τ σ(τ s) (1 - σ(τ s))``.

    Args:
        s_init: the logit at the start, finite; w starts at ``x / σ(s_init)``, so that x is what it was.
        final: the last temperature, in [1, inf); ``τ_t = final ** (t / until)``.
        until: the fraction of training at which it is reached, in (0, 1].
        penalty: λ, the pull towards smaller masks, in [0, inf).
        temperature: τ now; the optimizer sets it through :meth:`at`.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> geometry = SigmoidMask(final=100.0, until=0.5)
        >>> [round(geometry.at(Clock(step, 100)).temperature, 6) for step in (0, 25, 50, 100)]
        [1.0, 10.0, 100.0, 100.0]

    Source: Savarese, Silva and Maire 2020, arXiv 1912.04427, section 3, Algorithm 1.
    """

    s_init: float = 0.0
    final: float = 200.0
    until: float = 0.75
    penalty: float = 1e-8
    temperature: float = 1.0

    latents: ClassVar[tuple[str, ...]] = ("w", "s")
    weight_decayed: ClassVar[tuple[str, ...]] = ("w",)
    stepped: ClassVar[tuple[str, ...] | None] = ("w",)
    sparsifies: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("s_init", self.s_init)
        check_number("final", self.final, low=1.0)
        check_number("until", self.until, low=0.0, high=1.0, open_low=True, hint="a fraction of training")
        check_number("penalty", self.penalty, low=0.0)
        check_number("temperature", self.temperature, low=0.0, open_low=True)

    def at(self, clock: Clock) -> SigmoidMask:
        """``τ = final ** min(t / until, 1)``."""
        now = dataclasses.replace(self, temperature=self.final ** min(clock.progress / self.until, 1.0))
        return now if self.held is Geometry.held else now.over(self.held)

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """``w = x / σ(s_init)``, ``s = s_init``, in float32 at least."""
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        s = torch.full_like(x, self.s_init)
        return {"w": x / s.sigmoid(), "s": s}

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """``∂w`` and ``∂s``."""
        gates = self._gates(latents["s"])
        by_weight = list(torch._foreach_mul(gates, grads))
        slopes = torch._foreach_mul(gates, gates)  # σ²; then τ (σ - σ²)
        torch._foreach_sub_(gates, slopes)
        torch._foreach_mul_(gates, self.temperature)
        by_logit = list(torch._foreach_mul(latents["w"], grads))
        if self.penalty:
            torch._foreach_add_(by_logit, self.penalty)
        torch._foreach_mul_(by_logit, gates)
        return {"w": by_weight, "s": by_logit}

    def push(self, x: list[Tensor], latents: Latents) -> None:
        """``x = w ⊙ σ(τ s)``."""
        if x:
            torch._foreach_copy_(x, torch._foreach_mul(self._gates(latents["s"]), latents["w"]))

    def _gates(self, logits: list[Tensor]) -> list[Tensor]:
        gates = list(torch._foreach_mul(logits, self.temperature))
        torch._foreach_sigmoid_(gates)
        return gates

    def prune(self, latents: Mapping[str, Tensor], mask: Tensor) -> None:
        """``w = 0`` where the mask is False; the logit stays."""
        keep_only(latents["w"], mask)

    def revive(self, latents: Mapping[str, Tensor], alive: Tensor, new: Tensor, values: Tensor | None = None) -> None:
        """An undecided logit, ``s = 0``, and ``w = 2 v``; once settled, an open gate and ``w = v``."""
        settled = _is_settled(latents["s"])
        latents["s"].masked_fill_(new, SETTLED if settled else 0.0)
        if values is not None:
            value = values.to(latents["w"].dtype) * (1 if settled else 2)
            latents["w"].copy_(torch.where(new, value, latents["w"]))

    def adopt(self, x: Tensor, latents: Mapping[str, Tensor], changed: Tensor) -> None:
        """``w = x / σ(τ s)``; a gate that is nearly closed is undecided again, where x is not zero."""
        w, s = latents["w"], latents["s"]
        s.masked_fill_(changed & (x != 0) & (s < 0), 0.0)
        w.copy_(torch.where(changed, x.to(w.dtype) / self._gates([s])[0], w))

    def importance(self, latents: Mapping[str, Tensor]) -> Tensor | None:
        """The logit s: above 0 the sigmoid hardens to 1, below to 0; None once settled."""
        return None if _is_settled(latents["s"]) else latents["s"].clone()

    def reach(self, latents: Mapping[str, Tensor], shift: float) -> None:
        """``s - shift``."""
        latents["s"].sub_(shift)

    def settle(self, x: Tensor, latents: Mapping[str, Tensor]) -> None:
        """``w = x`` and a gate of exactly 1: an ordinary weight from here on."""
        latents["w"].copy_(x)
        latents["s"].fill_(SETTLED)


def _is_settled(logits: Tensor) -> bool:
    return logits.numel() > 0 and bool(logits.max() > SETTLED / 2)
