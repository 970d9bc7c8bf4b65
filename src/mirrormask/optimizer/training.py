"""What evolves in a training beside weights, latents and the base optimizer's state: one record."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mirrormask.optimizer.decay_clock import DecayClock
from mirrormask.optimizer.rounds import Rounds
from mirrormask.progress import Clock

__all__ = ["Training"]


@dataclass
class Training:
    """How far a training has come.

    Attributes:
        steps: how many there will be.
        decay: the decay's clock.
        rounds: what a mask that trains in rounds remembers; None for one that does not.
        step: how many were taken.
        skipped: how many were not, since a gradient was not finite.
        skipped_in_a_row: how many of those since the last step that was taken.
        idle_in_a_row: how many there were since the last one in which some weight had a gradient.
        on_device: such steps on an accelerator, where they are counted without waiting for it.
        finalized: whether the mask is final.
    """

    steps: int
    decay: DecayClock
    rounds: Rounds | None = None
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    idle_in_a_row: int = 0
    on_device: Tensor | None = None
    finalized: bool = False

    @property
    def clock(self) -> Clock:
        """Where training stands."""
        return Clock(self.step, self.steps)

    def count_on_device(self, good: Tensor) -> None:
        """One more step whose gradients became zeros there, if ``good`` is False."""
        bad = (~good).long()
        self.on_device = bad if self.on_device is None else self.on_device + bad

    def settle_count(self) -> int:
        """The steps that were skipped, those on an accelerator included, for which this waits."""
        if self.on_device is not None:
            self.skipped += int(self.on_device)
            self.on_device = None
        return self.skipped
