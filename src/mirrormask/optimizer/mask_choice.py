"""Choosing masks: from scores, allocations and patterns to one bool tensor a weight; nothing changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirrormask.flats import count_each
from mirrormask.masks import Magnitudes, allocate, exchange, floors, keep_count, protect, select, select_lamp
from mirrormask.masks.keys import Scores, common, over_layers
from mirrormask.masks.scores import DRAWING
from mirrormask.masks.selection import put_first
from mirrormask.masks.shards import Layer, largest_of_all, largest_of_each
from mirrormask.methods import Method
from mirrormask.optimizer.decay_clock import DecayClock
from mirrormask.optimizer.scores import drawn, scores_of
from mirrormask.optimizer.weights import SparseWeights
from mirrormask.progress import Clock

__all__ = ["MaskChoice"]

#: Of more tensors than so many the calls would take longer than the work.
MANY = 4096


@dataclass(frozen=True)
class MaskChoice:
    """What a method's mask would be.

    Args:
        method: whose mask it is.
        weights: what it masks.
        decay: of the training; what it has seen of the weights' growth decides how far a gradient counts.
    """

    method: Method
    weights: SparseWeights
    decay: DecayClock

    def choose(self, sparsity: float, clock: Clock) -> list[Tensor]:
        """The masks for ``sparsity``; a weight that is dead stays dead, unless the method revives."""
        rule = self.method.mask
        shards, share, own = self.weights.shards, self._floor, list(self.weights.values())
        least = floors(self._shapes, sparsity, share)
        dead = [None if rule.revives else self.weights.mask_of(x) for x in own]
        if self._is_lamp():
            sizes = [Magnitudes(x, mask) for x, mask in zip(own, dead, strict=True)]
            masks = select_lamp(sizes, self.count(sparsity))
            if self._reaches(masks, least):
                return masks
        scores = self._known(clock)
        if scores is None and self._is_by_magnitude():
            masks = self._largest([Magnitudes(x, mask) for x, mask in zip(own, dead, strict=True)], sparsity)
            if rule.allocation != "global" or self._reaches(masks, least):
                return masks
        scores = self._scored(clock) if scores is None else scores
        for index, (score, mask) in enumerate(zip(scores, dead, strict=True)):
            if mask is not None:
                score.masked_fill_(~mask, -math.inf)
            if rule.pattern is not None and score.numel():
                scores[index] = protect(score, rule.pattern)
        if not shards.spread:
            return select(scores, sparsity, rule.allocation, share)
        masks = self._largest(scores, sparsity)
        if rule.allocation != "global" or self._reaches(masks, least):
            return masks
        first = largest_of_each(self._layers(scores), least, shards.processes.sum)
        return self._largest(put_first(scores, first), sparsity)

    def _largest(self, scores: Sequence[Scores], sparsity: float) -> list[Tensor]:
        """The masks that keep the largest scores, without a floor."""
        rule, shards = self.method.mask, self.weights.shards
        if not shards.spread:
            return select(scores, sparsity, rule.allocation)
        layers, reduce = self._layers(scores), shards.processes.sum
        counts = allocate(rule.allocation, self._shapes, sparsity)
        if counts is not None:
            return largest_of_each(layers, counts, reduce)
        return largest_of_all(layers, self.count(sparsity), reduce)

    def _reaches(self, masks: Sequence[Tensor], least: Sequence[int]) -> bool:
        """Whether every weight keeps at least as many as asked, over all processes."""
        living = self.weights.shards.count(count_each(masks), list(self.weights.values()))
        return all(left >= k for left, k in zip(living, least, strict=True))

    @property
    def _floor(self) -> float:
        """What every layer keeps in any case; a pattern sees to it by itself."""
        return self.method.mask.floor if self.method.mask.pattern is None else 0.0

    @property
    def _shapes(self) -> list[tuple[int, ...]]:
        return [tuple(self.weights.shards.shape(x)) for x in self.weights.values()]

    def _is_lamp(self) -> bool:
        """Whether the masks are those of LAMP's own search, for which no scores need to be there."""
        rule, geometry = self.method.mask, self.weights.geometry
        return rule.score == "lamp" and rule.allocation == "global" and rule.pattern is None and not geometry.sparsifies

    def _is_by_magnitude(self) -> bool:
        """Whether magnitudes rank the weights, and are made as they are read: all of as many bits compare.

        Very many small tensors are rather read together, as scores that are there.
        """
        rule, own = self.method.mask, self.weights.values()
        alike = len({common([x.dtype]) for x in own}) == 1
        return rule.score == "magnitude" and rule.pattern is None and alike and len(own) <= MANY

    def _known(self, clock: Clock) -> list[Tensor] | None:
        """New tensors: what the geometry says, or what was measured; None where the mask's own score decides."""
        geometry, own = self.weights.geometry.at(clock), list(self.weights.values())
        scores: list[Tensor | None] = [geometry.importance(self.weights.latents_of(x)) for x in own]
        if geometry.sparsifies and self.weights.shards.all(all(score is not None for score in scores)):
            return [score for score in scores if score is not None]
        measured = [self.weights.state(x).get("score") for x in own]
        if all(score is not None for score in measured):
            return [score.clone() for score in measured if score is not None]
        return None

    def _scored(self, clock: Clock) -> list[Tensor]:
        """The mask's own score of each weight, in new tensors."""
        own, score = list(self.weights.values()), self.method.mask.score
        generators = self._generators(clock) if score in DRAWING else [torch.Generator()] * len(own)
        return scores_of(score, own, generators, self.weights.shards, self.decay.state.get("grown", 0.0))

    def _layers(self, scores: Sequence[Scores]) -> list[Layer]:
        shards = self.weights.shards
        return [
            Layer(score, shards.index(x), shards.size(x), shards.counts(x))
            for x, score in zip(self.weights.values(), scores, strict=True)
        ]

    def is_reached(self, sparsity: float) -> bool:
        """Whether the masks have exactly this sparsity already."""
        masks = [self.weights.mask_of(x) for x in self.weights.values()]
        living = [mask for mask in masks if mask is not None]
        if len(living) != len(masks):
            return False
        return sum(self.weights.shards.count(count_each(living), list(self.weights.values()))) == self.count(sparsity)

    def count(self, sparsity: float) -> int:
        """How many weights a sparsity leaves."""
        return keep_count(sum(map(self.weights.shards.size, self.weights.values())), sparsity)

    def exchanged(
        self, alive: Sequence[Tensor], wishes: Sequence[Tensor], kept: Sequence[int], grown: Sequence[int]
    ) -> list[Tensor]:
        """As :func:`mirrormask.masks.exchange`, of each weight."""
        own, reduce = list(self.weights.values()), self.weights.shards.processes.sum
        if not self.weights.shards.spread:
            return over_layers(exchange, own, alive, wishes, kept, grown)
        living = self._layers([Magnitudes(x, mask) for x, mask in zip(own, alive, strict=True)])
        stays = largest_of_each(living, kept, reduce)
        others = [Magnitudes(wish, mask, wanted=False) for wish, mask in zip(wishes, stays, strict=True)]
        new = largest_of_each(self._layers(others), grown, reduce)
        return [mask.logical_or_(more) for mask, more in zip(stays, new, strict=True)]

    def starts(
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

    def _generators(self, clock: Clock) -> list[torch.Generator]:
        """The random numbers of each weight at this step: a function of seed and step, so that no state is saved."""
        words = [(self.method.mask.seed, clock.step, index) for index in range(len(self.weights))]
        seeds = [int(np.random.SeedSequence(own).generate_state(1, np.uint64)[0] >> 1) for own in words]
        return [torch.Generator().manual_seed(seed) for seed in seeds]
