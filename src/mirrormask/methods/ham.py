"""HAM: the hyperbolic mirror step after the optimizer's, alone and with other methods."""

from __future__ import annotations

import dataclasses

from mirrormask.corrections import Hyperbolic
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean
from mirrormask.masks import OneShot
from mirrormask.methods.at_start import erk
from mirrormask.methods.base import Method, named
from mirrormask.methods.dynamic import rigl
from mirrormask.methods.magnitude import acdc, gmp
from mirrormask.methods.penalized import soft_threshold

__all__ = ["acdc_ham", "erk_ham", "gmp_ham", "ham", "rigl_ham", "str_ham"]

REFERENCE = "Jacobs et al. 2025, arXiv 2506.02630"


def _with_ham(method: Method, a: float, b: float, clip: float | None) -> Method:
    return dataclasses.replace(method, name=f"{method.name}_ham", correction=Hyperbolic(a, b, clip))


@named(REFERENCE)
def ham(
    sparsity: float,
    *,
    a: float = 20.0,
    b: float = 1e-3,
    clip: float | None = 0.1,
    at: float = 0.5,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """HAM: hyperbolic aware minimisation, then one-shot magnitude pruning and fine-tuning.

    ``x ← x exp(lr (-a sign(x) ∇f - b))`` after every step of the optimizer.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        a, b, clip: as in :class:`mirrormask.corrections.Hyperbolic`; ``a=200, clip=None`` is the paper's setting, which
            needs gradient clipping or a small learning rate.
        at: when to prune, a fraction of training in (0, 1].
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> ham(0.9).correction.a
        20.0

    Source: Jacobs, Gadhikar, Rubio-Madrigal and Burkholz 2025, arXiv 2506.02630.

    Differs from the paper: a = 20 and a clipped exponent, stable at large learning rates.
    """
    mask = OneShot(sparsity, at=at, allocation=allocation, pattern=pattern)
    return Method(Euclidean(), ConstantDecay(), mask, "ham", Hyperbolic(a, b, clip))


@named(REFERENCE)
def gmp_ham(
    sparsity: float,
    *,
    a: float = 20.0,
    b: float = 1e-3,
    clip: float | None = 0.1,
    start_at: float = 0.10,
    end_at: float = 0.75,
    every: float = 1 / 45,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """Gradual magnitude pruning with HAM's mirror step.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        a, b, clip: as in :class:`mirrormask.corrections.Hyperbolic`.
        start_at, end_at, every: as in :class:`mirrormask.masks.Gradual`.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> gmp_ham(0.9).name
        'gmp_ham'

    Source: arXiv 2506.02630 (HAM); arXiv 1710.01878 (the schedule).

    Differs from the paper: as in :func:`ham`.
    """
    method = gmp(sparsity, start_at=start_at, end_at=end_at, every=every, allocation=allocation, pattern=pattern)
    return _with_ham(method, a, b, clip)


@named(REFERENCE)
def acdc_ham(
    sparsity: float,
    *,
    a: float = 20.0,
    b: float = 1e-3,
    clip: float | None = 0.1,
    start_at: float = 0.10,
    end_at: float = 0.85,
    phase: float = 0.05,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """Alternating compressed and decompressed training with HAM's mirror step.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        a, b, clip: as in :class:`mirrormask.corrections.Hyperbolic`.
        start_at, end_at, phase: as in :class:`mirrormask.masks.Alternating`.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> acdc_ham(0.9).mask.phase
        0.05

    Source: arXiv 2506.02630 (HAM); arXiv 2106.12379 (AC/DC).

    Differs from the paper: as in :func:`ham`.
    """
    method = acdc(sparsity, start_at=start_at, end_at=end_at, phase=phase, allocation=allocation, pattern=pattern)
    return _with_ham(method, a, b, clip)


@named(REFERENCE)
def rigl_ham(
    sparsity: float,
    *,
    a: float = 20.0,
    b: float = 1e-3,
    clip: float | None = 0.1,
    fraction: float = 0.3,
    every: float = 0.01,
    until: float = 0.75,
    allocation: str = "erk",
    seed: int = 0,
) -> Method:
    """RigL with HAM's mirror step.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        a, b, clip: as in :class:`mirrormask.corrections.Hyperbolic`.
        fraction, every, until, allocation, seed: as in :func:`mirrormask.methods.rigl`.

    Example:
        >>> rigl_ham(0.9).mask.grow
        'gradient'

    Source: arXiv 2506.02630 (HAM); arXiv 1911.11134 (RigL).

    Differs from the paper: as in :func:`ham`.
    """
    method = rigl(sparsity, fraction=fraction, every=every, until=until, allocation=allocation, seed=seed)
    return _with_ham(method, a, b, clip)


@named(REFERENCE)
def str_ham(
    sparsity: float,
    *,
    a: float = 20.0,
    b: float = 1e-3,
    clip: float | None = 0.1,
    init_threshold: float = 0.01,
    start_at: float = 0.10,
    end_at: float = 0.75,
    every: float = 1 / 45,
    allocation: str = "global",
) -> Method:
    """STR with HAM's mirror step on the weights behind the threshold.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        a, b, clip: as in :class:`mirrormask.corrections.Hyperbolic`.
        init_threshold, start_at, end_at, every, allocation: as in ``mirrormask.methods.str``.

    Example:
        >>> str_ham(0.9).name
        'str_ham'

    Source: arXiv 2506.02630 (HAM); arXiv 2002.03231 (STR).

    Differs from the paper: as in :func:`ham` and ``mirrormask.methods.str``.
    """
    method = soft_threshold(
        sparsity,
        init_threshold=init_threshold,
        start_at=start_at,
        end_at=end_at,
        every=every,
        allocation=allocation,
    )
    return _with_ham(method, a, b, clip)


@named(REFERENCE)
def erk_ham(sparsity: float, *, a: float = 20.0, b: float = 1e-3, clip: float | None = 0.1, seed: int = 0) -> Method:
    """A random ERK mask at initialisation with HAM's mirror step.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        a, b, clip: as in :class:`mirrormask.corrections.Hyperbolic`.
        seed: of the draw, at least 0.

    Example:
        >>> erk_ham(0.9).mask.allocation
        'erk'

    Source: arXiv 2506.02630 (HAM); arXiv 1911.11134 (ERK).

    Differs from the paper: as in :func:`ham`.
    """
    return _with_ham(erk(sparsity, seed=seed), a, b, clip)
