"""The options that several methods share, each with its default and its line of documentation."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.corrections import Hyperbolic
from mirrormask.decay import Decay, PILoTDecay
from mirrormask.geometry import Hadamard
from mirrormask.masks import Gradual, Iterative, Mask, OneShot
from mirrormask.methods.options import Options

__all__ = [
    "Algorithm1",
    "Allocation",
    "At",
    "Coupling",
    "Factors",
    "HyperbolicStep",
    "Layers",
    "Pattern",
    "Rewinding",
    "Rounds",
    "Score",
    "Seed",
    "Window",
]


@dataclass(frozen=True, kw_only=True)
class Score(Options):
    """Which weights matter.

    Args:
        score: how weights are ranked, as in :class:`mirrormask.masks.Mask`.
    """

    score: str = Mask.score


@dataclass(frozen=True, kw_only=True)
class Allocation(Options):
    """How many a layer keeps.

    Args:
        allocation: how the sparsity is shared over layers, as in :class:`mirrormask.masks.Mask`.
        floor: the share of its ERK count that ``allocation="global"`` leaves of every layer, as in
            :class:`mirrormask.masks.Mask`.
    """

    allocation: str = Mask.allocation
    floor: float = Mask.floor


@dataclass(frozen=True, kw_only=True)
class Pattern(Options):
    """Where zeros may lie.

    Args:
        pattern: ``"N:M"`` or None, as in :class:`mirrormask.masks.Mask`.
    """

    pattern: str | None = Mask.pattern


@dataclass(frozen=True, kw_only=True)
class Layers(Allocation, Pattern):
    """How zeros are shared out: over layers, and within them."""


@dataclass(frozen=True, kw_only=True)
class Seed(Options):
    """What is drawn at random.

    Args:
        seed: of the draw of a mask or of factors, and of random growth; at least 0.
    """

    seed: int = Mask.seed


@dataclass(frozen=True, kw_only=True)
class At(Layers):
    """One pruning; the mask :class:`mirrormask.masks.OneShot`.

    Args:
        at: when to prune and to fix the mask, a fraction of training in (0, 1]; 1.0 for a single threshold at the end.
    """

    at: float = OneShot.at


@dataclass(frozen=True, kw_only=True)
class Window(Options):
    """The cubic course of sparsity; the mask :class:`mirrormask.masks.Gradual`.

    Args:
        start_at, end_at, every: t₀, t₁ and Δt of the cubic course, as in :class:`mirrormask.masks.Gradual`.
    """

    start_at: float = Gradual.start_at
    end_at: float = Gradual.end_at
    every: float = Gradual.every


@dataclass(frozen=True, kw_only=True)
class Rounds(Layers):
    """Training in rounds; the mask :class:`mirrormask.masks.Iterative`.

    Args:
        prunings: how often it is pruned, at least 1; each removes the same fraction of what is left.
    """

    prunings: int = Iterative.prunings


@dataclass(frozen=True, kw_only=True)
class Rewinding(Options):
    """Rounds that go back to an early step.

    Args:
        rewind_to: the fraction of the first round to whose weights and learning rate later rounds go back, in [0, 1).
    """

    rewind_to: float = 0.1


@dataclass(frozen=True, kw_only=True)
class Factors(Options):
    """``x = m ⊙ w``; the geometry :class:`mirrormask.geometry.Hadamard`.

    Args:
        beta, gain: as in :class:`mirrormask.geometry.Hadamard`.
    """

    beta: float | str = Hadamard.beta
    gain: float | str | None = Hadamard.gain


@dataclass(frozen=True, kw_only=True)
class Coupling(Options):
    """Where the decay acts.

    Args:
        coupled: add the decay to the gradient, as the paper does.
    """

    coupled: bool = Decay.coupled


@dataclass(frozen=True, kw_only=True)
class Algorithm1(Options):
    """PILoT's dynamic decay; :class:`mirrormask.decay.PILoTDecay`.

    Args:
        alpha_init, delta, K, half, relative: as in :class:`mirrormask.decay.PILoTDecay`; ``half`` counts over all
            rounds together, where there are any.
    """

    alpha_init: float = 5e-3
    delta: float = PILoTDecay.delta
    K: float = PILoTDecay.K
    half: float = PILoTDecay.half
    relative: bool = PILoTDecay.relative


@dataclass(frozen=True, kw_only=True)
class HyperbolicStep(Options):
    """HAM's step after the optimizer's; the correction :class:`mirrormask.corrections.Hyperbolic`.

    Args:
        a, b, clip: as in :class:`mirrormask.corrections.Hyperbolic`; ``a=200, clip=5.0`` is that of the published
            code, which needs small gradients or a small learning rate.
    """

    a: float = Hyperbolic.a
    b: float = Hyperbolic.b
    clip: float | None = Hyperbolic.clip
