"""The signed power: x = sign(θ) |θ|^p."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.geometry.base import Geometry, Latents

__all__ = ["Power"]

#: A weight at θ = 0 has no gradient; one that comes back starts at this fraction of the living weights' rms.
REVIVED = 1e-2


@dataclass(frozen=True)
class Power(Geometry):
    """``x = θ |θ|^(p-1)``: large weights learn fast, small ones slowly, so that the small ones can be pruned.

    The pullback is ``∂θ = p |θ|^(p-1) ∂x``.

    Args:
        power: p (the paper's α), in [1, inf); 1 is the ordinary weight.
        gain: θ trains at ``lr · gain / mean(p² |θ₀|^(2p-2))`` per tensor (Adam and its kin:
            ``lr · gain / mean(p |θ₀|^(p-1))``), so that gain 1 makes the first step move x, on average, as the base
            optimizer would have; ``None`` leaves the learning rate alone: the paper's setting.

    Raises:
        ValueError: power is below 1, or gain is not positive.

    Example:
        >>> geometry = Power(power=2.0)
        >>> geometry.init(torch.tensor([4.0, -9.0]))["theta"].tolist()
        [2.0, -3.0]

    Source: Schwarz et al. 2021, arXiv 2110.00296, section 2 (powerpropagation).
    """

    power: float = 2.0
    gain: float | None = 1.0

    latents: ClassVar[tuple[str, ...]] = ("theta",)
    rounding: ClassVar[float] = 16.0
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("power", self.power, low=1.0)
        if self.gain is not None:
            check_number("gain", self.gain, low=0.0, open_low=True)

    @property
    def keeps_zeros(self) -> bool:  # type: ignore[override]
        """A power of 1 has a slope at 0."""
        return self.power > 1

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """``θ = sign(x) |x|^(1/p)``, in float32 at least."""
        x = x.detach()
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return {"theta": x.sign() * x.abs().pow(1 / self.power)}

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """``∂θ = p |θ|^(p-1) ∂x``."""
        slopes = self._slopes(latents["theta"])
        torch._foreach_mul_(slopes, self.power)
        torch._foreach_mul_(slopes, grads)
        return {"theta": slopes}

    def push(self, x: list[Tensor], latents: Latents) -> None:
        """``x = θ |θ|^(p-1)``."""
        if x:
            torch._foreach_copy_(x, torch._foreach_mul(self._slopes(latents["theta"]), latents["theta"]))

    def _slopes(self, theta: list[Tensor]) -> list[Tensor]:
        slopes = list(torch._foreach_abs(theta))
        if self.power != 2.0:
            torch._foreach_pow_(slopes, self.power - 1)
        return slopes

    def rate(self, x: Tensor, latents: Mapping[str, Tensor], *, adaptive: bool) -> float:
        """``gain`` over the mean speed of x for a unit step of θ."""
        if self.gain is None or not self.held.size(x):
            return 1.0
        slope = self.power * latents["theta"].double().abs().pow(self.power - 1)
        (total,) = self.held.sums([(slope if adaptive else slope.square_()).sum()])
        speed = float(total) / self.held.size(x)
        return self.gain / speed if speed > 0 else 1.0

    def revive(self, latents: Mapping[str, Tensor], alive: Tensor, new: Tensor, values: Tensor | None = None) -> None:
        """``sign(v) |v|^(1/p)``; where that is 0, a hundredth of the living weights' rms, so that it can move."""
        theta = latents["theta"]
        (total,), (lived,) = self.held.sums([(theta.square() * alive).sum()]), self.held.sums([alive.sum()])
        small = REVIVED * total.div(lived.clamp(min=1)).sqrt()
        start = torch.zeros_like(theta) if values is None else self.init(values)["theta"].to(theta.dtype)
        theta.copy_(torch.where(new, torch.where(start == 0, small, start), theta))
