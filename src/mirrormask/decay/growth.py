"""How far the weights have outgrown their start: what tells a random start from a trained one."""

from __future__ import annotations

from collections.abc import Sequence

from mirrormask.checks import check_number
from mirrormask.decay.base import Decay, DecayState
from mirrormask.progress import Clock

__all__ = ["DEAD", "GROWTH", "Growing", "check_growth", "share_grown", "watch"]

#: The default of a method that asks for it: in full where the large weights have grown by a factor of ``exp(0.5)``.
GROWTH = 0.5
#: The fraction of it below which nothing counts as grown.
DEAD = 0.5


def check_growth(growth: float | None) -> None:
    """Raise a ValueError unless ``growth`` is None or in (0, inf)."""
    if growth is not None:
        check_number("growth", growth, low=0.0, open_low=True, hint="None decays wherever training starts from")


def share_grown(growths: Sequence[float], counts: Sequence[int], growth: float) -> float:
    """``Σ n_l clip(g_l / growth, ½, 1) / Σ n_l``, moved to [0, 1]: 0 up to half of ``growth``, 1 from it on.

    Args:
        growths: ``g_l = log ‖x_l‖₄ - log ‖x_l at the start‖₄``, one number a weight tensor.
        counts: ``n_l``, the elements of each.
        growth: what counts as grown, in (0, inf).

    Returns:
        In [0, 1]. A tensor counts by its size, and for no more than that however much it has grown: a new head on a
        trained network, or a layer that starts at zero, does not make it look like a random start.

    Example:
        >>> share_grown([1.0, 0.0], [30, 10], growth=0.5)
        0.75
        >>> share_grown([0.375, -1.0], [10, 0], growth=0.5)
        0.5
    """
    shares = (min(max((g / growth - DEAD) / (1 - DEAD), 0.0), 1.0) for g in growths)
    return sum(n * share for n, share in zip(counts, shares, strict=True)) / max(sum(counts), 1)


def watch(state: DecayState, sizes: Sequence[float], counts: Sequence[int], growth: float) -> None:
    """Keep the sizes of the start in a controller's memory at the first call; afterwards put the share there."""
    if "size.0" not in state:
        state.update({f"size.{index}": size for index, size in enumerate(sizes)})
    growths = [size - state[f"size.{index}"] for index, size in enumerate(sizes)]
    state["grown"] = share_grown(growths, counts, growth)


class Growing(Decay):
    """A decay with a field ``growth``: what counts as grown, or None to look at no weights."""

    growth: float | None

    @property
    def watches(self) -> bool:  # type: ignore[override]
        """Whether it answers to the weights' growth."""
        return self.growth is not None

    def watch(self, state: DecayState, clock: Clock, sizes: Sequence[float], counts: Sequence[int]) -> None:
        """Remember the start, then the share that has grown."""
        if self.growth is not None:
            watch(state, sizes, counts, self.growth)
