"""Training in rounds within one run: keep the start, go back to it, play the learning rates again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mirrormask.masks import Mask
from mirrormask.optimizer.base_groups import Group
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.decay_clock import DecayClock
from mirrormask.optimizer.weights import KEPT, SparseWeights
from mirrormask.progress import Clock

__all__ = ["Rounds", "pack", "unpack"]


@dataclass
class Rounds:
    """What is remembered for a mask that trains in rounds; the kept weights are in the state, under ``"start."``.

    Attributes:
        rates: the learning rates of each step of the first round, one a group.
        integrals: the decay's when the weights to go back to were kept; empty until then.
        decay_state: its controller's memory then.
    """

    rates: list[list[float]] = field(default_factory=list)
    integrals: list[float] = field(default_factory=list)
    decay_state: dict[str, float] = field(default_factory=dict)

    def before_step(self, groups: Sequence[Group], mask: Mask, clock: Clock) -> None:
        """Note the learning rates in the first round; in later ones set them again, whatever a scheduler has done."""
        if clock.step < mask.round_steps(clock.steps):
            self.rates[clock.step :] = [[float(group["lr"]) for group in groups]]  # a skipped step asks twice
        for group, lr in zip(groups, self.again(mask, clock), strict=False):
            group["lr"] = lr

    def again(self, mask: Mask, clock: Clock) -> list[float]:
        """The learning rates of the first round, one a group, that the step at ``clock`` has again; none within it."""
        if clock.step < mask.round_steps(clock.steps) or not self.rates:
            return []
        return self.rates[min(mask.position(clock), len(self.rates) - 1)]

    def keep(self, weights: SparseWeights, base: BaseOptimizer, decay: DecayClock) -> None:
        """Keep every weight and parameter as it is now."""
        self.integrals = list(decay.integrals)
        self.decay_state = dict(decay.state)
        for p, name, held in everything(weights, base):
            weights.state(p)[KEPT + name] = held.detach().clone()

    @torch.no_grad()
    def start_again(self, weights: SparseWeights, base: BaseOptimizer, decay: DecayClock, clock: Clock) -> None:
        """Go back to what was kept, if anything was, under the mask as it is now; the base optimizer starts anew."""
        if self.integrals:
            geometry = weights.geometry.at(clock)
            for p, name, held in everything(weights, base):
                kept = weights.state(p).get(KEPT + name)
                if kept is not None:  # a group that was added since has no start to go back to
                    held.copy_(kept)
            decay.integrals, decay.state = list(self.integrals), dict(self.decay_state)
            for x in weights.values():
                geometry.prune(weights.latents_of(x), weights.state(x)["mask"])
            weights.push_all(clock, zeros_stay=base.zeros_stay)
            for x in weights.values():
                geometry.settle(x, weights.latents_of(x))
        base.forget()


def everything(weights: SparseWeights, base: BaseOptimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Each parameter of the model with each tensor to go back to, latents and constants or itself, and its name."""
    for p in base.group_of:
        latents = weights.latents_of(p) if weights.holds(p) else {}
        for name, held in latents.items() if latents else (("x", p),):
            yield p, name, held


def pack(rows: list[list[float]]) -> list[list[float]]:
    """Rows with equal ones in a run joined: ``[how many, *row]``.

    Example:
        >>> pack([[0.1], [0.1], [0.2]])
        [[2, 0.1], [1, 0.2]]
    """
    packed: list[list[float]] = []
    for row in rows:
        if packed and packed[-1][1:] == row:
            packed[-1][0] += 1
        else:
            packed.append([1, *row])
    return packed


def unpack(packed: list[list[float]]) -> list[list[float]]:
    """What :func:`pack` was given."""
    return [list(row) for count, *row in packed for _ in range(int(count))]
