"""The product of two factors: x = m ⊙ w."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy.typing as npt
import torch
from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.geometry import hypentropy
from mirrormask.geometry.base import Geometry, Held, Latents, mean

__all__ = ["Hadamard", "balance", "check_beta_and_gain", "chosen_gain", "factorize"]

#: ``gain="auto"``, for an optimizer whose step is linear in the gradient and for Adam and its kin. 0.7 is as accurate
#: as 1 on Fashion-MNIST (docs/results.md), and does not diverge on a small network at learning rate 0.1 as 1 does.
LINEAR_GAIN = 0.7
ADAPTIVE_GAIN = 1.0
#: The least of the rms that "rms" reckons with, as a fraction of torch's own initialisation, ``1 / sqrt(3 fan_in)``:
#: the rates are made for weights that grow tenfold or so, and a layer that starts a thousand times smaller diverged.
LEAST_RMS = 0.7


def factorize(x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Split ``x`` into ``(m, w)`` with ``m ⊙ w = x`` and ``m² - w² = beta``.

    ``m = sqrt((β + sqrt(β² + 4x²)) / 2)``, ``w = x / m``: PILoT's initialisation. A balanced start (β = 0) cannot
    change a weight's sign, since ``m² - w²`` is conserved and m would have to cross w; β > 0 can.

    Args:
        x: any shape.
        beta: the imbalance, in (0, inf), in the units of x.

    Returns:
        ``m > 0`` and ``w``, of x's shape and dtype.

    Example:
        >>> m, w = factorize(torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64), beta=1.0)
        >>> bool(torch.allclose(m * w, torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64)))
        True
        >>> (m**2 - w**2).round(decimals=12).tolist()
        [1.0, 1.0, 1.0]
    """
    m = (2 * x).hypot_(x.new_full((), beta)).add_(beta).div_(2).sqrt_()
    return m, x / m


def check_beta_and_gain(beta: float | str, gain: float | str | None) -> None:
    """Raise a ValueError unless ``beta`` is positive or "rms", and ``gain`` positive, "auto" or None."""
    if isinstance(beta, str):
        if beta != "rms":
            raise ValueError(f"beta={beta!r} is neither a positive number nor 'rms'")
    else:
        check_number("beta", beta, low=0.0, open_low=True, hint="a balanced start cannot change signs")
    if isinstance(gain, str):
        if gain != "auto":
            raise ValueError(f"gain={gain!r} is neither a positive number, 'auto' nor None")
    elif gain is not None:
        check_number("gain", gain, low=0.0, open_low=True)


def balance(beta: float | str, x: Tensor, held: Held = Geometry.held) -> float:
    """The imbalance ``m₀² - w₀²`` of one weight tensor: ``beta``, or twice its rms for "rms" (1 where x is 0).

    For "rms" it is ``2 max(rms(x), 0.7 / sqrt(3 fan_in))``, with the inputs of an output as fan_in.
    """
    if not isinstance(beta, str):
        return float(beta)
    rms = math.sqrt(mean(torch.square, x, held)) if held.size(x) else 0.0
    if rms == 0:
        return 1.0
    fan_in = math.prod(held.shape(x)[1:]) if x.dim() > 1 else 0
    return 2 * max(rms, LEAST_RMS / math.sqrt(3 * fan_in) if fan_in else 0.0)


def chosen_gain(gain: float | str, *, adaptive: bool) -> float:
    """``gain``, or what "auto" means for an adaptive base or for SGD."""
    if isinstance(gain, str):
        return ADAPTIVE_GAIN if adaptive else LINEAR_GAIN
    return gain


