"""The decay of a training: its controller's memory, its integrals, what it does in this step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mirrormask.decay import Decay, DecayState
from mirrormask.progress import Clock

__all__ = ["DecayClock"]


@dataclass
class DecayClock:
    """How far the decay has come, one number a parameter group.

    Attributes:
        decay: the method's.
        state: the memory of its controller.
        integrals: ``A = ∫ α`` so far, of each group.
        increments: ``ΔA`` of the last step, of each group.
    """

    decay: Decay
    state: DecayState = field(default_factory=dict)
    integrals: list[float] = field(default_factory=list)
    increments: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, decay: Decay, groups: int) -> DecayClock:
        """Before the first step."""
        return cls(decay, decay.start(), [0.0] * groups, [0.0] * groups)

    def add_group(self) -> None:
        """One more group."""
        self.integrals.append(0.0)
        self.increments.append(0.0)

    def ahead(self, clock: Clock, lrs: Sequence[float], *, finalized: bool) -> tuple[float, ...]:
        """``ΔA`` of each group in the step that begins at ``clock``; nothing changes until :meth:`take`."""
        return tuple(
            0.0
            if finalized or (self.decay.coupled and lr == 0)
            else self.decay.increment(self.state, clock, lr, integral)
            for lr, integral in zip(lrs, self.integrals, strict=True)
        )

    def take(self, increments: Sequence[float]) -> None:
        """That step is taken."""
        self.increments = list(increments)
        self.integrals = [total + step for total, step in zip(self.integrals, increments, strict=True)]
