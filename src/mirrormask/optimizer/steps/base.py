"""What every way to take a step answers: whether it serves now, whether the gradients are finite, the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirrormask import flats
from mirrormask.masked import keep_only
from mirrormask.methods import Method
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.shards import Shards
from mirrormask.optimizer.weights import SparseWeights
from mirrormask.progress import Clock

__all__ = ["Now", "Step", "all_finite"]


@dataclass(frozen=True)
class Now:
    """What a step may know of the moment.

    Attributes:
        clock: where training stands, before this step.
        lrs: the learning rate of each parameter group.
        increments: ``ΔA`` of the decay in this step, of each group.
        coupled: whether the decay joins the gradient of the latents, as ``2 (ΔA / lr) θ``, instead of shrinking them.
        finalized: whether the mask is final.
    """

    clock: Clock
    lrs: tuple[float, ...]
    increments: tuple[float, ...]
    coupled: bool
    finalized: bool

    def alpha(self, group: int) -> float:
        """The strength of the decay, ``ΔA / lr``; 0 where nothing is learned."""
        lr = self.lrs[group]
        return self.increments[group] / lr if lr > 0 else 0.0

    def keep(self, group: int) -> float:
        """What a decoupled decay multiplies latents by."""
        return 1.0 if self.coupled else 1 - 2 * self.increments[group]


class Step(ABC):
    """One way to step all parameters. It may keep what stays the same between steps, and is made anew after a load."""

    @property
    def snaps(self) -> bool:
        """Whether it leaves no latent, and no state of one, that is on its way to denormal numbers."""
        return False

    @property
    def narrow(self) -> bool:
        """Whether it keeps momenta in ``state_dtype``."""
        return False

    def __init__(self, method: Method, weights: SparseWeights, base: BaseOptimizer) -> None:
        self.method = method
        self.weights = weights
        self.base = base

    @abstractmethod
    def ready(self, now: Now) -> bool:
        """Whether it serves this step, with these options and gradients; nothing that is trained changes."""

    def finite(self) -> bool | Tensor:
        """Whether all gradients are finite: see :func:`all_finite`."""
        own = self.weights.values() if self.weights.geometry.latents else ()
        grads = [p.grad for p in (*own, *self.base.plain) if p.grad is not None]
        return all_finite(grads, self.weights.shards)

    @abstractmethod
    def run(self, now: Now) -> None:
        """Take the step: latents, weights, masks and all else."""


def all_finite(grads: Sequence[Tensor], shards: Shards) -> bool | Tensor:
    """Whether all gradients are finite; those of this process alone, where they are in CPU memory.

    Returns:
        True or False where all are in CPU memory. Elsewhere to find out would mean waiting for the device: if any is
        not, all become zeros, and whether they were is returned as a bool tensor.
    """
    if all(grad.device.type == "cpu" for grad in grads):
        return flats.all_finite(grads)
    norms = torch._foreach_norm(list(grads))
    good = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()
    if shards.spread:
        good = shards.processes.max((~good).int()) == 0
    for grad in grads:
        keep_only(grad, good.to(grad.device))
    return good
