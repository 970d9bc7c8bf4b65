"""Other methods that train a weight as a product of factors."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.decay import ConstantDecay
from mirrormask.geometry import DeepProduct, Hadamard, SignIn
from mirrormask.masks import AtStart, OneShot
from mirrormask.methods.base import Method, named
from mirrormask.methods.groups import Allocation, At, Coupling, Factors, Score, Seed
from mirrormask.methods.options import reads

__all__ = ["dwf", "sign_in", "spred"]


@dataclass(frozen=True, kw_only=True)
class _Spred(Factors, Coupling, At):
    """The options of :func:`spred`.

    Args:
        alpha: the strength, in [0, inf).
    """

    alpha: float = 1e-2


@named("Ziyin and Wang 2023, arXiv 2210.01212")
@reads(_Spred)
def spred(options: _Spred) -> Method:
    """``x = m ⊙ w`` with a constant decay: explicit L1 by SGD.

    Example:
        >>> spred(0.9).decay.alpha
        0.01

    Source: Ziyin and Wang 2023, arXiv 2210.01212.

    Differs from the paper: a mask of exact sparsity is fixed at ``at``, where the paper prunes with a small threshold.
    """
    return Method(options.part(Hadamard), options.part(ConstantDecay), options.part(OneShot), "spred")


@dataclass(frozen=True, kw_only=True)
class _Deep(Coupling, At, Seed):
    """The options of :func:`dwf`.

    Args:
        alpha: the strength, in [0, inf).
        depth, least, gain: as in :class:`mirrormask.geometry.DeepProduct`.
    """

    alpha: float = 3e-3
    depth: int = DeepProduct.depth
    least: float = DeepProduct.least
    gain: float | str | None = DeepProduct.gain


@named("Kolb et al. 2025, arXiv 2502.02496")
@reads(_Deep)
def dwf(options: _Deep) -> Method:
    """Deep weight factorization: a product of three factors or more with a constant decay: a penalty ``|x|^(2/D)``.

    ``min f(x) + α Σ_d ‖ω_d‖²`` over ``x = ω₁ ⊙ ... ⊙ ω_D`` has the minima of ``f(x) + α D ‖x‖_{2/D}^{2/D}``.

    Example:
        >>> dwf(0.9).geometry.depth
        3

    Source: Kolb, Weber, Bischl and Rügamer 2025, arXiv 2502.02496, Theorem 1.

    Differs from the paper: the start, bounds and learning rate of :class:`mirrormask.geometry.DeepProduct`; a mask of
    exact sparsity is fixed at ``at``, there what ends below a tiny threshold is removed; the decay is beside the
    gradient unless ``coupled=True``.
    """
    return Method(options.part(DeepProduct), options.part(ConstantDecay), options.part(OneShot), "dwf")


#: ``gain="auto"`` of sign_in, under SGD and under Adam and its kin. With β = 1 the metric of x starts at 1, so that 2
#: is twice the learning rate that the weights would have.
GAINS = (2.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class _SignIn(Factors, Score, Allocation, Seed):
    """The options of :func:`sign_in`.

    Args:
        alpha: the strength of a constant decay of the factors, in [0, inf): half of a ``weight_decay`` that SGD would
            have put on each factor.
        every, until: as in :class:`mirrormask.geometry.SignIn`.
    """

    alpha: float = ConstantDecay.alpha
    beta: float | str = SignIn.beta
    every: float = SignIn.every
    until: float = SignIn.until
    score: str = "random"
    allocation: str = "erk"


@named("Gadhikar et al. 2025, arXiv 2504.12801")
@reads(_SignIn)
def sign_in(options: _SignIn) -> Method:
    """Sign-In: ``m ⊙ w`` on a masked network, its inner scaling reset so that signs go on flipping.

    ``dx = -sqrt(4x² + β²) ∇f dt`` with ``β = m² - w²``, set back to 1 from time to time. The mask is fixed before the
    first step. ``gain="auto"`` is 2 under SGD and 1 under Adam and its kin.

    Example:
        >>> sign_in(0.9).mask.allocation
        'erk'

    Source: Gadhikar, Jacobs, Zhou and Burkholz 2025, arXiv 2504.12801.

    Differs from the paper: as in :class:`mirrormask.geometry.SignIn`; the learning rate of the factors is twice the
    base's under SGD, which is what the same authors have in arXiv 2408.09966 and a reading of ours here; the base's
    weight decay does not act on factors.
    """

    def method(adaptive: bool, other: Method | None = None) -> Method:
        gain = GAINS[adaptive] if options.gain == "auto" else options.gain
        geometry, decay, mask = options.part(SignIn, gain=gain), options.part(ConstantDecay), options.part(AtStart)
        return Method(geometry, decay, mask, "sign_in", adaptive=other)

    return method(False, method(True))
