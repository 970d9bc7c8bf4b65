"""Momentum SGD on factors by tensor operations alone, without temporaries: the pulled-back gradient is never stored.

``b ← μ b + ∂x ⊙ w`` is one ``addcmul`` into the momentum that exists anyway. This is the path of SGD where
:mod:`mirrormask.optimizer.steps.fused_cpu` cannot serve (a GPU, float64, no llvmlite); it
 allocates nothing of a weight's size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mirrormask.geometry import Hadamard
from mirrormask.geometry.base import steps_like
from mirrormask.optimizer.base_optimizer import step_plain_parameters

if TYPE_CHECKING:
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["momentum_buffer", "momentum_step"]


def momentum_step(optimizer: SparseOptimizer) -> bool:
    """Step the factors and the plain parameters, the decay included; False if nothing was done.

    It serves SGD with momentum, without Nesterov's term (which needs the gradient itself) and dampening.
    """
    base, decay = optimizer.base, optimizer.method.decay
    if type(base) is not torch.optim.SGD or optimizer.method.correction is not None:
        return False
    if not steps_like(optimizer.method.geometry, Hadamard):
        return False
    groups = [
        (group, index) for group, (index, rate, _) in zip(base.param_groups, optimizer.links, strict=True) if rate
    ]
    if any(
        group["nesterov"] or group["dampening"] or group["maximize"] or group["differentiable"] or not group["momentum"]
        for group, _ in groups
    ):
        return False
    factors: dict[Tensor, tuple[Tensor, Tensor]] = {}
    for x in optimizer.weights.values():
        if x.grad is not None:
            m, w = optimizer.state[x]["m"], optimizer.state[x]["w"]
            if x.grad.dtype != m.dtype or x.grad.is_sparse:
                return False
            factors[m], factors[w] = (w, x.grad), (m, x.grad)
    steps: list[tuple[list[Tensor], list[Tensor], float, float]] = []
    for group, index in groups:
        own = [latent for latent in group["params"] if latent in factors]
        if not own:
            continue
        momenta = [momentum_buffer(optimizer, latent) for latent in own]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_addcmul_(momenta, [factors[latent][0] for latent in own], [factors[latent][1] for latent in own])
        increment, lr = optimizer.increments[index], float(optimizer.param_groups[index]["lr"])
        if decay.coupled and increment:
            torch._foreach_add_(momenta, own, alpha=2 * increment / lr)
        steps.append((own, momenta, group["lr"], 1.0 if decay.coupled else 1 - 2 * increment))
    for own, momenta, rate, keep in steps:  # only now: both factors' gradients need the old values
        if keep != 1.0:
            torch._foreach_mul_(own, keep)
        torch._foreach_add_(own, momenta, alpha=-rate)
    step_plain_parameters(optimizer)
    return True


def momentum_buffer(optimizer: SparseOptimizer, latent: Tensor) -> Tensor:
    """The momentum that the base optimizer keeps for a latent; zeros give the first step that torch takes."""
    state = optimizer.base.state[latent]
    buffer: Tensor | None = state.get("momentum_buffer")
    if buffer is None:
        buffer = state["momentum_buffer"] = torch.zeros_like(latent)
    return buffer