@dataclass(frozen=True)
class Hadamard(Geometry):
    """``x = m ⊙ w``: a mirror flow whose potential moves from L2 to L1 as ``a = ½|m² - w²|`` falls.

    The pullback is ``∂m = ∂x ⊙ w``, ``∂w = ∂x ⊙ m``. A step of size η on the factors moves x by
    ``-η (m² + w²) ∂x = -η sqrt(4a² + 4x²) ∂x``, so this geometry carries a learning-rate scale of its own.

    Args:
        beta: the imbalance ``m₀² - w₀²`` at the start, in the units of x; ``"rms"`` for ``2 rms(x₀)`` of each tensor
            (1 where a tensor is all zeros), with at least ``0.7 / sqrt(3 fan_in)`` for the rms: less makes rates that
            no longer suit the weights once they have grown.
        gain: the factors train at ``lr · gain / mean(m₀² + w₀²)``, per tensor, under an optimizer whose step is
            linear in the gradient (SGD), and at ``lr · gain / mean(|m₀| + |w₀|)`` under Adam and its kin: in both
            cases gain 1 makes the first step move x, on average, as the base optimizer would have. ``"auto"``
            is 0.7 for SGD, chosen from measurements, and 1 for the others, which is not tuned; ``None`` leaves the
            learning rate alone: the paper's setting.

    Raises:
        ValueError: beta or gain is not positive and finite.

    Example:
        >>> geometry = Hadamard(beta=1.0, gain=None)                  # the paper's literal setting
        >>> latents = geometry.init(torch.tensor([0.5, -1.0]))
        >>> (latents["m"] * latents["w"]).tolist()
        [0.5, -1.0]

    Source: arXiv 2408.09966, section 4 (reparameterization) and the initialisation of PILoT.

    Differs from the paper: per-tensor beta and learning rate unless ``beta`` is a number and ``gain=None``.
    """

    beta: float | str = "rms"
    gain: float | str | None = "auto"

    latents: ClassVar[tuple[str, ...]] = ("m", "w")
    keeps_zeros: ClassVar[bool] = True
    rounding: ClassVar[float] = 4.0
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_beta_and_gain(self.beta, self.gain)

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """``m₀, w₀`` of :func:`factorize`, in float32 at least."""
        x = x.detach()
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        m, w = factorize(x, balance(self.beta, x, self.held))
        return {"m": m, "w": w}

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """``∂m = ∂x ⊙ w`` and ``∂w = ∂x ⊙ m``."""
        return {
            "m": list(torch._foreach_mul(latents["w"], grads)),
            "w": list(torch._foreach_mul(latents["m"], grads)),
        }

    def push(self, x: list[Tensor], latents: Latents) -> None:
        """``x = m ⊙ w``."""
        if x and x[0].dtype == latents["m"][0].dtype:
            torch._foreach_copy_(x, latents["m"])
            torch._foreach_mul_(x, latents["w"])
        else:
            torch._foreach_copy_(x, torch._foreach_mul(latents["m"], latents["w"]))

    def rate(self, x: Tensor, latents: Mapping[str, Tensor], *, adaptive: bool) -> float:
        """``gain / mean(m² + w²)`` or, for an adaptive base, ``gain / mean(|m| + |w|)``; 1 if gain is None."""
        if self.gain is None or not self.held.size(x):
            return 1.0
        size = torch.abs if adaptive else torch.square
        speed = mean(size, latents["m"], self.held) + mean(size, latents["w"], self.held)
        return chosen_gain(self.gain, adaptive=adaptive) / speed

    def revive(self, latents: Mapping[str, Tensor], alive: Tensor, new: Tensor, values: Tensor | None = None) -> None:
        """``m = sqrt(2a)``, ``w = x / m``: at the scale that the living weights of the tensor have now."""
        m, w = latents["m"], latents["w"]
        (lived,) = self.held.sums([alive.sum()])
        (total,) = self.held.sums([((m.square() - w.square()).abs() * alive).sum()])
        imbalance = total / lived.clamp(min=1)
        fallback = 1.0 if isinstance(self.beta, str) else float(self.beta)
        start = torch.where((lived > 0) & (imbalance > 0), imbalance, torch.full_like(imbalance, fallback)).sqrt()
        m.copy_(torch.where(new, start.to(m.dtype), m))
        w.masked_fill_(new, 0.0)
        if values is not None:
            w.copy_(torch.where(new, values.to(m.dtype) / m, w))

    def adopt(self, x: Tensor, latents: Mapping[str, Tensor], changed: Tensor) -> None:
        """The factors of x with the imbalance and the signs that they have: ``m² - w²`` stays."""
        m, w = latents["m"], latents["w"]
        x, imbalance = x.to(m.dtype), m.square() - w.square()
        large = ((imbalance.abs() + torch.hypot(imbalance, 2 * x)) / 2).sqrt()
        small = torch.where(large > 0, x.abs() / large, large)
        by_m = torch.where(imbalance >= 0, large, small).copysign(m)
        by_w = torch.where(imbalance >= 0, small, large) * x.sign() * by_m.sign()
        m.copy_(torch.where(changed, by_m, m))
        w.copy_(torch.where(changed, by_w, w))

    def scale(self, latents: Mapping[str, Tensor]) -> Tensor:
        """``a = ½ |m² - w²|``."""
        return (latents["m"].square() - latents["w"].square()).abs() / 2

    def potential(self, x: Tensor, latents: Mapping[str, Tensor], c0: npt.ArrayLike = 0.0) -> float:
        """The Bregman potential ``R_a(x)`` at the latents' scale; see :func:`mirrormask.flow.potential`."""
        return hypentropy.potential(_array(x), _array(self.scale(latents)), c0)

    def mirror_map(self, x: Tensor, latents: Mapping[str, Tensor], c0: npt.ArrayLike = 0.0) -> hypentropy.Array:
        """``∇R_a(x) = ½ (arcsinh(x / a) - c₀)`` at the latents' scale; see :func:`mirrormask.flow.mirror_map`."""
        return hypentropy.mirror_map(_array(x), _array(self.scale(latents)), c0)


def _array(tensor: Tensor) -> hypentropy.Array:
    return tensor.detach().double().cpu().numpy()
