"""Changing the masks: choose, prune, revive, exchange."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirrormask.checks import callers_level
from mirrormask.masks import Regrow, keep_count, largest, protect, select
from mirrormask.masks.scores import SCORES, balanced
from mirrormask.methods import Method
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.decay_clock import DecayClock
from mirrormask.optimizer.weights import SNAP, STATE_SNAP, SparseWeights
from mirrormask.progress import Clock

__all__ = ["MaskChanges", "report_empty"]


@dataclass(frozen=True)
class MaskChanges:
    """What a method's mask does to the weights.

    Args:
        method: whose mask it is.
        weights: what it masks.
        base: the optimizer whose state of a weight that dies goes too.
        on_empty: what happens when nothing of a tensor is left: "warn", "error" or "ignore".
        decay: of the training; what it has seen of the weights' growth decides how far a gradient counts.
    """

    method: Method
    weights: SparseWeights
    base: BaseOptimizer
    on_empty: str
    decay: DecayClock

    def choose(self, sparsity: float, clock: Clock) -> list[Tensor]:
        """The masks for ``sparsity``; a weight that is dead stays dead, unless the method revives."""
        rule, geometry = self.method.mask, self.weights.geometry.at(clock)
        scores = []
        for index, x in enumerate(self.weights.values()):
            score = geometry.importance(self.weights.latents_of(x))
            if score is None:
                measured = self.weights.state(x).get("score")
                score = self._score(x, index, clock) if measured is None else measured.clone()
            mask = self.weights.mask_of(x)
            if mask is not None and not rule.revives:
                score.masked_fill_(~mask, -math.inf)
            scores.append(score if rule.pattern is None else protect(score, rule.pattern))
        return select(scores, sparsity, rule.allocation)

    def _score(self, x: Tensor, index: int, clock: Clock) -> Tensor:
        generator, name = self._generator(clock, index), self.method.mask.score
        if name == "balanced":
            return balanced(x, generator, self.decay.state.get("grown", 0.0))
        return SCORES[name](x, generator)

    def is_reached(self, sparsity: float) -> bool:
        """Whether the masks have exactly this sparsity already."""
        masks = [self.weights.mask_of(x) for x in self.weights.values()]
        living = [int(mask.sum()) for mask in masks if mask is not None]
        return len(living) == len(masks) and sum(living) == self.count(sparsity)

    def count(self, sparsity: float) -> int:
        """How many weights a sparsity leaves."""
        return keep_count(sum(x.numel() for x in self.weights.values()), sparsity)

    @torch.no_grad()
    def prune(self, sparsity: float, clock: Clock) -> None:
        """Prune (or, where the method revives, revive) to ``sparsity``.

        A geometry that makes zeros of its own is only steered there, and its mask is fixed when the last sparsity is
        due; where the mask revives or training comes in rounds, already at the first one. From then on its weights are
        ordinary.
        """
        rule, geometry = self.method.mask, self.weights.geometry.at(clock)
        final = sparsity >= rule.sparsity or rule.revives or rule.replays
        if geometry.sparsifies:
            if sparsity > 0:
                self._reach(sparsity, clock)
            if not final:
                return
        self.set_masks(self.choose(sparsity, clock), clock)
        if geometry.sparsifies:
            for x in self.weights.values():
                geometry.settle(x, self.weights.latents_of(x))

    def _reach(self, sparsity: float, clock: Clock) -> None:
        """Shift importances so that those above 0 are exactly the weights that ``sparsity`` keeps (up to ties)."""
        rule, geometry = self.method.mask, self.weights.geometry.at(clock)
        spans = []
        for x, mask in zip(self.weights.values(), self.choose(sparsity, clock), strict=True):
            score = geometry.importance(self.weights.latents_of(x))
            if score is None:  # settled
                return
            kept, dropped = score[mask], score[~mask]
            low = float(dropped.max()) if dropped.numel() else -math.inf
            spans.append((low, float(kept.min()) if kept.numel() else math.inf))
        if rule.allocation == "global" and rule.pattern is None:
            spans = [(max(low for low, _ in spans), min(high for _, high in spans))] * len(spans)
        for x, (low, high) in zip(self.weights.values(), spans, strict=True):
            if math.isinf(low):
                shift = min(high, 0.0) - (high <= 0)
            else:
                shift = low if math.isinf(high) else (low + high) / 2
            geometry.reach(self.weights.latents_of(x), shift)
        self.weights.push_all(clock, zeros_stay=self.base.zeros_stay)

    @torch.no_grad()
    def set_masks(self, masks: Sequence[Tensor], clock: Clock, values: Sequence[Tensor] | None = None) -> None:
        """Put ``masks`` in force: what dies is zero with all its state, what comes back starts anew.

        Args:
            masks: one bool tensor a weight.
            clock: when.
            values: what the weights that come back start from; None for 0.
        """
        befores = [self.weights.mask_of(x) for x in self.weights.values()]
        if not self.method.mask.revives:
            masks = [mask if old is None else mask & old for mask, old in zip(masks, befores, strict=True)]
        empty = [
            name
            for name, mask, old in zip(self.weights, masks, befores, strict=True)
            if not mask.any() and (old is None or old.any())
        ]
        report_empty(empty, self.on_empty)  # before anything changes
        for index, (x, mask) in enumerate(zip(self.weights.values(), masks, strict=True)):
            new = self._revive(x, mask, None if values is None else values[index], clock)
            self.weights.state(x)["mask"] = mask
            self.kill(x, mask if new is None else mask & ~new)
            if new is not None and self.weights.geometry.latents and bool(new.any()):
                self.weights.push([x], clock)
                x.masked_fill_(~mask, 0.0)

    def _revive(self, x: Tensor, mask: Tensor, value: Tensor | None, clock: Clock) -> Tensor | None:
        """Give the weights that come back a start, and return where they are; None where nothing ever does."""
        before = self.weights.mask_of(x)
        if before is None or not self.method.mask.revives:
            return None
        geometry, latents, new = self.weights.geometry.at(clock), self.weights.latents_of(x), mask & ~before
        geometry.prune(latents, before)  # what drifted while dead
        geometry.revive(latents, before, new, value)
        if not latents and value is not None:
            x.copy_(torch.where(new, value, x))
        return new

    def kill(self, x: Tensor, keep: Tensor) -> None:
        """Zeros where the mask of a weight removes it: in the weight, its latents, and the base optimizer's state.

        Args:
            x: the weight, whose mask is set.
            keep: whose state of the base optimizer stays; what comes back starts without.
        """
        mask, latents = self.weights.state(x)["mask"], self.weights.latents_of(x)
        self.weights.geometry.prune(latents, mask)
        for held in latents.values() if latents else (x,):
            for tensor in self.base.elementwise(held):
                if tensor.shape == keep.shape:
                    tensor.masked_fill_(~keep, 0.0)
        x.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def exchange(self, fraction: float, grads: Sequence[Tensor | None], clock: Clock) -> None:
        """Drop ``fraction`` of the living weights of each layer, the smallest, and grow as many others.

        Args:
            fraction: in (0, 1).
            grads: the gradient of each weight, for growth where it is largest; None counts as zeros.
            clock: when.
        """
        rule = self.method.mask
        assert isinstance(rule, Regrow)
        masks, values = [], []
        for index, x in enumerate(self.weights.values()):
            generator, alive = self._generator(clock, index), self.weights.state(x)["mask"]
            count = int(alive.sum())
            dropped = min(round(fraction * count), alive.numel() - count)
            kept = largest(x.abs().float().masked_fill_(~alive, -1.0), count - dropped)
            grad = grads[index]
            if rule.grow == "random":
                wish = torch.rand(x.shape, generator=generator).to(x.device)
            else:
                wish = torch.zeros_like(x, dtype=torch.float32) if grad is None else grad.abs().float()
            grown = largest(wish.masked_fill_(kept, -1.0), dropped)
            masks.append(kept | grown)
            if rule.spread:
                rms = x[alive].float().square().mean().sqrt() if count else x.new_zeros(())
                noise = torch.randn(x.shape, generator=generator).to(x.device)
                values.append((noise * rms * rule.spread).to(x.dtype))
        self.set_masks(masks, clock, values or None)

    @torch.no_grad()
    def removed_share(self, sparsity: float, clock: Clock) -> float:
        """``rho``: the share of the weights' L2 norm that pruning to ``sparsity`` would remove now, in [0, 1]."""
        removed = kept = 0.0
        for x, mask in zip(self.weights.values(), self.choose(sparsity, clock), strict=True):
            square = x.double().square()
            kept += float((square * mask).sum())
            removed += float((square * ~mask).sum())
        total = removed + kept
        return float((removed / total) ** 0.5) if total > 0 else 0.0

    @torch.no_grad()
    def refresh(self, clock: Clock) -> None:
        """Let the geometry choose its latents anew; what the base optimizer knew of the old ones does not hold."""
        geometry = self.weights.geometry.at(clock)
        for x in self.weights.values():
            latents, mask = self.weights.latents_of(x), self.weights.mask_of(x)
            geometry.refresh(x, latents, mask)
            if mask is not None:
                geometry.prune(latents, mask)
            for latent in latents.values():
                for value in self.base.elementwise(latent):
                    value.zero_()
        self.weights.push_all(clock, zeros_stay=self.base.zeros_stay)

    @torch.no_grad()
    def snap(self, clock: Clock) -> None:
        """Set to zero what is on its way to denormal numbers: latents, and the base optimizer's state of them."""
        for x in self.weights.values():
            for name in self.weights.geometry.latents:
                latent = self.weights.state(x)[name]
                latent.masked_fill_(latent.abs() < SNAP, 0.0)
                for value in self.base.elementwise(latent):
                    value.masked_fill_(value.abs() < STATE_SNAP, 0.0)
        self.weights.push_all(clock, zeros_stay=self.base.zeros_stay)

    @torch.no_grad()
    def enforce(self, sparsity: float) -> None:
        """The masks are those of ``sparsity``: see to it that the weights are, and warn where that leaves too few."""
        found = {}
        for name, x in self.weights.items():
            self.kill(x, self.weights.state(x)["mask"])
            found[name] = int(x.count_nonzero())
        short = [name for name, x in self.weights.items() if found[name] < int(self.weights.state(x)["mask"].sum())]
        if short:
            warnings.warn(
                f"{sum(found.values())} nonzeros instead of {self.count(sparsity)}: weights that the mask keeps are "
                f"exactly zero already in {', '.join(short)}",
                stacklevel=callers_level(),
            )

    def _generator(self, clock: Clock, index: int) -> torch.Generator:
        """The random numbers of one weight at this step: a function of seed and step, so that no state is saved."""
        words = [self.method.mask.seed, clock.step, index]
        seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
        return torch.Generator().manual_seed(seed)


def report_empty(names: Sequence[str], on_empty: str) -> None:
    """Warn of weights that lose their last element, raise, or do nothing, as the user asked."""
    if not names or on_empty == "ignore":
        return
    message = (
        f"this sparsity leaves nothing of {', '.join(names)}; leave the layer out with weights=, lower the sparsity, "
        "choose another allocation, or pass on_empty='ignore' to mm.sparsify"
    )
    if on_empty == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=callers_level())
