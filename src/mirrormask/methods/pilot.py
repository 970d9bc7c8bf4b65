"""PILoT, its ablation and its combinations with rounds."""

from __future__ import annotations

from mirrormask.decay import ConstantDecay, PILoTDecay
from mirrormask.geometry import Hadamard
from mirrormask.masks import Iterative, OneShot
from mirrormask.methods.base import Method, named

__all__ = ["pilot", "pilot_init", "pilot_lrr", "pilot_wr"]


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
