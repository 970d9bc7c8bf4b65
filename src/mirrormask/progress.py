"""Where training stands, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.checks import check_number

__all__ = ["Clock", "check_window"]


@dataclass(frozen=True)
class Clock:
    """``step`` of ``steps``: the steps taken so far, in [0, steps] and beyond where training goes on."""

    step: int
    steps: int

    @property
    def next(self) -> Clock:
        """One step later."""
        return Clock(self.step + 1, self.steps)

    @property
    def progress(self) -> float:
        """The fraction of training that is over; above 1 where training goes on after its steps."""
        return self.step / self.steps

    def at(self, fraction: float) -> int:
        """The step at which ``fraction`` of training is over, rounded to the nearest."""
        return round(fraction * self.steps)


def check_window(start: float, end: float, *, what: str) -> None:
    """Refuse a window of training that is not ``0 <= start < end <= 1``."""
    check_number(f"{what} start", start, low=0.0, high=1.0, hint="fractions of training")
    check_number(f"{what} end", end, low=0.0, high=1.0, hint="fractions of training")
    if start >= end:
        raise ValueError(f"{what} start={start!r} is not before end={end!r}; both are fractions of training in [0, 1]")
