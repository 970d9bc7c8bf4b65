"""Optimal Brain Surgeon for all rows of a layer at once: SparseGPT's solver."""

from __future__ import annotations

import torch
from torch import Tensor

from mirrormask.calibration.inverse import DAMPING, inverse_factor
from mirrormask.masks import allocate
from mirrormask.masks.patterns import check_pattern
from mirrormask.pruning.choice import choose

__all__ = ["BLOCK", "reconstruct", "relative_error"]

#: Columns between two choices of a mask, and between two updates of all that follows.
BLOCK = 128


def reconstruct(
    x: Tensor,
    moment: Tensor,
    k: int,
    *,
    by_row: bool = False,
    pattern: str | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Prune a layer's matrix to ``k`` weights, from left to right, and let what stays make up for what goes.

    With ``U`` of :func:`mirrormask.calibration.inverse.inverse_factor`, column by column, where the mask removes x_ij:

        x_i,j: ← x_i,j: - (x_ij / U_jj) U_j,j:

    the least change of output i among all that set x_ij to zero and leave the columns before j as they are. A block's
    mask is chosen when the solver comes to it, by ``x_ij² / U_jj²``, from weights that made up for the blocks before.

    Args:
        x: of shape ``(groups, outputs, inputs)``, float32 or float64.
        moment: H, of shape ``(groups, inputs, inputs)`` and the dtype of x.
        k: how many weights to keep.
        by_row: within a block, every output keeps as many.
        pattern: ``"N:M"`` along the inputs; chosen M columns at a time.
        damping: as in ``inverse_factor``.
        block: columns in a block, at least 1.

    Returns:
        The new matrix, and its mask.

    Source: Frantar and Alistarh 2023, arXiv 2301.00774, Algorithm 1.
    """
    groups, outputs, inputs = x.shape
    x, mask = x.clone(), torch.empty(x.shape, dtype=torch.bool, device=x.device)
    factor = inverse_factor(moment, damping)
    diagonal = factor.diagonal(dim1=1, dim2=2)[:, None, :]
    wide = min(block, inputs)
    step = wide if pattern is None else check_pattern(pattern)[1]
    wide = max(wide // step, 1) * step
    starts = list(range(0, inputs, step))
    sizes = [min(step, inputs - start) for start in starts]
    counts = dict(zip(starts, _shares([groups * outputs * size for size in sizes], k), strict=True))
    for first in range(0, inputs, wide):
        last = min(first + wide, inputs)
        errors = torch.zeros(groups, outputs, last - first, dtype=x.dtype, device=x.device)
        for j in range(first, last):
            if j in counts:
                part = slice(j, min(j + step, inputs))
                scores = (x[:, :, part] / diagonal[:, :, part]).square().flatten(0, 1)
                chosen = choose(scores, counts[j], by_row=by_row, pattern=pattern)
                mask[:, :, part] = chosen.view(groups, outputs, -1)
            error = (x[:, :, j] / diagonal[:, :, j]).masked_fill_(mask[:, :, j], 0.0)[:, :, None]
            x[:, :, j:last].baddbmm_(error, factor[:, j : j + 1, j:last], alpha=-1.0)
            errors[:, :, j - first] = error[:, :, 0]
        if last < inputs:
            x[:, :, last:].baddbmm_(errors, factor[:, first:last, last:], alpha=-1.0)
        x[:, :, first:last].masked_fill_(~mask[:, :, first:last], 0.0)
    return x, mask


def _shares(sizes: list[int], k: int) -> list[int]:
    """How many weights each block keeps: the same share, and exactly ``k`` together."""
    if k == 0:
        return [0] * len(sizes)
    shares = allocate("uniform", [(size,) for size in sizes], 1 - k / sum(sizes))
    assert shares is not None
    return shares


def relative_error(before: Tensor, after: Tensor, moment: Tensor) -> float:
    """``‖(W - Ŵ) X‖² / ‖W X‖²``, from ``H = X Xᵀ``; 0 where the layer puts out nothing but zeros.

    Example:
        >>> h = torch.diag(torch.tensor([1.0, 4.0]))[None]
        >>> relative_error(torch.tensor([[[2.0, 1.0]]]), torch.tensor([[[2.0, 0.0]]]), h)
        0.5
    """
    whole, lost = _energy(before, moment), _energy(before - after, moment)
    return lost / whole if whole > 0 else 0.0


def _energy(x: Tensor, moment: Tensor) -> float:
    return max(float(torch.sum((x @ moment).double() * x)), 0.0)
