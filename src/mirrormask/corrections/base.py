"""What every step after the optimizer's answers: what it does to a weight (or its latents), given their gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from mirrormask.progress import Clock

__all__ = ["Correction"]


class Correction(ABC):
    """A second update of θ, after the base optimizer's: a mirror step, a proximal step.

    A frozen configuration without memory; the optimizer calls it on the lists of tensors that share a learning rate.
    It acts on sparsifiable weights (or those of their latents that their geometry names), before masks are applied.
    """

    #: Whether it does to a part of a tensor what it does to the whole one. Of a class itself: one derived says so anew.
    shards: ClassVar[bool] = False

    def active(self, clock: Clock) -> bool:
        """Whether there is anything to do in the step that begins at ``clock``."""
        return True

    def prepare(self, grads: list[Tensor], lr: float) -> list[Tensor]:
        """What ``apply`` needs of the gradients, as new tensors: the base optimizer may overwrite gradients."""
        return []

    @abstractmethod
    def apply(self, theta: list[Tensor], prepared: list[Tensor], lr: float) -> None:
        """Update ``theta`` in place.

        Args:
            theta: after the base optimizer's step.
            prepared: what ``prepare`` returned; may be overwritten.
            lr: the learning rate of these tensors in this step.
        """
