"""PILoT, its ablation and its combinations with rounds."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.decay import ConstantDecay, PILoTDecay
from mirrormask.geometry import Hadamard
from mirrormask.masks import Iterative, OneShot
from mirrormask.methods.base import Method, named
from mirrormask.methods.groups import Algorithm1, At, Coupling, Factors, Layers, Rewinding, Rounds
from mirrormask.methods.options import reads

__all__ = ["pilot", "pilot_init", "pilot_lrr", "pilot_wr"]


@dataclass(frozen=True, kw_only=True)
class _Pilot(Algorithm1, Factors, Coupling, At):
    """The options of :func:`pilot`."""


@named("Jacobs and Burkholz 2024, arXiv 2408.09966")
@reads(_Pilot)
def pilot(options: _Pilot) -> Method:
    """PILoT: an initialisation that lets signs flip, and a dynamic decay (Algorithm 1).

    Example:
        >>> pilot(0.95).decay.delta
        1.1

    Source: Jacobs and Burkholz 2024, arXiv 2408.09966, Algorithm 1.

    Differs from the paper: beta and the learning rate of the factors per tensor, decoupled decay, K as a fraction of
    the first L1 norm. ``beta=1.0, gain=None, coupled=True, alpha_init=1e-4`` (3e-4, 1e-3) at twice the base's learning
    rate (0.2 where it is 0.1) is the paper's literal setting; its K and δ are published nowhere, and ours are a reading
    (docs/methods.md).
    """
    return Method(options.part(Hadamard), options.part(PILoTDecay), options.part(OneShot), "pilot")


@dataclass(frozen=True, kw_only=True)
class _Init(Factors, At):
    """The options of :func:`pilot_init`."""


@named("Jacobs and Burkholz 2024, arXiv 2408.09966")
@reads(_Init)
def pilot_init(options: _Init) -> Method:
    """PILoT's initialisation alone: ``x = m ⊙ w`` with ``m² - w² = β``, without decay.

    Example:
        >>> pilot_init(0.9).decay.off
        True

    Source: arXiv 2408.09966, the ablation of the initialisation.

    Differs from the paper: as in :func:`pilot`.
    """
    return Method(options.part(Hadamard), ConstantDecay(), options.part(OneShot), "pilot_init")


@dataclass(frozen=True, kw_only=True)
class _Rounds(Rounds, Algorithm1, Factors, Layers):
    """The options of :func:`pilot_lrr`."""


@named("Jacobs and Burkholz 2024, arXiv 2408.09966; Renda et al. 2020, arXiv 2003.02389")
@reads(_Rounds)
def pilot_lrr(options: _Rounds) -> Method:
    """PILoT with learning-rate rewinding: factors and decay go on, the learning rate starts anew each round.

    Example:
        >>> pilot_lrr(0.9).mask.rewind_to is None
        True

    Source: arXiv 2408.09966, section 5 (PILoT with iterative pruning); arXiv 2003.02389.

    Differs from the paper: as in :func:`pilot`; the rounds share one budget.
    """
    mask = options.part(Iterative, rewind_to=None)
    return Method(options.part(Hadamard), options.part(PILoTDecay), mask, "pilot_lrr")


@dataclass(frozen=True, kw_only=True)
class _Rewound(Rounds, Rewinding, Algorithm1, Factors, Layers):
    """The options of :func:`pilot_wr`."""


@named("Jacobs and Burkholz 2024, arXiv 2408.09966; Frankle et al. 2020, arXiv 1912.05671")
@reads(_Rewound)
def pilot_wr(options: _Rewound) -> Method:
    """PILoT with weight rewinding: the factors and the decay go back to an early step after each round.

    Example:
        >>> pilot_wr(0.9).mask.rewind_to
        0.1

    Source: arXiv 2408.09966, section 5 (PILoT with iterative pruning); arXiv 1912.05671.

    Differs from the paper: as in :func:`pilot`; the rounds share one budget.
    """
    return Method(options.part(Hadamard), options.part(PILoTDecay), options.part(Iterative), "pilot_wr")
