"""Training in rounds within one run: keep the start, go back to it, play the learning rates again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mirrormask.progress import Clock

if TYPE_CHECKING:
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["Rounds", "pack", "unpack"]

#: The prefix of kept weights in a parameter's state.
KEPT = "start."


class Rounds:
    """What a SparseOptimizer remembers for a mask that trains in rounds.

    ``rates`` are the learning rates of each step of the first round, one a group; ``integrals`` the decay's integrals
    when the weights to go back to were kept, and ``decay_state`` its controller's memory then. The kept weights are
    in the optimizer's state, under ``"start."``.
    """

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.integrals: list[float] = []
        self.decay_state: dict[str, float] = {}

    def before_step(self, optimizer: SparseOptimizer) -> None:
        """Note the learning rates in the first round; in later ones set them again, whatever a scheduler has done."""
        mask = optimizer.method.mask
        clock = Clock(optimizer.step_count, optimizer.steps)
        if clock.step < mask.round_steps(optimizer.steps):
            self.rates.append([float(group["lr"]) for group in optimizer.param_groups])
        elif self.rates:
            rates = self.rates[min(mask.position(clock), len(self.rates) - 1)]
            for group, lr in zip(optimizer.param_groups, rates, strict=False):
                group["lr"] = lr

    def keep(self, optimizer: SparseOptimizer) -> None:
        """Keep every weight and parameter as it is now."""
        self.integrals = list(optimizer.decay_integrals)
        self.decay_state = dict(optimizer.decay_state)
        for p, name, held in _everything(optimizer):
            optimizer.state[p][KEPT + name] = held.detach().clone()

    @torch.no_grad()
    def start_again(self, optimizer: SparseOptimizer) -> None:
        """Go back to what was kept, if anything was, under the mask as it is now; the base optimizer starts anew."""
        if self.integrals:
            for p, name, held in _everything(optimizer):
                held.copy_(optimizer.state[p][KEPT + name])
            optimizer.decay_integrals = list(self.integrals)
            optimizer.decay_state = dict(self.decay_state)
            for x in optimizer.weights.values():
                optimizer.geometry.prune(optimizer.latents_of(x), optimizer.state[x]["mask"])
            optimizer.push_all()
            for x in optimizer.weights.values():
                optimizer.geometry.settle(x, optimizer.latents_of(x))
        optimizer.forget_base_state()


def _everything(optimizer: SparseOptimizer) -> list[tuple[Tensor, str, Tensor]]:
    """Each parameter of the model with each tensor that the base optimizer trains for it, and that one's name."""
    result = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            latents = optimizer.latents_of(p) if optimizer.is_sparsified(p) else {}
            result += [(p, name, held) for name, held in latents.items()] or [(p, "x", p)]
    return result


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
