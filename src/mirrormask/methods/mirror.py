"""Methods that train a weight as a product of two factors."""

from __future__ import annotations

from mirrormask.checks import check_known
from mirrormask.decay import ConstantDecay, PILoTDecay, ShrinkDecay
from mirrormask.geometry import Geometry, Hadamard, MirrorDescent, SignIn
from mirrormask.masks import AtStart, Gradual, Iterative, OneShot
from mirrormask.methods.base import Method, named

__all__ = ["mirror", "pilot", "pilot_init", "pilot_lrr", "pilot_wr", "sign_in", "spred"]

#: The bound on a step of u that `mirror` takes under Adam and its kin. With 0.05, LeNet-300-100 at 99.5% collapsed at
#: twice the learning rate that suits it (docs/methods.md).
ADAPTIVE_CLIP = 0.01


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


@named("Jacobs and Burkholz 2024, arXiv 2408.09966")
def pilot(
    sparsity: float,
    *,
    alpha_init: float = 5e-3,
    delta: float = 1.1,
    K: float = 0.1,
    half: float = 0.5,
    relative: bool = True,
    beta: float | str = "rms",
    gain: float | str | None = "auto",
    coupled: bool = False,
    at: float = 0.5,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """PILoT: an initialisation that lets signs flip, and a dynamic decay (Algorithm 1).

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        alpha_init, delta, K, half, relative, coupled: as in :class:`mirrormask.decay.PILoTDecay`.
        beta, gain: as in :class:`mirrormask.geometry.Hadamard`; ``beta=1.0, gain=None`` is the paper's setting.
        at: when the mask is fixed, a fraction of training in (0, 1]; 1.0 for a single threshold at the end.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> pilot(0.95).decay.delta
        1.1

    Source: Jacobs and Burkholz 2024, arXiv 2408.09966, Algorithm 1.

    Differs from the paper: beta and the learning rate of the factors per tensor, decoupled decay, K as a fraction of
    the first L1 norm. ``beta=1.0, gain=None, coupled=True, relative=False`` is the paper's literal setting.
    """
    decay = PILoTDecay(alpha_init, delta, K, half, relative, coupled=coupled)
    return Method(
        Hadamard(beta, gain), decay, OneShot(sparsity, at=at, allocation=allocation, pattern=pattern), "pilot"
    )


@named("Jacobs and Burkholz 2024, arXiv 2408.09966")
def pilot_init(
    sparsity: float,
    *,
    beta: float | str = "rms",
    gain: float | str | None = "auto",
    at: float = 0.5,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """PILoT's initialisation alone: ``x = m ⊙ w`` with ``m² - w² = β``, without decay.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        beta, gain: as in :class:`mirrormask.geometry.Hadamard`.
        at: when the mask is fixed, a fraction of training in (0, 1].
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> pilot_init(0.9).decay.off
        True

    Source: arXiv 2408.09966, the ablation of the initialisation.

    Differs from the paper: as in :func:`pilot`.
    """
    mask = OneShot(sparsity, at=at, allocation=allocation, pattern=pattern)
    return Method(Hadamard(beta, gain), ConstantDecay(), mask, "pilot_init")


@named("Jacobs and Burkholz 2024, arXiv 2408.09966; Renda et al. 2020, arXiv 2003.02389")
def pilot_lrr(
    sparsity: float,
    *,
    prunings: int = 4,
    alpha_init: float = 5e-3,
    delta: float = 1.1,
    K: float = 0.1,
    half: float = 0.5,
    relative: bool = True,
    beta: float | str = "rms",
    gain: float | str | None = "auto",
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """PILoT with learning-rate rewinding: factors and decay go on, the learning rate starts anew each round.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        prunings: as in :func:`mirrormask.methods.lth`.
        alpha_init, delta, K, half, relative: as in :class:`mirrormask.decay.PILoTDecay`; ``half`` counts over all
            rounds together.
        beta, gain: as in :class:`mirrormask.geometry.Hadamard`.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> pilot_lrr(0.9).mask.rewind_to is None
        True

    Source: arXiv 2408.09966, section 5 (PILoT with iterative pruning); arXiv 2003.02389.

    Differs from the paper: as in :func:`pilot`; the rounds share one budget.
    """
    decay = PILoTDecay(alpha_init, delta, K, half, relative)
    mask = Iterative(sparsity, prunings, None, allocation=allocation, pattern=pattern)
    return Method(Hadamard(beta, gain), decay, mask, "pilot_lrr")


@named("Jacobs and Burkholz 2024, arXiv 2408.09966; Frankle et al. 2020, arXiv 1912.05671")
def pilot_wr(
    sparsity: float,
    *,
    prunings: int = 4,
    rewind_to: float = 0.1,
    alpha_init: float = 5e-3,
    delta: float = 1.1,
    K: float = 0.1,
    half: float = 0.5,
    relative: bool = True,
    beta: float | str = "rms",
    gain: float | str | None = "auto",
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """PILoT with weight rewinding: the factors and the decay go back to an early step after each round.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        prunings, rewind_to: as in :func:`mirrormask.methods.wr`.
        alpha_init, delta, K, half, relative: as in :class:`mirrormask.decay.PILoTDecay`; ``half`` counts over all
            rounds together.
        beta, gain: as in :class:`mirrormask.geometry.Hadamard`.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Example:
        >>> pilot_wr(0.9).mask.rewind_to
        0.1

    Source: arXiv 2408.09966, section 5 (PILoT with iterative pruning); arXiv 1912.05671.

    Differs from the paper: as in :func:`pilot`; the rounds share one budget.
    """
    decay = PILoTDecay(alpha_init, delta, K, half, relative)
    mask = Iterative(sparsity, prunings, rewind_to, allocation=allocation, pattern=pattern)
    return Method(Hadamard(beta, gain), decay, mask, "pilot_wr")


@named("Gadhikar et al. 2025, arXiv 2504.12801")
def sign_in(
    sparsity: float,
    *,
    alpha: float = 0.0,
    beta: float | str = "rms",
    gain: float | str | None = "auto",
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

    Differs from the paper: beta and the learning rate of the factors per tensor.
    """
    mask = AtStart(sparsity, score=score, allocation=allocation, seed=seed)
    return Method(SignIn(beta, gain, every, until), ConstantDecay(alpha), mask, "sign_in")


@named("this library, after arXiv 2408.09966")
def mirror(
    sparsity: float,
    *,
    shrink: float = 4.0,
    decay_from: float = 0.05,
    decay_until: float = 0.75,
    decay_limit: float | None = 0.004,
    start_at: float = 0.10,
    end_at: float = 0.75,
    every: float = 1 / 45,
    beta: float | str = "rms",
    gain: float | str | None = "auto",
    clip: float | str | None = "auto",
    factors: bool | None = None,
    allocation: str = "global",
    pattern: str | None = None,
) -> Method:
    """The library's recommendation: the mirror flow of ``m ⊙ w``, a scheduled decay and a gradual mask.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
        shrink, decay_from, decay_until, decay_limit: ``a`` falls to ``a₀ exp(-shrink)`` in this window of training, and
            ``log a`` by at most ``decay_limit`` in a step; see :class:`mirrormask.decay.ShrinkDecay`.
        start_at, end_at, every: as in :class:`mirrormask.masks.Gradual`.
        beta, gain: as in :class:`mirrormask.geometry.Hadamard`.
        clip: as in :class:`mirrormask.geometry.MirrorDescent`, where factors are not trained; ``"auto"`` for its
            default under SGD and 0.01 under Adam and its kin, whose steps do not become smaller with the gradient.
        factors: True to train the factors ``m`` and ``w``; False for mirror descent without them, which needs half of
            their memory and is a little less accurate under SGD (docs/results.md); None for factors under SGD and
            mirror descent under Adam and its kin, which do not follow the flow on factors.
        allocation, pattern: as in :class:`mirrormask.masks.Mask`.

    Raises:
        ValueError: an option is outside its range, or ``clip`` is given with ``factors=True``, which does not read it.

    Example:
        >>> mirror(0.99).decay.shrink
        4.0
    """
    if factors and clip != "auto":
        raise ValueError(f"clip={clip!r} bounds the step of mirror descent; leave out clip or factors=True")
    adaptive_clip: float | None
    if isinstance(clip, str):
        check_known("clip", clip, ("auto",))
        clip, adaptive_clip = MirrorDescent.clip, ADAPTIVE_CLIP
    else:
        adaptive_clip = clip
    mask = Gradual(sparsity, start_at, end_at, every, allocation=allocation, pattern=pattern)
    decay = ShrinkDecay(shrink, decay_from, decay_until, decay_limit)
    geometry: Geometry = MirrorDescent(beta, gain, clip) if factors is False else Hadamard(beta, gain)
    adaptive = None if factors else MirrorDescent(beta, gain, adaptive_clip)
    return Method(geometry, decay, mask, "mirror", adaptive=adaptive)
