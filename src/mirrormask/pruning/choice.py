"""Which weights of a layer live: exactly as many as asked, compared within a row or over all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mirrormask.masks import largest, protect

__all__ = ["choose"]


def choose(scores: Tensor, k: int, *, by_row: bool = False, pattern: str | None = None) -> Tensor:
    """A bool mask of exactly ``k`` of the largest scores.

    Args:
        scores: of shape ``(rows, inputs)``; no NaN.
        k: how many to keep, in [0, numel].
        by_row: every row keeps ``k // rows``, its largest; what is left over goes to the rows whose next score is
            largest.
        pattern: ``"N:M"`` along the inputs; then k must be N/M of all.

    Example:
        >>> scores = torch.tensor([[9.0, 8.0, 7.0], [3.0, 2.0, 1.0]])
        >>> choose(scores, 3).int().tolist()
        [[1, 1, 1], [0, 0, 0]]
        >>> choose(scores, 3, by_row=True).int().tolist()
        [[1, 1, 0], [1, 0, 0]]
    """
    if pattern is not None:
        scores = protect(scores, pattern)
    elif by_row:
        share = k // len(scores)
        order = scores.argsort(dim=1, descending=True, stable=True)
        scores = scores.scatter(1, order[:, :share], torch.inf).scatter_(1, order[:, share + 1 :], -torch.inf)
    return largest(scores, k)
