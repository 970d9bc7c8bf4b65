"""What every mask schedule answers: how sparse the network shall be after this step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mirrormask.checks import check_int, check_number, check_sparsity
from mirrormask.masks.allocations import FLOOR, allocate, check_allocation, keep_count
from mirrormask.masks.patterns import check_pattern, check_pattern_fits
from mirrormask.masks.scores import check_score
from mirrormask.progress import Clock

__all__ = ["Mask"]


@dataclass(frozen=True)
class Mask(ABC):
    """Which weights live: a schedule of sparsity, a score and an allocation.

    Args:
        sparsity: the fraction of zeros that ``finalize()`` leaves, in [0, 1).
        score: how weights are ranked, a name in ``SCORES``.
        allocation: how the sparsity is shared over layers: ``"global"``, ``"uniform"`` or ``"erk"``.
        pattern: ``"N:M"`` to end with N living weights in every M along the input dimension; then sparsity must be
            ``1 - N/M``.
        floor: what every layer keeps in any case under ``"global"``, as a share of its ERK count and at least one
            weight, in [0, 1]; 0 to leave it to the scores alone. The other allocations, and patterns, empty no layer
            that they need not.
        seed: of the score ``"random"`` and of random growth; nothing else reads it.

    Raises:
        ValueError: a field is outside its range or unknown, or the pattern does not fit sparsity or allocation.
    """

    sparsity: float = 0.0
    score: str = field(default="magnitude", kw_only=True)
    allocation: str = field(default="global", kw_only=True)
    pattern: str | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    floor: float = field(default=FLOOR, kw_only=True)

    #: Whether a weight that is dead may live again.
    revives: ClassVar[bool] = False
    #: Whether ``regrow_at`` is ever above 0.
    regrows: ClassVar[bool] = False
    #: Whether training comes in rounds, with the learning rates of the first one again in each.
    replays: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        check_score(self.score)
        check_allocation(self.allocation)
        check_int("seed", self.seed, low=0)
        check_number("floor", self.floor, low=0.0, high=1.0, hint="a share of a layer's ERK count")
        if self.pattern is not None:
            n, m = check_pattern(self.pattern)
            if abs(self.sparsity - (1 - n / m)) > 1e-9:
                raise ValueError(
                    f"sparsity={self.sparsity!r} does not fit pattern={self.pattern!r}, which leaves {n} of {m}: "
                    f"use sparsity={1 - n / m!r}"
                )
            if self.allocation == "erk":
                raise ValueError(f"allocation='erk' does not fit pattern={self.pattern!r}: every layer has the same")

    def check_weights(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Refuse weights that this mask cannot prune; returns the names of those that it will surely empty.

        Raises:
            ValueError: nothing at all would be left, or the pattern does not divide a weight.
        """
        if self.pattern is not None:
            check_pattern_fits(self.pattern, shapes)
        total = sum(math.prod(shape) for shape in shapes.values())
        if keep_count(total, self.sparsity) == 0:
            raise ValueError(
                f"sparsity={self.sparsity!r} leaves none of {total} weights; the highest possible is {1 - 1 / total:g}"
            )
        counts = allocate(self.allocation, list(shapes.values()), self.sparsity)
        return [] if counts is None else [name for name, count in zip(shapes, counts, strict=True) if count == 0]

    @abstractmethod
    def sparsity_at(self, clock: Clock) -> float | None:
        """The sparsity to prune to once the step that ends at ``clock`` is done; None to leave the mask alone."""

    def sparsity_ahead(self, clock: Clock) -> float:
        """The sparsity of the next change of the mask: what a controller of the decay prepares for."""
        return self.sparsity

    def regrow_at(self, clock: Clock) -> float:
        """The fraction of living weights to exchange after the step that ends at ``clock``; 0 for none."""
        return 0.0

    def round_steps(self, steps: int) -> int:
        """How many steps a learning-rate schedule shall have: those of the first round; all, without rounds."""
        return steps

    def keep_at(self, steps: int) -> int | None:
        """The step after which to keep the weights that later rounds start from; None for never."""
        return None

    def position(self, clock: Clock) -> int:
        """The step of the learning-rate schedule that belongs to the step that begins at ``clock``."""
        return clock.step
