"""Changing the masks: prune, revive, exchange."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mirrormask.checks import callers_level, few
from mirrormask.flats import count_each, is_small, keep_only_each
from mirrormask.masked import count_true
from mirrormask.masks import Regrow, floors
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.mask_choice import MaskChoice
from mirrormask.optimizer.scores import drawn
from mirrormask.optimizer.weights import SNAP, STATE_SNAP
from mirrormask.progress import Clock

__all__ = ["MaskChanges", "report_empty"]


@dataclass(frozen=True)
class MaskChanges(MaskChoice):
    """What a method's mask does to the weights.

    Args:
        method, weights, decay: as of :class:`MaskChoice`.
        base: the optimizer whose state of a weight that dies goes too.
        on_empty: what happens when nothing of a tensor is left: "warn", "error" or "ignore".
        normed: the weights of weight norm, each with the dimensions over which it takes norms.
    """

    base: BaseOptimizer
    on_empty: str
    normed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

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

    def _known(self, clock: Clock) -> list[Tensor] | None:
        """What an aiming geometry wishes for takes the place of magnitude, in its targets and in the final mask."""
        geometry = self.weights.geometry
        if not geometry.aims or self.method.mask.score != "magnitude":
            return super()._known(clock)
        own = list(self.weights.values())
        moments = [self.base.second_moment(self.weights.state(x)[geometry.latents[0]]) for x in own]
        return [geometry.wish(self.weights.latents_of(x), moment) for x, moment in zip(own, moments, strict=True)]

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
            living.append(count_true(mask))
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
        living = shards.count(count_each(masks), own)
        empty = []
        if not all(living):
            olds = [mask if old is None else old for mask, old in zip(masks, befores, strict=True)]
            lived = shards.count(count_each(olds), own)
            empty = [
                name
                for name, now, before, old in zip(self.weights, living, lived, befores, strict=True)
                if not now and (before or old is None)
            ]
        self._check_rows(masks)
        report_empty(empty, self.on_empty)  # before anything changes
        small, keeps, back = list[nn.Parameter](), list[Tensor](), list[nn.Parameter]()
        for index, (x, mask) in enumerate(zip(own, masks, strict=True)):
            new = self._revive(x, mask, None if values is None else values[index], clock)
            self.weights.state(x)["mask"] = mask
            keep = mask if new is None else mask & ~new
            if is_small(x):  # together, and others one by one: nothing of their size is kept
                small.append(x)
                keeps.append(keep)
            else:
                self.kill([x], [keep])
            if new is not None and self.weights.geometry.latents and bool(new.any()):
                back.append(x)
        self.kill(small, keeps)
        for some in (back,) if all(map(is_small, back)) else ([x] for x in back):
            self.weights.push(some, clock)
            self.weights.hold_zeros((x, x) for x in some)

    def _check_rows(self, masks: Sequence[Tensor]) -> None:
        """Weight norm divides a row by its norm: refuse a mask that leaves nothing of one, before it is NaN."""
        normed = [(name, x, mask) for (name, x), mask in zip(self.weights.items(), masks, strict=True)
                  if self.normed.get(name)]  # fmt: skip
        sums = [(x, mask.sum(self.normed[name]), self.normed[name]) for name, x, mask in normed]
        rows = self.weights.shards.rows(sums)
        bad = [name for (name, _, _), living in zip(normed, rows, strict=True) if not bool(living.all())]
        if bad:
            raise RuntimeError(
                f"this sparsity leaves nothing of some rows of {few(bad)}, which weight norm divides by their norms, "
                "and the output would be nan; take weight norm away before mm.sparsify "
                "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.remove_weight_norm), choose an "
                "N:M pattern, lower the sparsity, or leave the layer out with weights="
            )

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

    def kill(self, weights: Sequence[nn.Parameter], keeps: Sequence[Tensor]) -> None:
        """Zeros where the mask of a weight removes it: in the weight, its latents, and the base optimizer's state.

        Args:
            weights: whose masks are set.
            keeps: whose state of the base optimizer stays; what comes back starts without.
        """
        states, stay = list[Tensor](), list[Tensor]()
        for x, keep in zip(weights, keeps, strict=True):
            latents = self.weights.latents_of(x)
            if latents:
                self.weights.geometry.prune(latents, self.weights.state(x)["mask"])
            for held in latents.values() if latents else (x,):
                found = [tensor for tensor in self.base.elementwise(held) if tensor.shape == keep.shape]
                states += found
                stay += [keep] * len(found)
            # What a wrapper keeps to write it into the weights at some time: a Lookahead its slow ones.
            found = [v for v in self.weights.foreign(x).values() if isinstance(v, Tensor) and v.shape == keep.shape]
            states += found
            stay += [keep] * len(found)
        keep_only_each(states, stay)
        self.weights.hold_zeros((x, x) for x in weights)

    @torch.no_grad()
    def exchange(self, fraction: float, grads: Sequence[Tensor | None], clock: Clock) -> None:
        """Drop ``fraction`` of the living weights of each layer, the smallest, and grow as many others.

        Args:
            fraction: in (0, 1).
            grads: the gradient of each weight, for growth where it is largest; one that has None in this step, since
                it is frozen, say, keeps its mask: what it would grow starts at zero, and would stay there.
            clock: when.
        """
        rule, shards, own = self.method.mask, self.weights.shards, list(self.weights.values())
        assert isinstance(rule, Regrow)
        generators = self._generators(clock)
        alive = [self.weights.state(x)["mask"] for x in own]
        counts = shards.count(count_each(alive), own)
        dropped = [
            0 if grad is None else min(round(fraction * n), shards.size(x) - n)
            for n, x, grad in zip(counts, own, grads, strict=True)
        ]
        if rule.grow == "random":
            wishes = [drawn(torch.rand, x, g, shards) for x, g in zip(own, generators, strict=True)]
        else:
            wishes = [x.new_zeros(()).expand(x.shape) if g is None else g for x, g in zip(own, grads, strict=True)]
        stay = [count - drop for count, drop in zip(counts, dropped, strict=True)]
        masks = self.exchanged(alive, wishes, stay, dropped)
        values = self.starts(rule.spread, alive, counts, generators) if rule.spread else None
        self.set_masks(masks, clock, values)

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
        its momentum away, LeNet-300-100 lost a point in a short training (docs/studies.md).
        """
        geometry = self.weights.geometry.at(clock)
        if geometry.aims:
            for x, living in zip(self.weights.values(), self.choose(self.method.mask.sparsity, clock), strict=True):
                geometry.aim(self.weights.latents_of(x), living, clock)
            return  # x is where it was
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
        self.kill(own, masks)
        found = self.weights.shards.count(count_each(own), own)
        wanted = self.weights.shards.count(count_each(masks), own)
        short = [name for name, n, all_ in zip(self.weights, found, wanted, strict=True) if n < all_]
        if short:
            warnings.warn(
                f"{sum(found)} nonzeros instead of {self.count(sparsity)}: weights that the mask keeps are "
                f"exactly zero already in {', '.join(short)}",
                stacklevel=callers_level(),
            )


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
