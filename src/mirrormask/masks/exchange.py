"""The exchange of a mask that regrows: the smallest living weights of a layer go, and as many others come."""

from __future__ import annotations

from torch import Tensor

from mirrormask.masks.magnitudes import Magnitudes
from mirrormask.masks.selection import largest

__all__ = ["exchange"]


def exchange(x: Tensor, alive: Tensor, wishes: Tensor, kept: int, grown: int) -> Tensor:
    """The mask after an exchange: the ``kept`` largest living weights, and the ``grown`` largest wishes of all others.

    Args:
        x: the weight of one layer.
        alive: its mask.
        wishes: of its shape, by magnitude: the gradient for RigL, random numbers for SET.
        kept: how many living weights stay, at most as many as there are.
        grown: how many others come.

    Example:
        >>> import torch
        >>> x, alive = torch.tensor([3.0, -1.0, 0.0, 0.0]), torch.tensor([True, True, False, False])
        >>> exchange(x, alive, torch.tensor([9.0, 1.0, -5.0, 2.0]), 1, 1).int().tolist()
        [1, 0, 1, 0]
    """
    stays = largest(Magnitudes(x, alive), kept)
    return stays.logical_or_(largest(Magnitudes(wishes, stays, wanted=False), grown))
