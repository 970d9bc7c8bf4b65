"""The step that works for every base optimizer, dtype and device: tensor operations on whole lists of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mirrormask.optimizer.steps.fused_cpu import SNAP, STATE_SNAP
from mirrormask.optimizer.steps.momentum_sgd import momentum_step
from mirrormask.progress import Clock

if TYPE_CHECKING:
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["apply_masks", "keep_finite", "plain_step", "push", "snap"]

#: Optimizers whose step is zero for an element that is zero, has a zero gradient and a zero state: under them pruned
#: factors stay zero by themselves. Under any other (one that mixes elements, say) the mask is applied at every step.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)


def plain_step(optimizer: SparseOptimizer) -> None:
    """The path that works for every base optimizer, dtype and device, on whole lists of tensors."""
    live = [x for x in optimizer.weights.values() if x.grad is not None]
    geometry = optimizer.geometry
    if not geometry.latents or not live:
        base_step(optimizer)
        apply_masks(optimizer, live)
        return
    if momentum_step(optimizer):
        push(optimizer, live)
        apply_masks(optimizer, live)
        return
    latents = latents_of_all(optimizer, live)
    pulled = geometry.pullback([x.grad for x in live if x.grad is not None], list[Tensor](live), latents)
    for increment, members in by_increment(optimizer, live):
        if optimizer.method.decay.coupled:
            for name in geometry.latents:
                chosen = [pulled[name][i] for i in members]
                torch._foreach_add_(chosen, [latents[name][i] for i in members], alpha=2 * increment)
        else:
            chosen_latents = {name: [values[i] for i in members] for name, values in latents.items()}
            geometry.shrink(chosen_latents, 1 - 2 * increment)
    for name in geometry.latents:
        for latent, grad in zip(latents[name], pulled[name], strict=True):
            latent.grad = grad
    del pulled
    before = geometry.before_step(list[Tensor](live), latents)
    base_step(optimizer)
    geometry.after_step(latents, before)
    del before
    for name in geometry.latents:
        for latent in latents[name]:
            latent.grad = None
    push(optimizer, live, ahead=1)
    apply_masks(optimizer, live)


def base_step(optimizer: SparseOptimizer) -> None:
    """The base optimizer's step, and the method's own after it."""
    after = optimizer.method.correction
    if after is None or not after.active(Clock(optimizer.step_count, optimizer.steps)):
        optimizer.base.step()
        return
    work = []
    for group, pairs in zip(optimizer.base.param_groups, optimizer._stepped, strict=True):
        theta = [held for held, _ in pairs if held.grad is not None]
        if theta:
            lr = float(group["lr"])
            work.append((theta, after.prepare([p.grad for p in theta if p.grad is not None], lr), lr))
    optimizer.base.step()
    for theta, prepared, lr in work:
        after.apply(theta, prepared, lr)


def by_increment(optimizer: SparseOptimizer, live: list[nn.Parameter]) -> Iterable[tuple[float, list[int]]]:
    """The positions of the live weights by what the decay does to them: ``ΔA``, or α where it is coupled."""
    if optimizer.method.decay.off or optimizer.finalized:
        return
    position = {x: i for i, x in enumerate(live)}
    for group, increment in zip(optimizer.param_groups, optimizer.increments, strict=True):
        members = [position[p] for p in group["params"] if p in position]
        if members and increment:
            yield (increment / float(group["lr"]) if optimizer.method.decay.coupled else increment), members


def latents_of_all(optimizer: SparseOptimizer, weights: Iterable[nn.Parameter]) -> dict[str, list[Tensor]]:
    """The latents and constants of several weights, each name with one tensor a weight."""
    states, geometry = [optimizer.state[x] for x in weights], optimizer.method.geometry
    return {name: [state[name] for state in states] for name in (*geometry.latents, *geometry.constants)}


def push(optimizer: SparseOptimizer, weights: list[nn.Parameter], ahead: int = 0) -> None:
    """Write ``x = φ(θ)``, with φ as it is ``ahead`` steps from now."""
    if weights and optimizer.method.geometry.latents:
        geometry = optimizer.method.geometry.at(Clock(optimizer.step_count + ahead, optimizer.steps))
        for name in geometry.masked:
            hold_zeros(optimizer, {x: optimizer.state[x][name] for x in weights})
        geometry.push(list[Tensor](weights), latents_of_all(optimizer, weights))


def apply_masks(optimizer: SparseOptimizer, weights: Iterable[nn.Parameter]) -> None:
    """Set to zero what the masks remove, where the weights do not stay there by themselves."""
    geometry = optimizer.method.geometry
    if geometry.masked or (geometry.keeps_zeros and type(optimizer.base) in ELEMENTWISE):
        return
    hold_zeros(optimizer, {x: x for x in weights})


def hold_zeros(optimizer: SparseOptimizer, tensors: Mapping[Tensor, Tensor]) -> None:
    """Set to zero, of each weight's tensor here, what the weight's mask removes."""
    masked = [x for x in tensors if "mask" in optimizer.state[x]]
    if masked:
        held = [tensors[x] for x in masked]
        torch._foreach_mul_(held, [optimizer.state[x]["mask"] for x in masked])
        torch._foreach_add_(held, 0.0)  # -0.0, which a negative weight leaves, is a value that files must store


def snap(optimizer: SparseOptimizer) -> None:
    """Set to zero what is on its way to denormal numbers: latents, and the base optimizer's state of them."""
    for x in optimizer.weights.values():
        for name in optimizer.method.geometry.latents:
            latent = optimizer.state[x][name]
            latent.masked_fill_(latent.abs() < SNAP, 0.0)
            for value in optimizer.base_tensors(latent):
                value.masked_fill_(value.abs() < STATE_SNAP, 0.0)
    optimizer.push_all()


def keep_finite(grads: list[Tensor]) -> bool:
    """True if the step may go on: on a CPU, if all gradients are finite; elsewhere bad ones become zeros."""
    if not grads:
        return True
    if all(grad.device.type == "cpu" for grad in grads):
        # A sum is fast to take; it can overflow where every gradient is finite.
        return all(math.isfinite(grad.sum().item()) or bool(grad.isfinite().all()) for grad in grads)
    norms = torch._foreach_norm(grads)
    bad = ~torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()
    for grad in grads:
        grad.masked_fill_(bad.to(grad.device), 0.0)
    return True
