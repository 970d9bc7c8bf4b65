"""How a training stands, in numbers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mirrormask.flats import count_each
from mirrormask.geometry.base import Geometry, Held, mean
from mirrormask.masks.shards import kth_largest
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.decay_clock import DecayClock
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["diagnose", "l1_norm", "log_size", "pack_signs", "unpack_signs"]

#: A weight is below the threshold where it is under this fraction of its tensor's root mean square.
THRESHOLD = 0.01
#: The least size of a tensor: one of zeros has grown, once it moves, and by a number.
SMALLEST = 1e-12


@torch.no_grad()
def l1_norm(weights: SparseWeights) -> float:
    """``Σ |x|`` over all weights, summed in float64."""
    own = list(weights.values())
    return sum(weights.shards.sum([float(x.abs().sum(dtype=torch.float64)) for x in own], own))


@torch.no_grad()
def log_size(x: Tensor, held: Held = Geometry.held) -> float:
    """``log (mean x⁴)^¼``: the size of the weights that a mask leaves, as the small ones hardly count.

    Example:
        >>> round(log_size(torch.tensor([1.0, 0.0, 0.0, 0.0])), 6) == round(-math.log(4) / 4, 6)
        True
    """
    fourth = mean(lambda part: part.square().square_(), x.detach(), held) if held.size(x) else 0.0
    return math.log(max(fourth**0.25, SMALLEST)) if math.isfinite(fourth) else math.inf


#: Bytes that are packed at a time.
PACKED = 1 << 12


def pack_signs(x: Tensor) -> Tensor:
    """Which elements are negative, eight to a byte: ``sign_flips`` is not worth a byte a weight.

    Example:
        >>> pack_signs(torch.tensor([-1.0, 2.0, -3.0]))
        tensor([5], dtype=torch.uint8)
    """
    if x.device.type == "cpu" and x.is_contiguous() and not isinstance(x, torch._subclasses.FakeTensor):
        if x.numel() <= 8 * PACKED and x.dtype != torch.bfloat16:  # the same in fewer calls
            return torch.from_numpy(np.packbits(x.detach().numpy().reshape(-1) < 0, bitorder="little"))
        packed = np.empty((x.numel() + 7) // 8, np.uint8)
        for at, part in enumerate(
            torch.split(x.detach().view(-1), 8 * PACKED)
        ):  # a byte of each weight is more than is kept
            found = np.packbits((part < 0).numpy(), bitorder="little")
            packed[at * PACKED : at * PACKED + len(found)] = found
        return torch.from_numpy(packed)
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
    if bits.device.type == "cpu" and not isinstance(bits, torch._subclasses.FakeTensor):
        found = np.unpackbits(bits.numpy(), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(found).view(torch.bool).view(shape)
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
    own, shards = list(weights.values()), weights.shards
    scales, below, flips, zeros, total = [], 0, 0, 0, sum(map(shards.size, own))
    for x, mean_square, nonzeros in zip(own, _mean_squares(weights), count_each(own), strict=True):
        if shards.spread and not shards.counts(x):
            continue
        scale, mask = weights.geometry.scale(weights.latents_of(x)), weights.mask_of(x)
        if scale is not None:
            scales.append(scale.reshape(-1) if mask is None else scale[mask])
        below += int((x.abs() < THRESHOLD * mean_square.sqrt()).sum())
        started_negative = unpack_signs(weights.state(x)["signs"], x.shape)
        flips += int((((x < 0) != started_negative) & (x != 0)).sum())
        zeros += x.numel() - nonzeros
    below, flips, zeros = (int(n) for n in shards.sum([below, flips, zeros]))
    return {
        "alpha": decay.increments[group] / lr if lr else 0.0,
        "decay_integral": decay.integrals[group],
        "median_a": _median(scales, weights),
        "l1_norm": l1_norm(weights),
        "sparsity": zeros / total,
        "below_threshold": below / total,
        "sign_flips": flips,
    }


def _mean_squares(weights: SparseWeights) -> list[Tensor]:
    """The mean square of each weight, all of it."""
    own, shards = list(weights.values()), weights.shards
    if not shards.spread:
        return [x.square().mean() for x in own]
    sums = shards.sum([float(x.square().sum(dtype=torch.float64)) for x in own], own)
    return [x.new_tensor(total / max(shards.size(x), 1)) for x, total in zip(own, sums, strict=True)]


def _median(parts: list[Tensor], weights: SparseWeights) -> float:
    """The lower median of all parts on all processes; NaN of none."""
    (count,) = weights.shards.sum([sum(part.numel() for part in parts)])
    if not count:
        return float("nan")
    if not weights.shards.spread:
        return float(torch.cat(parts).median())
    like = next(iter(weights.values()))  # who counts nothing says of which kind it would be
    return kth_largest([*parts, like.new_empty(0)], int(count) - (int(count) - 1) // 2, weights.shards.processes.sum)
