"""How a training stands, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mirrormask.geometry.base import mean
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.decay_clock import DecayClock
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["diagnose", "l1_norm", "log_size", "pack_signs", "unpack_signs"]

#: A weight is below the threshold where it is under this fraction of its tensor's root mean square.
THRESHOLD = 0.01
#: The least size of a tensor: one of zeros has grown, once it moves, and by a number.
SMALLEST = 1e-12


@torch.no_grad()
def l1_norm(weights: Iterable[Tensor]) -> float:
    """``Σ |x|`` over all weights, summed in float64."""
    return sum(float(x.abs().sum(dtype=torch.float64)) for x in weights)


@torch.no_grad()
def log_size(x: Tensor) -> float:
    """``log (mean x⁴)^¼``: the size of the weights that a mask leaves, as the small ones hardly count.

    Example:
        >>> round(log_size(torch.tensor([1.0, 0.0, 0.0, 0.0])), 6) == round(-math.log(4) / 4, 6)
        True
    """
    fourth = mean(lambda part: part.square().square(), x.detach()) if x.numel() else 0.0
    return math.log(max(fourth**0.25, SMALLEST)) if math.isfinite(fourth) else math.inf


def pack_signs(x: Tensor) -> Tensor:
    """Which elements are negative, eight to a byte: ``sign_flips`` is not worth a byte a weight.

    Example:
        >>> pack_signs(torch.tensor([-1.0, 2.0, -3.0]))
        tensor([5], dtype=torch.uint8)
    """
    negative = (x.detach() < 0).reshape(-1)
    bits = torch.zeros((negative.numel() + 7) // 8, dtype=torch.uint8, device=x.device)
    for place in range(8):
        part = negative[place::8]
        bits[: part.numel()] |= part.to(torch.uint8) << place
    return bits


def unpack_signs(bits: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`pack_signs` was told, as a bool tensor of that shape.

    Example:
        >>> unpack_signs(torch.tensor([5], dtype=torch.uint8), torch.Size([3])).tolist()
        [True, False, True]
    """
    negative = torch.empty(shape, dtype=torch.bool, device=bits.device)
    flat = negative.view(-1)
    for place in range(8):
        part = flat[place::8]
        part.copy_((bits[: part.numel()] >> place) & 1)
    return negative


@torch.no_grad()
def diagnose(weights: SparseWeights, base: BaseOptimizer, decay: DecayClock, lrs: list[float]) -> dict[str, float]:
    """How weights and decay stand.

    Args:
        weights: the sparsifiable weights.
        base: knows their groups.
        decay: of the training.
        lrs: the learning rate of each group.

    Returns:
        ``alpha`` (of the last step, in the first group with sparsifiable weights), ``decay_integral`` (A, there),
        ``median_a`` (over the living weights; NaN without latents), ``l1_norm``, ``sparsity``,
        ``below_threshold`` (the fraction of weights under 1% of their tensor's rms) and ``sign_flips`` (living
        weights whose sign is not the one they started with).
    """
    group = base.group_of[next(iter(weights.values()))]
    lr = lrs[group]
    scales, below, flips, zeros, total = [], 0, 0, 0, 0
    for x in weights.values():
        scale, mask = weights.geometry.scale(weights.latents_of(x)), weights.mask_of(x)
        if scale is not None:
            scales.append(scale.reshape(-1) if mask is None else scale[mask])
        below += int((x.abs() < THRESHOLD * x.square().mean().sqrt()).sum())
        started_negative = unpack_signs(weights.state(x)["signs"], x.shape)
        flips += int((((x < 0) != started_negative) & (x != 0)).sum())
        zeros += x.numel() - int(x.count_nonzero())
        total += x.numel()
    alive = torch.cat(scales) if scales else torch.empty(0)
    return {
        "alpha": decay.increments[group] / lr if lr else 0.0,
        "decay_integral": decay.integrals[group],
        "median_a": float(alive.median()) if alive.numel() else float("nan"),
        "l1_norm": l1_norm(weights.values()),
        "sparsity": zeros / total,
        "below_threshold": below / total,
        "sign_flips": flips,
    }
