"""Soft thresholding with a learned threshold a layer: STR."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.geometry.base import Geometry, Latents
from mirrormask.masked import keep_only

__all__ = ["SoftThreshold"]

#: ``g(SETTLED) = 0`` exactly, and no step of an optimizer changes that.
SETTLED = -1e4
#: A weight that comes back starts this far above its layer's threshold, as a fraction of the living weights' rms.
ABOVE = 1e-2


@dataclass(frozen=True)
class SoftThreshold(Geometry):
    """``x = sign(w) max(|w| - g(s), 0)`` with ``g = exp``: one learned s for each weight tensor.

    The pullback is ``∂w = ∂x ⊙ 1[|w| > g]`` and ``∂s = -g Σ ∂x ⊙ sign(w) ⊙ 1[|w| > g] / max(1, n g²)`` with n living
    weights: s is as stiff as n g² weights, and at a weight's learning rate would jump over all of them. A weight below
    the threshold keeps its w and comes back when the threshold falls.

    Args:
        init_threshold: the threshold at the start, as a fraction of the tensor's rms, in (0, 1]; w starts so that x is
            what it was.

    Raises:
        ValueError: init_threshold is outside its range.

    Example:
        >>> geometry = SoftThreshold(init_threshold=0.1)
        >>> latents = geometry.init(torch.tensor([3.0, -4.0, 0.0]))
        >>> x = torch.empty(3)
        >>> geometry.push([x], {name: [tensor] for name, tensor in latents.items()})
        >>> [round(value, 5) + 0.0 for value in x.tolist()]
        [3.0, -4.0, 0.0]

    Source: Kusupati et al. 2020, arXiv 2002.03231, equations (3) to (5).

    Differs from the paper: thresholds start relative to each tensor's rms instead of at one s for all, and rise by
    ``reach`` (a controller that meets the schedule's sparsity) instead of by weight decay on s, whose gradient is
    divided by ``max(1, n g²)``.
    """

    init_threshold: float = 0.01

    latents: ClassVar[tuple[str, ...]] = ("w", "s")
    weight_decayed: ClassVar[tuple[str, ...]] = ("w",)
    stepped: ClassVar[tuple[str, ...] | None] = ("w",)
    keeps_zeros: ClassVar[bool] = True
    sparsifies: ClassVar[bool] = True
    shared: ClassVar[tuple[str, ...]] = ("s",)
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("init_threshold", self.init_threshold, low=0.0, high=1.0, open_low=True)

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """``w = sign(x) (|x| + g)``, ``s = log g`` of shape (1,), in float32 at least."""
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        size = self.held.size(x)
        rms = (self.held.sums([x.square().sum()])[0] / size).sqrt() if size else x.new_ones(())
        g = self.init_threshold * torch.where(rms > 0, rms, torch.ones_like(rms))
        return {"w": x + x.sign() * g, "s": g.log().reshape(1)}

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """``∂w`` and ``∂s``."""
        thresholds = torch._foreach_exp(latents["s"])
        living = [w.abs() > g.view(()) for w, g in zip(latents["w"], thresholds, strict=True)]
        by_weight = [grad.to(w.dtype) * lives for grad, w, lives in zip(grads, latents["w"], living, strict=True)]
        counts = self.held.sums([lives.sum() for lives in living])
        slopes = self.held.sums([(grad * w.sign()).sum() for grad, w in zip(by_weight, latents["w"], strict=True)])
        by_threshold = []
        for g, count, slope in zip(thresholds, counts, slopes, strict=True):
            stiffness = g.square() * count  # how much more s bends the loss than a single weight does
            by_threshold.append(-g * slope / stiffness.clamp(min=1.0))
        return {"w": by_weight, "s": by_threshold}

    def push(self, x: list[Tensor], latents: Latents) -> None:
        """``x = sign(w) max(|w| - g, 0)``."""
        for target, w, g in zip(x, latents["w"], torch._foreach_exp(latents["s"]), strict=True):
            target.copy_(w.sign().mul_(w.abs().sub_(g.view(())).clamp_(min=0)))

    def prune(self, latents: Mapping[str, Tensor], mask: Tensor) -> None:
        """``w = 0`` where the mask is False; the threshold stays."""
        keep_only(latents["w"], mask)

    def revive(self, latents: Mapping[str, Tensor], alive: Tensor, new: Tensor, values: Tensor | None = None) -> None:
        """``w = sign(v) (|v| + g)``; for v = 0 a little above g, where it has a gradient."""
        w, g = latents["w"], latents["s"].view(()).exp()
        v = torch.zeros_like(w) if values is None else values.to(w.dtype)
        (total,), (lived,) = self.held.sums([(w.square() * alive).sum()]), self.held.sums([alive.sum()])
        rms = total.div(lived.clamp(min=1)).sqrt()
        start = torch.where(v == 0, (g + ABOVE * rms).expand_as(w), v + v.sign() * g)
        w.copy_(torch.where(new, start, w))

    def adopt(self, x: Tensor, latents: Mapping[str, Tensor], changed: Tensor) -> None:
        """``w = sign(x) (|x| + g)`` with the threshold of now."""
        w, g = latents["w"], latents["s"].view(()).exp()
        x = x.to(w.dtype)
        w.copy_(torch.where(changed, x + x.sign() * g, w))

    def importance(self, latents: Mapping[str, Tensor]) -> Tensor:
        """``log |w| - s``, the log of how far w is above its layer's threshold."""
        w = latents["w"].abs()
        return w.clamp(min=torch.finfo(w.dtype).tiny).log() - latents["s"].view(())

    def reach(self, latents: Mapping[str, Tensor], shift: float) -> None:
        """``s + shift``: every threshold by the same factor."""
        latents["s"].add_(shift)

    def settle(self, x: Tensor, latents: Mapping[str, Tensor]) -> None:
        """``w = x`` and a threshold of 0: an ordinary weight from here on."""
        latents["w"].copy_(x)
        latents["s"].fill_(SETTLED)
