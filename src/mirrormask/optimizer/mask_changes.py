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
from mirrormask.masks import Regrow, allocate, floors, keep_count, largest, protect, select
from mirrormask.masks.selection import put_first
from mirrormask.masks.shards import Layer, largest_of_all, largest_of_each
from mirrormask.methods import Method
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.decay_clock import DecayClock
from mirrormask.optimizer.scores import drawn, scores_of
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
        rule = self.method.mask
        scores = self._scores(clock)
        for index, x in enumerate(self.weights.values()):
            score, mask = scores[index], self.weights.mask_of(x)
            if mask is not None and not rule.revives:
                score.masked_fill_(~mask, -math.inf)
            if rule.pattern is not None and score.numel():
                scores[index] = protect(score, rule.pattern)
        shards, share = self.weights.shards, self._floor
        if not shards.spread:
            return select(scores, sparsity, rule.allocation, share)
        layers, reduce = self._layers(scores), shards.processes.sum
        counts = allocate(rule.allocation, self._shapes, sparsity)
        if counts is not None:
            return largest_of_each(layers, counts, reduce)
        masks, least = largest_of_all(layers, self.count(sparsity), reduce), floors(self._shapes, sparsity, share)
        living = shards.count([int(mask.sum()) for mask in masks], list(self.weights.values()))
        if all(left >= k for left, k in zip(living, least, strict=True)):
            return masks
        first = largest_of_each(layers, least, reduce)
        return largest_of_all(self._layers(put_first(scores, first)), self.count(sparsity), reduce)

    @property
    def _floor(self) -> float:
        """What every layer keeps in any case; a pattern sees to it by itself."""
        return self.method.mask.floor if self.method.mask.pattern is None else 0.0

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(self.weights.shards.shape(x)) for x in self.weights.values()]

    def _scores(self, clock: Clock) -> list[Tensor]:
        """New tensors: what the geometry says, what was measured, or the mask's own score."""
        geometry, own = self.weights.geometry.at(clock), list(self.weights.values())
        scores: list[Tensor | None] = [geometry.importance(self.weights.latents_of(x)) for x in own]
        if geometry.sparsifies and self.weights.shards.all(all(score is not None for score in scores)):
            return [score for score in scores if score is not None]
        measured = [self.weights.state(x).get("score") for x in own]
        if all(score is not None for score in measured):
            return [score.clone() for score in measured if score is not None]
        generators = [self._generator(clock, index) for index in range(len(own))]
        grown = self.decay.state.get("grown", 0.0)
        return scores_of(self.method.mask.score, own, generators, self.weights.shards, grown)

    def _layers(self, scores: Sequence[Tensor]) -> list[Layer]:
        shards = self.weights.shards
        return [
            Layer(score, shards.index(x), shards.size(x), shards.counts(x))
            for x, score in zip(self.weights.values(), scores, strict=True)
        ]

    def _largest(self, scores: Sequence[Tensor], ks: Sequence[int]) -> list[Tensor]:
        """The masks of the ``ks`` largest of each weight."""
        shards = self.weights.shards
        if not shards.spread:
            return [largest(score, k) for score, k in zip(scores, ks, strict=True)]
        return largest_of_each(self._layers(scores), ks, shards.processes.sum)

    def is_reached(self, sparsity: float) -> bool:
        """Whether the masks have exactly this sparsity already."""
        masks = [self.weights.mask_of(x) for x in self.weights.values()]
        living = [int(mask.sum()) for mask in masks if mask is not None]
        if len(living) != len(masks):
            return False
        return sum(self.weights.shards.count(living, list(self.weights.values()))) == self.count(sparsity)

    def count(self, sparsity: float) -> int:
        """How many weights a sparsity leaves."""
        return keep_count(sum(map(self.weights.shards.size, self.weights.values())), sparsity)

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
        rule, geometry, shards = self.method.mask, self.weights.geometry.at(clock), self.weights.shards
        own = list(self.weights.values())
        scores = [geometry.importance(self.weights.latents_of(x)) for x in own]
        if not shards.all(all(score is not None for score in scores)):  # settled
            return
        lows, highs, living = [], [], []
        for score, mask in zip(scores, self.choose(sparsity, clock), strict=True):
            assert score is not None
            living.append(int(mask.sum()))
            kept, dropped = score[mask], score[~mask]
            lows.append(float(dropped.max()) if dropped.numel() else -math.inf)
            highs.append(-float(kept.min()) if kept.numel() else -math.inf)
        both = shards.max([*lows, *highs])
        spans = [(low, -high) for low, high in zip(both[: len(own)], both[len(own) :], strict=True)]
        if rule.allocation == "global" and rule.pattern is None:
            least = floors(self._shapes, sparsity, self._floor)
            held = [
                0 < n <= k for n, k in zip(shards.count(living, own), least, strict=True)
            ]  # by the floor, not the score
            free = [span for span, by_floor in zip(spans, held, strict=True) if not by_floor]
            if free:
                common = (max(low for low, _ in free), min(high for _, high in free))
                spans = [span if by_floor else common for span, by_floor in zip(spans, held, strict=True)]
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
        own, shards = list(self.weights.values()), self.weights.shards
        empty = [
            name
            for name, living in zip(self.weights, shards.count([int(mask.any()) for mask in masks], own), strict=True)
            if not living
        ]
        if empty:
            lived = shards.count([int(old is None or bool(old.any())) for old in befores], own)
            empty = [name for name, before in zip(self.weights, lived, strict=True) if name in empty and before]
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
        geometry, latents, new = self.weights.geometry_of([x], clock), self.weights.latents_of(x), mask & ~before
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
        rule, shards, own = self.method.mask, self.weights.shards, list(self.weights.values())
        assert isinstance(rule, Regrow)
        generators = [self._generator(clock, index) for index in range(len(own))]
        alive = [self.weights.state(x)["mask"] for x in own]
        counts = shards.count([int(mask.sum()) for mask in alive], own)
        dropped = [min(round(fraction * n), shards.size(x) - n) for n, x in zip(counts, own, strict=True)]
        kept = self._largest(
            [x.abs().float().masked_fill_(~mask, -1.0) for x, mask in zip(own, alive, strict=True)],
            [count - drop for count, drop in zip(counts, dropped, strict=True)],
        )
        if rule.grow == "random":
            wishes = [drawn(torch.rand, x, g, shards) for x, g in zip(own, generators, strict=True)]
        else:
            wishes = [
                torch.zeros_like(x, dtype=torch.float32) if grad is None else grad.abs().float()
                for x, grad in zip(own, grads, strict=True)
            ]
        grown = self._largest(
            [wish.masked_fill_(stays, -1.0) for wish, stays in zip(wishes, kept, strict=True)], dropped
        )
        values = self._spread(rule.spread, alive, counts, generators) if rule.spread else None
        self.set_masks([old | new for old, new in zip(kept, grown, strict=True)], clock, values)

    def _spread(
        self, spread: float, alive: Sequence[Tensor], counts: Sequence[int], generators: Sequence[torch.Generator]
    ) -> list[Tensor]:
        """What grown weights start from: a normal of ``spread`` times their layer's living rms."""
        shards, own = self.weights.shards, list(self.weights.values())
        squares = [x[mask].float().square() for x, mask in zip(own, alive, strict=True)]
        if shards.spread:
            totals = shards.sum([float(square.sum(dtype=torch.float64)) for square in squares], own)
            sizes = [x.new_tensor((total / n) ** 0.5 if n else 0.0, dtype=torch.float32)
                     for x, total, n in zip(own, totals, counts, strict=True)]  # fmt: skip
        else:
            sizes = [square.mean().sqrt() if n else x.new_zeros(())
                     for x, square, n in zip(own, squares, counts, strict=True)]  # fmt: skip
        noises = [drawn(torch.randn, x, g, shards) for x, g in zip(own, generators, strict=True)]
        return [(noise * rms * spread).to(x.dtype) for x, noise, rms in zip(own, noises, sizes, strict=True)]

    @torch.no_grad()
    def removed_share(self, sparsity: float, clock: Clock) -> float:
        """``rho``: the share of the weights' L2 norm that pruning to ``sparsity`` would remove now, in [0, 1]."""
        removed = kept = 0.0
        shards = self.weights.shards
        for x, mask in zip(self.weights.values(), self.choose(sparsity, clock), strict=True):
            square = x.double().square()
            if shards.counts(x) or not shards.spread:
                kept += float((square * mask).sum())
                removed += float((square * ~mask).sum())
        removed, kept = shards.sum([removed, kept])
        total = removed + kept
        return float((removed / total) ** 0.5) if total > 0 else 0.0

    @torch.no_grad()
    def refresh(self, clock: Clock) -> None:
        """Let the geometry choose its latents anew, for the same weights.

        What the base optimizer knows of them stays: x is where it was and goes where it went. When every refresh threw
        its momentum away, LeNet-300-100 lost a point in a short training (docs/methods.md).
        """
        geometry = self.weights.geometry.at(clock)
        for x in self.weights.values():
            latents, mask = self.weights.latents_of(x), self.weights.mask_of(x)
            geometry.refresh(x, latents, mask)
            if mask is not None:
                geometry.prune(latents, mask)
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
        own, masks = list(self.weights.values()), [self.weights.state(x)["mask"] for x in self.weights.values()]
        for x, mask in zip(own, masks, strict=True):
            self.kill(x, mask)
        found = self.weights.shards.count([int(x.count_nonzero()) for x in own], own)
        wanted = self.weights.shards.count([int(mask.sum()) for mask in masks], own)
        short = [name for name, n, all_ in zip(self.weights, found, wanted, strict=True) if n < all_]
        if short:
            warnings.warn(
                f"{sum(found)} nonzeros instead of {self.count(sparsity)}: weights that the mask keeps are "
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
