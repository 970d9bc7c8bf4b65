"""How often a checkpoint is due: after some time, after some steps, or at the end of an epoch only."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

__all__ = ["Interval", "Timer", "parse"]

#: Seconds, or steps.
UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
FORMS = "write 30s, 10min, 2h, 500steps, or epoch for the end of each epoch only"


@dataclass(frozen=True)
class Interval:
    """So many ``seconds`` or ``steps``; neither is None only where the other is not, both are where it is epochs."""

    seconds: float | None = None
    steps: int | None = None


def parse(text: str) -> Interval:
    """An interval from what a recipe says.

    Raises:
        TypeError, ValueError: it is none.

    Example:
        >>> parse("10min"), parse("500 steps"), parse("epoch")
        (Interval(seconds=600.0, steps=None), Interval(seconds=None, steps=500), Interval(seconds=None, steps=None))
    """
    if not isinstance(text, str):
        raise TypeError(f"checkpoint_every={text!r} is a {type(text).__name__}; {FORMS}")
    if text.strip() == "epoch":
        return Interval()
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*(steps?|s|sec|min|h)\s*", text)
    if match is None:
        raise ValueError(f"checkpoint_every={text[:40]!r} is no interval; {FORMS}")
    number, unit = float(match[1]), match[2]
    if unit.startswith("step"):
        if number < 1 or number != int(number):
            raise ValueError(f"checkpoint_every={text!r} is not a whole number of steps of at least 1; {FORMS}")
        return Interval(steps=int(number))
    if number <= 0:
        raise ValueError(f"checkpoint_every={text!r} is not above 0; {FORMS}")
    return Interval(seconds=number * UNITS[unit])


class Timer:
    """Says when a checkpoint is due.

    Args:
        interval: between two of them.
    """

    def __init__(self, interval: Interval) -> None:
        self.interval = interval
        self.restart()

    def restart(self) -> None:
        """A checkpoint was written."""
        self.last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether one is due after this step."""
        if self.interval.steps is not None:
            return step % self.interval.steps == 0
        return self.interval.seconds is not None and time.monotonic() - self.last >= self.interval.seconds
