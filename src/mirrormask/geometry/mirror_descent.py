"""Mirror descent in the hypentropy potential: the mirror flow of m ⊙ w, without the factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.geometry import hypentropy
from mirrormask.geometry.base import Geometry, Latents, mean
from mirrormask.geometry.hadamard import balance, check_beta_and_gain, chosen_gain
from mirrormask.masked import keep_only

__all__ = ["MirrorDescent"]


@dataclass(frozen=True)
class MirrorDescent(Geometry):
    """``x = a sinh(u)``, and the base optimizer steps u with the gradient of x: the mirror flow of ``m ⊙ w`` itself.

    Gradient flow on the factors of ``x = m ⊙ w`` integrates to ``x_t = a_t sinh(c₀ - 2 ∫ ∇f(x_s) ds)`` with
    ``a_t = a₀ exp(-4 A_t)``. This geometry takes that at its word: ``u`` is what stands in the sinh, one scale ``a``
    per weight tensor carries the decay, and there are no factors to train. A step of size η on u moves x by
    ``-η sqrt(a² + x²) ∂x``, the metric of the mirror flow; ``m² - w² = 2a`` holds exactly at any step size.

    Beside ``m ⊙ w`` it needs one latent a weight instead of two, half of the base optimizer's state, and the geometry
    outlives a base that rescales gradients: Adam on two factors, each rescaled by itself, does not follow the flow.

    Args:
        beta: ``2 a₀``, in the units of x; ``"rms"`` as in :class:`mirrormask.geometry.Hadamard`.
        gain: u trains at ``lr · gain / mean(sqrt(a₀² + x₀²))`` per tensor: gain 1 makes the first step move x, on
            average, as the base optimizer would have. ``"auto"`` is 0.7 for SGD and 1 for Adam and its kin;
            ``None`` trains it at ``2 lr``, the time of the factors' own flow.
        clip: the most that one step may change u by, in (0, inf): no step changes a weight by more than a factor
            ``exp(clip)``. The metric grows with the weight, so that a step which is too long makes the next one
            longer; with the bound, learning rates that suit the base optimizer do not diverge. ``None`` for none.

    Raises:
        ValueError: beta, gain or clip is not positive and finite.

    Example:
        >>> geometry = MirrorDescent(beta=2.0)
        >>> latents = geometry.init(torch.tensor([0.75, 0.0]))
        >>> [round(value, 6) for value in latents["u"].tolist()], latents["a"].item()
        ([0.693147, 0.0], 1.0)

    Source: the integrated flow of arXiv 2408.09966 (section 3); mirror descent in this potential: Ghai, Hazan and
    Singer 2020, arXiv 1902.01903 (hypentropy).

    Differs from the paper: the flow is discretised in u, where the paper takes steps on m and w.
    """

    beta: float | str = "rms"
    gain: float | str | None = "auto"
    clip: float | None = 0.05

    latents: ClassVar[tuple[str, ...]] = ("u",)
    constants: ClassVar[tuple[str, ...]] = ("a",)
    masked: ClassVar[tuple[str, ...]] = ("u",)
    couples: ClassVar[bool] = False
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_beta_and_gain(self.beta, self.gain)
        if self.clip is not None:
            check_number("clip", self.clip, low=0.0, open_low=True)

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """``u = arcsinh(x / a)`` in float32 at least, and ``a = β/2``, one number."""
        x = x.detach()
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        scale = balance(self.beta, x, self.held) / 2
        return {"u": (x / scale).asinh_(), "a": x.new_full((), scale)}

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """``∂x`` itself, in u's dtype: mirror descent steps the dual variable with the gradient of the primal one."""
        return {"u": [grad.to(u.dtype, copy=True) for grad, u in zip(grads, latents["u"], strict=True)]}

    def push(self, x: list[Tensor], latents: Latents) -> None:
        """``x = a sinh(u)``, as ``(a/2) tanh(u) (c² + 1) / c`` with ``c = exp(u)``: torch's sinh is slow on a CPU."""
        if not x:
            return
        same = x[0].dtype == latents["u"][0].dtype
        values = x if same else [torch.empty_like(u) for u in latents["u"]]
        torch._foreach_copy_(values, latents["u"])
        torch._foreach_tanh_(values)
        powers = list(torch._foreach_exp(latents["u"]))
        torch._foreach_div_(values, powers)
        torch._foreach_mul_(powers, powers)
        torch._foreach_add_(powers, 1.0)
        torch._foreach_mul_(values, powers)
        torch._foreach_mul_(values, list(torch._foreach_div(latents["a"], 2.0)))
        if not same:
            torch._foreach_copy_(x, values)

    def before_step(self, x: list[Tensor], latents: Latents) -> list[Tensor]:
        """A copy of u, in x where x can hold it."""
        if self.clip is None or not x:
            return []
        copies = x if x[0].dtype == latents["u"][0].dtype else [torch.empty_like(u) for u in latents["u"]]
        torch._foreach_copy_(copies, latents["u"])
        return copies

    def after_step(self, latents: Latents, before: list[Tensor]) -> None:
        """Bound the step of u by ``clip``, both ways."""
        if self.clip is None or not before:
            return
        torch._foreach_sub_(latents["u"], before)  # in place: a copy would be the most memory that a step takes
        torch._foreach_clamp_max_(latents["u"], self.clip)
        torch._foreach_clamp_min_(latents["u"], -self.clip)
        torch._foreach_add_(latents["u"], before)

    def shrink(self, latents: Latents, keep: float) -> None:
        """``a ← keep² a``, which is what ``m ← keep m, w ← keep w`` makes of ``½ (m² - w²)``; u stays."""
        if latents["a"]:
            torch._foreach_mul_(latents["a"], keep * keep)

    def rate(self, x: Tensor, latents: Mapping[str, Tensor], *, adaptive: bool) -> float:
        """``gain / mean(sqrt(a² + x²))``; 2 if gain is None."""
        if self.gain is None or not self.held.size(x):
            return 2.0
        a = float(latents["a"])
        metric = mean(lambda part: part.square().add_(a * a).sqrt_(), x.detach(), self.held)
        return chosen_gain(self.gain, adaptive=adaptive) / metric

    def prune(self, latents: Mapping[str, Tensor], mask: Tensor) -> None:
        """``u = 0`` where the mask is False."""
        keep_only(latents["u"], mask)

    def revive(self, latents: Mapping[str, Tensor], alive: Tensor, new: Tensor, values: Tensor | None = None) -> None:
        """``u = arcsinh(v / a)``: a weight at 0 moves with the metric ``a``."""
        u = latents["u"]
        start = torch.zeros_like(u) if values is None else torch.asinh(values.to(u.dtype) / latents["a"])
        u.copy_(torch.where(new, start, u))

    def adopt(self, x: Tensor, latents: Mapping[str, Tensor], changed: Tensor) -> None:
        """``u = arcsinh(x / a)`` with the a of now."""
        u = latents["u"]
        u.copy_(torch.where(changed, torch.asinh(x.to(u.dtype) / latents["a"]), u))

    def scale(self, latents: Mapping[str, Tensor]) -> Tensor:
        """``a``, the same for all weights of a tensor."""
        return latents["a"].expand_as(latents["u"])

    def potential(self, x: Tensor, latents: Mapping[str, Tensor]) -> float:
        """The Bregman potential ``R_a(x)``, c₀ = 0; see :func:`mirrormask.flow.potential`."""
        return hypentropy.potential(x.detach().double().cpu().numpy(), float(latents["a"]))
