"""Methods that make a weight small by a penalty or a map of their own, before a mask removes it."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.corrections import Proximal
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Consensus, Euclidean, Power, SigmoidMask, SoftThreshold
from mirrormask.masks import Gradual, OneShot
from mirrormask.methods.base import Method, named
from mirrormask.methods.groups import Allocation, At, Layers, Window
from mirrormask.methods.options import reads

__all__ = ["Thresholds", "cs", "elsa", "l1", "powerprop", "soft_threshold"]


@dataclass(frozen=True, kw_only=True)
class _Proximal(At):
    """The options of :func:`l1`.

    Args:
        alpha: α, the strength, in [0, inf).
    """

    alpha: float = Proximal.alpha


@named("Tibshirani 1996; Parikh and Boyd 2014, section 6.5.2")
@reads(_Proximal)
def l1(options: _Proximal) -> Method:
    """Explicit L1 by proximal steps: soft thresholding after the optimizer's step.

    ``x ← sign(x) max(|x| - lr α, 0)`` until ``at``; then the mask is fixed and training goes on without it.

    Example:
        >>> l1(0.9).correction.alpha
        0.0001

    Source: Parikh and Boyd 2014, Proximal Algorithms, section 4.2 (proximal gradient) and 6.5.2.
    """
    mask = options.part(OneShot)
    return Method(Euclidean(), ConstantDecay(), mask, "l1", options.part(Proximal, until=options.at))


@dataclass(frozen=True, kw_only=True)
class Thresholds(Window, Allocation):
    """Learned thresholds; the geometry :class:`mirrormask.geometry.SoftThreshold`.

    Args:
        init_threshold: as in :class:`mirrormask.geometry.SoftThreshold`.
    """

    init_threshold: float = SoftThreshold.init_threshold


@named("Kusupati et al. 2020, arXiv 2002.03231", name="str")
@reads(Thresholds)
def soft_threshold(options: Thresholds) -> Method:
    """STR: soft threshold reparametrisation with a learned threshold a layer.

    ``x = sign(w) max(|w| - exp(s), 0)``; a controller multiplies all thresholds by one factor at every update of the
    schedule, so that the sparsity asked for is met, and how they differ is learned.

    Example:
        >>> soft_threshold(0.9).name
        'str'

    Source: Kusupati et al. 2020, arXiv 2002.03231, equations (3) to (5).

    Differs from the paper: the controller takes the place of weight decay on s and of the start value of s, from which
    the paper's sparsity results; the mask is fixed at ``end_at`` and the weights then train without a threshold.
    """
    return Method(options.part(SoftThreshold), ConstantDecay(), options.part(Gradual), "str")


@dataclass(frozen=True, kw_only=True)
class _Sigmoids(Window, Allocation):
    """The options of :func:`cs`.

    Args:
        s_init, final, penalty: as in :class:`mirrormask.geometry.SigmoidMask`.
    """

    s_init: float = SigmoidMask.s_init
    final: float = SigmoidMask.final
    penalty: float = SigmoidMask.penalty


@named("Savarese, Silva and Maire 2020, arXiv 1912.04427")
@reads(_Sigmoids)
def cs(options: _Sigmoids) -> Method:
    """Continuous sparsification: sigmoid masks with an annealed temperature.

    ``x = w ⊙ σ(τ s)``, ``τ_t = final ** (t / end_at)``, penalty ``λ Σ σ(τ s)``; at every update of the schedule all
    logits are shifted alike, so that the sparsity asked for is met.

    Example:
        >>> cs(0.9).geometry.final
        200.0

    Source: Savarese, Silva and Maire 2020, arXiv 1912.04427, Algorithm 1 and its defaults.

    Differs from the paper: the shift of the logits, without which λ and s_init alone decide the sparsity; w starts at
    ``x / σ(s_init)``; the mask is fixed at ``end_at`` and the weights then train without a gate.
    """
    mask = options.part(Gradual)
    return Method(options.part(SigmoidMask, until=options.end_at), ConstantDecay(), mask, "cs")


@dataclass(frozen=True, kw_only=True)
class _Power(At):
    """The options of :func:`powerprop`.

    Args:
        power, gain: as in :class:`mirrormask.geometry.Power`; ``gain=None`` is the paper's setting.
        alpha: the strength of a constant decay of θ, in [0, inf).
    """

    power: float = Power.power
    gain: float | None = Power.gain
    alpha: float = ConstantDecay.alpha


@named("Schwarz et al. 2021, arXiv 2110.00296")
@reads(_Power)
def powerprop(options: _Power) -> Method:
    """Powerpropagation: ``x = θ |θ|^(p-1)``, pruned by magnitude.

    Example:
        >>> powerprop(0.9).geometry.power
        2.0

    Source: Schwarz et al. 2021, arXiv 2110.00296, section 2.

    Differs from the paper: a learning-rate scale for each tensor, unless ``gain=None``; training goes on under the
    mask from ``at`` on, where the paper prunes at the end.
    """
    return Method(options.part(Power), options.part(ConstantDecay), options.part(OneShot), "powerprop")


@dataclass(frozen=True, kw_only=True)
class _Elsa(Layers):
    """The options of :func:`elsa`.

    Args:
        strength, every: as in :class:`mirrormask.geometry.Consensus`.
        at: when to prune to the target and to fix the mask, a fraction of training in (0, 1]; 1.0 is the paper's.
    """

    strength: float = Consensus.strength
    every: float = Consensus.every
    at: float = Consensus.until


@named("Lee et al. 2025, arXiv 2510.01650")
@reads(_Elsa)
def elsa(options: _Elsa) -> Method:
    """ELSA: ADMM, which draws the weights to a sparse copy chosen by the Fisher information that Adam keeps.

    The geometry :class:`mirrormask.geometry.Consensus` until ``at``; then the mask is fixed, and the rest of training
    goes on without the penalty.

    Example:
        >>> elsa(0.9).geometry.until
        0.9

    Source: Lee, Jang, Lee, Alistarh and Lee 2025, arXiv 2510.01650; the authors' code.

    Differs from the paper: sparsity is shared over all layers together, there each layer has the same; a tenth of
    training follows the projection; under a base without second moments the projection is by magnitude.
    """
    return Method(
        options.part(Consensus, until=options.at), ConstantDecay(), options.part(OneShot, at=options.at), "elsa"
    )
