"""A decay that finds its own strength: by the end, pruning to the target costs almost nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from mirrormask.checks import check_number
from mirrormask.decay.base import DecayState
from mirrormask.decay.growth import GROWTH, Growing, check_growth
from mirrormask.progress import Clock, check_window

__all__ = ["TargetDecay"]


@dataclass(frozen=True)
class TargetDecay(Growing):
    """Steers ``rho = ‖weights that the next mask removes‖ / ‖weights‖`` log-linearly down to ``rho_end``.

    The desired course is ``log rho*(t)``, a straight line from the first rho seen to ``rho_end`` at ``end_at``. The
    strength answers to the distance from it: ``rate = base · exp(k log(rho / rho*))``, within ``[0, 4 base]``, where
    ``base`` spreads ``shrink`` over the window; and the sum is capped at ``cap``, because decay alone cannot bring
    every network to every sparsity: beyond the cap it would only starve whole layers.

    Rho alone is no guide: in a short training, or from trained weights, it says "pull harder" for as long as it takes
    to destroy the network. Hence two bounds that hold whatever rho says: one step lowers ``log a`` by at most
    ``limit``, and the decay is multiplied by the share of the network that has outgrown its start, as in
    :class:`mirrormask.decay.ShrinkDecay`: it takes back what gradients have added, and no more.

    Args:
        rho_end: the share of the weights' L2 norm that the mask may cost at the end, in (0, 1).
        shrink: the total ``4A`` that the controller would spend if rho followed its course, in (0, inf).
        cap: the most it may spend, in [shrink, inf).
        response: k, the exponent of the answer, in (0, inf).
        start_at, end_at: the window of training, fractions in [0, 1].
        limit: the most that one step may lower ``log a`` by, in (0, inf); ``None`` for no limit.
        growth: as in :class:`mirrormask.decay.ShrinkDecay`.
        coupled: as in :class:`Decay`.

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> decay, state = TargetDecay(growth=None), TargetDecay().start()
        >>> decay.observe(state, Clock(100, 1000), rho=0.8)
        >>> decay.observe(state, Clock(300, 1000), rho=0.9)       # behind its course: pull harder
        >>> state["rate"] > 1.0
        True
    """

    rho_end: float = 0.03
    shrink: float = 4.0
    cap: float = 8.0
    response: float = 1.0
    start_at: float = 0.05
    end_at: float = 0.75
    limit: float | None = field(default=0.004, metadata={"before": None})
    growth: float | None = field(default=GROWTH, metadata={"before": None})

    observes: ClassVar[float] = 1 / 100

    def __post_init__(self) -> None:
        check_number("rho_end", self.rho_end, low=0.0, high=1.0, open_low=True, open_high=True)
        check_number("shrink", self.shrink, low=0.0, open_low=True)
        check_number("cap", self.cap, low=self.shrink)
        check_number("response", self.response, low=0.0, open_low=True)
        check_window(self.start_at, self.end_at, what="decay")
        if self.limit is not None:
            check_number("limit", self.limit, low=0.0, open_low=True)
        check_growth(self.growth)

    def start(self) -> DecayState:
        """``rate`` is the strength in units of the even spread."""
        return {"rate": 1.0}

    def increment(self, state: DecayState, clock: Clock, lr: float, integral: float) -> float:
        """The even spread's increment times ``rate`` and the share that has grown, until ``4A`` reaches ``cap``."""
        first = clock.at(self.start_at)
        last = max(clock.at(self.end_at), first + 1)
        if not first <= clock.step < last:
            return 0.0
        step = min(self.shrink * state["rate"] / (last - first), self.cap - 4 * integral)
        step = step if self.limit is None else min(step, self.limit)
        return max(step, 0.0) * (1.0 if self.growth is None else state.get("grown", 0.0)) / 4

    def observe(self, state: DecayState, clock: Clock, *, rho: float) -> None:
        """Compare rho with its course and answer."""
        if clock.progress < self.start_at:
            return
        rho = max(rho, 1e-12)
        first = state.setdefault("first_rho", max(rho, self.rho_end))
        begun = state.setdefault("begun", clock.progress)
        done = min(max((clock.progress - begun) / max(self.end_at - begun, 1e-12), 0.0), 1.0)
        course = (1 - done) * math.log(first) + done * math.log(self.rho_end)
        state["rate"] = min(math.exp(self.response * (math.log(rho) - course)), 4.0)
