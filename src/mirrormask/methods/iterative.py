"""Iterative magnitude pruning: train, prune and start again, in rounds."""

from __future__ import annotations

from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean
from mirrormask.masks import Iterative
from mirrormask.methods.base import Method, named

__all__ = ["lrr", "lth", "wr"]


@named("Frankle and Carbin 2019, arXiv 1803.03635")
def lth(sparsity: float, *, prunings: int = 4, allocation: str = "global", pattern: str | None = None) -> Method:
    """Lottery tickets: iterative magnitude pruning, rewound to the initialisation after each round.

    The ``prunings + 1`` rounds of training share the one budget of steps; build learning-rate schedules for
    ``optimizer.round_steps``.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        prunings: how often it is pruned, at least 1; each removes the same fraction of what is left.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> lth(0.9).mask.rewind_to
        0.0

    Source: Frankle and Carbin 2019, arXiv 1803.03635, section 1 (iterative pruning).

    Differs from the paper: the rounds share one budget, and so are fewer (the paper removes 20% a round, each trained
    in full: 14 rounds to 95%).
    """
    mask = Iterative(sparsity, prunings, 0.0, allocation=allocation, pattern=pattern)
    return Method(Euclidean(), ConstantDecay(), mask, "lth")


@named("Frankle et al. 2020, arXiv 1912.05671")
def wr(
    sparsity: float,
    *,
    prunings: int = 4,
    rewind_to: float = 0.1,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """Weight rewinding: iterative magnitude pruning, rewound to an early step after each round.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        prunings: as in :func:`lth`.
        rewind_to: the fraction of the first round to whose weights and learning rate later rounds go back, in [0, 1).
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> wr(0.9).mask.rewind_to
        0.1

    Source: Frankle et al. 2020, arXiv 1912.05671; Renda, Frankle and Carbin 2020, arXiv 2003.02389.

    Differs from the paper: the rounds share one budget.
    """
    mask = Iterative(sparsity, prunings, rewind_to, allocation=allocation, pattern=pattern)
    return Method(Euclidean(), ConstantDecay(), mask, "wr")


@named("Renda, Frankle and Carbin 2020, arXiv 2003.02389")
def lrr(sparsity: float, *, prunings: int = 4, allocation: str = "global", pattern: str | None = None) -> Method:
    """Learning-rate rewinding: iterative magnitude pruning, only the learning rate starts anew each round.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        prunings: as in :func:`lth`.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> lrr(0.9).mask.rewind_to is None
        True

    Source: Renda, Frankle and Carbin 2020, arXiv 2003.02389, section 3.

    Differs from the paper: the rounds share one budget.
    """
    mask = Iterative(sparsity, prunings, None, allocation=allocation, pattern=pattern)
    return Method(Euclidean(), ConstantDecay(), mask, "lrr")
