"""What a tuner knows of a layer to be run: the choices that there are, and a plan of the layer alone to measure one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from mirrormask.runtime.kernels.activation import Chain
from mirrormask.runtime.schedule.plan import Plan

__all__ = ["Alone", "Choice", "Fused", "Problem"]


@dataclass(frozen=True)
class Choice:
    """How a layer runs.

    Attributes:
        kernel: ``aligned``, ``direct`` (sparse, unaligned loads), ``dense``, ``winograd`` (dense) or, for one vector,
            ``shared``, ``sell`` or ``panel`` (dense).
        rows, vectors: the tile.
        block: input planes per block (sparse), output channels per group (``dense``, ``winograd``), or slices per
            nonzero of a row in percent (``shared``).
    """

    kernel: str
    rows: int = 1
    vectors: int = 1
    block: int = 1


@dataclass(frozen=True)
class Fused:
    """What follows a layer and is computed as it stores: a tensor to add, activations, and the value's final name."""

    out: str
    residual: str = ""
    activation: Chain = ()


@dataclass(frozen=True)
class Alone:
    """A layer by itself.

    Attributes:
        plan: runs it.
        source: where the layer's input lies in the plan's memory.
        copying: seconds that the choice costs besides, since its input has to be copied.
    """

    plan: Plan
    source: slice
    copying: float = 0.0


class Problem(Protocol):
    """A layer to be run."""

    @property
    def key(self) -> str:
        """What the choice depends on, apart from the processor and where the nonzeros are."""

    def candidates(self) -> Iterator[Choice]:
        """The choices worth measuring, best guess first."""

    def direct(self, choice: Choice) -> Choice:
        """``choice`` if it computes every output from the inputs that its weights name alone; else one that does."""

    def trial(self, choice: Choice) -> Alone:
        """The layer alone, with this choice."""
