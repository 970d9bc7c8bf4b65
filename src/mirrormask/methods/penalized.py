"""Methods that make a weight small by a penalty or a map of their own, before a mask removes it."""

from __future__ import annotations

from mirrormask.corrections import Proximal
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean, Power, SigmoidMask, SoftThreshold
from mirrormask.masks import Gradual, OneShot
from mirrormask.methods.base import Method, named

__all__ = ["cs", "l1", "powerprop", "soft_threshold"]


@named("Tibshirani 1996; Parikh and Boyd 2014, section 6.5.2")
def l1(
    sparsity: float,
    *,
    alpha: float = 1e-4,
    at: float = 0.5,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """Explicit L1 by proximal steps: soft thresholding after the optimizer's step.

    ``x ← sign(x) max(|x| - lr α, 0)`` until ``at``; then the mask is fixed and training goes on without it.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        alpha: α, the strength, in [0, inf).
        at: when the mask is fixed, a fraction of training in (0, 1].
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> l1(0.9).correction.alpha
        0.0001

    Source: Parikh and Boyd 2014, Proximal Algorithms, section 4.2 (proximal gradient) and 6.5.2.
    """
    mask = OneShot(sparsity, at=at, allocation=allocation, pattern=pattern)
    return Method(Euclidean(), ConstantDecay(), mask, "l1", Proximal(alpha, until=at))


@named("Kusupati et al. 2020, arXiv 2002.03231", name="str")
def soft_threshold(
    sparsity: float,
    *,
    init_threshold: float = 0.01,
    start_at: float = 0.10,
    end_at: float = 0.75,
    every: float = 1 / 45,
    allocation: str = "global",
) -> Method:
    """STR: soft threshold reparametrisation with a learned threshold a layer.

    ``x = sign(w) max(|w| - exp(s), 0)``; a controller multiplies all thresholds by one factor at every update of the
    schedule, so that the sparsity asked for is met, and how they differ is learned.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        init_threshold: as in :class:`mirrormask.geometry.SoftThreshold`.
        start_at, end_at, every: the cubic course of sparsity, as in :class:`mirrormask.masks.Gradual`.
        allocation: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> soft_threshold(0.9).name
        'str'

    Source: Kusupati et al. 2020, arXiv 2002.03231, equations (3) to (5).

    Differs from the paper: the controller takes the place of weight decay on s and of the start value of s, from which
    the paper's sparsity results; the mask is fixed at ``end_at`` and the weights then train without a threshold.
    """
    mask = Gradual(sparsity, start_at, end_at, every, allocation=allocation)
    return Method(SoftThreshold(init_threshold), ConstantDecay(), mask, "str")


@named("Savarese, Silva and Maire 2020, arXiv 1912.04427")
def cs(
    sparsity: float,
    *,
    s_init: float = 0.0,
    final: float = 200.0,
    penalty: float = 1e-8,
    start_at: float = 0.10,
    end_at: float = 0.75,
    every: float = 1 / 45,
    allocation: str = "global",
) -> Method:
    """Continuous sparsification: sigmoid masks with an annealed temperature.

    ``x = w ⊙ σ(τ s)``, ``τ_t = final ** (t / end_at)``, penalty ``λ Σ σ(τ s)``; at every update of the schedule all
    logits are shifted alike, so that the sparsity asked for is met.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        s_init, final, penalty: as in :class:`mirrormask.geometry.SigmoidMask`.
        start_at, end_at, every: the cubic course of sparsity, as in :class:`mirrormask.masks.Gradual`.
        allocation: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> cs(0.9).geometry.final
        200.0

    Source: Savarese, Silva and Maire 2020, arXiv 1912.04427, Algorithm 1 and its defaults.

    Differs from the paper: the shift of the logits, without which λ and s_init alone decide the sparsity; w starts at
    ``x / σ(s_init)``; the mask is fixed at ``end_at`` and the weights then train without a gate.
    """
    mask = Gradual(sparsity, start_at, end_at, every, allocation=allocation)
    geometry = SigmoidMask(s_init, final, end_at, penalty)
    return Method(geometry, ConstantDecay(), mask, "cs")


@named("Schwarz et al. 2021, arXiv 2110.00296")
def powerprop(
    sparsity: float,
    *,
    power: float = 2.0,
    gain: float | None = 1.0,
    alpha: float = 0.0,
    at: float = 0.5,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """Powerpropagation: ``x = θ |θ|^(p-1)``, pruned by magnitude.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        power, gain: as in :class:`mirrormask.geometry.Power`; ``gain=None`` is the paper's setting.
        alpha: the strength of a constant decay of θ, in [0, inf).
        at: when the mask is fixed, a fraction of training in (0, 1].
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> powerprop(0.9).geometry.power
        2.0

    Source: Schwarz et al. 2021, arXiv 2110.00296, section 2.

    Differs from the paper: a learning-rate scale for each tensor, unless ``gain=None``; training goes on under the
    mask from ``at`` on, where the paper prunes at the end.
    """
    mask = OneShot(sparsity, at=at, allocation=allocation, pattern=pattern)
    return Method(Power(power, gain), ConstantDecay(alpha), mask, "powerprop")
