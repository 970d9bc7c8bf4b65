"""Methods that keep the ordinary weight and prune by its magnitude."""

from __future__ import annotations

from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean
from mirrormask.masks import Alternating, Gradual, Never, OneShot
from mirrormask.methods.base import Method, named

__all__ = ["acdc", "dense", "gmp", "magnitude"]


@named("-")
def dense(sparsity: float = 0.0) -> Method:
    """No sparsity: the reference of every table.

    Raises:
        ValueError: sparsity is not 0.

    Example:
        >>> dense().sparsity
        0.0
    """
    if sparsity != 0:
        raise ValueError(f"sparsity={sparsity!r}: the dense method has sparsity 0; choose another method to prune")
    return Method(Euclidean(), ConstantDecay(), Never(), "dense")


@named("Han et al. 2015, arXiv 1506.02626")
def magnitude(
    sparsity: float,
    *,
    at: float = 0.5,
    score: str = "magnitude",
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """One-shot magnitude pruning, then fine-tuning.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        at: when to prune, a fraction of training in (0, 1].
        score, allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> magnitude(0.9).mask.at
        0.5

    Source: Han et al. 2015, arXiv 1506.02626.

    Differs from the paper: one threshold for the whole network (``allocation="global"``) instead of one a layer, in
    proportion to its standard deviation.
    """
    mask = OneShot(sparsity, at=at, score=score, allocation=allocation, pattern=pattern)
    return Method(Euclidean(), ConstantDecay(), mask, "magnitude")


@named("Zhu and Gupta 2017, arXiv 1710.01878")
def gmp(
    sparsity: float,
    *,
    start_at: float = 0.10,
    end_at: float = 0.75,
    every: float = 1 / 45,
    score: str = "magnitude",
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """Gradual magnitude pruning by the cubic schedule.

    Equation: ``s_t = s (1 - (1 - (t - t₀) / (t₁ - t₀))³)``.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        start_at, end_at, every: t₀, t₁ and Δt, as in :class:`mirrormask.masks.Gradual`.
        score, allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> gmp(0.9).mask.end_at
        0.75

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation (1).

    Differs from the paper: magnitudes are compared over the whole network (``allocation="global"``), there layer by
    layer; and a weight that is dead stays dead.
    """
    mask = Gradual(sparsity, start_at, end_at, every, score=score, allocation=allocation, pattern=pattern)
    return Method(Euclidean(), ConstantDecay(), mask, "gmp")


@named("Peste et al. 2021, arXiv 2106.12379")
def acdc(
    sparsity: float,
    *,
    start_at: float = 0.10,
    end_at: float = 0.85,
    phase: float = 0.05,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """Alternating compressed and decompressed training.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        start_at, end_at, phase: as in :class:`mirrormask.masks.Alternating`.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> acdc(0.9).mask.phase
        0.05

    Source: Peste et al. 2021, arXiv 2106.12379, Algorithm 1.
    """
    mask = Alternating(sparsity, start_at, end_at, phase, allocation=allocation, pattern=pattern)
    return Method(Euclidean(), ConstantDecay(), mask, "acdc")
