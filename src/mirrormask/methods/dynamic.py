"""Dynamic sparse training: masks of constant size that move."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.corrections import NeuronScale
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean
from mirrormask.masks import Regrow
from mirrormask.methods.base import Method, named
from mirrormask.methods.groups import Allocation, Seed
from mirrormask.methods.options import reads

__all__ = ["Exchange", "rigl", "set", "sparseopt"]


@dataclass(frozen=True, kw_only=True)
class Exchange(Allocation, Seed):
    """Masks that move; the mask :class:`mirrormask.masks.Regrow`.

    Args:
        fraction: of a layer's living weights, what is exchanged at a time, in (0, 1).
        every: the fraction of training between two exchanges, in (0, 1].
        until: the fraction of training after which there are no more, in (0, 1].
    """

    fraction: float = Regrow.fraction
    every: float = Regrow.every
    until: float = Regrow.until
    allocation: str = Regrow.allocation


@named("Evci et al. 2020, arXiv 1911.11134")
@reads(Exchange)
def rigl(options: Exchange) -> Method:
    """RigL: a sparse network that drops its smallest weights and grows where the gradient is largest.

    Every Δt each layer exchanges ``α/2 (1 + cos(πt / T_end))`` of its living weights; grown ones start at 0. α is
    ``fraction``, Δt ``every`` and T_end ``until``; ``allocation`` and ``seed`` are those of the first mask.

    Example:
        >>> rigl(0.9).mask.grow
        'gradient'

    Source: Evci et al. 2020, arXiv 1911.11134, section 3 and Algorithm 1.

    Differs from the paper: an update of the mask follows an ordinary step instead of taking its place, and comes every
    hundredth of training instead of every 100 steps.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(Regrow), "rigl")


@named("Adnan et al. 2026, arXiv 2605.27541; Evci et al. 2020, arXiv 1911.11134")
@reads(Exchange)
def sparseopt(options: Exchange) -> Method:
    """SparseOpt: RigL with each neuron's gradient scaled by ``sqrt((1 - s_i) / (1 - s_mean))``.

    The correction :class:`mirrormask.corrections.NeuronScale`, which goes with any other mask as well. Growth reads the
    gradients as they were, which the paper finds the better of both.

    Example:
        >>> sparseopt(0.9).correction.then is None
        True

    Source: Adnan et al. 2026 (ICML), arXiv 2605.27541; arXiv 1911.11134 (RigL).

    Differs from the paper: as in :class:`mirrormask.corrections.NeuronScale` and :func:`rigl`.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(Regrow), "sparseopt", NeuronScale())


@dataclass(frozen=True, kw_only=True)
class _Spread(Exchange):
    """The options of :func:`set`.

    Args:
        spread: grown weights start from a normal of this multiple of their layer's rms, in [0, inf).
    """

    until: float = 1.0
    spread: float = 0.1


@named("Mocanu et al. 2018, arXiv 1707.04780")
@reads(_Spread)
def set(options: _Spread) -> Method:
    """SET: a sparse network that drops its smallest weights and grows others at random.

    ``allocation`` is that of the first mask.

    Example:
        >>> set(0.9).mask.grow
        'random'

    Source: Mocanu et al. 2018, arXiv 1707.04780, Algorithm 1.

    Differs from the paper: the smallest magnitudes are dropped, there the smallest positive and the largest negative
    weights (the same but for the balance of signs); an exchange every hundredth of training instead of every epoch.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(Regrow, grow="random", anneal=False), "set")
