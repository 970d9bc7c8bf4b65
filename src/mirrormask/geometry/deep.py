"""The product of D factors: x = ω₁ ⊙ ... ⊙ ω_D."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mirrormask.checks import check_int, check_number
from mirrormask.geometry.base import Geometry, Held, Latents
from mirrormask.geometry.hadamard import balance, check_beta_and_gain

__all__ = ["DeepProduct", "draw_factors"]

#: ``gain="auto"`` for two factors, under an optimizer whose step is linear in the gradient and under Adam and its kin.
GAINS = (0.7, 1.0)
#: By how much large weights outgrow the start; their speed grows by a power of it that is the higher the more factors.
GROWN = 16.0
#: The most factors: more would each need a tensor of a weight's size, and nobody has measured a use.
MOST = 8


def draw_factors(
    x: Tensor, sigma: float, depth: int, least: float, generator: torch.Generator, held: Held = Geometry.held
) -> list[Tensor]:
    """``depth`` factors whose product is x, of truncated normal sizes.

    The sizes are drawn from a normal of deviation ``σ^(1/D)``, between ``(least σ)^(1/D)`` and ``(2 σ)^(1/D)``, and all
    of a weight are then multiplied by one number, so that their product is ``max(|x|, least σ)``; the last takes x's
    sign, and what is missing where x is smaller. So no weight starts where it could hardly move, and none at D equal
    factors, from where it could not change its sign.

    Args:
        x: any shape, float32 or float64.
        sigma: σ, the size of the weights, in (0, inf).
        depth: D, at least 2.
        least: what counts as too small to move, as a share of σ, in (0, 1].
        generator: in CPU memory.
        held: knows what is elsewhere of the weight: each element's draw goes by its place in all of it.

    Returns:
        D new tensors; all but the last are positive.

    Example:
        >>> x = torch.tensor([0.5, -0.25, 0.0], dtype=torch.float64)
        >>> factors = draw_factors(x, 0.3, 3, 0.25, torch.Generator().manual_seed(0))
        >>> torch.allclose(factors[0] * factors[1] * factors[2], x)
        True
    """
    low, high = ((bound ** (1 / depth)) / math.sqrt(2) for bound in (least, 2.0))
    span = torch.stack([held.cut(x, draw) for draw in
                        torch.rand((depth, *held.shape(x)), generator=generator, dtype=torch.float64)])  # fmt: skip
    sizes = torch.erfinv(math.erf(low) + (math.erf(high) - math.erf(low)) * span).mul_(
        math.sqrt(2)
    )  # in units of σ^(1/D)
    target = (x.abs().double().cpu() / sigma).clamp_(min=least)
    sizes *= (target / sizes.prod(0)).pow_(1 / depth) * sigma ** (1 / depth)
    factors = [size.to(x) for size in sizes]
    others = torch.stack(factors[:-1]).prod(0)
    return [*factors[:-1], x / others]


@dataclass(frozen=True)
class DeepProduct(Geometry):
    """``x = ω₁ ⊙ ... ⊙ ω_D``: a decay of the factors is a penalty ``|x|^(2/D)``, which is not convex for D > 2.

    The pullback is ``∂ω_d = ∂x ⊙ Π_{e≠d} ω_e``. ``ω_d² - ω_e²`` is constant along the flow and falls as ``exp(-4 ∫α)``
    under a decay; a step of size η moves x by ``-η Σ_d Π_{e≠d} ω_e² ∂x``, which for equal factors is
    ``-η D |x|^(2 - 2/D) ∂x``.

    Args:
        depth: D, the number of factors, from 2 to 8.
        least: how small a weight counts as at the start, as a share of its tensor's rms, in (0, 1]; see
            :func:`draw_factors`.
        gain: the factors train at ``lr · gain / mean(Σ_d Π_{e≠d} ω_e²)`` per tensor (Adam and its kin:
            ``lr · gain / mean(Σ_d Π_{e≠d} |ω_e|)``), so that gain 1 makes the first step move x, on average, as the
            base optimizer would have. ``"auto"`` is that of two factors, 0.7 (1 under Adam), times ``16^(2/D - 1)``
            (``16^(1/D - 1/2)``): weights that grow sixteenfold end at the speed that two factors would give them. With
            0.7 for three, LeNet-300-100 diverged in 17 steps at learning rate 0.1. ``None`` leaves the learning rate
            alone: the paper's setting, which has to be searched for each depth.
        seed: of the draw of the factors, at least 0.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> geometry = DeepProduct(depth=3)
        >>> latents = geometry.init(torch.tensor([0.5, -1.0, 0.0]))
        >>> (latents["f1"] * latents["f2"] * latents["f3"]).tolist()
        [0.5, -1.0, 0.0]

    Source: Kolb, Weber, Bischl and Rügamer 2025, arXiv 2502.02496, Theorem 1 (the penalty) and Algorithm D.1 (the
    initialisation).

    Differs from the paper: the weights keep the values that they have, and what is drawn is how a weight is shared out
    to its factors; there all factors are drawn, and the weights with them. The bounds are shares of the tensor's own
    rms (with a floor, as in :class:`mirrormask.geometry.Hadamard`), there the lower one is a constant, whose value we
    do not know. The paper finds that deep factors need larger learning rates than weights, which ``gain`` gives them.
    """

    depth: int = 3
    least: float = 0.25
    gain: float | str | None = "auto"
    seed: int = 0

    keeps_zeros: ClassVar[bool] = True
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if check_int("depth", self.depth, low=2) > MOST:
            raise ValueError(
                f"depth={self.depth!r} is more than {MOST} factors, each of the weight's size; 3 or 4 will do"
            )
        check_number("least", self.least, low=0.0, high=1.0, open_low=True, hint="a share of the tensor's rms")
        check_beta_and_gain("rms", self.gain)
        check_int("seed", self.seed, low=0)

    @property
    def latents(self) -> tuple[str, ...]:  # type: ignore[override]
        """``f1`` to ``fD``."""
        return tuple(f"f{d}" for d in range(1, self.depth + 1))

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """The factors of :func:`draw_factors`, in float32 at least; the same for the same weights."""
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if not self.held.size(x):
            return {name: x.clone() for name in self.latents}
        # So that layers of one shape differ; a sum over processes has no -0.
        first = (self.held.first(x, 4096) + 0.0).numpy().tobytes()
        words = np.random.SeedSequence([self.seed, zlib.crc32(first)]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> 1))
        factors = draw_factors(x, balance("rms", x, self.held) / 2, self.depth, self.least, generator, self.held)
        return dict(zip(self.latents, factors, strict=True))

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """``∂ω_d = ∂x ⊙ Π_{e≠d} ω_e``, with products from the left and from the right: nothing is divided."""
        names = self.latents
        found: dict[str, list[Tensor]] = {}
        left = grads
        for name in names:  # ∂x times all factors before this one
            found[name] = list(left)
            left = list(torch._foreach_mul(left, latents[name]))
        right = latents[names[-1]]
        for name in reversed(names[:-1]):
            found[name] = list(torch._foreach_mul(found[name], right))
            right = list(torch._foreach_mul(right, latents[name]))
        return found

    def push(self, x: list[Tensor], latents: Latents) -> None:
        """``x = Π ω_d``."""
        if not x:
            return
        product = list(torch._foreach_mul(latents[self.latents[0]], latents[self.latents[1]]))
        for name in self.latents[2:]:
            torch._foreach_mul_(product, latents[name])
        torch._foreach_copy_(x, product)

    def rate(self, x: Tensor, latents: Mapping[str, Tensor], *, adaptive: bool) -> float:
        """``gain`` over the mean speed of x for a unit step of the factors."""
        if self.gain is None or not self.held.size(x):
            return 1.0
        ones = torch.ones_like(latents[self.latents[0]])
        slopes = self.pullback([ones], [x], {name: [latents[name]] for name in self.latents})
        totals = [(s.double().abs() if adaptive else s.double().square()).sum() for (s,) in slopes.values()]
        speed = sum(float(total) for own in totals for total in self.held.sums([own])) / self.held.size(x)
        gain = self.gain
        if isinstance(gain, str):
            power = 1 / self.depth - 1 / 2
            gain = GAINS[adaptive] * GROWN ** (power if adaptive else 2 * power)
        return gain / speed if speed > 0 else 1.0

    def revive(self, latents: Mapping[str, Tensor], alive: Tensor, new: Tensor, values: Tensor | None = None) -> None:
        """All factors but the last are the D-th root of the living weights' rms; the last is 0, or what x takes."""
        x = torch.stack([latents[name] for name in self.latents]).prod(0)
        (total,), (lived,) = self.held.sums([(x.square() * alive).sum()]), self.held.sums([alive.sum()])
        size = total.div(lived.clamp(min=1)).sqrt()
        start = torch.where(size > 0, size, torch.ones_like(size)).pow(1 / self.depth)
        for name in self.latents[:-1]:
            latents[name].copy_(torch.where(new, start.to(latents[name].dtype), latents[name]))
        last = latents[self.latents[-1]]
        wanted = torch.zeros_like(last) if values is None else values.to(last.dtype) / start ** (self.depth - 1)
        last.copy_(torch.where(new, wanted, last))

    def adopt(self, x: Tensor, latents: Mapping[str, Tensor], changed: Tensor) -> None:
        """The last factor takes it; where another one is 0, all are drawn anew."""
        last = latents[self.latents[-1]]
        others = torch.stack([latents[name] for name in self.latents[:-1]]).prod(0)
        own = x.to(last.dtype) / others
        last.copy_(torch.where(changed & own.isfinite(), own, last))
        if bool((changed & ~own.isfinite()).any()):
            super().adopt(x, latents, changed & ~own.isfinite())
