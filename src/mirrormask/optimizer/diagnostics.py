"""How a training stands, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["diagnose", "l1_norm"]

#: A weight is below the threshold where it is under this fraction of its tensor's root mean square.
THRESHOLD = 0.01


@torch.no_grad()
def l1_norm(weights: Iterable[Tensor]) -> float:
    """``Σ |x|`` over all weights, summed in float64."""
    return sum(float(x.abs().sum(dtype=torch.float64)) for x in weights)


@torch.no_grad()
def diagnose(optimizer: SparseOptimizer) -> dict[str, float]:
    """What :meth:`mirrormask.SparseOptimizer.diagnostics` returns.

    Returns:
        ``alpha`` (of the last step, in the first group with sparsifiable weights), ``decay_integral`` (A, there),
        ``median_a`` (over the living weights; NaN without latents), ``l1_norm``, ``sparsity``,
        ``below_threshold`` (the fraction of weights under 1% of their tensor's rms), ``sign_flips`` (living
        weights whose sign is not the one they started with), ``step`` and ``skipped_steps``.
    """
    first = next(iter(optimizer.weights.values()))
    index = next(i for i, group in enumerate(optimizer.param_groups) if any(p is first for p in group["params"]))
    lr = float(optimizer.param_groups[index]["lr"])
    scales, below, flips, zeros, total = [], 0, 0, 0, 0
    for x in optimizer.weights.values():
        state = optimizer.state[x]
        scale = optimizer.method.geometry.scale(optimizer.latents_of(x))
        if scale is not None:
            scales.append(scale[state["mask"]] if "mask" in state else scale.reshape(-1))
        below += int((x.abs() < THRESHOLD * x.square().mean().sqrt()).sum())
        flips += int((((x < 0) != state["negative_start"]) & (x != 0)).sum())
        zeros += x.numel() - int(x.count_nonzero())
        total += x.numel()
    alive = torch.cat(scales) if scales else torch.empty(0)
    return {
        "step": optimizer.step_count,
        "alpha": optimizer.increments[index] / lr if lr else 0.0,
        "decay_integral": optimizer.decay_integrals[index],
        "median_a": float(alive.median()) if alive.numel() else float("nan"),
        "l1_norm": l1_norm(optimizer.weights.values()),
        "sparsity": zeros / total,
        "below_threshold": below / total,
        "sign_flips": flips,
        "skipped_steps": optimizer.skipped_steps,
    }
