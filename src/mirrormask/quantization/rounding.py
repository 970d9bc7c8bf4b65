"""Rounding that keeps what a layer computes: levels whose errors cancel in its output."""

from __future__ import annotations

import torch
from torch import Tensor

from mirrormask.quantization.levels import LEVELS

__all__ = ["round_together"]

#: Times that all columns are gone through; later ones change little.
SWEEPS = 3


def round_together(x: Tensor, level: Tensor, scale: Tensor, moment: Tensor, sweeps: int = SWEEPS) -> Tensor:
    """Levels ``q`` of small ``tr(E H Eᵀ)``, where ``E = s q - x`` and ``H = X Xᵀ``: the output's square error.

    Column by column, with all others held, the best level of a weight is the one nearest to

        x_j - Σ_{k ≠ j} E_k H_kj / H_jj

    and is taken; so no step makes the error larger, and it ends at or below that of the nearest levels. Zeros stay, and
    so does the largest weight of an output, which tells its scale.

    Args:
        x: the weights, ``(groups, outputs, inputs)``, of the dtype to compute in.
        level: the nearest levels, integers in [-127, 127], of the same shape and dtype.
        scale: one for each output, ``(groups, outputs)``.
        moment: H, ``(groups, inputs, inputs)``.
        sweeps: how often all columns are gone through.

    Returns:
        The levels, of the shape and dtype of ``level``.

    Example:
        >>> x, h = torch.tensor([[[1.0, 0.6, 0.6]]]), torch.ones(1, 3, 3)
        >>> round_together(x, x.round(), torch.ones(1, 1), h).tolist()  # the nearest would add up to 3, not 2.2
        [[[1.0, 0.0, 1.0]]]

    Source: this library; coordinate descent on the objective of GPTQ, Frantar et al. 2022, arXiv 2210.17323, equation
    (1), which suits rows with zeros in different places.
    """
    level = level.clone()
    free = x != 0
    free.scatter_(2, level.abs().argmax(2, keepdim=True), False)
    pull = (level * scale[..., None] - x) @ moment  # of each column on the others: E H
    for _ in range(sweeps):
        changed = False
        for column in range(x.shape[2]):
            curvature = moment[:, column, column, None]
            here = level[..., column]
            best = here - torch.where(curvature > 0, pull[..., column] / (scale * curvature), 0.0)
            new = torch.where(free[..., column], best.round().clamp_(-LEVELS, LEVELS), here)
            step = new - here
            if bool(step.any()):
                changed = True
                level[..., column] = new
                pull += (step * scale)[..., None] * moment[:, column, None, :]
        if not changed:
            break
    return level
