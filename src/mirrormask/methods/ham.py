"""HAM: the hyperbolic mirror step after the optimizer's, alone and with other methods."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.corrections import Hyperbolic
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean, SoftThreshold
from mirrormask.masks import Alternating, AtStart, Gradual, OneShot, Regrow
from mirrormask.methods.base import Method, named
from mirrormask.methods.dynamic import Exchange
from mirrormask.methods.groups import At, HyperbolicStep, Layers, Seed, Window
from mirrormask.methods.magnitude import Phases
from mirrormask.methods.options import reads
from mirrormask.methods.penalized import Thresholds

__all__ = ["acdc_ham", "erk_ham", "gmp_ham", "ham", "rigl_ham", "str_ham"]

REFERENCE = "Jacobs et al. 2025, arXiv 2506.02630"


@dataclass(frozen=True, kw_only=True)
class _OneShot(HyperbolicStep, At):
    """The options of :func:`ham`."""


@named(REFERENCE)
@reads(_OneShot)
def ham(options: _OneShot) -> Method:
    """HAM: hyperbolic aware minimisation, then one-shot magnitude pruning and fine-tuning.

    ``x ← x exp(lr (-a sign(x) ∇f - b))`` after every step of the optimizer.

    Example:
        >>> ham(0.9).correction.a
        20.0

    Source: Jacobs, Gadhikar, Rubio-Madrigal and Burkholz 2025, arXiv 2506.02630.

    Differs from the paper: a = 20 and a clipped exponent, stable at large learning rates.
    """
    mask = options.part(OneShot)
    return Method(Euclidean(), ConstantDecay(), mask, "ham", options.part(Hyperbolic))


@dataclass(frozen=True, kw_only=True)
class _Gradual(HyperbolicStep, Window, Layers):
    """The options of :func:`gmp_ham`."""


@named(REFERENCE)
@reads(_Gradual)
def gmp_ham(options: _Gradual) -> Method:
    """Gradual magnitude pruning with HAM's mirror step.

    Example:
        >>> gmp_ham(0.9).name
        'gmp_ham'

    Source: arXiv 2506.02630 (HAM); arXiv 1710.01878 (the schedule).

    Differs from the paper: as in :func:`ham`.
    """
    mask = options.part(Gradual)
    return Method(Euclidean(), ConstantDecay(), mask, "gmp_ham", options.part(Hyperbolic))


@dataclass(frozen=True, kw_only=True)
class _Phases(HyperbolicStep, Phases):
    """The options of :func:`acdc_ham`."""


@named(REFERENCE)
@reads(_Phases)
def acdc_ham(options: _Phases) -> Method:
    """Alternating compressed and decompressed training with HAM's mirror step.

    Example:
        >>> acdc_ham(0.9).mask.phase
        0.05

    Source: arXiv 2506.02630 (HAM; its authors give 77.2, 76.7 and 75.5% for ResNet-50 on ImageNet at 80, 90 and 95%,
    where AC/DC alone has 75.8, 74.8 and 72.6); arXiv 2106.12379 (AC/DC).

    Differs from the paper: as in :func:`ham` and :func:`mirrormask.methods.acdc`.
    """
    mask = options.part(Alternating)
    return Method(Euclidean(), ConstantDecay(), mask, "acdc_ham", options.part(Hyperbolic))


@dataclass(frozen=True, kw_only=True)
class _Exchange(HyperbolicStep, Exchange):
    """The options of :func:`rigl_ham`."""


@named(REFERENCE)
@reads(_Exchange)
def rigl_ham(options: _Exchange) -> Method:
    """RigL with HAM's mirror step.

    Example:
        >>> rigl_ham(0.9).mask.grow
        'gradient'

    Source: arXiv 2506.02630 (HAM); arXiv 1911.11134 (RigL).

    Differs from the paper: as in :func:`ham`.
    """
    mask = options.part(Regrow)
    return Method(Euclidean(), ConstantDecay(), mask, "rigl_ham", options.part(Hyperbolic))


@dataclass(frozen=True, kw_only=True)
class _Thresholds(HyperbolicStep, Thresholds):
    """The options of :func:`str_ham`."""


@named(REFERENCE)
@reads(_Thresholds)
def str_ham(options: _Thresholds) -> Method:
    """STR with HAM's mirror step on the weights behind the threshold.

    Example:
        >>> str_ham(0.9).name
        'str_ham'

    Source: arXiv 2506.02630 (HAM); arXiv 2002.03231 (STR).

    Differs from the paper: as in :func:`ham` and ``mirrormask.methods.str``.
    """
    mask = options.part(Gradual)
    return Method(options.part(SoftThreshold), ConstantDecay(), mask, "str_ham", options.part(Hyperbolic))


@dataclass(frozen=True, kw_only=True)
class _Seed(HyperbolicStep, Seed):
    """The options of :func:`erk_ham`."""


@named(REFERENCE)
@reads(_Seed)
def erk_ham(options: _Seed) -> Method:
    """A random ERK mask at initialisation with HAM's mirror step.

    Example:
        >>> erk_ham(0.9).mask.allocation
        'erk'

    Source: arXiv 2506.02630 (HAM); arXiv 1911.11134 (ERK).

    Differs from the paper: as in :func:`ham`.
    """
    mask = options.part(AtStart, score="random", allocation="erk")
    return Method(Euclidean(), ConstantDecay(), mask, "erk_ham", options.part(Hyperbolic))
