"""What every step after the optimizer's answers: what it does to a weight (or its latents), given their gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mirrormask.progress import Clock

__all__ = ["Correction"]


class Correction(ABC):
    """A second update of θ, after the base optimizer's: a mirror step, a proximal step. Or another gradient before it.

    A frozen configuration without memory; the optimizer calls it on the lists of tensors that share a learning rate.
    It acts on sparsifiable weights (or those of their latents that their geometry names), before masks are applied.
    """

    #: Whether ``gradients`` changes any; one that does not leaves the steps of the base as they are.
    rescales: ClassVar[bool] = False
    #: Whether it must know which dimension of a weight its outputs are: then it has to be the first.
    by_output: ClassVar[bool] = False
    #: Whether it does to a part of a tensor what it does to the whole one. Of a class itself: one derived says so anew.
    shards: ClassVar[bool] = False

    def active(self, clock: Clock) -> bool:
        """Whether there is anything to do in the step that begins at ``clock``."""
        return True

    def gradients(self, grads: Sequence[Tensor], x: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradients of the weights with which the step is taken; growth by gradient reads those that were given.

        Args:
            grads: of the weights, which stay as they are.
            x: the weights.
            masks: of each, True where it lives; None before there is one.

        Returns:
            New tensors, or those that were given.
        """
        return list(grads)

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
