"""Momentum SGD on factors by tensor operations alone, without temporaries: the pulled-back gradient is never stored.

``b ← μ b + ∂x ⊙ w`` is one ``addcmul`` into the momentum that exists anyway. This is the path of SGD where
:mod:`mirrormask.optimizer.steps.fused_cpu` and ``fused_gpu`` cannot serve (float64, no llvmlite, no Triton); it
allocates nothing of a weight's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mirrormask.geometry import Hadamard
from mirrormask.geometry.base import steps_like
from mirrormask.optimizer.base_groups import Group
from mirrormask.optimizer.base_optimizer import Link
from mirrormask.optimizer.steps.base import Now, Step

__all__ = ["MomentumSGD"]

#: Options of SGD that need the gradient itself, or another sign of it.
UNSERVED = ("nesterov", "dampening", "maximize", "differentiable")


class MomentumSGD(Step):
    """Serves SGD with momentum on ``x = m ⊙ w``, without Nesterov's term and dampening, and without a correction."""

    def ready(self, now: Now) -> bool:
        """Whether base, geometry, options and gradients are such."""
        if type(self.base.torch) is not torch.optim.SGD or self.base.has_hooks or self.method.correction is not None:
            return False
        if not steps_like(self.weights.geometry, Hadamard):
            return False
        options = [group for _, group in self._latent_groups()]
        if any(not group["momentum"] or any(group[name] for name in UNSERVED) for group in options):
            return False
        live = [x for x in self.weights.values() if x.grad is not None]
        return bool(live) and all(x.grad is None or x.grad.dtype == self.weights.state(x)["m"].dtype for x in live)

    def run(self, now: Now) -> None:
        """``b ← μ b + ∂x ⊙ other``, ``own ← keep own - lr b``, ``x = m ⊙ w``."""
        live = [x for x in self.weights.values() if x.grad is not None]
        partners: dict[Tensor, tuple[Tensor, Tensor]] = {}  # factor -> the other one, and the gradient of x
        for x in live:
            m, w = self.weights.state(x)["m"], self.weights.state(x)["w"]
            assert x.grad is not None
            partners[m], partners[w] = (w, x.grad), (m, x.grad)
        work = []
        for link, group in self._latent_groups():
            own = [factor for factor in group["params"] if factor in partners]
            if own:
                work.append((link, group, own, self._momenta(own, link, group, partners, now)))
        for link, group, own, momenta in work:  # only now: both factors' gradients need the old values
            keep = now.keep(link.group)
            if keep != 1.0:
                torch._foreach_mul_(own, keep)
            torch._foreach_add_(own, momenta, alpha=-group["lr"])
        self.base.step_plain()
        self.weights.push(live, now.clock.next)
        self.weights.apply_masks(live, zeros_stay=self.base.zeros_stay)

    def _momenta(
        self, own: list[Tensor], link: Link, group: Group, partners: dict[Tensor, tuple[Tensor, Tensor]], now: Now
    ) -> list[Tensor]:
        momenta = [self.base.momentum(factor) for factor in own]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_addcmul_(momenta, [partners[factor][0] for factor in own], [partners[f][1] for f in own])
        if now.coupled and now.increments[link.group]:
            torch._foreach_add_(momenta, own, alpha=2 * now.alpha(link.group))
        return momenta

    def _latent_groups(self) -> list[tuple[Link, Group]]:
        return [(link, group) for link, group in self.base.groups if link.rate is not None]
