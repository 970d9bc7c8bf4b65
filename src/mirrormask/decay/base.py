"""What every decay answers: how much the integral A = ∫ α grows in one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from mirrormask.progress import Clock

__all__ = ["Decay", "DecayState"]

#: The memory of a controller between steps: plain numbers, saved in the optimizer's state dict.
DecayState = dict[str, float]


@dataclass(frozen=True)
class Decay(ABC):
    """How strongly the implicit bias pulls, as a function of training progress.

    Decoupled (the default): ``θ ← θ (1 - 2 ΔA)`` beside the base optimizer's step, with ``ΔA = lr α``, so that
    ``m² - w²`` falls as ``exp(-4A)`` under every optimizer. Coupled: ``2 α θ`` is added to the gradient of θ: the
    paper's literal objective ``f(m ⊙ w) + α (‖m‖² + ‖w‖²)``.

    Args:
        coupled: add the decay to the gradient instead of multiplying the latents.
    """

    coupled: bool = field(default=False, kw_only=True)

    #: How often, as a fraction of training, the decay wants to observe the weights; 0 for never.
    observes: ClassVar[float] = 0.0
    #: Whether it wants the sizes of the weights as well: before the first step, and as often as it observes.
    watches: ClassVar[bool] = False
    #: Whether ``observe`` reads rho, for which the next mask has to be chosen.
    reads_rho: ClassVar[bool] = True
    #: Whether ``epoch_end`` has a use for the training accuracy.
    reads_score: ClassVar[bool] = False

    def start(self) -> DecayState:
        """The controller's memory before the first step."""
        return {}

    @abstractmethod
    def increment(self, state: DecayState, clock: Clock, lr: float, integral: float) -> float:
        """``ΔA = ∫ α`` over the step that begins at ``clock``, at the group's learning rate ``lr``; >= 0.

        ``integral`` is A so far.
        """

    def epoch_end(self, state: DecayState, clock: Clock, *, score: float, l1_norm: float) -> None:
        """Read a score once an epoch; most decays have no use for one."""
        return

    def observe(self, state: DecayState, clock: Clock, *, rho: float) -> None:
        """Read ``rho = ‖weights that the mask will remove‖ / ‖weights‖`` (L2 norms), in [0, 1]."""
        return

    def watch(self, state: DecayState, clock: Clock, sizes: Sequence[float], counts: Sequence[int]) -> None:
        """Read how large the weights are: ``log (mean x⁴)^¼`` of each tensor, and how many elements it has."""
        return

    @property
    def off(self) -> bool:
        """True if this decay never does anything, so that its work can be left out."""
        return False
