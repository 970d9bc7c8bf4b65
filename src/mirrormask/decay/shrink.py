"""A decay given by what it does in total: how far the scale a shrinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mirrormask.checks import check_number
from mirrormask.decay.base import DecayState
from mirrormask.decay.growth import Growing, check_growth
from mirrormask.progress import Clock, check_window

__all__ = ["ShrinkDecay"]


@dataclass(frozen=True)
class ShrinkDecay(Growing):
    """A total shrink ``4 A_T``, spread evenly over a window of training: ``a_T = a₀ exp(-shrink)``.

    Neither the learning rate nor the number of steps (but for ``limit``) changes where ``a`` ends, which is what the
    implicit bias depends on; afterwards the decay is zero, and its effect stays.

    With ``growth`` it answers to what it sees. The decay is there to take back what gradients add: from random weights
    they make the large ones several times larger within the first few per cent of training, and the whole shrink is
    spent. From trained weights there is next to nothing to take back, and a decay pulls the network apart. So the
    decay of a step is multiplied by the share of the network whose ``log ‖x‖₄`` is above that of the start by
    ``growth``; it is zero where no tensor is above by half of that, however long and at whatever learning rate, since
    that is measured in what the base optimizer does to the weights. What a delay leaves is spread over the rest of the
    window, at no more than twice the even pace.

    Args:
        shrink: ``4 A_T``, in [0, inf).
        start_at: the fraction of training at which the decay begins, in [0, 1).
        end_at: the fraction at which it ends, in (start_at, 1].
        limit: the most that one step may lower ``log a`` by, in (0, inf): in a training of few steps the weights could
            not hold their own against the whole shrink, and ``a`` ends higher. ``None`` for no limit.
        coupled: as in :class:`Decay`.

        growth: what counts as grown, in (0, inf); ``None`` to decay wherever training starts from.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> decay = ShrinkDecay(shrink=4.0, start_at=0.0, end_at=0.5)
        >>> total = sum(decay.increment({}, Clock(step, 100), lr=0.1, integral=0.0) for step in range(100))
        >>> round(4 * total, 12)
        4.0

    Source: the theory of arXiv 2408.09966 (a_t depends on the integral of α alone); the schedule is this library's.
    """

    shrink: float = 4.0
    start_at: float = 0.05
    end_at: float = 0.75
    limit: float | None = None
    growth: float | None = None

    observes: ClassVar[float] = 1 / 100
    reads_rho: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("shrink", self.shrink, low=0.0)
        check_window(self.start_at, self.end_at, what="decay")
        if self.limit is not None:
            check_number("limit", self.limit, low=0.0, open_low=True)
        check_growth(self.growth)

    def increment(self, state: DecayState, clock: Clock, lr: float, integral: float) -> float:
        """``shrink / 4`` over the number of steps in the window, and at most ``limit / 4``, inside it; 0 outside.

        With ``growth``: what is left of ``shrink / 4`` over the steps that are left, at most twice that and ``limit``,
        times the share that has grown.
        """
        first = clock.at(self.start_at)
        last = max(clock.at(self.end_at), first + 1)
        if not first <= clock.step < last:
            return 0.0
        fall = even = self.shrink / (last - first)
        if self.growth is not None:
            fall = min(max(self.shrink - 4 * integral, 0.0) / (last - clock.step), 2 * even)
        fall = fall if self.limit is None else min(fall, self.limit)
        return fall * (1.0 if self.growth is None else state.get("grown", 0.0)) / 4

    @property
    def off(self) -> bool:
        """True for shrink = 0."""
        return self.shrink == 0.0
