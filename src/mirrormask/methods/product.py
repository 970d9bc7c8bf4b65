"""Other methods that train a weight as a product of two factors."""

from __future__ import annotations

from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Hadamard, SignIn
from mirrormask.masks import AtStart, OneShot
from mirrormask.methods.base import Method, named

__all__ = ["sign_in", "spred"]


@named("Ziyin and Wang 2023, arXiv 2210.01212")
def spred(
    sparsity: float,
    *,
    alpha: float = 1e-2,
    beta: float | str = "rms",
    gain: float | str | None = "auto",
    coupled: bool = False,
    at: float = 0.5,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """``x = m ⊙ w`` with a constant decay: explicit L1 by SGD.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        alpha: the strength, in [0, inf).
        beta, gain: as in :class:`mirrormask.geometry.Hadamard`.
        coupled: add the decay to the gradient, as the paper does.
        at: when the mask is fixed, a fraction of training in (0, 1].
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> spred(0.9).decay.alpha
        0.01

    Source: Ziyin and Wang 2023, arXiv 2210.01212.

    Differs from the paper: a mask of exact sparsity is fixed at ``at``, where the paper prunes with a small threshold.
    """
    decay = ConstantDecay(alpha, coupled=coupled)
    return Method(
        Hadamard(beta, gain), decay, OneShot(sparsity, at=at, allocation=allocation, pattern=pattern), "spred"
    )


@named("Gadhikar et al. 2025, arXiv 2504.12801")
def sign_in(
    sparsity: float,
    *,
    alpha: float = 0.0,
    beta: float | str = "rms",
    gain: float | str | None = 0.3,
    every: float = 0.1,
    until: float = 0.75,
    score: str = "random",
    allocation: str = "erk",
    seed: int = 0,
) -> Method:
    """Sign-In: ``m ⊙ w`` on a masked network, its inner scaling reset so that signs go on flipping.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        alpha: the strength of a constant decay of the factors, in [0, inf).
        beta, gain, every, until: as in :class:`mirrormask.geometry.SignIn`.
        score, allocation: of the mask that is fixed before the first step, as in :class:`mirrormask.masks.Mask`.
        seed: of a random mask, at least 0.

    Example:
        >>> sign_in(0.9).mask.allocation
        'erk'

    Source: Gadhikar, Jacobs, Zhou and Burkholz 2025, arXiv 2504.12801.

    Differs from the paper: beta and the learning rate of the factors per tensor. The latter is smaller than elsewhere:
    the weights of a network that is sparse from the start grow furthest, and their metric with them; at a gain of 0.7
    LeNet-300-100 diverged at learning rate 0.1 and 98%.
    """
    mask = AtStart(sparsity, score=score, allocation=allocation, seed=seed)
    return Method(SignIn(beta, gain, every, until), ConstantDecay(alpha), mask, "sign_in")
