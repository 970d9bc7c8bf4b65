"""N:M patterns: of every M consecutive weights along the input dimension, N live."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mirrormask.masks.keys import CHUNK

__all__ = ["check_pattern", "check_pattern_fits", "protect"]


def check_pattern(pattern: str) -> tuple[int, int]:
    """``"2:4"`` -> (2, 4), or a ValueError that says what a pattern is.

    Example:
        >>> check_pattern("2:4")
        (2, 4)
    """
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern={pattern!r} is not 'N:M' with 0 < N < M, such as '2:4': N of every M weights live")
    return int(match[1]), int(match[2])


def check_pattern_fits(pattern: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a ValueError that names the weights whose input dimension M does not divide."""
    _, m = check_pattern(pattern)
    bad = [f"{name} {shape}" for name, shape in shapes.items() if len(shape) < 2 or shape[1] % m]
    if bad:
        raise ValueError(
            f"pattern={pattern!r} needs an input dimension (the second of the shape) that {m} divides; "
            f"not so in {', '.join(bad)}; leave them out with weights="
        )


def protect(scores: Tensor, pattern: str) -> Tensor:
    """``scores`` with infinity in the N best places of every group of M along dimension 1.

    Pruning the smallest of what this returns meets every sparsity up to ``1 - N/M``, and at that one leaves exactly
    the pattern; of equal scores the first of the group are kept.

    Example:
        >>> import torch
        >>> protect(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), "2:4").tolist()
        [[1.0, inf, inf, 2.0]]
    """
    n, m = check_pattern(pattern)
    kept = scores.movedim(1, -1).clone(memory_format=torch.contiguous_format)
    for groups in torch.split(
        kept.view(-1, m), max(CHUNK // m, 1)
    ):  # a sort of all would take four times what scores take
        best = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
        groups.scatter_(1, best, float("inf"))
    return kept.movedim(-1, 1)
