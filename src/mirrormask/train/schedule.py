"""The learning rate over a run: a warm-up, then cosine, linear, steps or constant; or one cycle."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mirrormask.train.recipe import Schedule

__all__ = ["factor", "make_scheduler"]

#: One cycle begins at the largest rate over this, and ends at that over this: torch's defaults.
CYCLE_START, CYCLE_END = 25.0, 1e4


def factor(step: int, *, schedule: Schedule, steps: int) -> float:
    """The fraction of the largest learning rate that step number ``step`` (from 0) of ``steps`` uses.

    During the warm-up of ``W = round(warmup · steps)`` steps it is ``(step + 1) / W``; after it, with
    ``t = (step - W) / (steps - W)``, it is ``½ (1 + cos πt)`` (cosine), ``1 - t`` (linear), 1 (constant), or ``factor``
    to the number of those of ``at`` that ``step / steps`` has reached (step). One cycle (Smith and Topin, arXiv
    1708.07120) rises by a cosine from 1/25 to 1 over W steps, and falls by one to 1/250,000.

    Example:
        >>> [round(factor(k, schedule=Schedule("linear", warmup=0.5), steps=4), 2) for k in range(4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    warmup = round(float(schedule.warmup or 0.0) * steps)
    if schedule.name == "one-cycle":
        return _cycle(step, warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "step":
        return float(schedule.factor ** sum(step >= at * steps for at in schedule.at))
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule.name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - progress if schedule.name == "linear" else 1.0


def _cycle(step: int, warmup: int, steps: int) -> float:
    low, lowest = 1 / CYCLE_START, 1 / CYCLE_START / CYCLE_END
    rising = step < warmup
    progress = step / warmup if rising else (step - warmup) / max(1, steps - 1 - warmup)
    start, end = (low, 1.0) if rising else (1.0, lowest)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def make_scheduler(optimizer: Optimizer, schedule: Schedule, steps: int) -> LambdaLR:
    """A torch scheduler that multiplies every group's rate by :func:`factor`; call its ``step`` once a step."""
    return LambdaLR(optimizer, partial(factor, schedule=schedule, steps=steps))
