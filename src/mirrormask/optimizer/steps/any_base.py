"""The step that works for every base optimizer, dtype and device: tensor operations on whole lists of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirrormask.optimizer.steps.base import Now, Step

__all__ = ["AnyBase"]


class AnyBase(Step):
    """Pull the gradient back to the latents, decay them, step the base, push the weights forward, mask."""

    def ready(self, now: Now) -> bool:
        """Always."""
        return True

    def run(self, now: Now) -> None:
        """The path that every other one must equal."""
        live = [x for x in self.weights.values() if x.grad is not None]
        given = self._rescale(live)
        try:
            if self.weights.geometry.latents and live:
                self._step_latents(live, now)
            else:
                self._step_base(now)
        finally:
            for x, grad in given.items():
                x.grad = grad
        self.weights.apply_masks(live, zeros_stay=self.base.zeros_stay)

    def _rescale(self, live: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """Let the step see the gradients that the correction makes of those given, which are returned."""
        correction = self.method.correction
        if correction is None or not correction.rescales:
            return {}
        given = {x: x.grad for x in live if x.grad is not None}
        made = correction.gradients(list(given.values()), live, [self.weights.mask_of(x) for x in live])
        for x, grad in zip(live, made, strict=True):
            x.grad = grad
        return given

    def _step_latents(self, live: list[nn.Parameter], now: Now) -> None:
        geometry, latents = self.weights.geometry_of(live, now.clock), self.weights.latents(live)
        grads = geometry.pullback([x.grad for x in live if x.grad is not None], list[Tensor](live), latents)
        self._decay(live, latents, grads, now)
        for name in geometry.latents:
            for latent, grad in zip(latents[name], grads[name], strict=True):
                latent.grad = grad
        del grads
        before = geometry.before_step(list[Tensor](live), latents)
        self._step_base(now)
        geometry.after_step(latents, before)
        del before
        for name in geometry.latents:
            for latent in latents[name]:
                latent.grad = None
        self.weights.push(live, now.clock.next)

    def _decay(
        self, live: list[nn.Parameter], latents: dict[str, list[Tensor]], grads: dict[str, list[Tensor]], now: Now
    ) -> None:
        """Shrink the latents, or add what shrinks them to their gradients, group by group."""
        group_of = self.base.group_of
        for group in range(len(now.lrs)):
            members = [i for i, x in enumerate(live) if group_of[x] == group]
            if not members or not now.increments[group]:
                continue
            if now.coupled:
                for name in self.weights.geometry.latents:
                    chosen = [grads[name][i] for i in members]
                    torch._foreach_add_(chosen, [latents[name][i] for i in members], alpha=2 * now.alpha(group))
            else:
                chosen_latents = {name: [values[i] for i in members] for name, values in latents.items()}
                self.weights.geometry.shrink(chosen_latents, now.keep(group))

    def _step_base(self, now: Now) -> None:
        """The base optimizer's step, and the method's correction after it."""
        correction = self.method.correction
        if correction is None or not correction.active(now.clock):
            self.base.step()
            return
        work = []
        for link, group in self.base.groups:
            theta = [held for held in link.stepped if held.grad is not None]
            if theta:
                lr = float(group["lr"])
                work.append((theta, correction.prepare([p.grad for p in theta if p.grad is not None], lr), lr))
        self.base.step()
        for theta, prepared, lr in work:
            correction.apply(theta, prepared, lr)
