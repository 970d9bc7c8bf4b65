"""Methods that keep the ordinary weight and prune by its magnitude."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean
from mirrormask.masks import Alternating, Gradual, Never, OneShot
from mirrormask.methods.base import Method, named
from mirrormask.methods.groups import At, Layers, Score, Window
from mirrormask.methods.options import reads

__all__ = ["Phases", "acdc", "dense", "gmp", "magnitude"]


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


@dataclass(frozen=True, kw_only=True)
class _OneShot(At, Score, Layers):
    """The options of :func:`magnitude`."""


@named("Han et al. 2015, arXiv 1506.02626")
@reads(_OneShot)
def magnitude(options: _OneShot) -> Method:
    """One-shot magnitude pruning, then fine-tuning.

    Example:
        >>> magnitude(0.9).mask.at
        0.5

    Source: Han et al. 2015, arXiv 1506.02626.

    Differs from the paper: one threshold for the whole network (``allocation="global"``) instead of one a layer, in
    proportion to its standard deviation.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(OneShot), "magnitude")


@dataclass(frozen=True, kw_only=True)
class _Gradual(Window, Score, Layers):
    """The options of :func:`gmp`."""


@named("Zhu and Gupta 2017, arXiv 1710.01878")
@reads(_Gradual)
def gmp(options: _Gradual) -> Method:
    """Gradual magnitude pruning by the cubic schedule.

    Equation: ``s_t = s (1 - (1 - (t - t₀) / (t₁ - t₀))³)``.

    Example:
        >>> gmp(0.9).mask.end_at
        0.75

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation (1).

    Differs from the paper: magnitudes are compared over the whole network (``allocation="global"``), there layer by
    layer; and a weight that is dead stays dead.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(Gradual), "gmp")


@dataclass(frozen=True, kw_only=True)
class Phases(Layers):
    """Compressed and decompressed in turn; the mask :class:`mirrormask.masks.Alternating`.

    Args:
        start_at, end_at, phase: as in :class:`mirrormask.masks.Alternating`.
    """

    start_at: float = Alternating.start_at
    end_at: float = Alternating.end_at
    phase: float = Alternating.phase


@named("Peste et al. 2021, arXiv 2106.12379")
@reads(Phases)
def acdc(options: Phases) -> Method:
    """Alternating compressed and decompressed training.

    Example:
        >>> acdc(0.9).mask.phase
        0.05

    Source: Peste et al. 2021, arXiv 2106.12379, Algorithm 1.

    Differs from the paper: its code empties all momentum where a dense phase begins; here the weights that come back
    start without, and those that lived keep theirs.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(Alternating), "acdc")
